"""What the view's server says to envoys and what the daemon says to the view's server.

Both run over SOCK_SEQPACKET sockets, one message a packet. Envoys speak the fixed layouts of ``native/envoy.c``, in the
machine's byte order. An envoy runs with the container's rights, so its replies are checked like any other input.
The control socket carries JSON objects; descriptors travel beside them (SCM_RIGHTS).
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated, NamedTuple

import msgspec

from interceptor.errors import ProtocolError

DATA_MAX = 65536
"""Most bytes of data in one message to or from an envoy."""
PATH_MAX = 4095
"""Longest path in a request (bytes, without NUL)."""
NAME_MAX = 255
CONTROL_MAX = 4096
"""Longest control message."""

_REQUEST = struct.Struct("=IBBHIIQ")
_REPLY = struct.Struct("=IiQ")
_ATTR = struct.Struct("=IIIIQqqq")
_ENTRY_TAIL = struct.Struct("=QH6x")
_ENTRY_SIZE = _ATTR.size + _ENTRY_TAIL.size
REPLY_MAX = _REPLY.size + DATA_MAX
"""Longest packet that an envoy sends."""

_ERRNO_MAX = 999  # libfuse takes nothing beyond (fuse_send_reply_iov_nofree in lib/fuse_lowlevel.c)
_KINDS = frozenset({stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK})


class Op(IntEnum):
    """What an envoy can be asked to do."""

    GETATTR = 1
    LIST = 2
    READ = 3
    WRITE = 4
    READLINK = 5
    OPEN = 6
    SETHOSTNAME = 7
    SETDOMAINNAME = 8


class Base(IntEnum):
    """Which of the container's two filesystems a path is relative to."""

    PROC = 0
    SYS = 1


class Namespace(IntEnum):
    """Kinds of namespaces that nodes are of, by index. WITHIN_* of native/envoy.c are ``2 << index``."""

    NET = 0
    IPC = 1
    UTS = 2
    USER = 3

    @property
    def flag(self) -> int:
        """What says in a request that its namespace comes along."""
        return 2 << self


class Attr(NamedTuple):
    """A node's attributes; the ids are those seen in the container's user namespace, times in nanoseconds."""

    mode: int
    nlink: int
    uid: int
    gid: int
    size: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int


class Entry(NamedTuple):
    """A name in a directory, its attributes and the cookie from which the listing goes on after it."""

    name: bytes
    attr: Attr
    cookie: int


@dataclass(frozen=True, slots=True)
class Reply:
    """An envoy's answer: ``error`` is a positive errno or 0; ``value`` as in ``struct reply`` of native/envoy.c."""

    seq: int
    error: int
    value: int
    data: bytes


def encode_request(
    seq: int,
    op: Op,
    base: Base,
    path: bytes,
    *,
    offset: int = 0,
    size: int = 0,
    data: bytes = b"",
    flags: int = 0,
) -> bytes:
    """A request packet. `ProtocolError` if something does not fit; the caller checks names and ranges first."""
    if len(path) > PATH_MAX or len(data) > DATA_MAX or b"\0" in path:
        raise ProtocolError(f"request for a path of {len(path)} and data of {len(data)} bytes does not fit")
    try:
        return _REQUEST.pack(seq, op, base, len(path), size, flags, offset) + path + data
    except struct.error as error:
        raise ProtocolError(f"request out of range: {error}") from None


def decode_reply(packet: bytes) -> Reply:
    """The reply in a packet. `ProtocolError` if it is too short, too long or carries an impossible errno."""
    if not _REPLY.size <= len(packet) <= REPLY_MAX:
        raise ProtocolError(f"envoy's reply has {len(packet)} bytes")
    seq, error, value = _REPLY.unpack_from(packet)
    if not 0 <= error <= _ERRNO_MAX:
        raise ProtocolError(f"envoy's reply has error {error}")
    return Reply(seq, error, value, packet[_REPLY.size :])


def decode_attr(data: bytes) -> Attr:
    """The attributes in a GETATTR reply. `ProtocolError` if malformed or of a kind that the view never shows."""
    if len(data) != _ATTR.size:
        raise ProtocolError(f"envoy's attributes have {len(data)} bytes")
    return _attr_at(data, 0)


def _attr_at(data: bytes, at: int) -> Attr:
    attr = Attr._make(_ATTR.unpack_from(data, at))
    if stat.S_IFMT(attr.mode) not in _KINDS or attr.size >= 1 << 63:
        raise ProtocolError(f"envoy's attributes are impossible: mode {attr.mode:#o}, size {attr.size}")
    return attr


