"""Who answers: containers, and in each the callers that make the calls under one listener or none."""

from __future__ import annotations

import array
import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from integration.storm import systemd
from integration.storm.agents import Peer
from integration.storm.workloads import BIND, COPY, SOURCE, TARGET, Workload
from interceptor.errors import InterceptorError
from interceptor.kernel import mount, stat
from interceptor.library import GuardedChild, Interceptor, Mount, Process
from interceptor.spawn.create import spawn

HERE = Path(__file__).resolve().parent
SOURCES = ("floor.c", "calls.c")
COMPILE = ("cc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror")

#: Where the containers find the compiled program.
INSIDE = "/opt/storm"
MESSAGE_MAX = 65536

#: Mounts that are made in one go.
STEP = 1000

#: Longer than any turn takes: what comes later is a hang.
TURN_SECONDS = 120.0


@contextlib.contextmanager
def compiled() -> Iterator[Path]:
    """A directory, readable by containers, with the program ``floor`` in it. Raises `InterceptorError`."""
    directory = Path(tempfile.mkdtemp(prefix="storm-"))
    try:
        directory.chmod(0o755)
        argv = [*COMPILE, *(str(HERE / source) for source in SOURCES), "-o", str(directory / "floor")]
        done = subprocess.run(argv, capture_output=True, check=False)
        if done.returncode:
            raise InterceptorError(
                f"the benchmark does not compile: {done.stderr.decode()}", "install build-essential"
            )
        yield directory
    finally:
        shutil.rmtree(directory)


class Caller:
    """A process in a container that makes calls and times each of them."""

    def __init__(self, container: GuardedChild, mode: str) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(TURN_SECONDS)
        self._socket = ours
        with theirs:
            number = theirs.fileno()
            argv = [f"{INSIDE}/floor", "-m", mode, "-s", str(number)]
            self._process: Process = container.start(argv, pass_fds=[number])

    def run(self, workload: Workload, count: int) -> dict[str, array.array[int]]:
        """The nanoseconds of each call, by figure. Raises `InterceptorError` where a call did not do what it must."""
        self.begin(workload, count)
        return self.end(workload, count)

    def begin(self, workload: Workload, count: int) -> None:
        """Has it start; `end` must follow."""
        plan = "\n".join([str(count), *(step.call for step in workload.steps)])
        self._socket.send(plan.encode())

    def end(self, workload: Workload, count: int) -> dict[str, array.array[int]]:
        """What `run` returns, of what `begin` has started."""
        verdict = self._socket.recv(MESSAGE_MAX)
        if verdict != b"ok":
            said = verdict.decode() or self._process.stderr.decode() or "it is gone"
            raise InterceptorError(f"workload {workload.name}: {said}")
        width = len(workload.steps)
        samples = array.array("I")
        while len(samples) < count * width:
            samples.frombytes(self._socket.recv(MESSAGE_MAX))
        found = {
            step.figure: samples[index::width] for index, step in enumerate(workload.steps) if step.figure
        }
        if workload.whole:
            sums = (sum(samples[at : at + width]) for at in range(0, len(samples), width))
            found[workload.whole] = array.array("I", sums)
        return found

    @property
    def pid(self) -> int:
        """As the host numbers it."""
        return self._process.pid

    def close(self) -> None:
        self._socket.close()
        self._process.close()


def furnish(mounts: int) -> int:
    """Run inside: the directories that workloads use, and mounts until the table has ``mounts``. Returns how many."""
    for path in (SOURCE, TARGET, COPY, "/tmp/more", *systemd.DIRECTORIES):
        os.makedirs(path, exist_ok=True)
    there = len(stat.listmount())
    for number in range(there, mounts):
        path = f"/tmp/more/{number}"
        os.mkdir(path)
        mount.mount(path, path, None, BIND)
    return len(stat.listmount())


def mounts_with(program: Path) -> list[Mount]:
    """What brings the program into a container; and something on /sys, as systemd has."""
    return [Mount(str(program), INSIDE, "", ("bind", "ro")), Mount("cgroup", "/sys/fs/cgroup", "tmpfs")]


@dataclass(frozen=True)
class Contestant:
    """A caller with what it is called in tables and results: ``guarded``, ``kernel``, ``floor_resolve`` …"""

    name: str
    mounts: int
    caller: Caller
    guarded: bool
    floor: bool
    agent: bool = False
    """Somebody else's: asked for nothing but what every agent must be able to answer."""


#: The listeners that our guard is measured against.
FLOORS = ("answer", "resolve", "continue")


@contextlib.contextmanager
def arena(
    daemon: Interceptor, program: Path, mounts: int, peers: Mapping[str, Peer] | None = None
) -> Iterator[list[Contestant]]:
    """All contestants, in containers whose tables have ``mounts`` entries; ``peers`` by name."""
    with contextlib.ExitStack() as stack:
        guarded = stack.enter_context(daemon.spawn(mounts=mounts_with(program)))
        alone = stack.enter_context(spawn(None, None, mounts=mounts_with(program)))
        theirs = {
            name: stack.enter_context(spawn(peer, None, mounts=mounts_with(program)))
            for name, peer in (peers or {}).items()
        }
        for container in (guarded, alone, *theirs.values()):
            found = 0
            # Step by step: a mount takes the longer the more there are, and a call has its time.
            for step in range(STEP, mounts + STEP, STEP):
                found = container.call(furnish, min(step, mounts))
            if found < mounts:
                raise InterceptorError(f"the container has {found} mounts, not {mounts}")

        def caller(container: GuardedChild, mode: str) -> Caller:
            made = Caller(container, mode)
            stack.callback(made.close)
            return made

        yield [
            Contestant("kernel", mounts, caller(alone, "none"), guarded=False, floor=False),
            *(
                Contestant(f"floor_{mode}", mounts, caller(alone, mode), guarded=False, floor=True)
                for mode in FLOORS
            ),
            *(
                Contestant(name, mounts, caller(container, "none"), guarded=False, floor=False, agent=True)
                for name, container in theirs.items()
            ),
            Contestant("guarded", mounts, caller(guarded, "none"), guarded=True, floor=False),
        ]
