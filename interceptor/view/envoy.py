"""The server's end of an envoy: requests go out, replies come back by sequence number, nobody waits for ever.

Each container has an envoy, a socket and a reader task of its own, so that a stuck or dead envoy delays nobody else.
"""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import structlog
import trio

from interceptor.errors import ProtocolError
from interceptor.view.nodes import NodeError, Owner
from interceptor.view.protocol import (
    DATA_MAX,
    PATH_MAX,
    REPLY_MAX,
    Attr,
    Base,
    Entry,
    Op,
    Reply,
    decode_attr,
    decode_entries,
    decode_reply,
    encode_request,
)

log = structlog.get_logger(__name__)

PENDING_MAX = 512
"""Most requests that may wait for one envoy. More fail with EAGAIN, so that one container cannot take up the server."""
TIME_LIMIT_S = 5.0
"""How long a request to an envoy may take before it fails with EIO."""


@dataclass(slots=True, eq=False)
class _Call:
    done: trio.Event = field(default_factory=trio.Event)
    reply: Reply | None = None


class Envoy:
    """A connected envoy. `run` must be running in some nursery for `call` to get answers."""

    def __init__(self, sock: socket.socket, name: str, *, time_limit_s: float = TIME_LIMIT_S) -> None:
        """Takes over the SOCK_SEQPACKET socket."""
        sock.setblocking(False)
        self._sock = sock
        self._time_limit_s = time_limit_s
        self._log = log.bind(container=name)
        self._calls: dict[int, _Call] = {}
        self._seq = 0
        self._sending = trio.Lock()
        self._scope = trio.CancelScope()
        self._stuck = False
        self.alive = True

    async def run(self, ended: Callable[[], None]) -> None:
        """Receive replies until the envoy hangs up or `close` is called; then fail what is open and call ``ended``."""
        try:
            with self._scope:
                await self._receive()
        except trio.ClosedResourceError:
            pass  # closed by us
        except (OSError, ProtocolError) as error:
            self._log.warning("envoy_failed", error=str(error))
        except Exception as error:
            # A mistake here must cost one container its pass-through, not all of them the view.
            self._log.exception("envoy_reader_failed", error=str(error))
        finally:
            self.close()
            self._sock.close()
            ended()

    async def _receive(self) -> None:
        buffer = bytearray(REPLY_MAX)
        view = memoryview(buffer)
        while True:
            try:
                # MSG_TRUNC: the true length, so that an overlong packet is seen to be one.
                length = self._sock.recv_into(buffer, 0, socket.MSG_TRUNC)
            except (BlockingIOError, InterruptedError):
                await trio.lowlevel.wait_readable(self._sock)
                continue
            if length == 0:
                self._log.warning("envoy_ended")
                return
            if length > REPLY_MAX:
                raise ProtocolError(f"envoy's reply has {length} bytes")
            reply = decode_reply(bytes(view[:length]))
            if self._stuck:
                self._stuck = False
                self._log.warning("envoy_answers_again")
            call = self._calls.get(reply.seq)
            if call is not None:  # else it came after its time limit
                call.reply = reply
                call.done.set()

    def close(self) -> None:
        """Hang up. Calls that are open fail with EIO."""
        if self.alive:
            self.alive = False
            trio.lowlevel.notify_closing(self._sock)
            self._scope.cancel()
        for call in self._calls.values():
            call.done.set()

    async def call(
        self, op: Op, base: Base, path: bytes, *, offset: int = 0, size: int = 0, data: bytes = b""
    ) -> Reply:
        """One request and its reply. `NodeError` with the real node's errno; EIO if the envoy is dead or stuck."""
        if not self.alive or self._stuck:
            # One caller has waited in vain already. Lookups of one name come one after the other (d_alloc_parallel in
            # fs/dcache.c): each waiting anew would make a crowd wait for minutes. The late answer ends this.
            raise NodeError(errno.EIO)
        if len(path) > PATH_MAX:
            raise NodeError(errno.ENAMETOOLONG)
        if len(self._calls) >= PENDING_MAX:
            raise NodeError(errno.EAGAIN)
        self._seq = seq = self._seq + 1 & 0xFFFFFFFF
        packet = encode_request(seq, op, base, path, offset=offset, size=size, data=data)
        call = self._calls[seq] = _Call()
        try:
            with trio.move_on_after(self._time_limit_s):
                await self._send(packet)
                await call.done.wait()
        finally:
            del self._calls[seq]
        if call.reply is None:
            if self.alive and not self._stuck:
                self._stuck = True
                self._log.warning("envoy_gave_no_answer", operation=op.name, path=path)
            raise NodeError(errno.EIO)
        if call.reply.error:
            raise NodeError(call.reply.error)
        return call.reply

    async def _send(self, packet: bytes) -> None:
        try:
            self._sock.send(packet)
            return
        except (BlockingIOError, InterruptedError):
            pass  # its queue is full: wait, in turn
        except OSError:
            raise NodeError(errno.EIO) from None  # hung up; run() is about to notice
        async with self._sending:
            while True:
                try:
                    await trio.lowlevel.wait_writable(self._sock)
                    self._sock.send(packet)
                    return
                except (BlockingIOError, InterruptedError):
                    continue
                except (OSError, trio.ClosedResourceError):
                    raise NodeError(errno.EIO) from None


