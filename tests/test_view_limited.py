"""Containers with limits of their cgroup, real ones: what they are shown with ``cgroup_aware``, and nothing without."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from integration.containers import cgroups
from interceptor.containers.cgroups import places
from interceptor.library import GuardedChild, Interceptor
from interceptor.mounts.managed import CGROUP_PROC, CGROUP_SYS
from tests.robust.support import eventually, kill, view_of
from tests.view_support import forked, reap, told

pytestmark = pytest.mark.root

MIB = 1 << 20
ROOT = Path("/sys/fs/cgroup")
PATHS = [f"/proc/{p.decode()}" for p in CGROUP_PROC] + [f"/sys/{p.decode()}" for p in CGROUP_SYS]


class Limits:
    """A cgroup in every hierarchy, with 256 MiB and, of the host's processors, the last."""

    def __init__(self, name: str = "limited", *, limited: bool = True) -> None:
        self.name = f"interceptor-{name}-{os.getpid()}"
        version_1 = [ROOT / c for c in ("memory", "cpu", "cpuacct", "cpuset", "blkio", "pids")]
        self.is_old = all(top.is_dir() for top in version_1)
        top = cgroups.find()
        if not self.is_old:
            (top / "cgroup.subtree_control").write_text("+memory +cpu +cpuset +io +pids")
        self.directories = [t / self.name for t in (*(version_1 if self.is_old else ()), top)]
        for directory in self.directories:
            directory.mkdir()
        self.cpu = max(os.sched_getaffinity(0))
        if self.is_old:
            self.write("cpuset.mems", (ROOT / "cpuset/cpuset.mems").read_text())
            self.write("cpuset.cpus", (ROOT / "cpuset/cpuset.cpus").read_text())
        if limited:
            self._limit()

    def _limit(self) -> None:
        self.write("cpuset.cpus", str(self.cpu))
        self.write("memory.limit_in_bytes" if self.is_old else "memory.max", str(256 * MIB))

    def write(self, name: str, text: str) -> None:
        """A file of the hierarchy that has it."""
        (place,) = [d / name for d in self.directories if (d / name).exists()]
        place.write_text(text)

    def join(self) -> None:
        for directory in self.directories:
            (directory / "cgroup.procs").write_text(str(os.getpid()))

    def remove(self) -> None:
        for directory in self.directories:
            eventually(lambda d=directory: not (d / "cgroup.procs").read_text(), "nobody in it")  # type: ignore[misc]
            directory.rmdir()


@pytest.fixture(scope="module")
def limits() -> Iterator[Limits]:
    found = Limits()
    try:
        yield found
    finally:
        found.remove()


@pytest.fixture(scope="module")
def daemon() -> Iterator[Interceptor]:
    with Interceptor(cgroup_aware=True) as running:
        yield running


def inside(
    daemon: Interceptor, limits: Limits, work: Callable[[GuardedChild], object], **options: Any
) -> Any:
    """What ``work`` returns, as JSON, of a new container in that cgroup. A process of its own makes it: who spawns a
    container is what it inherits its cgroup from."""

    def child() -> object:
        limits.join()
        with daemon.spawn(**options) as container:
            return work(container)

    return told(child)


def output(*argv: str) -> str:
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


def meminfo() -> dict[str, int]:
    with open("/proc/meminfo") as file:
        return {words[0].rstrip(":"): int(words[1]) for words in map(str.split, file)}


def cpu_line() -> list[int]:
    with open("/proc/stat") as file:
        return [int(word) for word in file.readline().split()[1:]]


