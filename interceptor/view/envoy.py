"""The server's end of an envoy: requests go out, replies come back by sequence number, nobody waits for ever.

Each container has an envoy and a socket of its own, so that a stuck or dead envoy delays nobody else.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from interceptor.errors import ProtocolError
from interceptor.view.host import OverflowIds, Within
from interceptor.view.log import Logger
from interceptor.view.nodes import NodeError, Owner
from interceptor.view.protocol import (
    DATA_MAX,
    PATH_MAX,
    REPLY_MAX,
    Attr,
    Base,
    Entry,
    Namespace,
    Op,
    Reply,
    decode_attr,
    decode_entries,
    decode_reply,
    encode_request,
)
from interceptor.view.tasks import Waiting
from interceptor.view.values import Values

log = Logger()

PENDING_MAX = 512
"""Most requests that may wait for one envoy. More fail with EAGAIN, so that one container cannot take up the server."""
TIME_LIMIT_S = 5.0
"""How long a request to an envoy may take before it fails with EIO."""

#: For one reply, which is taken out of it at once: all envoys of a process share it.
_buffer = bytearray(REPLY_MAX)


class _Call(Waiting):
    __slots__ = ("deadline", "operation", "path", "reply", "within")

    def __init__(self, operation: Op, path: bytes, deadline: float, within: Within | None = None) -> None:
        super().__init__()
        self.operation = operation
        self.path = path
        self.deadline = deadline
        self.within = within
        self.reply: Reply | None = None


class Envoy:
    """A connected envoy. Somebody calls `receive` when its socket is readable, `send_more` when it takes data again."""

    def __init__(
        self,
        sock: socket.socket,
        name: str,
        *,
        time_limit_s: float = TIME_LIMIT_S,
        wants_to_send: Callable[[bool], None] = lambda _wants: None,
        ended: Callable[[], None] = lambda: None,
        owes: Callable[[int], None] = lambda _answers: None,
    ) -> None:
        """Takes over the SOCK_SEQPACKET socket. ``ended`` is called once, when it hangs up or is closed.

        ``owes`` is told how many answers are still to come, in time or late.
        """
        sock.setblocking(False)
        self._sock = sock
        self._time_limit_s = time_limit_s
        self._log = log.bind(container=name)
        self._calls: dict[int, _Call] = {}
        self._unsent: deque[tuple[_Call, bytes]] = deque()
        # A predecessor's requests may still be answered: ours are not mistaken for them.
        self._seq = int.from_bytes(os.urandom(4))
        self._stuck = False
        self._wants_to_send = wants_to_send
        self._ended = ended
        self._owes = owes
        self._owed = 0
        self.number = -1
        """What the pump knows it by; -1 without one."""
        self.stays_in_user_namespace = False
        """It is of an older version than the view, and answers for its own user namespace alone."""
        self.alive = True

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._sock.fileno()

    def receive(self) -> None:
        """Take one reply, and let who waits for it go on."""
        try:
            # MSG_TRUNC: the true length, so that an overlong packet is seen to be one.
            length = self._sock.recv_into(_buffer, 0, socket.MSG_TRUNC)
            if length == 0:
                self._log.warning("envoy_ended")
                self.close()
                return
            if length > REPLY_MAX:
                raise ProtocolError(f"envoy's reply has {length} bytes")
            reply = decode_reply(bytes(memoryview(_buffer)[:length]))
        except (BlockingIOError, InterruptedError):
            return
        except (OSError, ProtocolError) as error:
            self._log.warning("envoy_failed", error=str(error))
            self.close()
            return
        self._owe(-1)
        if self._stuck:
            self._stuck = False
            self._log.warning("envoy_answers_again")
        call = self._calls.pop(reply.seq, None)
        if call is not None:  # else it came after its time limit
            call.reply = reply
            call.settle(reply.error)

    def _owe(self, more: int) -> None:
        self._owed = max(0, self._owed + more)  # a predecessor's answers are not counted
        self._owes(self._owed)

    def close(self) -> None:
        """Hang up. Calls that are open fail with EIO."""
        if not self.alive:
            return
        self.alive = False
        self._ended()
        self._sock.close()
        calls, self._calls = self._calls, {}
        self._unsent.clear()
        for call in calls.values():
            call.settle(errno.EIO)

    def notice_end(self) -> None:
        """Hang up if the other end has, without waiting for its turn."""
        if self.alive:
            poll = select.poll()
            poll.register(self._sock, 0)
            if poll.poll(0):
                self._log.warning("envoy_ended")
                self.close()

    def expire(self, now: float) -> float | None:
        """Fail what is over its time; the seconds until the next may be, None if nothing waits."""
        while self._calls:
            seq, call = next(iter(self._calls.items()))  # the oldest, since all have the same limit
            if call.deadline > now and not call.settled:
                return call.deadline - now
            del self._calls[seq]
            if call.settled:
                continue  # its caller was interrupted
            if not self._stuck:
                self._stuck = True
                self._log.warning("envoy_gave_no_answer", operation=call.operation.name, path=call.path)
            call.settle(errno.EIO)
        return None

    async def call(
        self,
        op: Op,
        base: Base,
        path: bytes,
        *,
        offset: int = 0,
        size: int = 0,
        data: bytes = b"",
        within: Within | None = None,
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
        self._seq = seq = self._seq + 1 & 0x7FFFFFFF  # the other half is the pump's
        flags = within.kind.flag if within is not None else 0
        packet = encode_request(seq, op, base, path, offset=offset, size=size, data=data, flags=flags)
        call = _Call(op, path, time.monotonic() + self._time_limit_s, within)
        self._send(call, packet)
        return await self._answer(seq, call)

    async def answer_to(self, seq: int, op: Op, path: bytes) -> Reply:
        """The reply to a request that somebody else has sent; as `call`."""
        if not self.alive:
            raise NodeError(errno.EIO)
        return await self._answer(seq, _Call(op, path, time.monotonic() + self._time_limit_s))

    async def _answer(self, seq: int, call: _Call) -> Reply:
        self._owe(1)
        self._calls[seq] = call
        await call
        assert call.reply is not None
        return call.reply

    def _send(self, call: _Call, packet: bytes) -> None:
        if not self._unsent:
            try:
                self._send_now(call, packet)
                return
            except (BlockingIOError, InterruptedError):
                self._wants_to_send(True)
            except OSError:
                raise NodeError(errno.EIO) from None  # hung up; receive() is about to notice
        self._unsent.append((call, packet))

    def _send_now(self, call: _Call, packet: bytes) -> None:
        if call.within is None:
            self._sock.send(packet)
        else:
            socket.send_fds(self._sock, [packet], [call.within.fd.fileno()])

    def send_more(self) -> None:
        """Its queue was full and has room again."""
        while self._unsent:
            call, packet = self._unsent[0]
            try:
                if not call.settled:  # else its caller has given up
                    self._send_now(call, packet)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                break  # receive() is about to notice
            self._unsent.popleft()
        self._wants_to_send(False)


@dataclass(slots=True, eq=False)
class Container:
    """A container that the view serves."""

    owner: Owner
    envoy: Envoy
    overflow: OverflowIds
    values: Values
    since_ns: int = field(default_factory=time.time_ns)
    """Time stamp of the nodes that we make up, nanoseconds since the epoch."""

    async def getattr(self, base: Base, path: bytes, within: Within | None = None) -> Attr:
        """The real node's attributes, with the ids of the host."""
        try:
            reply = await self.envoy.call(Op.GETATTR, base, path, within=within)
        except NodeError as error:
            if error.errno != errno.EINVAL or within is None or within.kind is not Namespace.USER:
                raise
            # It is of a version that goes to no user namespace. Nobody is asked for one before this.
            self.envoy.stays_in_user_namespace = True
            return await self.getattr(base, path)
        return self._on_host(decode_attr(reply.data))

    async def list(
        self, base: Base, path: bytes, cookie: int, within: Within | None = None
    ) -> tuple[list[Entry], int]:
        """Entries of the real directory from ``cookie`` on (0: the first), and the cookie that follows (0: none)."""
        reply = await self.envoy.call(Op.LIST, base, path, offset=cookie, within=within)
        return list(self._entries(reply.data)), reply.value

    def _entries(self, data: bytes) -> Iterator[Entry]:
        for name, attr, cookie in decode_entries(data):
            yield Entry(name, self._on_host(attr), cookie)

    async def open(self, base: Base, path: bytes, access: int, within: Within | None = None) -> None:
        """Whether the real file opens for ``access`` (O_WRONLY, O_RDWR); it is not kept open."""
        await self.envoy.call(Op.OPEN, base, path, size=access, within=within)

    async def read(
        self, base: Base, path: bytes, offset: int, size: int, within: Within | None = None
    ) -> bytes:
        """At most ``size`` bytes of the real file, and at most `DATA_MAX`."""
        reply = await self.envoy.call(
            Op.READ, base, path, offset=offset, size=min(size, DATA_MAX), within=within
        )
        return reply.data[:size]

    async def read_asked(self, path: bytes, seq: int, size: int) -> bytes:
        """`read`, where the envoy has been asked under ``seq`` already."""
        reply = await self.envoy.answer_to(seq, Op.READ, path)
        return reply.data[:size]

    async def write(
        self, base: Base, path: bytes, offset: int, data: bytes, within: Within | None = None
    ) -> int:
        """Write to the real file in one write(2); how many bytes it took."""
        reply = await self.envoy.call(Op.WRITE, base, path, offset=offset, data=data, within=within)
        return min(reply.value, len(data))

    async def set_name(self, op: Op, name: bytes, within: Within | None = None) -> None:
        """sethostname(2) or setdomainname(2) in the container's UTS namespace."""
        await self.envoy.call(op, Base.PROC, b"", data=name, within=within)

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