@dataclass(frozen=True, slots=True)
class OverflowIds:
    """What ids without a mapping look like from inside a user namespace (/proc/sys/kernel/overflow[ug]id)."""

    uid: int = 65534
    gid: int = 65534


@dataclass(slots=True, eq=False)
class Container:
    """A container that the view serves."""

    owner: Owner
    envoy: Envoy
    overflow: OverflowIds
    since_ns: int = field(default_factory=time.time_ns)
    """Time stamp of the nodes that we make up, nanoseconds since the epoch."""

    async def getattr(self, base: Base, path: bytes) -> Attr:
        """The real node's attributes, with the ids of the host."""
        reply = await self.envoy.call(Op.GETATTR, base, path)
        return self._on_host(decode_attr(reply.data))

    async def list(self, base: Base, path: bytes, cookie: int) -> tuple[list[Entry], int]:
        """Entries of the real directory from ``cookie`` on (0: the first), and the cookie that follows (0: none)."""
        reply = await self.envoy.call(Op.LIST, base, path, offset=cookie)
        return list(self._entries(reply.data)), reply.value

    def _entries(self, data: bytes) -> Iterator[Entry]:
        for name, attr, cookie in decode_entries(data):
            yield Entry(name, self._on_host(attr), cookie)

    async def open(self, base: Base, path: bytes, access: int) -> None:
        """Whether the real file opens for ``access`` (O_WRONLY, O_RDWR); it is not kept open."""
        await self.envoy.call(Op.OPEN, base, path, size=access)

    async def read(self, base: Base, path: bytes, offset: int, size: int) -> bytes:
        """At most ``size`` bytes of the real file, and at most `DATA_MAX`."""
        reply = await self.envoy.call(Op.READ, base, path, offset=offset, size=min(size, DATA_MAX))
        return reply.data[:size]

    async def write(self, base: Base, path: bytes, offset: int, data: bytes) -> int:
        """Write to the real file in one write(2); how many bytes it took."""
        reply = await self.envoy.call(Op.WRITE, base, path, offset=offset, data=data)
        return min(reply.value, len(data))

    async def readlink(self, base: Base, path: bytes) -> bytes:
        """The text of the real symbolic link."""
        text = (await self.envoy.call(Op.READLINK, base, path)).data
        if not 0 < len(text) <= PATH_MAX or b"\0" in text:
            raise NodeError(errno.EIO)
        return text

    def _on_host(self, attr: Attr) -> Attr:
        """An envoy sees ids through its user namespace; the filesystem's are those of the initial one."""
        return attr._replace(
            uid=_host_id(attr.uid, self.owner.uid, self.overflow.uid),
            gid=_host_id(attr.gid, self.owner.gid, self.overflow.gid),
        )


def _host_id(seen: int, root: int, overflow: int) -> int:
    """The host's id for one seen in a user namespace whose root is ``root`` and whose map is one range.

    What has no mapping belongs to the host's root: nothing in procfs and sysfs belongs to anybody else on the host.
    """
    if root == 0:
        return seen  # no user namespace: what was seen is true
    return 0 if seen == overflow else root + seen
