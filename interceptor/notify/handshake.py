"""The OCI seccomp agent: how a runtime hands over the listener of a container's process.

A runtime connects to ``linux.seccomp.listenerPath`` and sends one JSON object, a `ContainerProcessState`, with the
descriptors that it names as SCM_RIGHTS on the same message. It expects no reply, and some connect only to see whether
anybody is there (crun, when it fails later). Source: OCI runtime specification, config-linux.md, "Seccomp".
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable, Iterable

import msgspec

from interceptor.errors import InterceptorError, ProtocolError
from interceptor.observe.log import get_logger
from interceptor.oci.state import ContainerProcessState
from interceptor.sockets import RootServer, peer_credentials

#: The specification's name for the listener.
SECCOMP_FD = "seccompFd"

#: Bounds of one message. Runtimes send one descriptor and a few hundred bytes.
FDS_MAX = 16
STATE_MAX = 1 << 20

_CHUNK = 1 << 16


class ReceivedFds:
    """Descriptors that came with a message, in order. Those that nobody takes are closed at the end."""

    def __init__(self, fds: Iterable[int] = ()) -> None:
        self._fds: list[int | None] = list(fds)

    def __len__(self) -> int:
        return len(self._fds)

    def add(self, fds: Iterable[int]) -> None:
        """Become the owner of ``fds`` too."""
        self._fds.extend(fds)

    def take(self, index: int) -> int:
        """The descriptor at ``index``, which is the caller's to close from now on. It can be taken once."""
        fd = self._fds[index]
        if fd is None:
            raise ValueError(f"descriptor {index} of the message was taken before")
        self._fds[index] = None
        return fd

    def close(self) -> None:
        """Close what was not taken."""
        while self._fds:
            fd = self._fds.pop()
            if fd is not None:
                os.close(fd)


#: Gets the state and the listener, which is the handler's to close. It may be any descriptor: only the kernel can tell.
Handler = Callable[[ContainerProcessState, int], Awaitable[None]]


async def start_agent_server(path: str, handler: Handler, patience: float = 10.0) -> RootServer:
    """Receive listeners at ``path``.

    A connection that has not sent its message after ``patience`` seconds, or sends anything else, is closed with one
    warning in the log, and every descriptor that came with it too. Raises `InterceptorError` where another daemon
    listens.
    """

    async def serve(connection: socket.socket) -> None:
        log = get_logger(socket=path, peer_pid=peer_credentials(connection).pid)
        with contextlib.closing(ReceivedFds()) as fds:
            try:
                async with asyncio.timeout(patience):
                    data = await _receive(connection, fds)
                if not data and not len(fds):
                    log.debug("an empty connection to the seccomp agent")
                    return
                state = parse_state(data)
                listener = fds.take(_listener_index(state, len(fds)))
            except TimeoutError:
                log.warning("refused a seccomp listener", reason=f"no whole message after {patience:g} s")
                return
            except (ProtocolError, ConnectionError) as error:
                log.warning("refused a seccomp listener", reason=str(error))
                return
        # The runtime has no more to say, and must not wait for what follows.
        connection.close()
        try:
            await handler(state, listener)
        except InterceptorError as error:
            log.error(
                "cannot serve a seccomp listener",
                container=state.state.id,
                pid=state.pid,
                error=str(error),
                hint=error.hint,
            )

    return RootServer(path, serve)


def parse_state(data: bytes) -> ContainerProcessState:
    """The state that ``data`` holds. Raises `ProtocolError` with the place of what is wrong."""
    try:
        return msgspec.json.decode(data, type=ContainerProcessState)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"not a ContainerProcessState: {error}") from None


def _listener_index(state: ContainerProcessState, received: int) -> int:
    """Where among the ``received`` descriptors the listener is."""
    names = state.fds or []
    if len(names) != received:
        raise ProtocolError(f"{len(names)} descriptors named, {received} received")
    if names.count(SECCOMP_FD) != 1:
        raise ProtocolError(f"{SECCOMP_FD} named {names.count(SECCOMP_FD)} times; allowed: once")
    return names.index(SECCOMP_FD)


async def _receive(connection: socket.socket, fds: ReceivedFds) -> bytes:
    """One message: all bytes up to the end of the JSON object, or to end of file; its descriptors go to ``fds``."""
    data = bytearray()
    while len(data) <= STATE_MAX:
        chunk = await _recvmsg(connection, fds)
        data += chunk
        if not chunk or _is_whole(data):
            return bytes(data)
    raise ProtocolError(f"a message of more than {STATE_MAX} bytes")


def _is_whole(data: bytearray) -> bool:
    """Whether ``data`` is a whole JSON value: runtimes need not close the connection after it."""
    if not data.rstrip().endswith(b"}"):
        return False
    try:
        msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return True


async def _recvmsg(connection: socket.socket, fds: ReceivedFds) -> bytes:
    """recvmsg(2) once there is something. asyncio's own streams drop descriptors."""
    while True:
        try:
            chunk, ancillary, flags, _ = connection.recvmsg(
                _CHUNK, socket.CMSG_SPACE(FDS_MAX * 4), socket.MSG_CMSG_CLOEXEC
            )
            break
        except BlockingIOError:
            await _readable(connection)
    for level, kind, payload in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            numbers = array.array("i")
            numbers.frombytes(payload[: len(payload) - len(payload) % numbers.itemsize])
            fds.add(numbers)
    if flags & socket.MSG_CTRUNC:
        # The kernel has closed those for which there was no room (unix(7)).
        raise ProtocolError(
            f"descriptors lost: more than {FDS_MAX} were sent, or this process has no number free"
        )
    if len(fds) > FDS_MAX:
        raise ProtocolError(f"more than {FDS_MAX} descriptors")
    return chunk


async def _readable(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(connection, wake)
    try:
        await ready
    finally:
        loop.remove_reader(connection)
