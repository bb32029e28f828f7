"""The process at which managers wait before they look into a container's files, and after they have changed them.

Docker and Podman open the file `LOWER` of a layer's directory each time that they begin to work in its overlay, and
again when they have done (Get and Put of their overlay drivers): for `docker cp`, `export`, `diff`. A permission event
of fanotify(7) has them wait there until what the kernel remembers of both overlays has been dropped.

A process of its own, which depends on nobody (see `interceptor.kernel.fanotify.Gate`). It ends with the daemon, and the
waiting with it; the next daemon starts another.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
from collections.abc import Callable

from interceptor.errors import SyscallError
from interceptor.kernel.fanotify import Gate
from interceptor.kernel.fd import OwnedFd
from interceptor.kernel.process import close_range

#: Beside the upper directory: where Docker's and Podman's drivers keep the list of the layers below.
LOWER = b"lower"

#: For one answer of the process, in seconds.
_TIMEOUT = 10.0
_MESSAGE_MAX = 4096

#: Drops what the kernel remembers of the names in a filesystem.
Forget = Callable[[OwnedFd], None]


class Gatekeeper:
    """The daemon's end."""

    def __init__(self, forget: Forget) -> None:
        """Starts the process. Raises `OSError`."""
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(_TIMEOUT)
        self._child = os.fork()
        if self._child == 0:
            _in_child(theirs.fileno(), forget)
        theirs.close()

    def add(self, cid: str, manager: OwnedFd, mapped: OwnedFd, directory: OwnedFd) -> None:
        """From now on managers wait at `LOWER` in ``directory`` until both overlays are in step. Raises `OSError`."""
        fds = [manager.fileno(), mapped.fileno(), directory.fileno()]
        self._ask(b"+" + cid.encode(), fds)

    def remove(self, cid: str) -> None:
        """Nobody waits there any more. Raises `OSError`."""
        self._ask(b"-" + cid.encode(), [])

    def fileno(self) -> int:
        """Readable when the process has ended."""
        return self._socket.fileno()

    def close(self) -> None:
        """Ends the process, without waiting for it."""
        self._socket.close()
        os.kill(self._child, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._child, os.WNOHANG)

    def _ask(self, message: bytes, fds: list[int]) -> None:
        socket.send_fds(self._socket, [message], fds)
        failed = int(self._socket.recv(_MESSAGE_MAX) or b"%d" % errno.EPIPE)
        if failed:
            raise SyscallError(failed, f"fanotify_mark({LOWER.decode()}, FAN_OPEN_PERM)")


def _in_child(sock: int, forget: Forget) -> None:
    """Never returns."""
    try:
        # It ends when the daemon has, not with it: who waits is let through in any case.
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        for first, last in ((3, sock - 1), (sock + 1, 0xFFFFFFFF)):
            if first <= last:
                close_range(first, last)
        _serve(socket.socket(fileno=sock), forget)
    finally:
        os._exit(0)


def _serve(sock: socket.socket, forget: Forget) -> None:
    containers: dict[str, list[OwnedFd]] = {}
    files: dict[tuple[int, int], str] = {}
    gate: Gate | None = None
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    while True:
        ready = {fd for fd, _ in poll.poll()}
        if gate is not None and gate.fileno() in ready:
            for file in gate.waiting():
                for root in containers[files[file]][:2] if file in files else ():
                    forget(root)
        if sock.fileno() not in ready:
            continue
        message, fds, _, _ = socket.recv_fds(sock, _MESSAGE_MAX, 3)
        if not message:
            return
        cid, failed = message[1:].decode(), 0
        try:
            if message[:1] == b"+":
                containers[cid] = [OwnedFd(fd) for fd in fds]
                if gate is None:
                    gate = Gate()
                    poll.register(gate, select.POLLIN)
                files[gate.add(containers[cid][2], LOWER)] = cid
            elif cid in containers and gate is not None:
                # The manager may have removed the file: then its mark is gone as well.
                with contextlib.suppress(SyscallError):
                    gate.remove(containers[cid][2], LOWER)
        except OSError as error:
            failed = error.errno or errno.EIO
        if message[:1] == b"-" or failed:
            files = {file: other for file, other in files.items() if other != cid}
            for root in containers.pop(cid, []):
                root.close()
        sock.send(b"%d" % failed)
