"""Kernel features, each found out by trying; never by the kernel's version."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass

from interceptor._native import lib
from interceptor.errors import SyscallError
from interceptor.kernel import mount, stat
from interceptor.kernel.fd import OwnedFd
from interceptor.kernel.flags import CLONE_NEWNS, CLONE_NEWUSER
from interceptor.kernel.namespaces import open_namespace, unshare

_WAIT_KILLABLE_RECV = 1 << 5
_RET_ALLOW = struct.pack("=HBBI", 0x06, 0, 0, 0x7FFF0000)
_NOTIF_SET_FLAGS = 0x40082104


@dataclass(frozen=True, slots=True)
class Feature:
    """One feature, the Linux version that brought it, and what it is used for."""

    name: str
    minimum: str
    available: bool
    needed: bool
    """False: there is a fallback."""
    why: str


def _in_child(body: Callable[[], None]) -> bool:
    """Whether ``body`` succeeds in a process of its own, whose namespaces and filters die with it."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            body()
            status = 0
        except OSError:
            pass
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _listener(flags: int) -> OwnedFd:
    fd = lib.ix_seccomp_listen(_RET_ALLOW, 1, flags)
    if fd < 0:
        raise SyscallError(-fd, "seccomp(SECCOMP_SET_MODE_FILTER)")
    return OwnedFd(fd)


def _sync_wake_up() -> None:
    with _listener(0) as listener:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.ioctl(listener.fileno(), ctypes.c_ulong(_NOTIF_SET_FLAGS), ctypes.c_ulong(1)) < 0:
            raise OSError(ctypes.get_errno(), "SECCOMP_IOCTL_NOTIF_SET_FLAGS")


def _workshop() -> None:
    unshare(CLONE_NEWNS)
    mount.mount(b"none", b"/", None, 0x4000 | 0x40000)


def _detached() -> tuple[OwnedFd, OwnedFd]:
    _workshop()
    return mount.new_mount(b"tmpfs", {}), mount.new_mount(b"tmpfs", {})


def _beneath() -> None:
    lower, upper = _detached()
    mount.attach(upper, mount.AT_FDCWD, b"/proc")
    mount.attach(lower, upper, beneath=True)


def _statmount() -> None:
    stat.statmount(stat.listmount()[0])


def _statmount_elsewhere() -> None:
    namespace = stat.mount_namespace_id(open_namespace(os.getpid(), "mnt"))
    stat.statmount(stat.listmount(namespace=namespace)[0], namespace)


def _unique_id() -> None:
    if not stat.statx(mount.AT_FDCWD, b"/").unique:
        raise OSError(errno.ENOSYS, "STATX_MNT_ID_UNIQUE")


_PROBES: tuple[tuple[str, str, bool, str, Callable[[], None]], ...] = (
    ("user namespaces", "3.8", True, "welds are made in one", lambda: unshare(CLONE_NEWUSER | CLONE_NEWNS)),
    ("seccomp user notification", "5.5", True, "how calls are trapped", lambda: _listener(0).close()),
    (
        "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV",
        "5.19",
        False,
        "signals do not interrupt a call being handled; else its result is kept for the restarted call",
        lambda: _listener(_WAIT_KILLABLE_RECV).close(),
    ),
    ("SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP", "6.6", False, "answers come six times faster", _sync_wake_up),
    (
        "fsopen, fsmount, move_mount",
        "5.2",
        True,
        "composites are built detached",
        lambda: _detached() and None,
    ),
    ("STATX_MNT_ID_UNIQUE", "6.8", True, "a mount's identity", _unique_id),
    ("statmount, listmount", "6.8", True, "facts about mounts, without parsing", _statmount),
    (
        "statmount in another namespace",
        "6.11",
        True,
        "facts about a container's mounts",
        _statmount_elsewhere,
    ),
    ("move_mount beneath", "6.5", False, "a base is replaced without a gap", _beneath),
)


def probe() -> list[Feature]:
    """Tries everything, as root. Takes a few milliseconds and leaves nothing behind."""
    return [
        Feature(name, minimum, _in_child(body), needed, why) for name, minimum, needed, why, body in _PROBES
    ]
