"""Where Prometheus scrapes: HTTP on a Unix socket or a port, if configured (``metrics``). Nothing runs in between."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from collections.abc import Awaitable, Callable

from interceptor.errors import InterceptorError
from interceptor.observe.exposition import CONTENT_TYPE, DaemonFigures, Exposition
from interceptor.sockets import RootServer
from interceptor.watch import Watch

#: Seconds that a client may take for its request, and for taking the answer.
CLIENT_S = 10.0
#: Bytes of a request, with all its headers.
REQUEST_MAX = 16384
#: Clients of a port at once; others are hung up on.
CLIENTS_MAX = 16


class Exporter:
    """Serves ``GET /metrics``. Raises `InterceptorError` where it cannot listen."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._exposition = Exposition()
        self._clients = 0
        self._unix: RootServer | None = None
        self._port: asyncio.Server | None = None
        watch.ended = self._exposition.ended

    async def start(self, address: str) -> None:
        """Listens at ``address``: an absolute path (for root only), or HOST:PORT."""
        if address.startswith("/"):
            self._unix = RootServer(address, self._serve_socket)
            return
        host, _, port = address.rpartition(":")
        try:
            self._port = await asyncio.start_server(
                self._serve_port, host.strip("[]"), int(port), limit=REQUEST_MAX
            )
        except OSError as error:
            raise InterceptorError(f"metrics: cannot listen at {address}: {error.strerror}") from error

    @property
    def port(self) -> int:
        """The port that it listens on; 0 on a Unix socket."""
        return 0 if self._port is None else int(self._port.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Stops listening."""
        if self._unix is not None:
            self._unix.close()
            await self._unix.wait_closed()
        if self._port is not None:
            self._port.close()

    async def text(self) -> bytes:
        """All metrics now."""
        readings = await self._watch.readings()
        counters = self._watch.counters
        figures = DaemonFigures(
            registrations=counters.registrations,
            guard_deaths=self._watch.guard_deaths(),
            storms=counters.storms,
            containers=len(readings),
            guards=self._watch.guards(),
            followers=len(self._watch.feed),
        )
        return self._exposition.text(readings, figures)

    async def _serve_socket(self, connection: socket.socket) -> None:
        reader, writer = await asyncio.open_unix_connection(sock=connection, limit=REQUEST_MAX)
        await self._serve(reader, writer)

    async def _serve_port(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._clients >= CLIENTS_MAX:
            writer.close()
            return
        self._clients += 1
        try:
            await self._serve(reader, writer)
        finally:
            self._clients -= 1

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request; the connection ends with its answer."""
        try:
            async with asyncio.timeout(CLIENT_S):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(await answer(head, self.text))
                await writer.drain()
        except (TimeoutError, ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # a client that says nothing, too much, or leaves: it is told nothing
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


async def answer(head: bytes, text: Callable[[], Awaitable[bytes]]) -> bytes:
    """The answer to a request's first line and headers."""
    match = re.match(rb"(\S+) (\S+) HTTP/1\.[01]\r\n", head)
    if match is None:
        return _response("400 Bad Request", b"not HTTP\n")
    method, target = match.groups()
    if target.split(b"?")[0] not in (b"/metrics", b"/"):
        return _response("404 Not Found", b"see /metrics\n")
    if method not in (b"GET", b"HEAD"):
        return _response("405 Method Not Allowed", b"GET it\n")
    body = await text()
    return _response("200 OK", body, CONTENT_TYPE, with_body=method == b"GET")


def _response(status: str, body: bytes, kind: str = "text/plain", with_body: bool = True) -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return head.encode() + (body if with_body else b"")
