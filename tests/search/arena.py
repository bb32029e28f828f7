"""Where programs run: a guarded container with the engine in it, made again where a program has spoilt it."""

from __future__ import annotations

import atexit
import os
import shutil
import socket
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from interceptor.kernel.flags import PROC_SUPER_MAGIC, SYSFS_MAGIC
from interceptor.library import GuardedChild, Interceptor, Mount
from interceptor.spawn.process import Process
from tests.search.program import Program

HERE = Path(__file__).parent
NATIVE = HERE.parent.parent / "native"
MASKED = ("/proc/kcore", "/sys/firmware")
READONLY = ("/proc/bus", "/proc/irq")
#: What nobody in a container may reach, by the paths of the host.
RAW = (
    *("/proc/uptime", "/proc/swaps", "/proc/sys", "/proc/kcore", "/sys/kernel", "/sys/devices/virtual"),
    *("/sys/module/nf_conntrack/parameters", "/sys/firmware"),
)
#: Seconds: one step may wait for half a minute in the engine, which then says so.
PATIENCE = 120.0
_HEAD = struct.Struct("<9I")


def raw_nodes(paths: Iterable[str]) -> list[str]:
    """``MAGIC:INO`` of each: the same in every procfs and sysfs of this kernel."""
    magic = {"proc": PROC_SUPER_MAGIC, "sys": SYSFS_MAGIC}
    return [f"{magic[path.split('/')[1]]}:{os.stat(path).st_ino}" for path in paths if os.path.exists(path)]


@cache
def build() -> Path:
    """A directory with the engine, statically linked: it runs where there are no libraries. Made once a process."""
    directory = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, directory)
    directory.chmod(0o755)
    target = directory / "engine"
    argv = ["gcc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-static", f"-I{NATIVE}"]
    sources = [str(p) for p in (*sorted((HERE / "engine").glob("*.c")), NATIVE / "syscalls.c")]
    subprocess.run([*argv, "-o", str(target), *sources], check=True)
    return directory


@dataclass(frozen=True)
class Outcome:
    """What became of a program."""

    errors: tuple[int, ...]
    dirty: bool
    wrong: str
    """What must not be, a line each; empty: nothing."""
    looks: int
    mounts: int
    """The most that any namespace had."""
    before: int
    """Mounts that were to go at the end."""
    calls: int
    """Unmounts that it took."""
    left: int
    walked: bool


@dataclass
class Totals:
    """Of many programs."""

    programs: int = 0
    steps: int = 0
    looks: int = 0
    containers: int = 0
    walks: int = 0
    copies: int = 0
    calls: int = 0
    succeeded: Counter[str] = field(default_factory=Counter)
    made: Counter[str] = field(default_factory=Counter)

    def add(self, program: Program, outcome: Outcome) -> None:
        self.programs += 1
        self.steps += len(outcome.errors)
        self.looks += outcome.looks
        if outcome.walked and outcome.before:
            self.walks += 1
            self.copies += outcome.before - outcome.left
            self.calls += outcome.calls
        for step, error in zip(program.steps, outcome.errors, strict=False):
            self.made[step.op.name] += 1
            self.succeeded[step.op.name] += error == 0

    def __str__(self) -> str:
        rates = ", ".join(f"{n.lower()} {self.succeeded[n]}/{self.made[n]}" for n in sorted(self.made))
        return (
            f"{self.programs} programs, {self.steps} steps in {self.containers} containers, {self.looks} looks; "
            f"{self.walks} walks took {self.copies} copies away in {self.calls} calls; succeeded: {rates}"
        )


class Arena:
    """The engine in a container of a daemon, and a new container when one is spoilt."""

    def __init__(self, daemon: Interceptor, mode: str, tools: Path, forbidden: Sequence[str] = ()) -> None:
        self.mode = mode
        self.totals = Totals()
        self._daemon = daemon
        self._tools = tools
        self._nodes = raw_nodes((*RAW, *forbidden))
        self._child: GuardedChild | None = None
        self._process: Process | None = None
        self._socket: socket.socket | None = None

    def run(self, program: Program) -> Outcome:
        """Raises `AssertionError` if the engine does not answer, or its container does not hold to begin with."""
        if self._socket is None:
            self._open()
        assert self._socket is not None
        self._socket.send(program.pack())
        try:
            data = self._socket.recv(1 << 17)
        except TimeoutError:
            raise AssertionError(f"no answer from the engine in {PATIENCE:g} s\n{program}") from None
        if not data:
            raise AssertionError(
                f"the engine has ended: {self._process and self._process.stderr!r}\n{program}"
            )
        outcome = _decode(data)
        self.totals.add(program, outcome)
        if outcome.dirty or "no answer" in outcome.wrong:
            self.close()
        return outcome

    def _open(self) -> None:
        assert self._daemon.is_running
        self.totals.containers += 1
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(PATIENCE)
        bind = Mount(str(self._tools), "/tools", "", ("bind", "ro", "nosuid", "nodev"))
        with theirs:
            self._child = self._daemon.spawn(masked_paths=MASKED, readonly_paths=READONLY, mounts=[bind])
            argv = ["/tools/engine", str(theirs.fileno()), self.mode, *self._nodes]
            self._process = self._child.start(argv, pass_fds=[theirs.fileno()])
        self._socket = ours

    def close(self) -> None:
        """End the container."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._child is not None:
            self._child.close()
            self._child = None


def _decode(data: bytes) -> Outcome:
    done, dirty, wrong, looks, mounts, before, calls, left, skipped = _HEAD.unpack_from(data)
    end = _HEAD.size + 4 * done
    errors = struct.unpack_from(f"<{done}i", data, _HEAD.size)
    text = data[end:].decode(errors="replace")
    assert bool(text) == bool(wrong)
    return Outcome(errors, bool(dirty), text, looks, mounts, before, calls, left, not skipped)


@contextmanager
def arena(mode: str, daemon: Interceptor | None = None, forbidden: Sequence[str] = ()) -> Iterator[Arena]:
    """A place for programs under a guard of that mode, with a daemon of its own if none is given.

    ``forbidden``: more nodes of procfs and sysfs, by their paths on the host, that nobody may reach.
    """
    with ExitStack() as stack:
        if daemon is None:
            daemon = stack.enter_context(
                Interceptor(guard_mode=mode, environment={"INTERCEPTOR_TESTING": "1"})
            )
        place = Arena(daemon, mode, build(), forbidden)
        stack.callback(place.close)
        yield place
