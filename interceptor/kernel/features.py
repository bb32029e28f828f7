"""Kernel features, each found out by trying; never by the kernel's version."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass

from interceptor._native import lib
from interceptor.errors import SyscallError
from interceptor.kernel import mount, stat
from interceptor.kernel.fd import OwnedFd
from interceptor.kernel.flags import CLONE_NEWNS, CLONE_NEWUSER, MountAttr, MountFlag, MoveMountFlag
from interceptor.kernel.namespaces import open_namespace, unshare
from interceptor.kernel.whereabouts import BY_INODE

#: What this kernel has is taken for granted; each younger mechanism is tried.
OLDEST = "5.10"
_WAIT_KILLABLE_RECV = 1 << 5
_RET_ALLOW = struct.pack("=HBBI", 0x06, 0, 0, 0x7FFF0000)
_NOTIF_SET_FLAGS = 0x40082104
_NOTIF_ADDFD = 0x40182103
_ADDFD_FLAG_SEND = 2
_F_DUPFD_QUERY = 1024 + 3


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


def _addfd_send() -> None:
    """No call has the ID 0, but the flags are looked at before that."""
    with _listener(0) as listener:
        request = struct.pack("=QIIII", 0, _ADDFD_FLAG_SEND, 0, 0, 0)
        try:
            fcntl.ioctl(listener.fileno(), _NOTIF_ADDFD, request)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise


def _thread_pidfd() -> None:
    os.close(os.pidfd_open(os.getpid(), os.O_EXCL))


def _same_file() -> None:
    fcntl.fcntl(1, _F_DUPFD_QUERY, 1)


def _pidns() -> None:
    _workshop()
    with open_namespace(os.getpid(), "pid") as namespace, mount.fsopen(b"proc") as context:
        mount.fsconfig(context, 5, b"pidns", None, namespace.fileno())


def _group() -> None:
    _workshop()
    for place in (b"/proc", b"/sys"):
        mount.mount(b"x", place, b"tmpfs")
    mount.mount(None, b"/proc", None, MountFlag.MS_SHARED)
    mount.mount(b"/proc", b"/sys", None, MountFlag.MS_BIND)
    mount.mount(None, b"/sys", None, MountFlag.MS_PRIVATE)
    mount.move_mount(mount.AT_FDCWD, b"/proc", mount.AT_FDCWD, b"/sys", MoveMountFlag.MOVE_MOUNT_SET_GROUP)


def _setattr() -> None:
    _workshop()
    mount.mount_setattr(mount.AT_FDCWD, b"/", set_=MountAttr.MOUNT_ATTR_NODEV)


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
    if stat.reads_mountinfo():
        raise OSError(errno.ENOSYS, "statmount")
    stat.statmount(stat.listmount()[0])


def _statmount_elsewhere() -> None:
    namespace = stat.mount_namespace_id(open_namespace(os.getpid(), "mnt"))
    if namespace & BY_INODE or stat.reads_mountinfo():
        raise OSError(errno.ENOSYS, "statmount of another namespace")
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
    (
        "STATX_MNT_ID_UNIQUE",
        "6.8",
        False,
        "a mount's identity; else its reusable ID with device and root, and guards remember no verdicts",
        _unique_id,
    ),
    (
        "statmount, listmount",
        "6.8",
        False,
        "facts about mounts; else from mountinfo, which takes longer the more mounts there are",
        _statmount,
    ),
    (
        "statmount in another namespace",
        "6.11",
        False,
        "facts about a container's mounts; else the daemon goes there to look",
        _statmount_elsewhere,
    ),
    (
        "mount_setattr",
        "5.12",
        False,
        "flags and propagation of trees that nobody sees yet; else they stand where nobody looks, and mount(2) does it",
        _setattr,
    ),
    (
        "SECCOMP_ADDFD_FLAG_SEND",
        "5.14",
        False,
        "a descriptor is handed over and the call answered in one step; else in two, with a look at the caller between",
        _addfd_send,
    ),
    (
        "MOVE_MOUNT_SET_GROUP",
        "5.15",
        False,
        "a welded mount shares what it shared before; else it is private",
        _group,
    ),
    (
        "MOVE_MOUNT_BENEATH",
        "6.5",
        False,
        "a base is replaced without a gap; else one after the other, and not with the container's own mounts on it",
        _beneath,
    ),
    (
        "PIDFD_THREAD",
        "6.9",
        False,
        "descriptors of threads with tables of their own; else the table of the thread's process",
        _thread_pidfd,
    ),
    ("F_DUPFD_QUERY", "6.10", False, "a context is known again; else by kcmp", _same_file),
    (
        "fsconfig pidns",
        "6.17",
        False,
        "a new procfs is told its PID namespace; else a child there makes it",
        _pidns,
    ),
)


def probe() -> list[Feature]:
    """Tries everything, as root. Takes a few milliseconds and leaves nothing behind."""
    return [
        Feature(name, minimum, _in_child(body), needed, why) for name, minimum, needed, why, body in _PROBES
    ]
