"""Identity of files and mounts: statx(2), statmount(2), listmount(2), statfs(2)."""

from __future__ import annotations

import errno
import functools
from collections.abc import Iterable
from enum import IntEnum
from typing import Any, NamedTuple

from interceptor._native import ffi, lib
from interceptor.errors import SyscallError
from interceptor.kernel import mountinfo
from interceptor.kernel.call import Path, c_fd, c_path, checked
from interceptor.kernel.fd import FdLike
from interceptor.kernel.flags import AT_EMPTY_PATH, AT_STATX_DONT_SYNC, AT_SYMLINK_NOFOLLOW
from interceptor.kernel.mountinfo import MountStat as MountStat
from interceptor.kernel.whereabouts import BY_INODE, remember, within

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
    """NS_GET_MNTNS_ID of ioctl_nsfs(2), 6.11+; before, a number that `whereabouts.within` knows."""
    value = ffi.new("uint64_t *")
    checked(lib.ix_mntns_id(c_fd(fd), value), "ioctl(NS_GET_MNTNS_ID)", c_fd(fd))
    number = int(value[0])
    if number & BY_INODE:
        remember(number, fd)
    return number


@functools.cache
def reads_mountinfo() -> bool:
    """Whether there is no statmount(2), which is then tried no more."""
    return bool(lib.ix_statmount(0, 0, 0, ffi.NULL, 0) == -errno.ENOSYS)


def _read(namespace: int) -> dict[int, MountStat]:
    if not namespace:
        return mountinfo.read()
    with within(namespace) as proc:
        return mountinfo.read(proc)


def read_at_once(namespace: int) -> dict[int, MountStat]:
    """All mounts of a mount namespace by ID, where they cannot be looked up one by one; else none.

    Raises as `listmount`.
    """
    return _read(namespace) if reads_mountinfo() else {}


def statmount(mnt_id: int, namespace: int = 0) -> MountStat:
    """statmount(2), 6.8+; ``namespace`` (6.11+) is the ID of a mount namespace, 0 the caller's own. Before, the calling
    thread goes there to look, and finds the reusable IDs in mountinfo.

    Raises `SyscallError`, with ENOENT if there is no such mount in that namespace.
    """
    if reads_mountinfo():
        found = _read(namespace).get(mnt_id)
        if found is None:
            raise SyscallError(errno.ENOENT, f"search for the mount {mnt_id} in {namespace:#x}")
        return found
    if namespace & BY_INODE:
        with within(namespace):
            return statmount(mnt_id)
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


class Pick(IntEnum):
    """Which of many mounts are worth a look; where there is no statmount(2) the others are among them."""

    BASES = int(lib.IX_PICK_BASES)
    """Of procfs or sysfs."""
    BETWEEN = int(lib.IX_PICK_BETWEEN)
    """Slaves that share."""
    POINTS = int(lib.IX_PICK_POINTS)
    """At one of some places."""


def listmount(
    mnt_id: int = LSMT_ROOT,
    namespace: int = 0,
    pick: Pick | None = None,
    points: Iterable[bytes] = (),
) -> list[int]:
    """listmount(2), 6.8+: unique IDs of every mount below ``mnt_id``, parents before what came later; or of those that
    are picked. Before, as `statmount`, in the order of mountinfo.
    """
    if reads_mountinfo():
        mounts = _read(namespace)
        return list(mounts) if mnt_id == LSMT_ROOT else mountinfo.below(mounts, mnt_id)
    if namespace & BY_INODE:
        with within(namespace):
            return listmount(mnt_id, 0, pick, points)
    count = 512
    ids = _uncleared("uint64_t[]", count)
    found: list[int] = []
    texts = [ffi.from_buffer("char[]", point + b"\0") for point in sorted(points)]
    wanted = ffi.new("char *[]", texts)
    last = 0
    while True:
        n = lib.ix_listmount(mnt_id, namespace, last, ids, count)
        if n < 0:
            raise SyscallError(-n, f"listmount({mnt_id:#x}, {namespace:#x})")
        last = ids[n - 1] if n else 0
        kept = lib.ix_pick(namespace, ids, n, pick, wanted, len(texts)) if pick and n else n
        found.extend(ffi.unpack(ids, kept))
        if n < count:
            return found


def mount_exists(mnt_id: int, namespace: int = 0) -> bool:
    """Whether a mount of that unique ID is in the namespace. Raises as `statmount`, but for ENOENT."""
    return find_mount(mnt_id, namespace) is not None


def present(ids: Iterable[int], namespace: int) -> set[int]:
    """Those of some mounts that are in a namespace; none where that has ended. Raises `SyscallError`."""
    if not reads_mountinfo():
        return {number for number in ids if mount_exists(number, namespace)}
    try:
        return _read(namespace).keys() & set(ids)
    except SyscallError as error:
        if error.errno != errno.ENOENT:
            raise
        return set()
