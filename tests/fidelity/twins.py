"""Identical containers: one trapped, one welded only, one as the kernel alone would have it; and what differs."""

from __future__ import annotations

import os
import pickle
import socket
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType

from interceptor.library import GuardedChild, Interceptor, Mount
from interceptor.spawn.create import spawn
from tests.fidelity.calls import Call
from tests.fidelity.stage import CONTEXTS, Stage

Script = tuple[Call, ...]

#: What each call of a script answered, and the mounts thereafter; None: as before.
Outcome = tuple[tuple[str, ...], tuple[str, ...] | None]

#: Seconds for one script; a hundred of them are sent at once.
PATIENCE = 300.0

_FUSE = os.makedev(10, 229)
_MNT_EXPIRE = 4


@dataclass(frozen=True)
class Difference:
    """One script that two twins answer differently."""

    context: str
    script: Script
    ours: Outcome
    theirs: Outcome

    def __str__(self) -> str:
        lines = [f"in the context {self.context}:"]
        for call, ours, theirs in zip(self.script, self.ours[0], self.theirs[0], strict=True):
            lines.append(f"  {call}: {ours}" + ("" if ours == theirs else f"   ***   alone: {theirs}"))
        if (self.ours[1] is None) != (self.theirs[1] is None):
            lines.append(f"  the mounts change {'alone' if self.ours[1] is None else 'here'} only")
        elif self.ours[1] != self.theirs[1]:
            here, alone = set(self.ours[1] or ()), set(self.theirs[1] or ())
            lines += [f"  here:  {line}" for line in sorted(here - alone)]
            lines += [f"  alone: {line}" for line in sorted(alone - here)]
        return "\n".join(lines)


def _perform(context: str, strip: bool, channel: int) -> None:
    """Runs inside: plays every script that comes until there are no more."""
    with Connection(channel) as connection:
        stage = Stage(CONTEXTS[context])
        while True:
            try:
                scripts: list[Script] = connection.recv()
            except EOFError:
                break
            for script in scripts:
                try:
                    connection.send(stage.run(script, strip))
                except Exception as error:
                    error.add_note(f"in {context}: {'; '.join(map(str, script))}")
                    raise
        stage.strike()


class Player:
    """A process in a twin that plays scripts, each on a new stage. A context manager."""

    def __init__(self, twin: GuardedChild, context: str, *, strip: bool) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            number = theirs.fileno()
            self._process = twin.start(
                _perform, context, strip, number, no_new_privs=False, pass_fds=(number,)
            )
        self._connection = Connection(ours.detach())

    def send(self, scripts: Sequence[Script]) -> None:
        self._connection.send(list(scripts))

    def outcome(self) -> Outcome:
        """Of the next script. Raises what went wrong inside."""
        try:
            if not self._connection.poll(PATIENCE):
                raise TimeoutError("a script does not end")
            outcome: Outcome = self._connection.recv()
        except (EOFError, ConnectionResetError, pickle.UnpicklingError):
            self._process.wait(30)
            raise
        return outcome

    def close(self) -> None:
        self._connection.close()
        self._process.wait(30)

    def __enter__(self) -> Player:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self._connection.close()
            self._process.close()


class Twins:
    """A trapped container, and one that is not: ``welded`` like it, or as the kernel alone would have it."""

    def __init__(self, ours: GuardedChild, theirs: GuardedChild, *, welded: bool) -> None:
        self._both = (ours, theirs)
        self._welded = welded

    @contextmanager
    def players(self, context: str) -> Iterator[tuple[Player, Player]]:
        """One in each."""
        with ExitStack() as stack:
            ours, theirs = (
                stack.enter_context(Player(twin, context, strip=not self._welded)) for twin in self._both
            )
            yield ours, theirs

    def differences(self, context: str, scripts: Sequence[Script]) -> list[Difference]:
        """Plays all scripts in both, at the same time."""
        with self.players(context) as players:
            return list(compare(players, context, scripts))


def _expires(script: Script) -> bool:
    """Whether a mark of MNT_EXPIRE is to last from one of its calls to another.

    It may not: a path walk that meets somebody's mount(2) anywhere on the machine drops the reference it took, and
    with it the mark. Beside a namespace that mounts all the time, one of 3,000 is lost by the bare kernel.
    """
    flags = [call.arguments[1] for call in script if call.name == "umount2"]
    return sum(isinstance(bits, int) and bool(bits & _MNT_EXPIRE) for bits in flags) > 1


def _compared(players: tuple[Player, Player], context: str, scripts: Sequence[Script]) -> list[Difference]:
    for player in players:
        player.send(scripts)
    outcomes = [[player.outcome() for _ in scripts] for player in players]
    return [
        Difference(context, script, ours, theirs)
        for script, ours, theirs in zip(scripts, *outcomes, strict=True)
        if ours != theirs
    ]


def compare(players: tuple[Player, Player], context: str, scripts: Sequence[Script]) -> Iterator[Difference]:
    """Those that are answered differently; where a mark has to last, twice."""
    # In small portions: neither side may wait for the other to read.
    for start in range(0, len(scripts), 100):
        for found in _compared(players, context, scripts[start : start + 100]):
            yield from _compared(players, context, [found.script]) if _expires(found.script) else [found]


@contextmanager
def twins(daemon: Interceptor, *, welded: bool) -> Iterator[Twins]:
    """New ones."""
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        # The host's own may be for its root alone.
        fuse = os.path.join(directory, "fuse")
        os.mknod(fuse, stat.S_IFCHR | 0o666, _FUSE)
        os.chmod(fuse, 0o666)
        mounts = [Mount(fuse, "/dev/fuse", "", ("bind",))]
        ours = stack.enter_context(daemon.spawn(mounts=mounts))
        theirs = daemon.spawn(mounts=mounts, trapped=False) if welded else spawn(None, None, mounts=mounts)
        yield Twins(ours, stack.enter_context(theirs), welded=welded)
