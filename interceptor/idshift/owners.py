"""What identifies an owner in a file's metadata, shifted into a container's range of IDs and out of it again. Pure.

Owner and group, the entries of POSIX ACLs, and the root's ID of file capabilities. IDs outside of the range have no
counterpart in the container: there such a file is nobody's, who it belongs to is noted in an attribute that no
container can read or write, and comes back with the file. A capability for another root has no effect in the container
and is not shown there; a file that the container changes comes back without it.

Sources: acl(5) and linux/posix_acl_xattr.h; capabilities(7), "File capability extended attribute versioning".
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
from msgspec.structs import replace

from interceptor.idshift.subid import ID_MAX, Block

CAPABILITY = b"security.capability"
ACLS = (b"system.posix_acl_access", b"system.posix_acl_default")
#: ``trusted``: neither seen nor set without CAP_SYS_ADMIN in the first user namespace.
ORIGINAL = b"trusted.interceptor.original"

_REVISION, _V1, _V2, _V3 = 0xFF000000, 0x01000000, 0x02000000, 0x03000000
_ACL_USER, _ACL_GROUP = 0x02, 0x08
#: /proc/sys/kernel/overflowuid.
_NOBODY = 65534


class Node(msgspec.Struct, frozen=True):
    """All of a file but its name, its data and its links."""

    mode: int
    uid: int = 0
    gid: int = 0
    size: int = 0
    rdev: int = 0
    atime_ns: int = 0
    mtime_ns: int = 0
    target: bytes = b""
    """Of a symbolic link."""
    xattrs: dict[bytes, bytes] = {}
    flags: str = ""
    """Of `interceptor.kernel.inode.FLAGS`."""


class _Original(msgspec.Struct, omit_defaults=True):
    uid: int | None = None
    gid: int | None = None
    acls: dict[bytes, tuple[bytes, bytes]] = {}
    """What was made of each, and what it was."""


@dataclass(frozen=True)
class Shift:
    """Between IDs from 0 on and the range of a container."""

    uids: Block
    gids: Block

    def inward(self, node: Node) -> Node:
        """A file of the manager's as the container is to have it."""
        xattrs = dict(node.xattrs)
        original = _Original()
        uid, gid = _in(self.uids, node.uid), _in(self.gids, node.gid)
        if uid == outside(self.uids):
            original.uid = node.uid
        if gid == outside(self.gids):
            original.gid = node.gid
        for name in ACLS:
            if name in xattrs:
                xattrs[name], lost = self._acl(xattrs[name], _in)
                if lost:
                    original.acls = {**original.acls, name: (xattrs[name], node.xattrs[name])}
        if CAPABILITY in xattrs:
            _put(xattrs, CAPABILITY, _capability_in(xattrs[CAPABILITY], self.uids))
        if original != _Original():
            xattrs[ORIGINAL] = msgspec.msgpack.encode(original)
        return replace(node, uid=uid, gid=gid, xattrs=xattrs)

    def outward(self, node: Node) -> Node:
        """A file of the container's as the manager is to have it."""
        xattrs = dict(node.xattrs)
        original = msgspec.msgpack.decode(xattrs.pop(ORIGINAL, b"\x80"), type=_Original)
        uid, gid = _out(self.uids, node.uid), _out(self.gids, node.gid)
        if node.uid == outside(self.uids) and original.uid is not None:
            uid = original.uid
        if node.gid == outside(self.gids) and original.gid is not None:
            gid = original.gid
        for name in ACLS:
            made, was = original.acls.get(name, (None, b""))
            if name in xattrs:
                xattrs[name] = was if xattrs[name] == made else self._acl(xattrs[name], _out)[0]
        if CAPABILITY in xattrs:
            _put(xattrs, CAPABILITY, _capability_out(xattrs[CAPABILITY], self.uids))
        return replace(node, uid=uid, gid=gid, xattrs=xattrs)

    def _acl(self, value: bytes, shift: Callable[[Block, int], int]) -> tuple[bytes, bool]:
        """Shifted, and whether an ID had no counterpart."""
        if len(value) % 8 != 4:
            return value, False  # nothing that a kernel would make
        made, lost = bytearray(value), False
        for at in range(4, len(value), 8):
            tag, _, number = struct.unpack_from("<HHI", value, at)
            ids = {_ACL_USER: self.uids, _ACL_GROUP: self.gids}.get(tag)
            if ids is not None:
                shifted = shift(ids, number)
                lost = lost or shifted == outside(ids)
                struct.pack_into("<I", made, at + 4, shifted)
        return bytes(made), lost


def outside(ids: Block) -> int:
    """The host's ID for what has no counterpart in a range: one that is not in it."""
    return ID_MAX if ids.first <= _NOBODY < ids.end else _NOBODY


def _in(ids: Block, number: int) -> int:
    return ids.first + number if number < ids.size else outside(ids)


def _out(ids: Block, number: int) -> int:
    """What is in no range of the container's is the host's own doing, and kept."""
    return number - ids.first if ids.first <= number < ids.end else number


def _put(xattrs: dict[bytes, bytes], name: bytes, value: bytes | None) -> None:
    if value is None:
        del xattrs[name]
    else:
        xattrs[name] = value


def _capability_in(value: bytes, ids: Block) -> bytes | None:
    """In a user namespace only revision 3 counts, with the namespace's root in it; None: for a root that is none of
    the container's."""
    (magic,) = struct.unpack_from("<I", value)
    revision, rest = magic & _REVISION, value[4:20].ljust(16, b"\0")
    root = struct.unpack_from("<I", value, 20)[0] if revision == _V3 else 0
    if revision not in (_V1, _V2, _V3):
        return value
    if root >= ids.size:
        return None
    return struct.pack("<I", magic & ~_REVISION | _V3) + rest + struct.pack("<I", ids.first + root)


def _capability_out(value: bytes, ids: Block) -> bytes | None:
    (magic,) = struct.unpack_from("<I", value)
    if magic & _REVISION != _V3:
        return value
    root = struct.unpack_from("<I", value, 20)[0]
    if not ids.first <= root < ids.end:
        return None
    if root == ids.first:
        return struct.pack("<I", magic & ~_REVISION | _V2) + value[4:20]
    return value[:20] + struct.pack("<I", root - ids.first)
