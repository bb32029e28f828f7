"""Nodes about the machine's resources as a container with limits should find them: the host's text, with what its
cgroup says in place of what the host's processors, memory and disks do. Pure.

Where nothing is known or nothing limited, the host's text stays as it is. A processor keeps its number: those are what
sched_setaffinity(2) takes. What the kernel keeps for no cgroup, as the time that a disk took, is 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from interceptor.view.cgroup import Memory, Transfers

_KIB = 1024
_SECTOR = 512
TICKS = 100
"""USER_HZ: in a second of /proc/stat, on every architecture that we build for."""

_MEMINFO = re.compile(rb"([^:\s]+):( +)(\d+)( kB)?")
_PROCESSOR = re.compile(rb"^processor\s*:\s*(\d+)", re.MULTILINE)
_CPU = re.compile(rb"cpu(\d*)\s+(.*)")

#: Of memory.stat of version 2: fields of /proc/meminfo that are the same there.
_SAME = {
    b"Cached": "file",
    b"SwapCached": "swapcached",
    b"Active(anon)": "active_anon",
    b"Inactive(anon)": "inactive_anon",
    b"Active(file)": "active_file",
    b"Inactive(file)": "inactive_file",
    b"Unevictable": "unevictable",
    b"Zswap": "zswap",
    b"Zswapped": "zswapped",
    b"Dirty": "file_dirty",
    b"Writeback": "file_writeback",
    b"AnonPages": "anon",
    b"Mapped": "file_mapped",
    b"Shmem": "shmem",
    b"KReclaimable": "slab_reclaimable",
    b"SReclaimable": "slab_reclaimable",
    b"SUnreclaim": "slab_unreclaimable",
    b"KernelStack": "kernel_stack",
    b"PageTables": "pagetables",
    b"SecPageTables": "sec_pagetables",
    b"Percpu": "percpu",
    b"AnonHugePages": "anon_thp",
    b"ShmemHugePages": "shmem_thp",
    b"FileHugePages": "file_thp",
}
#: Of the whole machine, and kept for no cgroup.
_NOBODYS = (
    *(
        b"Buffers",
        b"Mlocked",
        b"NFS_Unstable",
        b"Bounce",
        b"WritebackTmp",
        b"ShmemPmdMapped",
        b"FilePmdMapped",
    ),
    *(
        b"CmaTotal",
        b"CmaFree",
        b"HardwareCorrupted",
        b"Balloon",
        b"DirectMap4k",
        b"DirectMap4M",
        b"DirectMap2M",
    ),
    b"DirectMap1G",
)


def meminfo(host: bytes, memory: Memory | None) -> bytes:
    """/proc/meminfo of a container that may have less memory than the host; else the host's."""
    fields = {match[1]: int(match[3]) for match in map(_MEMINFO.fullmatch, host.splitlines()) if match}
    has = fields.get(b"MemTotal", 0)
    if memory is None or memory.limit is None or memory.limit // _KIB >= has:
        return host
    ours = _memory_fields(memory, fields)
    return b"".join(_meminfo_line(line, ours) for line in host.splitlines(keepends=True))


