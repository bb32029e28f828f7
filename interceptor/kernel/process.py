"""Processes by descriptor, and paths opened on behalf of others."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from interceptor._native import lib
from interceptor.kernel.call import Path, c_fd, c_path, checked, owned
from interceptor.kernel.fd import FdLike, OwnedFd


def pidfd_open(pid: int) -> OwnedFd:
    """pidfd_open(2). Raises `OSError` (ESRCH: no such process)."""
    return OwnedFd(os.pidfd_open(pid))


def pidfd_getfd(pidfd: FdLike, fd: int) -> OwnedFd:
    """pidfd_getfd(2)."""
    return owned(lib.ix_pidfd_getfd(c_fd(pidfd), fd), "pidfd_getfd", c_fd(pidfd), fd)


def openat2(dirfd: FdLike, path: Path, flags: int, resolve: int = 0, mode: int = 0) -> OwnedFd:
    """openat2(2), always CLOEXEC."""
    result = lib.ix_openat2(c_fd(dirfd), c_path(path), flags, mode, resolve)
    return owned(result, "openat2", dirfd, path, hex(flags), hex(resolve))


@contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """Interruptible calls in the block that wait longer fail with EINTR. For the main thread; uses SIGALRM."""
    previous = signal.signal(signal.SIGALRM, lambda _number, _frame: None)
    # Again and again: the first one may come just before the call.
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def same_file(a: FdLike, b: FdLike) -> bool:
    """Whether two descriptors are of one open file (F_DUPFD_QUERY of fcntl(2), or kcmp(2))."""
    return checked(lib.ix_same_file(c_fd(a), c_fd(b)), "kcmp", c_fd(a), c_fd(b)) == 1


def chroot_fd(fd: FdLike) -> None:
    """fchdir(2), chroot(2): the root of the calling thread."""
    checked(lib.ix_chroot_fd(c_fd(fd)), "chroot", c_fd(fd))


def close_range(first: int, last: int = 0xFFFFFFFF) -> None:
    """close_range(2)."""
    checked(lib.ix_close_range(first, last), "close_range", first, last)


def close_all_but(keep: Iterable[int]) -> None:
    """close_range(2) around what is kept."""
    first = 0
    for fd in sorted(set(keep)):
        if fd > first:
            close_range(first, fd - 1)
        first = fd + 1
    close_range(first)


def host_gid(pid: int, gid: int) -> int:
    """The host's number of what is group ``gid`` in the user namespace of a process (user_namespaces(7), gid_map).

    One that is not mapped is (gid_t)-1, which is no group's. Raises `OSError`.
    """
    with open(f"/proc/{pid}/gid_map") as file:
        for line in file:
            first, lower, count = (int(word) for word in line.split())
            if first <= gid < first + count:
                return lower + gid - first
    return 0xFFFFFFFF


def start_time(pid: int) -> int | None:
    """Field 22 of ``/proc/PID/stat``; None if there is no such process."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            text = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(text.rpartition(")")[2].split()[19])
