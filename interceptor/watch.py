"""What operators see of calls: counters of all journals, and what guards note while somebody follows.

Journals are read when somebody asks; between that, and while nobody follows, nothing here runs.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass

from interceptor.containers.registry import Container
from interceptor.guards.journal import Seen
from interceptor.guards.link import Repeated
from interceptor.guards.supervise import Supervisor
from interceptor.observe.feed import Event, Feed, Repetitions
from interceptor.observe.latency import Reading
from interceptor.observe.log import get_logger
from interceptor.observe.units import unit_of

#: How often guards' notes are read while somebody follows.
LOOK_S = 0.25
#: Containers in one answer to ``readings``: what fits into a message, in a few milliseconds.
PAGE = 64


@dataclass
class Counters:
    """What the daemon itself counts, since it was started."""

    registrations: int = 0
    guard_deaths: int = 0
    storms: int = 0


class _Notes:
    """What was read last of one guard's notes."""

    def __init__(self) -> None:
        self.noted = 0
        self.told = 0
        """Of these, those that events have told of, or that were missed."""
        self.rows: dict[int, tuple[int, int]] = {}

    def fresh(self, rows: Mapping[int, Seen]) -> list[tuple[Seen, int]]:
        """Rows with calls that are new, and how many."""
        found = []
        for number, row in sorted(rows.items(), key=lambda item: item[1].version):
            version, count = self.rows.get(number, (0, 0))
            new = row.count - count if version == row.version else row.count
            self.rows[number] = (row.version, row.count)
            if new > 0:
                found.append((row, new))
        return found


class Watch:
    """Over all containers of this daemon."""

    def __init__(self, supervisors: Mapping[str, Supervisor]) -> None:
        self.counters = Counters()
        self.feed = Feed(self._followed)
        self.ended: Callable[[str, Reading], None] | None = None
        """Told what a container had counted when it is let go."""
        self._supervisors = supervisors
        self._notes: dict[str, _Notes] = {}
        self._repetitions = Repetitions()
        self._timer: asyncio.TimerHandle | None = None
        self._log = get_logger()

    # ---- what happens to containers ---------------------------------------------------------------------------

    def registered(self, cid: str) -> None:
        """A container is set up."""
        self.counters.registrations += 1
        self.feed.publish({"event": "container", "container": cid, "what": "registered"})

    def started(self, supervisor: Supervisor) -> None:
        """There is one more to look after."""
        supervisor.follow(len(self.feed) > 0)

    def gone(self, cid: str, supervisor: Supervisor, reason: str) -> None:
        """It is let go; its journal can still be read."""
        if len(self.feed):
            self._read(cid, supervisor)
        self._notes.pop(cid, None)
        self.counters.guard_deaths += supervisor.deaths
        if self.ended is not None:
            self.ended(cid, supervisor.journal.reading())
        self.feed.publish({"event": "container", "container": cid, "what": "gone", "reason": reason})

    def repeated(self, container: Container, call: Repeated) -> None:
        """Its guard says that a call is repeated without effect."""
        unit = unit_of(call.tid)
        found = container.baseline.mounts.get(call.mnt_id)
        path = os.fsdecode(found.point) if found is not None else None
        about = {
            "container": container.cid,
            "op": call.op.name.lower(),
            "mount": call.mnt_id,
            "path": path,
            "calls": call.calls,
            "tid": call.tid,
            "unit": unit,
            "hint": f"it came with the container and stays: see why {unit} unmounts it, and have that end",
        }
        self._log.warning("a call is repeated without effect", **about)
        self.counters.storms += 1
        self.feed.publish({"event": "repeated", **about})

    # ---- counters ---------------------------------------------------------------------------------------------

    def page(self, after: str) -> dict[str, object]:
        """Counters of the containers that come after one in the order of their names, at most `PAGE`."""
        names = sorted(cid for cid in self._supervisors if cid > after)
        return {
            "containers": [
                {"id": cid, **_as_json(self._supervisors[cid].journal.reading())} for cid in names[:PAGE]
            ],
            "more": len(names) > PAGE,
        }

    async def readings(self) -> dict[str, Reading]:
        """All journals, in slices: others have their turn in between. What has ended meanwhile is left out."""
        found: dict[str, tuple[Supervisor, Reading]] = {}
        for number, (cid, supervisor) in enumerate(list(self._supervisors.items())):
            if self._supervisors.get(cid) is supervisor:
                found[cid] = (supervisor, supervisor.journal.reading())
            if number % PAGE == PAGE - 1:
                await asyncio.sleep(0)  # sleep: no time passes, others have their turn
        return {cid: reading for cid, (s, reading) in found.items() if self._supervisors.get(cid) is s}

    def guard_deaths(self) -> int:
        """How many guards have died, those of containers that are gone included."""
        return self.counters.guard_deaths + sum(s.deaths for s in self._supervisors.values())

    def guards(self) -> int:
        """How many guards are at work."""
        return sum(1 for supervisor in self._supervisors.values() if supervisor.link is not None)

    # ---- following --------------------------------------------------------------------------------------------

    def follow(self) -> AsyncGenerator[Event, None]:
        """Events from now on."""
        return self.feed.follow()

    def _followed(self, by_somebody: bool) -> None:
        for supervisor in self._supervisors.values():
            supervisor.follow(by_somebody)
        if by_somebody:
            # What was noted for an earlier follower is not news.
            for cid, supervisor in self._supervisors.items():
                self._notes[cid] = notes = _Notes()
                notes.noted = notes.told = supervisor.journal.noted()
                notes.fresh(supervisor.journal.seen())
            self._timer = asyncio.get_running_loop().call_later(LOOK_S, self._look)
        elif self._timer is not None:
            self._timer.cancel()
            self._notes.clear()
            self._repetitions = Repetitions()

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        for cid, supervisor in self._supervisors.items():
            self._read(cid, supervisor)
        for event in self._repetitions.due(loop.time()):
            self.feed.publish(event)
        self._timer = loop.call_later(LOOK_S, self._look)

    def _read(self, cid: str, supervisor: Supervisor) -> None:
        """What one guard has noted since the last look."""
        notes = self._notes.setdefault(cid, _Notes())
        noted = supervisor.journal.noted()
        if noted == notes.noted:
            return
        notes.noted = noted
        now = asyncio.get_running_loop().time()
        for row, count in notes.fresh(supervisor.journal.seen()):
            notes.told += count
            event: Event = {
                "event": "call",
                "container": cid,
                "operation": row.operation,
                "verdict": row.verdict,
                "errno": row.error,
                "path": os.fsdecode(row.path),
                "unit": row.unit,
                "comm": row.comm,
                "tid": row.tid,
                "reason": row.reason,
            }
            key = (cid, row.operation, row.verdict, row.error, row.path, row.unit)
            if said := self._repetitions.add(key, event, count, now):
                self.feed.publish(said)
        # Rows are read after the number, so more may have been told.
        missed = noted - notes.told
        if missed > 0:
            # More different calls at once than a guard has rows for.
            notes.told = noted
            self.feed.publish({"event": "missed", "container": cid, "count": missed})


def _as_json(reading: Reading) -> dict[str, object]:
    """Calls as ``[operation, verdict, sum of nanoseconds, [[bucket, count] …]]``: what is zero is left out."""
    return {
        "calls": [
            [
                *(operation, verdict, histogram.sum_ns),
                [[i, count] for i, count in enumerate(histogram.buckets) if count],
            ]
            for (operation, verdict), histogram in reading.calls.items()
        ],
        "asked": reading.asked,
        "cached": reading.cached,
        "missed": reading.missed,
        "waiting": reading.waiting,
    }
