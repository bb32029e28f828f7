"""The control socket: how the hook, the wrapper and the command line talk to the daemon.

A Unix stream socket, mode 0600, for root only. Each request is one JSON object on a line, with its operation under
``op``; each reply is one line, ``{"ok": true, "result": …}`` or ``{"ok": false, "error": "…", "hint": "…"}``. A line
has at most `MESSAGE_MAX` bytes. A connection may carry several requests, which are answered in turn; after one whose
result is a `Stream` only that comes, an object a line, until the client hangs up.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass

import msgspec

from interceptor.client import MESSAGE_MAX, request
from interceptor.errors import InterceptorError, ProtocolError
from interceptor.observe.log import get_logger
from interceptor.sockets import RootServer

__all__ = ["MESSAGE_MAX", "Handler", "Stream", "request", "start_control_server"]

#: Gets one request, returns what goes into ``result`` (anything msgspec can write as JSON). An `InterceptorError` is
#: told to the client; any other exception is logged and told as an internal error.
Handler = Callable[[dict[str, object]], Awaitable[object]]


@dataclass(frozen=True)
class Stream:
    """A result without end."""

    events: AsyncGenerator[dict[str, object], None]


async def start_control_server(path: str, handler: Handler) -> RootServer:
    """Serve the control protocol at ``path``. Raises `InterceptorError` where another daemon does."""

    async def serve(connection: socket.socket) -> None:
        # The limit is for the line without its newline.
        reader, writer = await asyncio.open_unix_connection(sock=connection, limit=MESSAGE_MAX - 1)
        try:
            await _serve_requests(reader, writer, handler)
        except ConnectionError:
            get_logger(socket=path).debug("a client of the control socket left before its reply")
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    return RootServer(path, serve)


async def _serve_requests(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, handler: Handler
) -> None:
    while True:
        try:
            line = await reader.readuntil(b"\n")
        except asyncio.IncompleteReadError as error:
            if error.partial:
                await _send(writer, _refusal(ProtocolError("the request does not end in a newline")))
            return
        except asyncio.LimitOverrunError:
            await _send(writer, _refusal(ProtocolError(f"the request is longer than {MESSAGE_MAX} bytes")))
            return
        reply = await _reply(line, handler)
        if isinstance(reply, Stream):
            await _stream(reader, writer, reply)
            return
        await _send(writer, reply)


async def _stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, stream: Stream) -> None:
    """Events as they come, until the client hangs up. Whoever makes them does not wait for the client."""

    async def send() -> None:
        await _send(writer, msgspec.json.encode({"ok": True, "result": "following"}))
        async with contextlib.aclosing(stream.events) as events:
            async for event in events:
                await _send(writer, msgspec.json.encode(event))

    sending = asyncio.ensure_future(send())
    hung_up = asyncio.ensure_future(reader.read(1))
    try:
        await asyncio.wait((sending, hung_up), return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (sending, hung_up):
            task.cancel()
        await asyncio.gather(sending, hung_up, return_exceptions=True)


async def _reply(line: bytes, handler: Handler) -> bytes | Stream:
    op: object = None
    try:
        message = _decode(line)
        op = message["op"]
        result = await handler(message)
        return result if isinstance(result, Stream) else msgspec.json.encode({"ok": True, "result": result})
    except InterceptorError as error:
        return _refusal(error)
    except Exception:
        get_logger(op=op).exception("internal error in a control request")
        return _refusal(InterceptorError("internal error", "look at the daemon's log"))


def _decode(line: bytes) -> dict[str, object]:
    try:
        message = msgspec.json.decode(line, type=dict[str, object])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ProtocolError("the request is not a JSON object") from None
    if not isinstance(message.get("op"), str):
        raise ProtocolError('the request has no "op"')
    return message


def _refusal(error: InterceptorError) -> bytes:
    reply = {"ok": False, "error": str(error)}
    if error.hint:
        reply["hint"] = error.hint
    return msgspec.json.encode(reply)


async def _send(writer: asyncio.StreamWriter, line: bytes) -> None:
    writer.write(line + b"\n")
    await writer.drain()
