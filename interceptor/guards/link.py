"""Messages between the daemon and one guard: fixed-size records, as native/api.h declares them."""

from __future__ import annotations

import array
import enum
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field

from interceptor._native import ffi, lib
from interceptor.errors import ProtocolError
from interceptor.kernel.fd import OwnedFd


class Op(enum.IntEnum):
    """What a guard asks about."""

    UMOUNT = lib.IX_OP_UMOUNT
    DETACH = lib.IX_OP_DETACH
    MOVE = lib.IX_OP_MOVE
    REMOUNT = lib.IX_OP_REMOUNT
    NEW = lib.IX_OP_NEW
    FSMOUNT = lib.IX_OP_FSMOUNT
    OPEN_TREE = lib.IX_OP_OPEN_TREE
    FSOPEN = lib.IX_OP_FSOPEN
    BENEATH = lib.IX_OP_BENEATH


class Act(enum.IntEnum):
    """What a guard is told to do."""

    CONTINUE = lib.IX_ACT_CONTINUE
    ERROR = lib.IX_ACT_ERROR
    DETACH = lib.IX_ACT_DETACH
    SWAP = lib.IX_ACT_SWAP
    ATTACH = lib.IX_ACT_ATTACH
    FLAGS = lib.IX_ACT_FLAGS
    GIVE = lib.IX_ACT_GIVE


MAX_IDS: int = lib.IX_MAX_IDS
_FD_COUNT = {Op.NEW: 3}
_ASK_SIZE: int = ffi.sizeof("struct ix_ask")
_NOTE_SIZE: int = ffi.sizeof("struct ix_note")
_STORM_SIZE: int = ffi.sizeof("struct ix_storm")


@dataclass
class Ask:
    """A question, every field checked for its range. The descriptors belong to whoever holds this."""

    op: Op
    seq: int
    mnt_id: int
    flags: int
    tid: int
    kind: int
    """Op.NEW, Op.FSOPEN: 1 procfs, 2 sysfs; else 0."""
    hidepid: int | None
    subset_pid: bool
    gid: int | None
    sb_flags: int
    source: bytes
    fds: list[OwnedFd]


@dataclass(frozen=True)
class Repeated:
    """A call is repeated without effect, more than a hundred times a second. Told at most every ten seconds."""

    op: Op
    mnt_id: int
    calls: int
    """Since it was told last."""
    tid: int


@dataclass(frozen=True)
class Ready:
    """The guard serves the listener of this index."""

    index: int


@dataclass(frozen=True)
class Refused:
    """The guard has no room for the listener of this index."""

    index: int


@dataclass(frozen=True)
class Taken:
    """The composite of this number, made ahead, has been used."""

    number: int


@dataclass(frozen=True)
class ForNew:
    """What a composite was made ahead for: a question like this one, in this PID or network namespace."""

    ask: Ask
    namespace_ino: int


@dataclass(frozen=True)
class ForSwap:
    """What a composite was made ahead for: a copied base of this kind that loses a cover."""

    dev: tuple[int, int]
    attributes: int
    shielded: frozenset[bytes]
    """Where shields will stand."""
    absent: tuple[bytes, ...]
    """What it does not cover, as it is not there."""


@dataclass
class Answer:
    """A verdict; ``tree`` is the composite handed over with SWAP, ATTACH and GIVE."""

    act: Act
    error: int = 0
    cache: bool = False
    base_id: int = 0
    there_id: int = 0
    ids: Sequence[int] = field(default_factory=tuple)
    tree: OwnedFd | None = None


@dataclass(frozen=True)
class Facts:
    """By what a guard knows a copied base from an original one (native/copies.c)."""

    namespace: int
    """ID of the container's first mount namespace."""
    roots: int
    """How many mounts are stacked at the container's root."""
    bases: Sequence[tuple[int, bytes, tuple[int, int]]]
    """The original ones: unique mount ID, mount point within the container's root, device."""
    proc: Sequence[bytes]
    """The managed paths of procfs, without slashes at the ends."""
    sys: Sequence[bytes]


