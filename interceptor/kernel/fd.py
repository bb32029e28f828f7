"""Descriptors that close themselves."""

from __future__ import annotations

import os
import select
from types import TracebackType
from typing import Protocol


class OwnedFd:
    """A file descriptor with one owner. Closed by `close`, at the end of a ``with`` block, or when forgotten."""

    __slots__ = ("__weakref__", "_fd")

    def __init__(self, fd: int) -> None:
        if fd < 0:
            raise ValueError(f"not a descriptor: {fd}")
        self._fd = fd

    def fileno(self) -> int:
        """The descriptor. Raises `ValueError` once it is closed or given away."""
        if self._fd < 0:
            raise ValueError("descriptor is closed")
        return self._fd

    def take(self) -> int:
        """Gives the descriptor away: from now on the caller closes it."""
        fd = self.fileno()
        self._fd = -1
        return fd

    def dup(self) -> OwnedFd:
        """A second descriptor on the same object (CLOEXEC)."""
        return OwnedFd(os.dup(self.fileno()))

    @property
    def closed(self) -> bool:
        return self._fd < 0

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def __enter__(self) -> OwnedFd:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"OwnedFd({self._fd})"


FdLike = int | OwnedFd


def fileno(fd: FdLike) -> int:
    """The number of a descriptor, owned or not."""
    return fd if isinstance(fd, int) else fd.fileno()


class HasFileno(Protocol):
    """A socket, an `OwnedFd`."""

    def fileno(self) -> int:
        """Its descriptor."""


def is_ready(fd: int | HasFileno, timeout_s: float = 0.0, events: int = select.POLLIN) -> bool:
    """Whether a descriptor is, or becomes in time, readable (or what ``events`` says), or hangs up.

    poll(2), because select(2) knows none from 1024 on: a daemon of a hundred containers has more.
    """
    poller = select.poll()
    poller.register(fd, events)
    return bool(poller.poll(max(0.0, timeout_s) * 1000))