def test_tools_agree_with_the_limits_and_with_each_other(daemon: Interceptor, limits: Limits) -> None:
    def look() -> dict[str, object]:
        with open("/proc/cpuinfo") as info, open("/proc/stat") as stat:
            processors = [line.split()[2] for line in info if line.startswith("processor")]
            lines = [line.split()[0] for line in stat if line.startswith("cpu")]
        return {
            "free": output("free", "-m").splitlines()[1].split()[1:3],
            "nproc": output("nproc"),
            "online": Path("/sys/devices/system/cpu/online").read_text(),
            "processors": processors,
            "lines": lines,
            "uptime": output("uptime"),
            "up": float(Path("/proc/uptime").read_text().split()[0]),
            "load": Path("/proc/loadavg").read_text().split(),
            "disks": Path("/proc/diskstats").read_text(),
            "pids": len([name for name in os.listdir("/proc") if name.isdigit()]),
        }

    found = inside(daemon, limits, lambda child: child.call(look))
    total, used = map(int, found["free"])
    assert total == 256 and 0 < used < 256
    assert found["nproc"] == "1\n"
    assert found["online"] == f"{limits.cpu}\n"
    assert found["processors"] == [str(limits.cpu)]
    assert found["lines"] == ["cpu", f"cpu{limits.cpu}"]
    assert "load average" in found["uptime"] and found["up"] < 3600
    running, tasks = found["load"][3].split("/")
    assert 1 <= int(running) <= int(tasks)
    assert int(tasks) >= found["pids"] - 1
    assert all(float(average) < 50 for average in found["load"][:3])


