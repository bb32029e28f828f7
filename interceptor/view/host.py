"""The host as the view sees it: its clock, its own nodes, its processes.

All of it goes through descriptors of the host's procfs and sysfs that were opened at the start, by paths from our
tables and numbers, never by names that a container gave: nothing here can come to a path that the view serves.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from typing import NamedTuple

from interceptor.kernel.fd import OwnedFd
from interceptor.kernel.flags import ResolveFlag
from interceptor.kernel.namespaces import owners
from interceptor.kernel.process import openat2
from interceptor.view.log import Logger
from interceptor.view.nodes import Capability
from interceptor.view.protocol import Base, Namespace

log = Logger()

_READ_MAX = 4096
_PART = 1 << 16
_PARTS_MAX = 1 << 10
_WITHIN = ResolveFlag.RESOLVE_BENEATH | ResolveFlag.RESOLVE_NO_SYMLINKS | ResolveFlag.RESOLVE_NO_XDEV
_STATUS_MAX = 16384


class Credentials(NamedTuple):
    """What a caller has beyond its ids."""

    groups: frozenset[int]
    capabilities: int
    userns: int
    """Inode number of its user namespace, which its capabilities are for."""

    def has(self, capability: Capability) -> bool:
        """Whether the capability is in its effective set."""
        return bool(self.capabilities >> capability.value & 1)


@dataclass(frozen=True, slots=True)
class Within:
    """A namespace of the container's that is not its own, but further in: somebody in it asks."""

    kind: Namespace
    fd: OwnedFd
    owners: tuple[int, ...]
    """Inode numbers of the user namespaces that it belongs to, up to the container's."""


NOBODY = Credentials(frozenset(), 0, 0)
"""A caller that is gone, or that nothing is known of."""


def parse_status(status: bytes, userns: int) -> Credentials:
    """The credentials in a /proc/PID/status (proc_pid_status(5))."""
    groups: frozenset[int] = frozenset()
    capabilities = 0
    for line in status.split(b"\n"):
        if line.startswith(b"Groups:"):
            groups = frozenset(int(word) for word in line[7:].split())
        elif line.startswith(b"CapEff:"):
            capabilities = int(line[7:], 16)
    return Credentials(groups, capabilities, userns)


def is_killed(status: bytes) -> bool:
    """Whether SIGKILL is pending in a /proc/PID/status."""
    return any(
        line.startswith((b"SigPnd:", b"ShdPnd:")) and int(line[7:], 16) >> signal.SIGKILL - 1 & 1
        for line in status.split(b"\n")
    )


@dataclass(frozen=True, slots=True)
class OverflowIds:
    """What ids without a mapping look like from inside a user namespace (/proc/sys/kernel/overflow[ug]id)."""

    uid: int = 65534
    gid: int = 65534


