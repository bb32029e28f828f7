"""Wait for ``READY=1`` of sd_notify(3), from a daemon or from a whole container's systemd, without polling."""

from __future__ import annotations

import os
import select
import socket
import time
from pathlib import Path
from types import TracebackType


class NotReady(Exception):
    """The process ended, or the time was up, before it said that it was ready."""


class NotifySocket:
    """A datagram socket at ``path`` that anybody may write to, as ``$NOTIFY_SOCKET`` needs it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.bind(str(path))
        # The container's root writes to it: another user for the host.
        path.chmod(0o666)

    def __enter__(self) -> NotifySocket:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()
        self.path.unlink(missing_ok=True)

    def wait_ready(self, pid: int, seconds: float, *, wake: int | None = None) -> bool:
        """Return True when READY=1 arrives, False when the descriptor ``wake`` becomes readable first.

        Raises `NotReady` when the process ``pid`` ends or ``seconds`` have passed.
        """
        pidfd = os.pidfd_open(pid)
        try:
            poller = select.poll()
            for descriptor in (self._socket.fileno(), pidfd, *([] if wake is None else [wake])):
                poller.register(descriptor, select.POLLIN)
            deadline = time.monotonic() + seconds
            while True:
                left = deadline - time.monotonic()
                ready = {descriptor for descriptor, _ in poller.poll(max(0.0, left) * 1000)}
                if self._socket.fileno() in ready and b"READY=1" in self._socket.recv(8192).split(b"\n"):
                    return True
                if wake is not None and wake in ready:
                    return False
                if pidfd in ready:
                    raise NotReady(f"process {pid} ended before it was ready")
                if left <= 0:
                    raise NotReady(f"process {pid} was not ready after {seconds:.0f} s")
        finally:
            os.close(pidfd)
