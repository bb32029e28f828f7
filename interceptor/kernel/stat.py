"""Identity of files and mounts: statx(2), statmount(2), listmount(2), statfs(2)."""

from __future__ import annotations

import errno
from typing import Any, NamedTuple

from interceptor._native import ffi, lib
from interceptor.errors import SyscallError
from interceptor.kernel.call import Path, c_fd, c_path, checked
from interceptor.kernel.fd import FdLike
from interceptor.kernel.flags import AT_EMPTY_PATH, AT_STATX_DONT_SYNC, AT_SYMLINK_NOFOLLOW

LSMT_ROOT = 0xFFFFFFFFFFFFFFFF
_BUFFER = 16384
#: The kernel writes it.
_uncleared = ffi.new_allocator(should_clear_after_alloc=False)


class FileStat(NamedTuple):
    """What statx(2) says of an object and of the mount it was reached through."""

    mnt_id: int
    """Unique mount ID where ``unique``, else the reusable one."""
    ino: int
    dev: tuple[int, int]
    mode: int
    mount_root: bool
    unique: bool
    uid: int
    gid: int


class MountStat(NamedTuple):
    """What statmount(2) says of a mount. Paths are bytes as the kernel keeps them, not escaped."""

    mnt_id: int
    parent_id: int
    dev: tuple[int, int]
    magic: int
    attributes: int
    """`MountAttr` bits."""
    propagation: int
    """MS_SHARED, MS_SLAVE, MS_PRIVATE, MS_UNBINDABLE."""
    peer_group: int
    master: int
    root: bytes
    """Path of the mount's root within its filesystem."""
    point: bytes
    """Where it is mounted, as seen from the root of the namespace asked for (or of this process)."""
    fstype: bytes


def statx(dirfd: FdLike, path: Path = b"", *, follow: bool = False) -> FileStat:
    """statx(2) without asking any server (AT_STATX_DONT_SYNC). Raises `SyscallError`."""
    out = _uncleared("struct ix_stat *")
    flags = AT_STATX_DONT_SYNC | (0 if follow else AT_SYMLINK_NOFOLLOW) | (0 if path else AT_EMPTY_PATH)
    result = lib.ix_statx(c_fd(dirfd), c_path(path), flags, out)
    if result < 0:
        checked(result, "statx", c_fd(dirfd), path, hex(flags))
    dev = (out.dev_major, out.dev_minor)
    return FileStat(
        out.mnt_id, out.ino, dev, out.mode, bool(out.mount_root), bool(out.unique), out.uid, out.gid
    )


def fs_magic(fd: FdLike) -> int:
    """f_type of fstatfs(2), as in linux/magic.h. May ask a FUSE server."""
    magic = ffi.new("uint64_t *")
    checked(lib.ix_fs_magic(c_fd(fd), magic), "fstatfs", c_fd(fd))
    return int(magic[0])


def mount_namespace_id(fd: FdLike) -> int:
    """NS_GET_MNTNS_ID of ioctl_nsfs(2), 6.11+."""
    value = ffi.new("uint64_t *")
    checked(lib.ix_mntns_id(c_fd(fd), value), "ioctl(NS_GET_MNTNS_ID)", c_fd(fd))
    return int(value[0])


def statmount(mnt_id: int, namespace: int = 0) -> MountStat:
    """statmount(2), 6.8+; ``namespace`` (6.11+) is the ID of a mount namespace, 0 the caller's own.

    Raises `SyscallError`, with ENOENT if there is no such mount in that namespace.
    """
    buffer = _uncleared("char[]", _BUFFER)
    s = _uncleared("struct ix_mount_view *")
    result = lib.ix_look_at_mount(mnt_id, namespace, buffer, _BUFFER, s)
    if result < 0:
        raise SyscallError(-result, f"statmount({mnt_id:#x}, {namespace:#x})")
    return MountStat(
        s.mnt_id,
        s.parent_id,
        (s.dev_major, s.dev_minor),
        s.magic,
        s.attributes,
        s.propagation,
        s.peer_group,
        s.master,
        _string(s.root),
        _string(s.point),
        _string(s.fstype),
    )


def find_mount(mnt_id: int, namespace: int = 0) -> MountStat | None:
    """As `statmount`; None where there is no such mount, or no such namespace any more."""
    try:
        return statmount(mnt_id, namespace)
    except SyscallError as error:
        if error.errno != errno.ENOENT:
            raise
        return None


def _string(text: Any) -> bytes:
    return bytes(ffi.string(text)) if text else b""


def listmount(mnt_id: int = LSMT_ROOT, namespace: int = 0) -> list[int]:
    """listmount(2), 6.8+: unique IDs of every mount below ``mnt_id``, parents before what came later."""
    count = 512
    ids = _uncleared("uint64_t[]", count)
    found: list[int] = []
    last = 0
    while True:
        n = lib.ix_listmount(mnt_id, namespace, last, ids, count)
        if n < 0:
            raise SyscallError(-n, f"listmount({mnt_id:#x}, {namespace:#x})")
        found.extend(ffi.unpack(ids, n))
        if n < count:
            return found
        last = found[-1]


def mount_exists(mnt_id: int, namespace: int = 0) -> bool:
    """Whether a mount of that unique ID is in the namespace. Raises as `statmount`, but for ENOENT."""
    return find_mount(mnt_id, namespace) is not None
