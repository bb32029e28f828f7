"""The client side of the control socket. Standard library only: the hook runs while a runtime waits for it."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from time import monotonic

from interceptor.errors import InterceptorError, NoDaemon, ProtocolError

#: One message, request or reply, with its newline, in bytes.
MESSAGE_MAX = 1 << 20

_CHUNK = 1 << 16


def request(path: str, message: dict[str, object], timeout: float) -> object:
    """Send ``message`` to the daemon's control socket at ``path``; return the ``result`` of its reply.

    ``timeout`` is in seconds, for the whole exchange. Raises `InterceptorError` with the daemon's own message where it
    refuses, with a hint where no daemon answers, and `ProtocolError` where what answers is no daemon of ours.
    """
    line = json.dumps(message).encode() + b"\n"
    if len(line) > MESSAGE_MAX:
        raise ProtocolError(f"{path}: a request of {len(line)} bytes; allowed: {MESSAGE_MAX}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as connection:
        try:
            reply = _exchange(connection, path, line, monotonic() + timeout)
        except OSError as error:
            raise _explained(path, error, timeout) from error
    return _result(path, reply)


def follow(path: str, message: dict[str, object], timeout: float) -> Iterator[dict[str, object]]:
    """Send a request whose result is a stream; give its events as they come, until the daemon hangs up.

    ``timeout`` is in seconds, until the daemon has begun. Raises what `request` raises.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as connection:
        try:
            connection.settimeout(timeout)
            connection.connect(path)
            connection.sendall(json.dumps(message).encode() + b"\n")
            with connection.makefile("rb") as lines:
                _result(path, lines.readline())
                connection.settimeout(None)
                for line in lines:
                    yield json.loads(line)
        except OSError as error:
            raise _explained(path, error, timeout) from error


def _explained(path: str, error: OSError, timeout: float) -> InterceptorError:
    """What the kernel says, as an operator would."""
    if isinstance(error, TimeoutError):
        return InterceptorError(
            f"{path}: the daemon has not answered within {timeout:g} s",
            "look at its log: journalctl -u interceptor",
        )
    if isinstance(error, (FileNotFoundError, ConnectionRefusedError)):
        return NoDaemon(
            f"{path}: no daemon listens there",
            "start it: systemctl start interceptor, or: interceptor serve",
        )
    if isinstance(error, PermissionError):
        return InterceptorError(f"{path}: only root may talk to the daemon", "use sudo")
    return InterceptorError(f"{path}: {error.strerror}")


def _exchange(connection: socket.socket, path: str, line: bytes, deadline: float) -> bytes:
    def until_deadline() -> float:
        left = deadline - monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    connection.settimeout(until_deadline())
    connection.connect(path)
    connection.settimeout(until_deadline())
    connection.sendall(line)
    reply = bytearray()
    while not reply.endswith(b"\n"):
        connection.settimeout(until_deadline())
        chunk = connection.recv(_CHUNK)
        if not chunk:
            raise ProtocolError(f"{path}: the connection ended before the reply", "look at the daemon's log")
        reply += chunk
        if len(reply) > MESSAGE_MAX:
            raise ProtocolError(f"{path}: a reply of more than {MESSAGE_MAX} bytes")
    return bytes(reply)


def _result(path: str, line: bytes) -> object:
    try:
        reply = json.loads(line)
    except ValueError:
        raise ProtocolError(f"{path}: the reply is not JSON") from None
    match reply:
        case {"ok": True, "result": result}:
            return result
        case {"ok": False, "error": str(error), "hint": str(hint)}:
            raise InterceptorError(error, hint)
        case {"ok": False, "error": str(error)}:
            raise InterceptorError(error)
    raise ProtocolError(f"{path}: the reply has neither a result nor an error")
