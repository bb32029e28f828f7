"""Sources of the nodes that show a container its cgroup: what `resources` makes of the host's text and the cgroup.

The cgroup is the one that the container's first process was in when the container was created. Where it moves to later
(a service manager makes cgroups below) is its own affair, and so is the caller's: neither changes what is shown.
"""

from __future__ import annotations

import errno

from interceptor.view import cgroup, resources
from interceptor.view.cgroup import Files, files_of
from interceptor.view.nodes import Host, NodeError, Owner
from interceptor.view.protocol import Base

_ONLINE = b"devices/system/cpu/online"


def _files(owner: Owner, host: Host) -> Files:
    return files_of(owner.cgroups.places if owner.cgroups is not None else {}, host.read_cgroup)


def _text(host: Host, base: Base, path: bytes) -> bytes:
    text = host.read_all(base, path)
    if text is None:
        raise NodeError(errno.EIO)
    return text


def _cpus(files: Files, host: Host) -> list[int]:
    online = cgroup.cpu_list(_text(host, Base.SYS, _ONLINE))
    return resources.shown_cpus(online, cgroup.allowed_cpus(files), cgroup.quota(files))


def _used(owner: Owner, files: Files) -> tuple[int, int] | None:
    """Microseconds of processor time since the creation: the cgroup may be older."""
    time = cgroup.cpu_time(files)
    if time is None or owner.cgroups is None:
        return None
    return max(0, time[0] - owner.cgroups.user_us), max(0, time[1] - owner.cgroups.system_us)


def meminfo(owner: Owner, host: Host) -> bytes:
    """The cgroup's limit is all the memory that there is."""
    return resources.meminfo(_text(host, Base.PROC, b"meminfo"), cgroup.memory(_files(owner, host)))


def cpuinfo(owner: Owner, host: Host) -> bytes:
    """The processors that the container may use, as many as its quota is worth."""
    return resources.cpuinfo(_text(host, Base.PROC, b"cpuinfo"), _cpus(_files(owner, host), host))


def online(owner: Owner, host: Host) -> bytes:
    """The same, as a list."""
    return resources.as_list(_cpus(_files(owner, host), host))


def stat(owner: Owner, host: Host) -> bytes:
    """The same, and what of their time the container has used."""
    files = _files(owner, host)
    elapsed_ns = max(0, host.boottime_ns() - owner.created_ns)
    text, cpus, used = _text(host, Base.PROC, b"stat"), _cpus(files, host), _used(owner, files)
    return resources.stat(text, cpus, used, elapsed_ns, owner.account)


def loadavg(owner: Owner, host: Host) -> bytes:
    """How busy the container has been."""
    files = _files(owner, host)
    used = _used(owner, files)
    busy = None
    if used is not None and owner.cgroups is not None:
        busy = sum(used) + max(0, cgroup.stalled(files) - owner.cgroups.stalled_us)
    text = _text(host, Base.PROC, b"loadavg")
    now_ns, tasks = host.boottime_ns(), cgroup.tasks(files)
    return resources.loadavg(text, busy, now_ns, owner.created_ns, tasks, owner.account)


def diskstats(owner: Owner, host: Host) -> bytes:
    """What the container has asked of disks."""
    return resources.diskstats(_text(host, Base.PROC, b"diskstats"), cgroup.transfers(_files(owner, host)))
