"""What parent and child say to each other while the child comes up: small JSON messages, some with descriptors."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
from types import TracebackType
from typing import NamedTuple

from interceptor.errors import ContainerError
from interceptor.kernel.fd import OwnedFd

#: One message in bytes. What a child says of its failure is cut to fit.
_MESSAGE_MAX = 1 << 16
_FAILURE_MAX = 1 << 14


class Message(NamedTuple):
    """``number`` is a process ID with ``forked``, an exit status with ``exited``."""

    kind: str
    number: int
    text: str
    fds: list[OwnedFd]


class Channel:
    """One end of a SOCK_SEQPACKET pair. End of file means that every holder of the other end is gone."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    @staticmethod
    def pair() -> tuple[Channel, Channel]:
        one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return Channel(one), Channel(other)

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, kind: str, number: int = 0, fds: tuple[int, ...] = (), text: str = "") -> None:
        """Raises `ContainerError` where nobody holds the other end."""
        message = json.dumps([kind, number, text[-_FAILURE_MAX:]]).encode()
        try:
            socket.send_fds(self._socket, [message], fds)
        except (BrokenPipeError, ConnectionResetError):
            raise ContainerError("the other end of the channel is gone") from None

    def fail(self, text: str) -> None:
        """Tell the parent why there will be no child; it raises that."""
        self.send("failed", text=text)

    def receive(self, expected: str, timeout: float | None = None) -> Message:
        """Wait for the message ``expected``, at most ``timeout`` seconds.

        Raises `ContainerError` with the child's words where it failed or is gone, `TimeoutError`.
        """
        message = self.next(timeout)
        if message is None:
            raise ContainerError(f"the child ended before it was {expected}")
        if message.kind == "failed":
            raise ContainerError(message.text)
        if message.kind != expected:
            raise ContainerError(f"the child said {message.kind!r}, expected {expected!r}")
        return message

    def next(self, timeout: float | None = None) -> Message | None:
        """The next message, None at end of file. Raises `TimeoutError`."""
        if not wait_readable(self, timeout):
            raise TimeoutError(f"the child has not answered within {timeout:g} s")
        try:
            data, numbers, _, _ = socket.recv_fds(self._socket, _MESSAGE_MAX, 4, socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError:
            return None
        fds = [OwnedFd(number) for number in numbers]
        if not data:
            return None
        kind, number, text = json.loads(data)
        return Message(kind, number, text, fds)

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Channel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def wait_readable(source: Channel | OwnedFd | socket.socket, timeout: float | None) -> bool:
    """poll(2) one descriptor; False when ``timeout`` seconds (None: no limit) have passed."""
    poller = select.poll()
    poller.register(source.fileno(), select.POLLIN)
    return bool(poller.poll(None if timeout is None else timeout * 1000))


def reap(pid: int) -> None:
    """waitpid(2) for a child of ours that is about to end; nothing where the embedder has reaped it already."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)