def _memory_fields(memory: Memory, host: Mapping[bytes, int]) -> dict[bytes, int]:
    assert memory.limit is not None
    total = memory.limit // _KIB
    used = min(memory.usage // _KIB, total)
    # The kernel brings its statistics up to date now and then: nothing is more than all that is used.
    ours = {name: min(memory.stat.get(key, 0) // _KIB, used) for name, key in _SAME.items()}
    reclaimable = min(ours[b"SReclaimable"], used - ours[b"Cached"])
    ours[b"SReclaimable"] = ours[b"KReclaimable"] = reclaimable
    ours[b"SUnreclaim"] = min(ours[b"SUnreclaim"], used - ours[b"Cached"] - reclaimable)
    ours |= dict.fromkeys(_NOBODYS, 0)
    ours[b"MemTotal"], ours[b"MemFree"] = total, total - used
    cache = ours[b"Active(file)"] + ours[b"Inactive(file)"]
    ours[b"MemAvailable"] = min(total, total - used + cache + reclaimable)
    ours[b"Slab"] = reclaimable + ours[b"SUnreclaim"]
    for name in (b"Active", b"Inactive"):
        ours[name] = ours[name + b"(anon)"] + ours[name + b"(file)"]
    swap = host.get(b"SwapTotal", 0)
    if memory.swap_limit is not None:
        swap = min(swap, memory.swap_limit // _KIB)
    swapped = min(memory.swap_usage // _KIB, swap)
    ours[b"SwapTotal"], ours[b"SwapFree"] = swap, swap - swapped
    commit = max(0, host.get(b"CommitLimit", 0) - host.get(b"SwapTotal", 0))
    ours[b"CommitLimit"] = commit * total // max(1, host[b"MemTotal"]) + swap
    ours[b"Committed_AS"] = ours[b"AnonPages"] + ours[b"Shmem"] + swapped
    return ours


def _meminfo_line(line: bytes, ours: Mapping[bytes, int]) -> bytes:
    match = _MEMINFO.fullmatch(line.rstrip(b"\n"))
    if match is None or match[1] not in ours:
        return line
    name, spaces, digits, unit = match.groups()
    shown = b"%d" % ours[name]
    return name + b":" + (b" " + shown.rjust(len(spaces + digits) - 1)) + (unit or b"") + b"\n"


def shown_cpus(online: Collection[int], allowed: Collection[int], quota: int | None) -> list[int]:
    """The processors that a container has: those that it may use, as many as its quota is worth; at least one."""
    usable = sorted(set(online) & set(allowed)) or sorted(online)
    return usable if quota is None else usable[: max(1, quota)]


def as_list(cpus: Iterable[int]) -> bytes:
    """``0-3,7``, as the kernel prints it."""
    ranges: list[list[int]] = []
    for cpu in sorted(set(cpus)):
        if ranges and ranges[-1][1] == cpu - 1:
            ranges[-1][1] = cpu
        else:
            ranges.append([cpu, cpu])
    return b",".join(b"%d" % a if a == b else b"%d-%d" % (a, b) for a, b in ranges) + b"\n"


def cpuinfo(host: bytes, cpus: Collection[int]) -> bytes:
    """/proc/cpuinfo, without the blocks of other processors."""
    kept, found = [], False
    for block in host.split(b"\n\n"):
        match = _PROCESSOR.search(block)
        if match is None or int(match[1]) in cpus:
            kept.append(block)
            found |= match is not None
    return b"\n\n".join(kept) if found else host


@dataclass(frozen=True, slots=True)
class Load:
    """What the load was when it was asked for last."""

    at_ns: int
    busy_us: int
    averages: tuple[float, float, float] = (0.0, 0.0, 0.0)
    running: int = 0


class Account:
    """What is remembered of a container so that nothing of it runs backwards."""

    def __init__(self) -> None:
        self.idle = 0
        """Ticks of all its processors, as they were shown last."""
        self.load: Load | None = None


def stat(
    host: bytes, cpus: Sequence[int], used_us: tuple[int, int] | None, elapsed_ns: int, account: Account
) -> bytes:
    """/proc/stat: the time that the container has used since its creation, and idle time for the rest.

    Of the kernel's times only what is used in user mode and in the kernel is known for a cgroup, and not on which
    processor: it is spread evenly. Other lines are the host's, the boot time among them, which processes' start times
    count from. ``used_us``: microseconds; None: not known, then the host's times for these processors.
    """
    times = _host_times(host)
    shown = [cpu for cpu in cpus if cpu in times]
    if not shown:
        return host
    columns = max(4, *(len(times[cpu]) for cpu in shown))
    if used_us is None:
        each = {cpu: times[cpu] + [0] * (columns - len(times[cpu])) for cpu in shown}
    else:
        user, system = (us * TICKS // 1_000_000 for us in used_us)
        idle = elapsed_ns * TICKS // 1_000_000_000 * len(shown) - user - system
        # A burst may be more than so many processors can do.
        account.idle = max(account.idle, idle)
        shares = [_spread(amount, len(shown)) for amount in (user, 0, system, account.idle)]
        each = {cpu: [s[i] for s in shares] + [0] * (columns - 4) for i, cpu in enumerate(shown)}
    lines = [b"cpu  " + _words([sum(column) for column in zip(*each.values(), strict=True)])]
    lines += [b"cpu%d " % cpu + _words(each[cpu]) for cpu in shown]
    return b"".join(lines) + b"".join(
        line for line in host.splitlines(keepends=True) if not line.startswith(b"cpu")
    )


def _host_times(host: bytes) -> dict[int, list[int]]:
    found = {}
    for line in host.splitlines():
        match = _CPU.fullmatch(line)
        if match and match[1] and all(word.isdigit() for word in match[2].split()):
            found[int(match[1])] = [int(word) for word in match[2].split()]
    return found


def _words(amounts: Iterable[int]) -> bytes:
    return b" ".join(b"%d" % amount for amount in amounts) + b"\n"


def _spread(amount: int, count: int) -> list[int]:
    """As even as whole numbers can be; none of them falls while the sum grows."""
    return [amount // count + (i < amount % count) for i in range(count)]


_MINUTES = (1, 5, 15)


def loadavg(
    host: bytes, busy_us: int | None, now_ns: int, created_ns: int, tasks: int | None, account: Account
) -> bytes:
    """/proc/loadavg. ``busy_us``: processor time since the creation, and time that something waited for it.

    The kernel counts what can run every five seconds. Nobody does for a container: how busy it was is known from one
    reading to the next, and decays as the kernel's averages do. The last PID is not known, and nobody else's is shown.
    """
    words = host.split()
    if busy_us is None or len(words) != 5:
        return host
    before = account.load or Load(created_ns, 0)
    seconds = (now_ns - before.at_ns) / 1e9
    load = before
    if seconds >= 0.01:  # below the clock of the averages there is nothing to see
        rate = max(0, busy_us - before.busy_us) / 1e6 / seconds
        decays = [math.exp(-seconds / 60 / minutes) for minutes in _MINUTES]
        averages = [old * d + rate * (1 - d) for old, d in zip(before.averages, decays, strict=True)]
        load = Load(now_ns, busy_us, (averages[0], averages[1], averages[2]), round(rate))
        account.load = load
    total = max(1, tasks if tasks is not None else 1)
    running = min(max(1, load.running), total)
    return b"%.2f %.2f %.2f %d/%d %d\n" % (*load.averages, running, total, total)


def diskstats(host: bytes, transfers: Mapping[bytes, Transfers] | None) -> bytes:
    """/proc/diskstats: the devices that the container has used, with what it asked of them."""
    if transfers is None:
        return host
    lines = []
    for line in host.splitlines():
        words = line.split()
        asked = transfers.get(b":".join(words[:2]))
        if len(words) < 4 or asked is None:
            continue
        lines.append(
            b"%4s %7s %s " % (words[0], words[1], words[2])
            + b"%d 0 %d 0 " % (asked.reads, asked.read_bytes // _SECTOR)
            + b"%d 0 %d 0 0 0 0 " % (asked.writes, asked.written_bytes // _SECTOR)
            + b"%d 0 %d 0 0 0\n" % (asked.discards, asked.discarded_bytes // _SECTOR)
        )
    return b"".join(lines)
