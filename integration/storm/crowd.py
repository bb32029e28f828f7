"""What many containers cost together, and what one that storms costs another: rates, wake-ups, memory."""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from integration.storm.contestants import Caller, furnish, mounts_with
from integration.storm.figures import FEW, Percentiles
from integration.storm.workloads import DENIED, FREE
from interceptor.library import GuardedChild, Interceptor

#: Calls of each container in one measurement of a rate, and how often that is measured.
CALLS, TURNS = 2000, 7
#: Seconds without any call, in which nobody may wake up.
IDLE_SECONDS = 10.0
#: Calls that the storm makes while the other container works.
STORM_CALLS = 1_000_000


@dataclass(frozen=True)
class Crowd:
    """Figures of ``containers`` guarded containers of one daemon."""

    containers: int
    calls_per_second: float
    """Denied unmounts, of all together: the median of some turns."""
    our_cpu_us_per_call: float
    """Processor time of all our processes, microseconds a call."""
    caller_cpu_us_per_call: float
    guard_private_kb: float
    """The median of what a guard alone has in memory."""
    our_private_kb: int
    registration_us: float
    """The daemon's time to set a container up: the median."""
    idle_wake_ups: int
    """Voluntary and involuntary context switches of all our processes while nothing is called."""
    idle_seconds: float

    def as_json(self) -> dict[str, float]:
        return asdict(self)


def our_processes(daemon: Interceptor) -> list[int]:
    """The daemon, its keeper, and all that these have started."""
    word = str(daemon.directory).encode()
    ours = {daemon.pid} | {
        pid for c in daemon.request("ps") for pid in (int(c["guard_pid"]), int(c["envoy_pid"])) if pid
    }
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            # Keeper, view and welder name the daemon's directory on their command line, as it does itself.
            if word in (entry / "cmdline").read_bytes():
                ours.add(int(entry.name))
    return sorted(ours)


def cpu_us(pids: Iterable[int]) -> float:
    """On a processor so far, all threads: the first field of schedstat."""
    total = 0
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").glob("*"):
            with contextlib.suppress(OSError):
                total += int((task / "schedstat").read_text().split()[0])
    return total / 1000


def switches(pids: Iterable[int]) -> int:
    """Context switches of all threads so far."""
    total = 0
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").glob("*"):
            with contextlib.suppress(OSError):
                lines = (task / "status").read_text().splitlines()
                total += sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)
    return total


def private_kb(pid: int) -> int:
    """Memory that is a process's own: private pages, clean and dirty."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))
    return 0


@contextlib.contextmanager
def _callers(daemon: Interceptor, program: Path, count: int) -> Iterator[list[Caller]]:
    with contextlib.ExitStack() as stack:
        found = []
        for _ in range(count):
            container: GuardedChild = stack.enter_context(daemon.spawn(mounts=mounts_with(program)))
            container.call(furnish, FEW)
            caller = Caller(container, "none")
            stack.callback(caller.close)
            found.append(caller)
        yield found


def _rate(callers: list[Caller], calls: int) -> float:
    started = time.monotonic()
    for caller in callers:
        caller.begin(DENIED, calls)
    for caller in callers:
        caller.end(DENIED, calls)
    return len(callers) * calls / (time.monotonic() - started)


def _registrations_us(daemon: Interceptor) -> list[float]:
    events = (json.loads(line) for line in daemon.log_path.read_text().splitlines() if line.startswith("{"))
    return [float(e["microseconds"]) for e in events if e.get("event") == "container set up"]


def crowd(program: Path, containers: int, calls: int = CALLS, idle_seconds: float = IDLE_SECONDS) -> Crowd:
    """Measures as many containers at once."""
    with Interceptor(log_level="info") as daemon, _callers(daemon, program, containers) as callers:
        ours = our_processes(daemon)
        guards = [int(c["guard_pid"]) for c in daemon.request("ps")]
        pids = [c.pid for c in callers]
        _rate(callers, calls // 10)
        before, theirs = cpu_us(ours), cpu_us(pids)
        rates = [_rate(callers, calls // containers or 1) for _ in range(TURNS)]
        made = TURNS * (calls // containers or 1) * containers
        spent, callers_spent = cpu_us(ours) - before, cpu_us(pids) - theirs
        time.sleep(1)  # sleep: the watchdogs look once more, and the tray goes
        quiet = switches(ours)
        time.sleep(idle_seconds)  # sleep: this is what is measured
        woken = switches(ours) - quiet
        return Crowd(
            containers=containers,
            calls_per_second=statistics.median(rates),
            our_cpu_us_per_call=spent / made,
            caller_cpu_us_per_call=callers_spent / made,
            guard_private_kb=statistics.median(private_kb(pid) for pid in guards),
            our_private_kb=sum(private_kb(pid) for pid in ours),
            registration_us=statistics.median(_registrations_us(daemon)),
            idle_wake_ups=woken,
            idle_seconds=idle_seconds,
        )


@dataclass(frozen=True)
class Storm:
    """One container repeats a denied unmount for ever while another works."""

    alone: Percentiles
    beside: Percentiles
    log_lines: int
    """What the daemon has logged meanwhile."""

    @property
    def p99_ratio(self) -> float:
        return self.beside.p99 / self.alone.p99

    def as_json(self) -> dict[str, object]:
        return {
            "alone_us": self.alone.as_json(),
            "beside_us": self.beside.as_json(),
            "log_lines": self.log_lines,
            "p99_ratio": round(self.p99_ratio, 2),
        }


def storm(program: Path, rounds: int) -> Storm:
    """Free pairs of a worker, alone and beside a storm."""
    with Interceptor(log_level="info") as daemon, _callers(daemon, program, 2) as (worker, stormer):
        figure = "free_umount"
        worker.run(FREE, FREE.turn)
        alone: list[int] = []
        beside: list[int] = []
        for _ in range(rounds):
            alone.extend(worker.run(FREE, FREE.turn)[figure])
        lines = len(daemon.log_path.read_text().splitlines())
        stormer.begin(DENIED, STORM_CALLS)
        for _ in range(rounds):
            beside.extend(worker.run(FREE, FREE.turn)[figure])
        said = len(daemon.log_path.read_text().splitlines()) - lines
        return Storm(Percentiles.of(alone), Percentiles.of(beside), said)
