"""What the files of a container's cgroup say, of either version: facts for `interceptor.view.resources`. Pure.

Nothing here raises for what is in a file: what is missing or malformed is not known. Limits are the least of those of
the cgroup and of all above it. Sources: Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/ of the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

Files = Callable[[str, str, int], bytes | None]
"""What a file says, by controller, name, and how many levels above the container's cgroup; None: there is none."""

DEPTH_MAX = 32
"""Levels that are looked at for limits."""
UNIFIED = ""
"""Where a place is told by controller: version 2, which has all that no hierarchy of version 1 has."""
_CPUS_MAX = 1 << 14
_UNLIMITED = 1 << 62
"""From here on a number of version 1 means that there is no limit (PAGE_COUNTER_MAX)."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes. ``stat`` is memory.stat by the names of version 2."""

    limit: int | None
    usage: int
    swap_limit: int | None = None
    swap_usage: int = 0
    stat: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Transfers:
    """What a device was asked for: operations and bytes."""

    reads: int = 0
    read_bytes: int = 0
    writes: int = 0
    written_bytes: int = 0
    discards: int = 0
    discarded_bytes: int = 0


def files_of(places: Mapping[str, tuple[str, str]], read: Callable[[str, str], bytes | None]) -> Files:
    """The files of the cgroup at these places: by controller, where the hierarchy is mounted and the path in it.

    ``read`` gives what a file says, by the same two. The first of the cgroups above is looked at with the rest: it may
    be the root of a host that is a container itself.
    """

    def files(controller: str, name: str, above: int) -> bytes | None:
        for key in dict.fromkeys((controller, UNIFIED)):
            if key in places:
                top, path = places[key]
                parts = path.split("/")
                if above <= len(parts):
                    text = read(top, "/".join([*parts[: len(parts) - above], name]))
                    if text is not None:
                        return text
        return None

    return files


def number(text: bytes | None) -> int | None:
    """The one number in a file; None where it says something else, as ``max``."""
    text = (text or b"").strip()
    return int(text) if text.isdigit() and len(text) < 20 else None


def keyed(text: bytes | None) -> dict[str, int]:
    """A flat keyed file: ``NAME NUMBER`` in each line; other lines are left out."""
    found = {}
    for line in (text or b"").splitlines():
        name, _, value = line.partition(b" ")
        amount = number(value)
        if amount is not None and name.isascii():
            found[name.decode("ascii")] = amount
    return found


def cpu_list(text: bytes | None) -> frozenset[int]:
    """A list like ``0-3,7`` (bitmap_print_list); what is no range in it is left out."""
    found: set[int] = set()
    for part in (text or b"").strip().split(b","):
        first, dash, last = part.partition(b"-")
        low, high = number(first), number(last if dash else first)
        if low is not None and high is not None and low <= high < _CPUS_MAX:
            found.update(range(low, high + 1))
    return frozenset(found)


def _least(amounts: Iterable[int | None]) -> int | None:
    known = [amount for amount in amounts if amount is not None and amount < _UNLIMITED]
    return min(known, default=None)


def _upwards(files: Files, controller: str, name: str) -> list[bytes]:
    """The file in the cgroup and in those above it, as far as there is one."""
    found = []
    for above in range(DEPTH_MAX):
        text = files(controller, name, above)
        if text is None:
            break
        found.append(text)
    return found


#: memory.stat of version 1, with all below the cgroup, by the names of version 2.
_VERSION_1 = {
    "total_cache": "file",
    "total_rss": "anon",
    "total_rss_huge": "anon_thp",
    "total_shmem": "shmem",
    "total_mapped_file": "file_mapped",
    "total_dirty": "file_dirty",
    "total_writeback": "file_writeback",
    "total_swapcached": "swapcached",
    "total_inactive_anon": "inactive_anon",
    "total_active_anon": "active_anon",
    "total_inactive_file": "inactive_file",
    "total_active_file": "active_file",
    "total_unevictable": "unevictable",
}


