"""Mount namespaces before Linux 6.11, which had no IDs: known by inode number, looked into by going there."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from weakref import WeakValueDictionary

from interceptor.errors import SyscallError
from interceptor.kernel.fd import FdLike, OwnedFd
from interceptor.kernel.namespaces import visiting

#: In a number that stands for a namespace: the rest is its inode number (native/compat.h: IX_NS_BY_INODE).
BY_INODE = 1 << 62

#: Descriptors that somebody else holds, and closes when he is done: a namespace is kept alive by them.
_held: WeakValueDictionary[int, OwnedFd] = WeakValueDictionary()


def remember(number: int, namespace: FdLike) -> None:
    """As long as ``namespace`` is open, the way there need not be looked for."""
    if isinstance(namespace, OwnedFd):
        _held[number] = namespace


@contextmanager
def within(number: int) -> Iterator[OwnedFd]:
    """The calling thread (`namespaces.become_visitor`) in that namespace. Gives the host's procfs.

    Raises `SyscallError`: ENOENT where the namespace has ended, as far as can be seen.
    """
    flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
    with (
        OwnedFd(os.open("/proc", flags)) as proc,
        OwnedFd(os.open("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)) as home,
        _opened(number) as there,
        visiting(there, home),
    ):
        yield proc


def _opened(number: int) -> OwnedFd:
    held = _held.get(number)
    if held is not None and not held.closed:
        return held.dup()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        path = f"/proc/{pid}/ns/mnt"
        with suppress(OSError):
            if os.stat(path).st_ino != number & ~BY_INODE:
                continue
            found = OwnedFd(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            if os.fstat(found.fileno()).st_ino == number & ~BY_INODE:
                return found
            found.close()
    raise SyscallError(errno.ENOENT, f"search for the mount namespace {number & ~BY_INODE}")