def read_cgroup(top: str, path: str) -> bytes | None:
    """What a file in a cgroup hierarchy says, as much as anybody needs of it; None if there is none, or no longer.

    The path may have names that a container gave, so it leads nowhere but to that hierarchy: cgroups have no links, and
    no mount is crossed.
    """
    try:
        with (
            OwnedFd(os.open(top, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) as directory,
            openat2(directory, path, os.O_RDONLY | os.O_NONBLOCK, _WITHIN) as file,
        ):
            return os.read(file.fileno(), _PART)
    except OSError:
        return None


class KernelHost:
    """The real one."""

    def __init__(self, *, writes: bool = True) -> None:
        """``writes``: whether values of the host may be raised."""
        self._writes = writes
        flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
        self._bases = {Base.PROC: os.open("/proc", flags), Base.SYS: os.open("/sys", flags)}
        self._uptime_fd = os.open("/proc/uptime", os.O_RDONLY | os.O_CLOEXEC)
        self.initial_userns = os.stat("/proc/self/ns/user").st_ino

    def boottime_ns(self) -> int:
        """CLOCK_BOOTTIME in nanoseconds."""
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME)

    def idle_ratio(self) -> float:
        """Idle seconds per second of uptime, summed over all processors."""
        up, idle = os.pread(self._uptime_fd, 128, 0).split()
        return float(idle) / max(float(up), 0.01)

    def read(self, base: Base, path: bytes) -> bytes | None:
        """What a node of the host says; None if there is none or it does not tell."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._bases[base])
        except OSError:
            return None
        try:
            return os.read(fd, _READ_MAX)
        except OSError:
            return None
        finally:
            os.close(fd)

    def read_all(self, base: Base, path: bytes) -> bytes | None:
        """As `read`, of a node that may say much: /proc/cpuinfo has a page for each processor."""
        try:
            with OwnedFd(
                os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._bases[base])
            ) as file:
                parts: list[bytes] = []
                while len(part := os.read(file.fileno(), _PART)) and len(parts) < _PARTS_MAX:
                    parts.append(part)
                return b"".join(parts)
        except OSError:
            return None

    def read_cgroup(self, top: str, path: str) -> bytes | None:
        """See `read_cgroup` of this module."""
        return read_cgroup(top, path)

    def raise_to(self, base: Base, path: bytes, value: int) -> None:
        """Raises a number of the host's to ``value``, unless it is that large already or must not be changed."""
        if not self._writes:
            return
        before = self.read(base, path)
        if before is None or int(before.split()[0]) >= value:
            return
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC, dir_fd=self._bases[base])
            try:
                os.write(fd, b"%d\n" % value)
            finally:
                os.close(fd)
        except OSError as error:
            log.warning("host_value_not_raised", path=path, value=value, error=str(error))
            return
        log.info("host_value_raised", path=path, before=int(before.split()[0]), value=value)

    def credentials(self, pid: int) -> Credentials:
        """Of a thread that waits for us, by its id in this process's PID namespace."""
        proc = self._bases[Base.PROC]
        try:
            userns = os.stat(f"{pid}/ns/user", dir_fd=proc).st_ino
            fd = os.open(f"{pid}/status", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc)
        except OSError:
            return NOBODY
        try:
            return parse_status(os.read(fd, _STATUS_MAX), userns)
        except (OSError, ValueError):
            return NOBODY
        finally:
            os.close(fd)

    def is_killed(self, pid: int) -> bool:
        """Whether a thread that waits for us is about to end, by whichever signal: that has SIGKILL sent to each of its
        process's threads (complete_signal in kernel/signal.c)."""
        try:
            fd = os.open(f"{pid}/status", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.proc)
            with OwnedFd(fd):
                return is_killed(os.read(fd, _STATUS_MAX))
        except OSError:
            return True

    @property
    def proc(self) -> int:
        """A descriptor of the host's procfs."""
        return self._bases[Base.PROC]

    def within(self, pid: int, kind: Namespace, home: int, userns: int) -> Within | None:
        """The namespace of a thread that waits for us, if it is not the one of inode number ``home``.

        None also where it does not belong to the user namespace of number ``userns`` or one further in: who comes from
        outside finds the container's own.
        """
        place = f"{pid}/ns/{kind.name.lower()}"
        try:
            if os.stat(place, dir_fd=self.proc).st_ino == home:
                return None
            fd = OwnedFd(os.open(place, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.proc))
        except OSError:
            return None
        belongs = owners(fd, userns)
        if belongs and kind is Namespace.USER:
            belongs = (os.fstat(fd.fileno()).st_ino, *belongs)  # a capability in it counts for it, too
        return Within(kind, fd, belongs) if belongs else None

    def overflow_ids(self) -> OverflowIds:
        """What unmapped ids look like on this host."""
        uid, gid = (self.read(Base.PROC, b"sys/kernel/" + name) for name in (b"overflowuid", b"overflowgid"))
        return OverflowIds(int(uid or 65534), int(gid or 65534))
