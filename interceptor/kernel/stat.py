"""Identity of files and mounts: statx(2), statmount(2), listmount(2), statfs(2)."""

from __future__ import annotations

from dataclasses import dataclass

from interceptor._native import ffi, lib
from interceptor.errors import SyscallError
from interceptor.kernel.call import Path, c_fd, c_path, checked
from interceptor.kernel.fd import FdLike
from interceptor.kernel.flags import AT_EMPTY_PATH, AT_STATX_DONT_SYNC, AT_SYMLINK_NOFOLLOW

LSMT_ROOT = 0xFFFFFFFFFFFFFFFF
_STATMOUNT_MASK = 0x1 | 0x2 | 0x4 | 0x8 | 0x10 | 0x20
_BUFFER = 16384


@dataclass(frozen=True, slots=True)
class FileStat:
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


@dataclass(frozen=True, slots=True)
class MountStat:
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
    out = ffi.new("struct ix_stat *")
    flags = AT_STATX_DONT_SYNC | (0 if follow else AT_SYMLINK_NOFOLLOW) | (0 if path else AT_EMPTY_PATH)
    checked(lib.ix_statx(c_fd(dirfd), c_path(path), flags, out), "statx", c_fd(dirfd), path, hex(flags))
    return FileStat(
        mnt_id=out.mnt_id,
        ino=out.ino,
        dev=(out.dev_major, out.dev_minor),
        mode=out.mode,
        mount_root=bool(out.mount_root),
        unique=bool(out.unique),
        uid=out.uid,
        gid=out.gid,
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
    buffer = ffi.new("char[]", _BUFFER)
    result = lib.ix_statmount(mnt_id, namespace, _STATMOUNT_MASK, buffer, _BUFFER)
    checked(result, "statmount", hex(mnt_id), hex(namespace))
    s = lib.ix_statmount_view(buffer)
    strings = ffi.buffer(buffer, _BUFFER)[s.strings :]
    return MountStat(
        mnt_id=s.mnt_id,
        parent_id=s.parent_id,
        dev=(s.dev_major, s.dev_minor),
        magic=s.magic,
        attributes=s.attributes,
        propagation=s.propagation,
        peer_group=s.peer_group,
        master=s.master,
        root=_string(strings, s.root),
        point=_string(strings, s.point),
        fstype=_string(strings, s.fstype),
    )


def _string(strings: bytes, offset: int) -> bytes:
    return strings[offset : strings.index(b"\0", offset)] if offset >= 0 else b""


def listmount(mnt_id: int = LSMT_ROOT, namespace: int = 0) -> list[int]:
    """listmount(2), 6.8+: unique IDs of every mount below ``mnt_id``, parents before what came later."""
    count = 512
    ids = ffi.new("uint64_t[]", count)
    found: list[int] = []
    last = 0
    while True:
        n = lib.ix_listmount(mnt_id, namespace, last, ids, count)
        checked(n, "listmount", hex(mnt_id), hex(namespace))
        found.extend(int(ids[i]) for i in range(n))
        if n < count:
            return found
        last = found[-1]


def mount_exists(mnt_id: int, namespace: int = 0) -> bool:
    """Whether a mount of that unique ID is in the namespace."""
    try:
        statmount(mnt_id, namespace)
    except SyscallError:
        return False
    return True