def test_what_the_container_uses_shows(daemon: Interceptor, limits: Limits) -> None:
    def use() -> dict[str, object]:
        before, times = meminfo(), cpu_line()
        block = bytearray(64 * MIB)  # written to, page by page
        block[:: os.sysconf("SC_PAGESIZE")] = b"x" * (len(block) // os.sysconf("SC_PAGESIZE"))
        while sum(os.times()[:2]) < 0.5:
            pass
        after, used = meminfo(), cpu_line()
        return {"before": before, "after": after, "times": times, "used": used, "size": len(block)}

    found = inside(daemon, limits, lambda child: child.call(use))
    before, after = found["before"], found["after"]
    assert before["MemTotal"] == after["MemTotal"] == 256 * 1024
    assert after["MemFree"] < before["MemFree"] - 50 * 1024
    assert after["MemFree"] + after["Buffers"] + after["Cached"] <= after["MemTotal"]
    spent = [b - a for a, b in zip(found["times"], found["used"], strict=True)]
    assert spent[0] + spent[2] >= 30, "ticks of 10 ms"
    assert min(spent) >= 0


def test_a_changed_limit_shows_at_once(daemon: Interceptor, limits: Limits) -> None:
    def change(child: GuardedChild) -> list[int]:
        first = child.call(meminfo)["MemTotal"]
        limits.write("memory.limit_in_bytes" if limits.is_old else "memory.max", str(128 * MIB))
        try:
            return [first, child.call(meminfo)["MemTotal"]]
        finally:
            limits.write("memory.limit_in_bytes" if limits.is_old else "memory.max", str(256 * MIB))

    assert inside(daemon, limits, change) == [256 * 1024, 128 * 1024]


def test_a_container_without_limits_has_the_hosts_values(daemon: Interceptor) -> None:
    def look() -> list[object]:
        total = meminfo()["MemTotal"]
        with open("/proc/cpuinfo") as info:
            return [
                total,
                Path("/sys/devices/system/cpu/online").read_text(),
                info.read().count("processor\t"),
            ]

    free = Limits("free", limited=False)
    try:
        assert inside(daemon, free, lambda child: child.call(look)) == look()
    finally:
        free.remove()


def test_a_process_in_another_cgroup_is_shown_the_same(daemon: Interceptor, limits: Limits) -> None:
    """A manager in the container makes cgroups below: what a reader is in does not count."""
    below = [directory / "below" for directory in limits.directories]

    def move(child: GuardedChild) -> list[int]:
        for directory in below:
            directory.mkdir()
            if limits.is_old and "cpuset" in directory.parts:
                for name in ("cpuset.cpus", "cpuset.mems"):
                    (directory / name).write_text((directory.parent / name).read_text())
        narrow = next(d for d in below if "memory" in d.parts) if limits.is_old else below[-1]
        if limits.is_old:
            (narrow / "memory.limit_in_bytes").write_text(str(32 * MIB))
        first = child.call(meminfo)["MemTotal"]
        for directory in below:
            (directory / "cgroup.procs").write_text(str(child.pid))
        second = child.call(meminfo)["MemTotal"]
        for directory in limits.directories:
            (directory / "cgroup.procs").write_text(str(child.pid))
        return [first, second]

    try:
        assert inside(daemon, limits, move) == [256 * 1024, 256 * 1024]
    finally:
        for directory in below:
            with contextlib.suppress(FileNotFoundError):
                eventually(lambda d=directory: not (d / "cgroup.procs").read_text(), "empty")  # type: ignore[misc]
                directory.rmdir()


def test_nothing_uncovers_them_and_new_bases_have_them(daemon: Interceptor, limits: Limits) -> None:
    def attack(paths: list[str]) -> list[str]:
        from interceptor.errors import SyscallError
        from interceptor.kernel import mount as km
        from tests.guarded import is_raw

        wrong = []
        for path in paths:
            for flags in (0, 2, 8):  # MNT_DETACH, UMOUNT_NOFOLLOW
                with contextlib.suppress(SyscallError):
                    km.umount2(path, flags)
                    wrong.append(f"umount of {path} worked")
            with contextlib.suppress(SyscallError):
                km.mount(path.encode(), b"/mnt", None, 0x2000)
                wrong.append(f"{path} moved")
            if is_raw(path):
                wrong.append(f"{path} is raw")
        os.makedirs("/tmp/at", exist_ok=True)
        for kind, prefix in ((b"proc", "/proc/"), (b"sysfs", "/sys/")):
            for source, flags in ((kind, 0), (prefix.encode(), 0x1000), (prefix.encode(), 0x5000)):
                km.mount(source, b"/tmp/at", kind if not flags else None, flags)
                wrong += [
                    f"{p} is raw in another base"
                    for p in paths
                    if p.startswith(prefix) and is_raw("/tmp/at/" + p.removeprefix(prefix))
                ]
                km.umount2("/tmp/at", 2)
        if meminfo()["MemTotal"] != 256 * 1024:
            wrong.append("limit lost")
        return wrong

    assert inside(daemon, limits, lambda child: child.call(attack, PATHS)) == []


def test_a_killed_view_shows_the_same_limits_and_nothing_runs_backwards(
    daemon: Interceptor, limits: Limits
) -> None:
    def look() -> list[object]:
        return [meminfo()["MemTotal"], Path("/sys/devices/system/cpu/online").read_text(), cpu_line()]

    def kill_it(child: GuardedChild) -> list[Any]:
        before = child.call(look)
        old = view_of(daemon)
        kill(old[0])
        eventually(lambda: view_of(daemon) not in ([], old), "a new server")
        return [before, child.call(look)]

    (total, online, times), (total_after, online_after, times_after) = inside(daemon, limits, kill_it)
    assert (total, online) == (total_after, online_after) == (256 * 1024, f"{limits.cpu}\n")
    assert times[0] <= times_after[0] and times[2] <= times_after[2]


def test_readers_do_not_wait_for_a_stopped_envoy(daemon: Interceptor, limits: Limits) -> None:
    """Cgroup files are read on the host's side: nothing of the container has to answer."""

    def stop(child: GuardedChild) -> bool:
        (envoy,) = [c["envoy_pid"] for c in daemon.request("ps") if c["id"] == child.cid]
        os.kill(envoy, signal.SIGSTOP)
        try:
            return all(child.call(meminfo)["MemTotal"] == 256 * 1024 for _ in range(20))
        finally:
            os.kill(envoy, signal.SIGCONT)

    assert inside(daemon, limits, stop) is True


def test_by_default_there_is_nothing_of_it() -> None:
    with Interceptor() as plain, plain.spawn() as child:
        mounted = str(child.call(lambda: Path("/proc/self/mountinfo").read_text()))
        assert " /proc/uptime " in mounted
        assert not [path for path in PATHS if f" {path} " in mounted]


def test_this_hosts_hierarchies_are_found(limits: Limits) -> None:
    read, write = os.pipe()

    def child() -> None:
        limits.join()
        os.write(write, Path("/proc/self/cgroup").read_bytes())

    pid = forked(child)
    os.close(write)
    with open(read) as result:
        text = result.read()
    assert reap(pid) == 0
    found = places(text, Path("/proc/self/mountinfo").read_text())
    assert {path for _, path in found.values()} == {limits.name}
    assert {os.path.join(*place) for place in found.values()} >= {str(d) for d in limits.directories}
