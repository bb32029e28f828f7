"""Flags of what the container was created with, attacked in all ways known to clear one."""

from __future__ import annotations

import os
from collections.abc import Iterator

from interceptor.errors import SyscallError
from interceptor.kernel import mount as km
from interceptor.kernel.flags import AT_FDCWD, MountAttr, MountFlag
from tests.attacks import audit
from tests.attacks.conftest import Box
from tests.attacks.contexts import Where, rbind
from tests.attacks.test_fresh import FSCONFIG_CMD_RECONFIGURE, kernel_fspick
from tests.guarded import errno_of, mount_id_at, mounts, try_mount

M = MountFlag
REMOUNTS = (
    M.MS_REMOUNT | M.MS_BIND,
    M.MS_REMOUNT,
    M.MS_REMOUNT | M.MS_BIND | M.MS_NOATIME,
    M.MS_REMOUNT | M.MS_BIND | M.MS_REC,
    # Flags that others took for something else.
    M.MS_REMOUNT | M.MS_BIND | M.MS_MOVE,
    M.MS_REMOUNT | M.MS_BIND | M.MS_PRIVATE,
    M.MS_REMOUNT | M.MS_BIND | 0xC0ED0000,
)
READ_ONLY = (b"tools", b"usr", b"proc/bus", b"proc/irq", b"sys/firmware")
ALL = MountAttr(int(audit.LOCKABLE))


def places(where: Where, name: bytes) -> Iterator[bytes]:
    """The mount, and copies of it by either API."""
    yield where.path(name)
    for n, flags in enumerate((M.MS_BIND, M.MS_BIND | M.MS_REC)):
        copy = where.path(b"run/spot/%s-%d" % (name.replace(b"/", b"-"), n))
        if os.path.isdir(where.path(name)):
            os.makedirs(copy, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(copy), exist_ok=True)
            os.close(os.open(copy, os.O_CREAT))
        before = mount_id_at(copy)
        try_mount(where.path(name), copy, None, flags)
        # A guard that decides at random may have said 0 of nothing.
        if mount_id_at(copy) != before:
            yield copy
    third = where.path(b"run/spot/third")
    if os.path.isdir(where.path(name)):
        os.makedirs(third, exist_ok=True)
        rbind(where.path(name), third)
        yield third


def weaken(path: bytes) -> None:
    """What can be tried of a mount that stands somewhere."""
    for flags in REMOUNTS:
        for fstype in (None, b"proc", b"tmpfs"):
            try_mount(b"x", path, fstype, flags)
    try:
        at = km.open_tree(AT_FDCWD, path, 0)
    except OSError:
        return
    with at:
        for recursive in (False, True):
            for clear in (ALL, MountAttr.MOUNT_ATTR_RDONLY, MountAttr.MOUNT_ATTR_NOSUID):
                errno_of(km.mount_setattr, at, clear=clear, recursive=recursive)
    try:
        fd = kernel_fspick(path)
        km.fsconfig(fd, 0, b"rw")
        km.fsconfig(fd, FSCONFIG_CMD_RECONFIGURE)
    except OSError:
        pass


def detached_is_weaker(path: bytes) -> list[str]:
    """The same of a clone that stands nowhere: 0 would mean that the flags are gone."""
    found = []
    for recursive in (False, True):
        try:
            tree = km.clone_mount(AT_FDCWD, path, recursive=recursive)
        except SyscallError:
            continue
        with tree:
            for clear in (MountAttr.MOUNT_ATTR_RDONLY, ALL):
                for deep in (False, True):
                    error = errno_of(km.mount_setattr, tree, clear=clear, recursive=deep)
                    if error == 0:
                        found.append(f"{path!r} {clear!r} recursive={deep}")
    return found


def writable(directory: bytes) -> bool:
    """EROFS comes before permissions are looked at, so EACCES counts."""
    return not os.statvfs(directory).f_flag & os.ST_RDONLY


def test_read_only_stays_read_only(box: Box, context: str) -> None:
    def attack(where: Where) -> tuple[list[bytes], list[str]]:
        wrong, weaker, seen = [], [], []
        for path in (path for name in READ_ONLY for path in places(where, name)):
            seen.append(path)
            weaken(path)
            weaker += detached_is_weaker(path)
            wrong += [p for p in seen if writable(p)]
        return wrong, weaker

    wrong, weaker = box.attack(context, attack)
    assert wrong == []
    assert weaker == []


def test_nosuid_nodev_noexec_stay(box: Box, context: str) -> None:
    def attack(where: Where) -> list[tuple[bytes, int]]:
        before = {m.mnt_id: m.attributes & audit.LOCKABLE & ~1 for m in mounts()}
        for name in (b"proc", b"sys", b"dev/shm", b"run", b"tmp"):
            weaken(where.path(name))
        return [
            (m.point, before[m.mnt_id] & ~m.attributes)
            for m in mounts()
            if before.get(m.mnt_id, 0) & ~m.attributes
        ]

    assert box.attack(context, attack) == []
