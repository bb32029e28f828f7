"""The FUSE protocol as the kernel speaks it on /dev/fuse (include/uapi/linux/fuse.h). Pure: bytes in, bytes out.

We speak it ourselves because of what a library keeps to itself: a successor must be able to go on with the connection
of a predecessor that was killed, without the INIT that the kernel sends once.
"""

from __future__ import annotations

import stat
import struct
from enum import IntEnum
from typing import NamedTuple

from interceptor.view.protocol import Attr

VERSION = (7, 38)
"""Linux 6.3's. The kernel speaks whatever older version it is told."""
OLDEST_MINOR = 32
"""Linux 5.10's. What came since is asked for by flags of INIT, or passed over by kernels that do not know it."""
ROOT_ID = 1
BUFFER_SIZE = 1 << 17
"""Longer than any request: `MAX_WRITE` and the headers."""
MAX_WRITE = 1 << 16
RESENT = 1 << 63
"""FUSE_UNIQUE_RESEND: a request that somebody had read already and never answered."""
BLOCK_SIZE = 4096


class Opcode(IntEnum):
    """enum fuse_opcode: what we answer. Anything else is ENOSYS, and the kernel then goes without it."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42
    READDIRPLUS = 44
    RENAME2 = 45


class InitFlag(IntEnum):
    """FUSE_* bits of INIT that we ask for."""

    ATOMIC_O_TRUNC = 1 << 3  # O_TRUNC comes with OPEN; truncating means nothing here
    BIG_WRITES = 1 << 5
    DO_READDIRPLUS = 1 << 13  # listings come with attributes, which saves a LOOKUP each
    PARALLEL_DIROPS = 1 << 18
    INIT_EXT = 1 << 30
    HAS_RESEND = 1 << 39


class OpenFlag(IntEnum):
    """FOPEN_* bits."""

    DIRECT_IO = 1 << 0  # sizes say nothing in procfs and content changes unseen: every read comes to us
    NOFLUSH = 1 << 5  # close(2) need not ask (5.16+)


NOTIFY_RESEND = 7
"""FUSE_NOTIFY_RESEND (6.9+): give us again what was read and not answered."""

SETATTR_OWNERSHIP = 1 << 0 | 1 << 1 | 1 << 2
"""FATTR_MODE, FATTR_UID, FATTR_GID."""

_IN_HEADER = struct.Struct("=IIQQIIII")
_OUT_HEADER = struct.Struct("=IiQ")
_ATTR = struct.Struct("=QQQQQQIIIIIIIIII")
_ENTRY = struct.Struct("=QQQQII")
_ATTR_OUT = struct.Struct("=QI4x")
_OPEN_OUT = struct.Struct("=QI4x")
_READ_IN = struct.Struct("=QQII8xI4x")
_WRITE_OUT = struct.Struct("=I4x")
_INIT_IN = struct.Struct("=IIIII")
_INIT_OUT = struct.Struct("=IIIIHHIIHHII24x")
_STATFS = struct.Struct("=QQQQQIIII24x")
_DIRENT = struct.Struct("=QQII")
_FORGET_ONE = struct.Struct("=QQ")
_U64 = struct.Struct("=Q")
_U32 = struct.Struct("=I")

IN_HEADER_SIZE = _IN_HEADER.size
_ENTRY_OUT_SIZE = _ENTRY.size + _ATTR.size


class Request(NamedTuple):
    """A request: who asks (ids on the host, thread id as this process sees it), for which node, and its arguments."""

    opcode: int
    unique: int
    node: int
    uid: int
    gid: int
    pid: int
    body: bytes


class IoIn(NamedTuple):
    """struct fuse_read_in and the head of struct fuse_write_in. ``flags`` are those of the open file."""

    fh: int
    offset: int
    size: int
    io_flags: int
    flags: int


def parse(buffer: bytearray, length: int) -> Request:
    """The request in the first ``length`` bytes of ``buffer``."""
    _, opcode, unique, node, uid, gid, pid, _ = _IN_HEADER.unpack_from(buffer)
    return Request(opcode, unique, node, uid, gid, pid, bytes(memoryview(buffer)[IN_HEADER_SIZE:length]))


def reply(unique: int, payload: bytes) -> bytes:
    """The answer to a request that went well."""
    return _OUT_HEADER.pack(_OUT_HEADER.size + len(payload), 0, unique) + payload


def refusal(unique: int, error: int) -> bytes:
    """The answer to a request that failed; ``error`` is a positive errno."""
    return _OUT_HEADER.pack(_OUT_HEADER.size, -error, unique)


def resend() -> bytes:
    """The notice that asks for what a predecessor left unanswered."""
    return _OUT_HEADER.pack(_OUT_HEADER.size, NOTIFY_RESEND, 0)


def init(body: bytes) -> bytes:
    """The answer to INIT. `ValueError` for a kernel whose protocol is another."""
    # Without the last field before Linux 5.17.
    major, minor, readahead, flags, flags2 = _INIT_IN.unpack_from(body.ljust(_INIT_IN.size, b"\0"))
    if major != VERSION[0] or minor < OLDEST_MINOR:
        raise ValueError(f"the kernel speaks FUSE {major}.{minor}, we need {VERSION[0]}.{OLDEST_MINOR}")
    wanted = 0
    for flag in InitFlag:
        wanted |= flag
    wanted &= flags | flags2 << 32
    spoken = min((major, minor), VERSION)
    return _INIT_OUT.pack(
        *(*spoken, readahead, wanted & 0xFFFFFFFF, 64, 48, MAX_WRITE, 1, 0, 0, wanted >> 32, 0)
    )


def _attr(number: int, attr: Attr) -> bytes:
    second = 1_000_000_000
    return _ATTR.pack(
        number,
        attr.size,
        0,
        *(attr.atime_ns // second, attr.mtime_ns // second, attr.ctime_ns // second),
        *(attr.atime_ns % second, attr.mtime_ns % second, attr.ctime_ns % second),
        stat.S_IFMT(attr.mode) | attr.mode & 0o1777,  # no setuid: this is not where programs live
        attr.nlink,
        attr.uid,
        attr.gid,
        0,
        BLOCK_SIZE,
        0,
    )


def entry(number: int, attr: Attr, name_s: int, attr_s: int) -> bytes:
    """struct fuse_entry_out; the kernel may take the name for granted for ``name_s`` seconds."""
    return _ENTRY.pack(number, 0, name_s, attr_s, 0, 0) + _attr(number, attr)


def attributes(number: int, attr: Attr, attr_s: int) -> bytes:
    """struct fuse_attr_out."""
    return _ATTR_OUT.pack(attr_s, 0) + _attr(number, attr)


def opened(fh: int, flags: int) -> bytes:
    """struct fuse_open_out."""
    return _OPEN_OUT.pack(fh, flags)


def io(body: bytes) -> IoIn:
    """The arguments of READ, WRITE, READDIR and READDIRPLUS."""
    return IoIn._make(_READ_IN.unpack_from(body))


def io_data(body: bytes) -> bytes:
    """What a WRITE wants written."""
    return body[_READ_IN.size :]


def written(count: int) -> bytes:
    """struct fuse_write_out."""
    return _WRITE_OUT.pack(count)


def statfs(name_max: int) -> bytes:
    """struct fuse_statfs_out."""
    return _STATFS.pack(0, 0, 0, 0, 0, BLOCK_SIZE, name_max, BLOCK_SIZE, 0)


def number_32(body: bytes) -> int:
    """The 32-bit number that arguments begin with: open flags, access mask, valid bits of SETATTR."""
    return int(_U32.unpack_from(body)[0])


def number_64(body: bytes) -> int:
    """The 64-bit number that arguments begin with: a file handle, lookups, the unique of an interrupted request."""
    return int(_U64.unpack_from(body)[0])


def forgets(body: bytes) -> list[tuple[int, int]]:
    """Nodes and lookups of a BATCH_FORGET."""
    count = number_32(body)
    return [_FORGET_ONE.unpack_from(body, 8 + 16 * index) for index in range(count)]


def dirent(name: bytes, number: int, mode: int, cookie: int) -> bytes:
    """struct fuse_dirent with its name, padded."""
    head = _DIRENT.pack(number, cookie, len(name), stat.S_IFMT(mode) >> 12)
    return head + name + bytes(-len(name) % 8)


def direntplus(name: bytes, known: bytes | None, number: int, mode: int, cookie: int) -> bytes:
    """struct fuse_direntplus; without ``known`` (from `entry`) the kernel does not count it as looked up."""
    return (known or bytes(_ENTRY_OUT_SIZE)) + dirent(name, number, mode, cookie)