class GuardLink:
    """The daemon's end of a guard's socket."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.setblocking(False)

    def fileno(self) -> int:
        return self.sock.fileno()

    def close(self) -> None:
        self.sock.close()

    def _send(self, data: bytes, fds: list[int] | None = None) -> bool:
        """False if the guard is gone or does not read: nothing is waited for."""
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self.sock.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)
        except OSError:
            return False
        return True

    def _note(self, kind: int, value: int = 0, fds: list[int] | None = None) -> bool:
        note = ffi.new("struct ix_note *", {"type": kind, "value": value})
        return self._send(bytes(ffi.buffer(note)), fds)

    def send_listener(self, index: int, listener: int) -> bool:
        return self._note(lib.IX_MSG_LISTENER, index, [listener])

    def drop_listener(self, index: int) -> bool:
        return self._note(lib.IX_MSG_DROP, index)

    def flush(self) -> bool:
        """The policy changed: cached verdicts are void."""
        return self._note(lib.IX_MSG_FLUSH)

    def send_facts(self, facts: Facts) -> bool:
        """Has the guard let copied bases go by itself; not where there is more to know than it takes."""
        covers = (facts.proc, facts.sys)
        if len(facts.bases) > lib.IX_FACT_BASES or any(len(paths) > lib.IX_FACT_COVERS for paths in covers):
            return True
        record = ffi.new(
            "struct ix_facts *",
            {"type": lib.IX_MSG_FACTS, "namespace_id": facts.namespace, "roots": facts.roots},
        )
        record.bases = len(facts.bases)
        for index, (mnt_id, point, dev) in enumerate(facts.bases):
            record.base[index] = {
                "mnt_id": mnt_id,
                "point": hashed(point),
                "dev_major": dev[0],
                "dev_minor": dev[1],
            }
        for kind, paths in enumerate(covers):
            record.covers[kind] = len(paths)
            for index, path in enumerate(paths):
                record.cover[kind][index] = hashed(path)
        return self._send(bytes(ffi.buffer(record)))

    def follow(self, by_somebody: bool) -> bool:
        """Whether somebody wants to know of every call."""
        return self._note(lib.IX_MSG_FOLLOW, int(by_somebody))

    def hello(self) -> bool:
        """A successor is here: what is open is asked again."""
        return self._note(lib.IX_MSG_HELLO)

    def answer(self, ask: Ask, answer: Answer) -> bool:
        record = ffi.new("struct ix_answer *")
        record.type = lib.IX_MSG_ANSWER
        record.act = answer.act
        record.seq = ask.seq
        record.error = answer.error
        record.cache = answer.cache
        record.base_id = answer.base_id
        record.there_id = answer.there_id
        record.count = min(len(answer.ids), MAX_IDS)
        for i, mount_id in enumerate(answer.ids[:MAX_IDS]):
            record.ids[i] = mount_id
        return self._send(bytes(ffi.buffer(record)), [answer.tree.fileno()] if answer.tree else None)

    def hand_over(self, number: int, tree: OwnedFd, there_id: int, purpose: ForNew | ForSwap) -> bool:
        """Gives the guard a composite before it asks for one; false where there is no room to describe it."""
        record = ffi.new("struct ix_ahead *", {"type": lib.IX_MSG_AHEAD, "number": number})
        record.there_id = there_id
        if isinstance(purpose, ForNew):
            record.act, record.ns_ino = lib.IX_ACT_ATTACH, purpose.namespace_ino
            record.ask = _as_asked(purpose.ask)
            return self._send(bytes(ffi.buffer(record)), [tree.fileno()])
        absent = b"".join(path + b"\0" for path in purpose.absent)
        if len(purpose.shielded) > lib.IX_AHEAD_SHIELDS or len(absent) + 2 > lib.IX_AHEAD_ABSENT:
            return False
        record.act, record.attributes = lib.IX_ACT_SWAP, purpose.attributes
        record.dev_major, record.dev_minor = purpose.dev
        record.shields = len(purpose.shielded)
        for index, path in enumerate(purpose.shielded):
            record.shield[index] = hashed(path)
        ffi.memmove(record.absent, absent, len(absent))
        return self._send(bytes(ffi.buffer(record)), [tree.fileno()])

    def receive(self) -> Ask | Ready | Refused | Repeated | Taken | None:
        """The next message; None at end of file.

        Raises `BlockingIOError` if there is none, `ProtocolError` for what a sound guard never sends.
        """
        space = socket.CMSG_SPACE(4 * 4)
        try:
            data, ancillary, flags, _ = self.sock.recvmsg(_ASK_SIZE + 1, space, socket.MSG_CMSG_CLOEXEC)
        except ConnectionError:
            return None
        fds: list[OwnedFd] = []
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.extend(OwnedFd(fd) for fd in memoryview(payload).cast("i"))
        if not data:
            return None
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise ProtocolError("a guard's message is too long")
        return _decode(data, fds)


def _as_asked(ask: Ask) -> dict[str, object]:
    """A question as the next like it will be asked, but for what differs each time."""
    return {
        "type": lib.IX_MSG_ASK,
        "op": ask.op,
        "flags": ask.flags,
        "kind": ask.kind,
        "hidepid": -1 if ask.hidepid is None else ask.hidepid,
        "subset_pid": ask.subset_pid,
        "gid": 0xFFFFFFFF if ask.gid is None else ask.gid,
        "sb_flags": ask.sb_flags,
        "source": ask.source,
    }


def _decode(data: bytes, fds: list[OwnedFd]) -> Ask | Ready | Refused | Repeated | Taken:
    if len(data) == _NOTE_SIZE:
        note = ffi.from_buffer("struct ix_note *", data)
        if note.type == lib.IX_MSG_READY:
            return Ready(int(note.value))
        if note.type == lib.IX_MSG_REFUSED:
            return Refused(int(note.value))
        if note.type == lib.IX_MSG_TAKEN:
            return Taken(int(note.value))
    if len(data) == _STORM_SIZE:
        storm = ffi.from_buffer("struct ix_storm *", data)
        if storm.type == lib.IX_MSG_STORM and storm.op in (Op.UMOUNT, Op.DETACH, Op.MOVE):
            return Repeated(Op(storm.op), int(storm.mnt_id), int(storm.calls), int(storm.tid))
    if len(data) != _ASK_SIZE:
        raise ProtocolError(f"a guard's message of {len(data)} bytes")
    record = ffi.from_buffer("struct ix_ask *", data)
    try:
        op = Op(record.op)
    except ValueError:
        raise ProtocolError(f"a guard asks about operation {record.op}") from None
    if (
        record.type != lib.IX_MSG_ASK
        or len(fds) != _FD_COUNT.get(op, 2)
        or record.kind not in ((1, 2) if op in (Op.NEW, Op.FSOPEN) else (0,))
        or record.hidepid > 4
    ):
        raise ProtocolError(f"a guard's question about {op.name} is malformed")
    source = bytes(ffi.buffer(record.source)).split(b"\0", 1)[0]
    return Ask(
        op=op,
        seq=record.seq,
        mnt_id=record.mnt_id,
        flags=record.flags,
        tid=record.tid,
        kind=record.kind,
        hidepid=None if record.hidepid < 0 else int(record.hidepid),
        subset_pid=bool(record.subset_pid),
        gid=None if record.gid == 0xFFFFFFFF else int(record.gid),
        sb_flags=record.sb_flags,
        source=source if all(0x20 <= c < 0x7F for c in source) else b"",
        fds=fds,
    )


def hashed(path: bytes) -> int:
    """FNV-1a, 64 bits, as native/copies.c has it."""
    value = 0xCBF29CE484222325
    for byte in path:
        value = (value ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return value


def socket_pair() -> tuple[GuardLink, OwnedFd]:
    """The daemon's end and the descriptor for the guard."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return GuardLink(ours), OwnedFd(theirs.detach())


def adopt(fd: OwnedFd) -> GuardLink:
    """The link of a guard that a predecessor started."""
    return GuardLink(socket.socket(fileno=fd.take()))


def is_listener(fd: int) -> bool:
    """Whether a descriptor is a seccomp listener: only those know SECCOMP_IOCTL_NOTIF_ID_VALID."""
    return bool(lib.ix_is_listener(fd))
