"""Listening Unix sockets for root and our own user only, and the tasks that serve their connections."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import os
import socket
import stat
import struct
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from interceptor.errors import InterceptorError
from interceptor.observe.log import get_logger

Handler = Callable[[socket.socket], Awaitable[None]]

#: Errors of accept(2) that mean "no descriptor or memory now", not "this socket is broken".
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}

#: Seconds to leave the backlog alone in that case.
_PAUSE = 1.0


class PeerCredentials(NamedTuple):
    """``struct ucred`` of unix(7): who connected, as numbered in our own namespaces."""

    pid: int
    uid: int
    gid: int


def peer_credentials(connection: socket.socket) -> PeerCredentials:
    """Credentials that the peer had when it called connect(2)."""
    layout = struct.Struct("3i")
    return PeerCredentials(
        *layout.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, layout.size))
    )


def listen(path: str, backlog: int = 128) -> socket.socket:
    """A non-blocking stream socket that listens at ``path`` with mode 0600.

    What a killed daemon left there is replaced; where a living one listens, `InterceptorError` is raised.
    """
    _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        listener.bind(path)
        # Before listen(2) nobody can connect, so there is no moment with a wider mode.
        os.chmod(path, 0o600)
        listener.listen(backlog)
    except OSError as error:
        listener.close()
        raise InterceptorError(f"{path}: cannot listen: {error.strerror}") from error
    return listener


def _remove_stale(path: str) -> None:
    # connect(2) says ECONNREFUSED for any file that is no socket, too.
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise InterceptorError(f"{path}: in the way, and not a socket", "move it elsewhere")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except FileNotFoundError:
            return
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:
            pass  # a full backlog: somebody is there
        except OSError as error:
            raise InterceptorError(f"{path}: in the way, and not ours to remove: {error.strerror}") from error
    raise InterceptorError(
        f"{path}: another daemon listens there", "stop it, or give this one a runtime_dir of its own"
    )


class RootServer:
    """Accepts connections of root and of our own user, and runs ``handler`` on each as a task, ``limit`` at a time.

    The connection is non-blocking and is closed when its handler ends. Nothing runs while nobody connects.
    """

    def __init__(self, path: str, handler: Handler, limit: int = 256) -> None:
        self._loop = asyncio.get_running_loop()
        self._path = path
        self._handler = handler
        self._limit = limit
        self._connections: set[asyncio.Task[None]] = set()
        self._log = get_logger(socket=path)
        self._pause: asyncio.TimerHandle | None = None
        self._listener = listen(path)
        self._inode = os.stat(path).st_ino
        self._loop.add_reader(self._listener, self._accept)

    def close(self) -> None:
        """Stop listening, remove the socket file if it is still ours, and cancel what is being served."""
        self._loop.remove_reader(self._listener)
        self._listener.close()
        if self._pause is not None:
            self._pause.cancel()
        with contextlib.suppress(FileNotFoundError):
            if os.stat(self._path).st_ino == self._inode:
                os.unlink(self._path)
        for task in self._connections:
            task.cancel()

    async def wait_closed(self) -> None:
        """Wait until everything that `close` cancelled has ended."""
        await asyncio.gather(*self._connections, return_exceptions=True)

    def _accept(self) -> None:
        """Called when somebody waits. Synchronous: a coroutine that is cancelled may lose what it has accepted."""
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            if error.errno not in _EXHAUSTED:
                raise
            self._log.warning("cannot accept a connection", error=error.strerror)
            self._loop.remove_reader(self._listener)
            # No event tells that a descriptor or memory has become free.
            self._pause = self._loop.call_later(_PAUSE, self._resume)
            return
        task = self._loop.create_task(self._serve(connection))
        self._connections.add(task)
        task.add_done_callback(functools.partial(self._done, connection))
        if len(self._connections) >= self._limit:
            self._loop.remove_reader(self._listener)

    def _resume(self) -> None:
        if self._listener.fileno() >= 0:
            self._loop.add_reader(self._listener, self._accept)

    def _done(self, connection: socket.socket, task: asyncio.Task[None]) -> None:
        # Not in the task itself: one that is cancelled before its first step runs no line of its own.
        connection.close()
        self._connections.discard(task)
        if len(self._connections) == self._limit - 1:
            self._resume()

    async def _serve(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        peer = peer_credentials(connection)
        if peer.uid not in (0, os.geteuid()):
            self._log.warning("refused a connection of another user", peer_pid=peer.pid, peer_uid=peer.uid)
            return
        try:
            await self._handler(connection)
        except Exception:
            self._log.exception("internal error while serving a connection", peer_pid=peer.pid)