def memory(files: Files) -> Memory | None:
    """None if the cgroup's memory is not accounted for."""
    usage = number(files("memory", "memory.current", 0))
    if usage is not None:
        return Memory(
            _least(map(number, _upwards(files, "memory", "memory.max"))),
            usage,
            _least(map(number, _upwards(files, "memory", "memory.swap.max"))),
            number(files("memory", "memory.swap.current", 0)) or 0,
            keyed(files("memory", "memory.stat", 0)),
        )
    usage = number(files("memory", "memory.usage_in_bytes", 0))
    if usage is None:
        return None
    stat = keyed(files("memory", "memory.stat", 0))
    limit = _least([stat.get("hierarchical_memory_limit")])
    both = _least([stat.get("hierarchical_memsw_limit")])
    return Memory(
        limit,
        usage,
        max(0, both - limit) if both is not None and limit is not None else None,
        stat.get("total_swap", 0),
        {name: stat[old] for old, name in _VERSION_1.items() if old in stat},
    )


def allowed_cpus(files: Files) -> frozenset[int]:
    """The processors that the cgroup may use; empty if that is not known."""
    for name in ("cpuset.cpus.effective", "cpuset.effective_cpus"):
        found = cpu_list(files("cpuset", name, 0))
        if found:
            return found
    return frozenset()


def quota(files: Files) -> int | None:
    """How many processors' time the cgroup may use, rounded up; None without a limit."""
    texts = _upwards(files, "cpu", "cpu.max")
    if texts:
        pairs = [text.split() for text in texts]
        counts = [_processors(number(pair[0]), number(pair[1])) for pair in pairs if len(pair) == 2]
    else:
        quotas = _upwards(files, "cpu", "cpu.cfs_quota_us")
        periods = _upwards(files, "cpu", "cpu.cfs_period_us")
        counts = [_processors(number(q), number(p)) for q, p in zip(quotas, periods, strict=False)]
    return _least(counts)


def _processors(quota_us: int | None, period_us: int | None) -> int | None:
    return max(1, -(-quota_us // period_us)) if quota_us is not None and period_us else None


def cpu_time(files: Files) -> tuple[int, int] | None:
    """Microseconds in user mode and in the kernel, since the cgroup was made; None if not accounted for."""
    stat = keyed(files("cpu", "cpu.stat", 0))
    if "user_usec" in stat and "system_usec" in stat:
        return stat["user_usec"], stat["system_usec"]
    user, system = (number(files("cpuacct", f"cpuacct.usage_{kind}", 0)) for kind in ("user", "sys"))
    return (user // 1000, system // 1000) if user is not None and system is not None else None


def stalled(files: Files) -> int:
    """Microseconds in which something in the cgroup waited for a processor; 0 where that is not known."""
    for line in (files("cpu", "cpu.pressure", 0) or b"").splitlines():
        words = line.split()
        if words[:1] == [b"some"]:
            return next((number(word[6:]) or 0 for word in words if word.startswith(b"total=")), 0)
    return 0


def tasks(files: Files) -> int | None:
    """Processes and threads; None if they are not counted."""
    return number(files("pids", "pids.current", 0))


_KEYS = {
    b"rbytes": "read_bytes",
    b"wbytes": "written_bytes",
    b"rios": "reads",
    b"wios": "writes",
    b"dbytes": "discarded_bytes",
    b"dios": "discards",
}
_OLD = (
    ("blkio.throttle.io_serviced_recursive", {b"Read": "reads", b"Write": "writes", b"Discard": "discards"}),
    (
        "blkio.throttle.io_service_bytes_recursive",
        {b"Read": "read_bytes", b"Write": "written_bytes", b"Discard": "discarded_bytes"},
    ),
)


def transfers(files: Files) -> dict[bytes, Transfers] | None:
    """By device, ``MAJOR:MINOR``; None if they are not accounted for."""
    text = files("io", "io.stat", 0)
    found: dict[bytes, dict[str, int]] = {}
    if text is not None:
        for line in text.splitlines():
            device, *words = line.split() or [b""]
            for word in words:
                key, _, value = word.partition(b"=")
                _note(found, device, _KEYS.get(key), number(value))
        return _transfers(found)
    known = False
    for name, kinds in _OLD:
        text = files("blkio", name, 0)
        known |= text is not None
        for line in (text or b"").splitlines():
            words = line.split()
            if len(words) == 3:
                _note(found, words[0], kinds.get(words[1]), number(words[2]))
    return _transfers(found) if known else None


def _note(found: dict[bytes, dict[str, int]], device: bytes, name: str | None, amount: int | None) -> None:
    if name is not None and amount is not None:
        found.setdefault(device, {})[name] = amount


def _transfers(found: Mapping[bytes, Mapping[str, int]]) -> dict[bytes, Transfers]:
    return {device: Transfers(**amounts) for device, amounts in found.items() if any(amounts.values())}
