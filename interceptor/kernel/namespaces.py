"""Namespaces: joining and leaving, and a thread that may visit other mount namespaces."""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from interceptor._native import lib
from interceptor.kernel.call import c_fd, checked
from interceptor.kernel.fd import FdLike, OwnedFd
from interceptor.kernel.flags import CLONE_FS, CLONE_NEWNS


def setns(fd: FdLike, kind: int) -> None:
    """setns(2) of the calling thread."""
    checked(lib.ix_setns(c_fd(fd), kind), "setns", fd, hex(kind))


def unshare(flags: int) -> None:
    """unshare(2) of the calling thread."""
    checked(lib.ix_unshare(flags), "unshare", hex(flags))


def open_namespace(pid: int, name: str) -> OwnedFd:
    """``/proc/PID/ns/NAME``. Raises `OSError`."""
    return OwnedFd(os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC))


_NS_GET_USERNS = 0xB701
_NS_GET_PARENT = 0xB702
_NS_MNT_GET_NEXT = 0x8010B70B
_NS_MNT_GET_PREV = 0x8010B70C
_NESTING_MAX = 33
"""Of user namespaces (kernel/user_namespace.c)."""


def belongs_to(fd: FdLike, user_namespace: FdLike) -> bool:
    """Whether ``fd`` is a namespace that is owned by a user namespace or by one below it (ioctl_nsfs(2)).

    A descriptor that is of no namespace is asked nothing: behind it may be a server that never answers.
    """
    result = lib.ix_belongs_to(c_fd(fd), c_fd(user_namespace))
    return bool(checked(result, "statx", fd, user_namespace))


def owners(namespace: FdLike, last: int) -> tuple[int, ...]:
    """Inode numbers of the user namespace that owns a namespace and of those above it, up to the one numbered ``last``.

    Empty if that is not among them. The descriptor must be one of a namespace.
    """
    found: list[int] = []
    try:
        at = OwnedFd(fcntl.ioctl(c_fd(namespace), _NS_GET_USERNS))
        for _ in range(_NESTING_MAX):
            found.append(os.fstat(at.fileno()).st_ino)
            if found[-1] == last:
                return tuple(found)
            at = OwnedFd(fcntl.ioctl(at.fileno(), _NS_GET_PARENT))
    except OSError:
        pass  # EPERM: above the initial one there is none
    return ()


def owner(namespace: FdLike) -> OwnedFd:
    """The user namespace that owns a namespace (ioctl_ns(2)). Raises `OSError`: EPERM outside of one's own."""
    return OwnedFd(fcntl.ioctl(c_fd(namespace), _NS_GET_USERNS))


def other_mount_namespaces(namespace: FdLike, most: int) -> Iterator[tuple[OwnedFd, int]]:
    """Mount namespaces beside one, with their IDs: at most so many made after it, and as many made before.

    By NS_MNT_GET_NEXT and NS_MNT_GET_PREV of ioctl_nsfs(2) (6.12+; before: none), in the order of their IDs. That is
    only nearly the order in which they were made: each CPU takes its IDs from a batch of its own. Only those whose
    owner grants the caller CAP_SYS_ADMIN. A descriptor is closed when the next one is asked for.
    """
    info = bytearray(16)  # struct mnt_ns_info: size, number of mounts, ID
    for request in (_NS_MNT_GET_NEXT, _NS_MNT_GET_PREV):
        at = OwnedFd(os.dup(c_fd(namespace)))
        for _ in range(most):
            info[:4] = len(info).to_bytes(4, sys.byteorder)
            try:
                following = OwnedFd(fcntl.ioctl(at.fileno(), request, info, True))
            except OSError:
                break  # ENOENT: that was the last
            finally:
                at.close()
            at = following
            yield at, int.from_bytes(info[8:], sys.byteorder)
        at.close()


def become_visitor() -> None:
    """Gives the calling thread a root and working directory of its own: setns to a mount namespace demands it."""
    unshare(CLONE_FS)


def start_janitor(sock: OwnedFd) -> None:
    """A native thread that unmounts the path in each message on ``sock``, which becomes its own."""
    number = sock.take()
    result = lib.ix_start_janitor(number)
    if result < 0:
        os.close(number)
    checked(result, "ix_start_janitor")


@contextmanager
def visiting(namespace: FdLike, home: FdLike) -> Iterator[None]:
    """The calling thread (see `become_visitor`) in another mount namespace, its root that namespace's root."""
    setns(namespace, CLONE_NEWNS)
    try:
        yield
    finally:
        setns(home, CLONE_NEWNS)
