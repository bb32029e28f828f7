"""Events on their way to those who follow (`interceptor events`): bounded, told once where they repeat. No system call.

Nobody who publishes waits: a follower that does not keep up loses events, and is told how many.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Callable, Hashable
from dataclasses import dataclass

#: Events that wait for one follower.
WAITING_MAX = 1024
#: Kinds of repeated events that are remembered.
KEYS_MAX = 4096
#: Seconds until a repeated event is told again: at first, and at most.
REPEATED_S, REPEATED_MAX_S = 1.0, 10.0

Event = dict[str, object]


class Follower:
    """One who follows. Iterating gives events, without end."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._arrived = asyncio.Event()
        self._dropped = 0

    def put(self, event: Event) -> None:
        """Never waits."""
        if len(self._events) >= WAITING_MAX:
            self._dropped += 1
        else:
            self._events.append(event)
            self._arrived.set()

    async def events(self) -> AsyncGenerator[Event, None]:
        """What was put, in order; after a gap an event that counts what is missing."""
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while self._events:
                yield self._events.popleft()
            if self._dropped:
                dropped, self._dropped = self._dropped, 0
                yield {"event": "dropped", "count": dropped}


class Feed:
    """All who follow."""

    def __init__(self, changed: Callable[[bool], None]) -> None:
        """``changed`` is told when the first one comes (True) and when the last one goes (False)."""
        self._followers: set[Follower] = set()
        self._changed = changed

    def __len__(self) -> int:
        return len(self._followers)

    def publish(self, event: Event) -> None:
        """Gives an event to everybody; costs nothing while nobody follows."""
        for follower in self._followers:
            follower.put(event)

    async def follow(self) -> AsyncGenerator[Event, None]:
        """Events from now on, until the iteration is closed."""
        follower = Follower()
        self._followers.add(follower)
        if len(self._followers) == 1:
            self._changed(True)
        try:
            async for event in follower.events():
                yield event
        finally:
            self._followers.discard(follower)
            if not self._followers:
                self._changed(False)


@dataclass
class _Told:
    at: float
    pause: float
    count: int
    latest: Event


class Repetitions:
    """Tells what repeats at once, and from then on now and then, with how often it was."""

    def __init__(self) -> None:
        self._told: OrderedDict[Hashable, _Told] = OrderedDict()

    def add(self, key: Hashable, event: Event, count: int, now: float) -> Event | None:
        """The event to tell now, if any: with ``count``, what was held back included."""
        told = self._told.get(key)
        if told is None:
            self._told[key] = _Told(now, REPEATED_S, 0, event)
            if len(self._told) > KEYS_MAX:
                self._told.popitem(last=False)
            return {**event, "count": count}
        told.count += count
        told.latest = event
        self._told.move_to_end(key)
        return None

    def due(self, now: float) -> list[Event]:
        """What has been held back long enough."""
        found = []
        for key, told in list(self._told.items()):
            if now - told.at < told.pause:
                continue
            if told.count:
                found.append({**told.latest, "count": told.count})
                told.at, told.count = now, 0
                told.pause = min(told.pause * 2, REPEATED_MAX_S)
            elif now - told.at >= told.pause + REPEATED_S:
                del self._told[key]  # it has ended: the next one is news again
        return found
