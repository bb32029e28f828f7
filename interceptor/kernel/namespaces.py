"""Namespaces: joining and leaving, and a thread that may visit other mount namespaces."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from interceptor._native import lib
from interceptor.kernel.call import c_fd, checked
from interceptor.kernel.fd import FdLike, OwnedFd
from interceptor.kernel.flags import CLONE_FS, CLONE_NEWNS


def setns(fd: FdLike, kind: int) -> None:
    """setns(2) of the calling thread."""
    checked(lib.ix_setns(c_fd(fd), kind), "setns", c_fd(fd), hex(kind))


def unshare(flags: int) -> None:
    """unshare(2) of the calling thread."""
    checked(lib.ix_unshare(flags), "unshare", hex(flags))


def open_namespace(pid: int, name: str) -> OwnedFd:
    """``/proc/PID/ns/NAME``. Raises `OSError`."""
    return OwnedFd(os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC))


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