def decode_entries(data: bytes) -> Iterator[Entry]:
    """The entries in a LIST reply. `ProtocolError` when reaching a malformed one."""
    at = 0
    while at < len(data):
        if len(data) - at < _ENTRY_SIZE:
            raise ProtocolError(f"envoy's list ends inside an entry, at {at} of {len(data)}")
        attr = _attr_at(data, at)
        cookie, length = _ENTRY_TAIL.unpack_from(data, at + _ATTR.size)
        start = at + _ENTRY_SIZE
        name = data[start : start + length]
        if len(name) != length or not is_name(name) or not 0 < cookie < 1 << 63:
            raise ProtocolError(f"envoy's list has an impossible entry at {at} of {len(data)}")
        yield Entry(name, attr, cookie)
        at = start + (length + 7 & ~7)


def is_name(name: bytes) -> bool:
    """Whether this may be one component of a path below a directory: no slash, NUL, ``.``, ``..``, not too long."""
    return 0 < len(name) <= NAME_MAX and name not in (b".", b"..") and b"/" not in name and b"\0" not in name


ContainerId = Annotated[str, msgspec.Meta(pattern=r"^(?!\.\.?\Z)[A-Za-z0-9_+.-]{1,255}\Z")]
Number = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Kuid = Annotated[int, msgspec.Meta(ge=0, lt=2**32 - 1)]


class _Message(
    msgspec.Struct, frozen=True, tag_field="op", tag=str.lower, forbid_unknown_fields=True, kw_only=True
):
    n: int = 0
    """Repeated in the answer: answers to questions of somebody who was killed are told apart by it."""


class Cgroups(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The cgroup of a container at its creation.

    ``places`` tells by controller where its hierarchy is mounted and the cgroup's path in that (`cgroup.UNIFIED`:
    version 2); the rest is how much time had been used in it, in microseconds.
    """

    places: dict[str, tuple[str, str]]
    user_us: Number = 0
    system_us: Number = 0
    stalled_us: Number = 0


class Add(_Message, frozen=True):
    """Serve a container; beside it one descriptor, the socket to its envoy.

    ``uid`` and ``gid`` are what the container's root is on the host; ``created_ns`` is when it was created, in
    nanoseconds of CLOCK_BOOTTIME; ``groups`` is how many ids are mapped from 0 on; ``userns`` is the inode number of
    its user namespace, ``namespaces`` are those of its network, IPC and UTS namespaces, ``proc_mount`` is the unique
    mount ID of the procfs that its envoy has; 0 where not known, and then the envoy is not asked for what needs it.
    Naming a container whose envoy has ended gives it a new one. ``cgroups`` is there where nodes are to show them.
    """

    id: ContainerId
    uid: Kuid
    gid: Kuid
    created_ns: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
    groups: Annotated[int, msgspec.Meta(ge=1, le=2**32 - 1)] = 65536
    userns: Number = 0
    namespaces: tuple[Number, Number, Number] = (0, 0, 0)
    proc_mount: Number = 0
    cgroups: Cgroups | None = None


class Remove(_Message, frozen=True):
    """Serve a container no longer."""

    id: ContainerId


class List(_Message, frozen=True):
    """Which containers are served: the answer has ``containers``, an object from id to whether its envoy lives."""


class Begin(_Message, frozen=True):
    """Now serve the kernel: every container there is has been added. On the boot socket, once."""


class Ping(_Message, frozen=True):
    """Nothing but an answer."""


class Version(_Message, frozen=True):
    """Which one this is: the answer has ``version`` (`interceptor.view.version`). Older ones do not know this."""


class HandOver(_Message, frozen=True):
    """End, for a successor to go on: what was begun is brought to its end, as far as that is soon, and nothing else."""


class Quit(_Message, frozen=True):
    """End. The mount stays, without anybody to serve it unless the connection is held elsewhere."""


Message = Add | Remove | List | Begin | Ping | Version | HandOver | Quit
_message_decoder: msgspec.json.Decoder[Message] = msgspec.json.Decoder(Message)
_encoder = msgspec.json.Encoder()


def decode_message(packet: bytes) -> Message:
    """The control message in a packet. `ProtocolError` says what is wrong with it."""
    try:
        return _message_decoder.decode(packet)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ProtocolError(f"control message: {error}") from None


def encode_message(message: Message) -> bytes:
    """A control message as a packet, for whoever holds the other end."""
    return _encoder.encode(message)


def number_of(packet: bytes) -> int:
    """The number of a message that may be none."""
    try:
        return msgspec.json.decode(packet, type=_Numbered).n
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return 0


class _Numbered(msgspec.Struct):
    n: int = 0


def encode_answer(error: str | None = None, *, n: int = 0, **facts: object) -> bytes:
    """What the server answers on the control socket: ``{"ok": true}`` and facts, or ``{"ok": false, "error": …}``.

    With the number of the message, where that has one.
    """
    answer: dict[str, object] = {"ok": True, **facts} if error is None else {"ok": False, "error": error}
    if n:
        answer["n"] = n
    return _encoder.encode(answer)
