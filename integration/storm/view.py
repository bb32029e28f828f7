"""What reading through the view costs, beside lxcfs and the kernel: ``python -m integration.storm view --json FILE``.

The contestants take turns, round by round, in the same minute on the same machine: a private lxcfs (its /proc/uptime),
a guarded container, and a container like it without daemon and covers, where procfs is the kernel's own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from interceptor.errors import InterceptorError
from interceptor.kernel.flags import CLONE_NEWNS, MountFlag
from interceptor.kernel.mount import mount
from interceptor.kernel.namespaces import unshare
from interceptor.library import GuardedChild, Interceptor
from interceptor.spawn.create import spawn

UPTIME = "/proc/uptime"
REAL = "/proc/sys/net/ipv4/ip_forward"
OWN = "/proc/sys/vm/swappiness"

#: Rounds, and opens in each; and how many readers are parallel.
ROUNDS, OPENS, READERS = 15, 400, 8
QUICK_ROUNDS, QUICK_OPENS = 2, 50
_LXCFS_SECONDS = 10.0

#: What each ratio should be at most.
BARS = {
    "uptime_vs_lxcfs": 1.0,
    "passthrough_vs_lxcfs": 1.5,
    "sysctl_a_vs_kernel": 4.0,
    "listing_vs_kernel": 4.0,
}


def opens(path: str, count: int) -> float:
    """Microseconds of open, read and close, the median of ``count``."""
    samples = []
    for _ in range(count):
        begin = time.perf_counter_ns()
        fd = os.open(path, os.O_RDONLY)
        os.read(fd, 4096)
        os.close(fd)
        samples.append(time.perf_counter_ns() - begin)
    return statistics.median(samples) / 1000


def opens_at_once(path: str, count: int, readers: int) -> float:
    """Microseconds for each of ``count`` opens shared by so many processes: what all of them took, divided."""
    go, begin = os.pipe()
    pids = []
    for _ in range(readers):
        pid = os.fork()
        if pid == 0:
            os.close(begin)
            os.read(go, 1)
            for _ in range(count // readers):
                fd = os.open(path, os.O_RDONLY)
                os.read(fd, 4096)
                os.close(fd)
            os._exit(0)
        pids.append(pid)
    os.close(go)
    started = time.perf_counter_ns()
    os.close(begin)
    for pid in pids:
        os.waitpid(pid, 0)
    return (time.perf_counter_ns() - started) / (count // readers * readers) / 1000


def command(*argv: str) -> float:
    """Microseconds of a whole program whose output nobody reads."""
    begin = time.perf_counter_ns()
    subprocess.run(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    return (time.perf_counter_ns() - begin) / 1000


@dataclass
class Contestant:
    """Somewhere to measure: ``call`` runs a function there and gives what it returns."""

    name: str
    call: Callable[..., object]


@contextlib.contextmanager
def lxcfs() -> Iterator[str]:
    """A private instance; the path of its /proc/uptime. Raises `InterceptorError` where it does not come up."""
    with tempfile.TemporaryDirectory(prefix="storm-lxcfs-") as directory:
        place = os.path.join(directory, "mount")
        os.mkdir(place)
        argv = ["lxcfs", "--foreground", "--pidfile", os.path.join(directory, "pid"), place]
        try:
            process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        except FileNotFoundError:
            raise InterceptorError("lxcfs is not installed", "apt-get install lxcfs") from None
        try:
            uptime = os.path.join(place, "proc/uptime")
            deadline = time.monotonic() + _LXCFS_SECONDS
            while not os.path.exists(uptime):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise InterceptorError("lxcfs does not serve")
                threading.Event().wait(0.05)
            yield uptime
        finally:
            subprocess.run(["umount", "-l", place], check=False, stderr=subprocess.DEVNULL)
            process.terminate()
            process.wait()


def there(child: GuardedChild) -> Callable[..., object]:
    """Runs a function in a container."""
    return lambda function, *arguments: child.run(function, *arguments).value


Samples = dict[str, list[float]]


def measure(rounds: int, count: int, say: Callable[[str], None]) -> Samples:
    """Every figure in turns: microseconds by name, one for each round."""
    samples: Samples = {}
    with contextlib.ExitStack() as stack:
        uptime = stack.enter_context(lxcfs())
        daemon = stack.enter_context(Interceptor(log_level="warning"))
        view = there(stack.enter_context(daemon.spawn()))
        kernel = there(stack.enter_context(spawn(None, None)))
        turns: list[tuple[str, Callable[[], object]]] = [
            ("lxcfs uptime", lambda: opens(uptime, count)),
            ("view uptime", lambda: view(opens, UPTIME, count)),
            ("view passthrough", lambda: view(opens, REAL, count)),
            ("view own value", lambda: view(opens, OWN, count)),
            ("kernel passthrough", lambda: kernel(opens, REAL, count)),
            ("lxcfs uptime, 8 at once", lambda: opens_at_once(uptime, count, READERS)),
            ("view uptime, 1 at once", lambda: view(opens_at_once, UPTIME, count, 1)),
            ("view uptime, 8 at once", lambda: view(opens_at_once, UPTIME, count, READERS)),
            ("view passthrough, 8 at once", lambda: view(opens_at_once, REAL, count, READERS)),
            ("view sysctl -a", lambda: view(command, "sysctl", "-a")),
            ("kernel sysctl -a", lambda: kernel(command, "sysctl", "-a")),
            ("view listing", lambda: view(command, "find", "/proc/sys", "-ls")),
            ("kernel listing", lambda: kernel(command, "find", "/proc/sys", "-ls")),
        ]
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            for name, turn in turns:
                result = turn()
                assert isinstance(result, float)
                samples.setdefault(name, []).append(result)
    return samples


def ratios(samples: Samples) -> dict[str, float]:
    """Medians of the ratios of each round."""

    def of(above: str, below: str) -> float:
        pairs = zip(samples[above], samples[below], strict=True)
        return round(statistics.median(a / b for a, b in pairs), 3)

    return {
        "uptime_vs_lxcfs": of("view uptime", "lxcfs uptime"),
        "passthrough_vs_lxcfs": of("view passthrough", "lxcfs uptime"),
        "sysctl_a_vs_kernel": of("view sysctl -a", "kernel sysctl -a"),
        "listing_vs_kernel": of("view listing", "kernel listing"),
        "eight_readers_vs_lxcfs": of("view uptime, 8 at once", "lxcfs uptime, 8 at once"),
        "eight_readers_speedup": of("view uptime, 1 at once", "view uptime, 8 at once"),
    }


def table(samples: Samples) -> Table:
    """The median of every figure."""
    shown = Table("what", "median µs", "best µs", title="The view, beside lxcfs and the kernel")
    for name, values in samples.items():
        shown.add_row(name, f"{statistics.median(values):.1f}", f"{min(values):.1f}")
    for column in shown.columns[1:]:
        column.justify = "right"
    return shown


def main(arguments: Sequence[str]) -> int:
    """Measures and prints; exit status 0 also where a bar is missed."""
    parser = argparse.ArgumentParser("python -m integration.storm view", description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    parser.add_argument("--quick", action="store_true", help="a few rounds: that it works, not how fast")
    parser.add_argument("--rounds", type=int, default=0)
    options = parser.parse_args(arguments)
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    console = Console()
    if os.geteuid() != 0:
        print("storm: must be run as root: it makes containers", file=sys.stderr)
        return 1
    # lxcfs's mount is nobody else's affair.
    unshare(CLONE_NEWNS)
    mount(None, "/", None, MountFlag.MS_REC | MountFlag.MS_SLAVE)
    try:
        with console.status("setting up") as status:
            samples = measure(rounds, QUICK_OPENS if options.quick else OPENS, status.update)
    except InterceptorError as error:
        print(f"storm: {error}", file=sys.stderr)
        return 1
    found = ratios(samples)
    console.print(table(samples))
    for name, value in found.items():
        bar = f"   at most {BARS[name]:g}" if name in BARS else ""
        console.print(f"{name:24} {value:8.2f}{bar}")
    if options.json:
        machine = {"kernel": platform.release(), "arch": platform.machine(), "cpus": os.cpu_count()}
        written = {"machine": machine, "ratios": found, "bars": BARS, "us": samples}
        Path(options.json).write_text(json.dumps(written), encoding="utf-8")
    return 0
