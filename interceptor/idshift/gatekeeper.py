"""The process at which managers wait before they look into a container's files, and after they have changed them.

Docker and Podman open the file `LOWER` of a layer's directory each time that they begin to work in its overlay, and
again when they have done (Get and Put of their overlay drivers): for `docker cp`, `export`, `diff`. A permission event
of fanotify(7) has them wait there until what the kernel remembers of both overlays has been dropped.

A process of its own, which depends on nobody (see `interceptor.kernel.fanotify.Gate`). It ends with the daemon, and the
waiting with it; the next daemon starts another. Should it be stopped or stuck while somebody waits, its *warden* kills
it after `PATIENCE`, and everybody is let through: a second process, which holds the same group and does nothing else.
Both sleep while nobody waits.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import select
import signal
import socket
from collections.abc import Callable
from typing import NoReturn

from interceptor.errors import SyscallError
from interceptor.kernel.fanotify import Gate
from interceptor.kernel.fd import OwnedFd, is_ready
from interceptor.kernel.process import close_all_but

#: Beside the upper directory: where Docker's and Podman's drivers keep the list of the layers below.
LOWER = b"lower"

#: Seconds after which a gatekeeper that has not got anywhere, with somebody waiting, is no good any more.
PATIENCE = 5.0

#: For one answer of the process to the daemon, in seconds.
_TIMEOUT = 5.0
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
        try:
            failed = int(self._socket.recv(_MESSAGE_MAX) or b"%d" % errno.EPIPE)
        except TimeoutError:
            # Its answer would be taken for that to the next question; its end is heard by whoever asks `fileno`.
            os.kill(self._child, signal.SIGKILL)
            raise
        if failed:
            raise SyscallError(failed, f"fanotify_mark({LOWER.decode()}, FAN_OPEN_PERM)")


def _in_child(sock: int, forget: Forget) -> NoReturn:
    try:
        # It ends when the daemon has, not with it: who waits is let through in any case.
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        close_all_but((0, 1, 2, sock))
        _Process(socket.socket(fileno=sock), forget).serve()
    finally:
        os._exit(0)


class _Process:
    """The gatekeeper itself."""

    def __init__(self, sock: socket.socket, forget: Forget) -> None:
        self._socket = sock
        self._forget = forget
        self._containers: dict[str, list[OwnedFd]] = {}
        self._files: dict[tuple[int, int], str] = {}
        self._gate: Gate | None = None
        self._progress = _Progress()
        self._warden: OwnedFd | None = None
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)

    def serve(self) -> None:
        """Until the daemon has ended."""
        while True:
            ready = {fd for fd, _ in self._poll.poll()}
            if self._gate is not None and self._gate.fileno() in ready:
                self._progress.begin()
                for file in self._gate.waiting():
                    for root in self._containers[self._files[file]][:2] if file in self._files else ():
                        self._forget(root)
                        self._progress.step()
                self._progress.done()
            if self._socket.fileno() in ready and not self._obey():
                return
            if self._warden is not None and self._warden.fileno() in ready:
                # Killed.
                self._poll.unregister(self._warden)
                self._warden.close()
                self._warden = None
                os.wait()
            self._have_warden()

    def _have_warden(self) -> None:
        if self._gate is not None and self._warden is None:
            # Where there can be no other process it is tried again at the next turn.
            with contextlib.suppress(OSError):
                self._warden = _start_warden(self._gate, self._progress)
                self._poll.register(self._warden, select.POLLIN)

    def _obey(self) -> bool:
        """Does what the daemon says; False: nobody says anything any more."""
        message, fds, _, _ = socket.recv_fds(self._socket, _MESSAGE_MAX, 3)
        if not message:
            return False
        cid, failed = message[1:].decode(), 0
        try:
            if message[:1] == b"+":
                self._add(cid, [OwnedFd(fd) for fd in fds])
            elif cid in self._containers and self._gate is not None:
                # The manager may have removed the file: then its mark is gone as well.
                with contextlib.suppress(SyscallError):
                    self._gate.remove(self._containers[cid][2], LOWER)
        except OSError as error:
            failed = error.errno or errno.EIO
        if message[:1] == b"-" or failed:
            self._files = {file: other for file, other in self._files.items() if other != cid}
            for root in self._containers.pop(cid, []):
                root.close()
        self._socket.send(b"%d" % failed)
        return True

    def _add(self, cid: str, roots: list[OwnedFd]) -> None:
        self._containers[cid] = roots
        if self._gate is None:
            self._gate = Gate()
            self._poll.register(self._gate, select.POLLIN)
        self._have_warden()
        self._files[self._gate.add(roots[2], LOWER)] = cid


# ---- its warden --------------------------------------------------------------------------------------------


class _Progress:
    """How far the gatekeeper is, in memory that both have, and what wakes the warden up."""

    def __init__(self) -> None:
        self._counts = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")
        self.bell = OwnedFd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))

    def begin(self) -> None:
        """Somebody waits."""
        self._counts[0] += 1
        os.eventfd_write(self.bell.fileno(), 1)

    def step(self) -> None:
        """One filesystem is in step."""
        self._counts[2] += 1

    def done(self) -> None:
        """Nobody waits that has been seen."""
        self._counts[1] = self._counts[0]

    def now(self) -> tuple[int, int, int]:
        """Turns begun, turns done, steps."""
        return self._counts[0], self._counts[1], self._counts[2]

    def heard(self) -> None:
        """The bell."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.bell.fileno())


def _start_warden(gate: Gate, progress: _Progress) -> OwnedFd:
    """Returns its pidfd, when it holds no more than it needs. Raises `OSError`."""
    watched = os.getpid()
    read, write = os.pipe2(os.O_CLOEXEC)
    try:
        child = os.fork()
    except OSError:
        os.close(write)
        os.close(read)
        raise
    if child == 0:
        try:
            gatekeeper = os.pidfd_open(watched)
            if os.getppid() == watched:
                close_all_but((0, 1, 2, gatekeeper, gate.fileno(), progress.bell.fileno()))
                _watch_over(gatekeeper, gate, progress)
        finally:
            os._exit(0)
    os.close(write)
    os.read(read, 1)
    os.close(read)
    return OwnedFd(os.pidfd_open(child))


def _watch_over(gatekeeper: int, gate: Gate, progress: _Progress) -> None:
    """Returns when the gatekeeper has ended: with its own end the last descriptor of the group is closed."""
    poll = select.poll()
    for fd in (gatekeeper, gate.fileno(), progress.bell.fileno()):
        poll.register(fd, select.POLLIN)
    while True:
        poll.poll()
        progress.heard()
        before, waiting = progress.now(), is_ready(gate)
        if is_ready(gatekeeper, PATIENCE):
            return
        begun, done, _ = now = progress.now()
        # No turn since, although somebody waited to be seen, or the same step still.
        if now == before and (begun != done or waiting):
            signal.pidfd_send_signal(gatekeeper, signal.SIGKILL)
            return
