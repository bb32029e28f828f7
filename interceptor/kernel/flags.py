"""The flags of the mount family by the kernel's own names, and how errors show them (mount(2), move_mount(2), …)."""

from __future__ import annotations

import enum

AT_FDCWD = -100
AT_SYMLINK_NOFOLLOW = 0x100
AT_NO_AUTOMOUNT = 0x800
AT_EMPTY_PATH = 0x1000
AT_STATX_DONT_SYNC = 0x4000
AT_RECURSIVE = 0x8000

CLONE_FS = 0x200
CLONE_NEWNS = 0x20000
CLONE_NEWCGROUP = 0x2000000
CLONE_NEWUTS = 0x4000000
CLONE_NEWIPC = 0x8000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

PROC_SUPER_MAGIC = 0x9FA0
SYSFS_MAGIC = 0x62656572


class MountFlag(enum.IntFlag):
    """mount(2)."""

    MS_RDONLY = 1
    MS_NOSUID = 2
    MS_NODEV = 4
    MS_NOEXEC = 8
    MS_SYNCHRONOUS = 16
    MS_REMOUNT = 32
    MS_MANDLOCK = 64
    MS_DIRSYNC = 128
    MS_NOSYMFOLLOW = 256
    MS_NOATIME = 1024
    MS_NODIRATIME = 2048
    MS_BIND = 4096
    MS_MOVE = 8192
    MS_REC = 16384
    MS_SILENT = 32768
    MS_UNBINDABLE = 1 << 17
    MS_PRIVATE = 1 << 18
    MS_SLAVE = 1 << 19
    MS_SHARED = 1 << 20
    MS_RELATIME = 1 << 21
    MS_STRICTATIME = 1 << 24
    MS_LAZYTIME = 1 << 25


class UmountFlag(enum.IntFlag):
    """umount2(2)."""

    MNT_FORCE = 1
    MNT_DETACH = 2
    MNT_EXPIRE = 4
    UMOUNT_NOFOLLOW = 8


class MountAttr(enum.IntFlag):
    """mount_setattr(2), fsmount(2) and statmount(2). Access time is a field, not a bit: `MOUNT_ATTR__ATIME`."""

    MOUNT_ATTR_RDONLY = 0x1
    MOUNT_ATTR_NOSUID = 0x2
    MOUNT_ATTR_NODEV = 0x4
    MOUNT_ATTR_NOEXEC = 0x8
    MOUNT_ATTR_NOATIME = 0x10
    MOUNT_ATTR_STRICTATIME = 0x20
    MOUNT_ATTR_NODIRATIME = 0x80
    MOUNT_ATTR_IDMAP = 0x100000
    MOUNT_ATTR_NOSYMFOLLOW = 0x200000


MOUNT_ATTR__ATIME = 0x70


class OpenTreeFlag(enum.IntFlag):
    """open_tree(2)."""

    OPEN_TREE_CLONE = 1
    AT_SYMLINK_NOFOLLOW = 0x100
    AT_NO_AUTOMOUNT = 0x800
    AT_EMPTY_PATH = 0x1000
    AT_RECURSIVE = 0x8000


class MoveMountFlag(enum.IntFlag):
    """move_mount(2)."""

    MOVE_MOUNT_F_SYMLINKS = 0x1
    MOVE_MOUNT_F_EMPTY_PATH = 0x4
    MOVE_MOUNT_T_SYMLINKS = 0x10
    MOVE_MOUNT_T_EMPTY_PATH = 0x40
    MOVE_MOUNT_SET_GROUP = 0x100
    MOVE_MOUNT_BENEATH = 0x200


class ResolveFlag(enum.IntFlag):
    """openat2(2)."""

    RESOLVE_NO_XDEV = 0x1
    RESOLVE_NO_MAGICLINKS = 0x2
    RESOLVE_NO_SYMLINKS = 0x4
    RESOLVE_BENEATH = 0x8
    RESOLVE_IN_ROOT = 0x10
    RESOLVE_CACHED = 0x20


class Shown:
    """Flags that are rendered once somebody looks: in the message of a call that failed."""

    __slots__ = ("_flags", "_kind")

    def __init__(self, flags: int, kind: type[enum.IntFlag]) -> None:
        self._flags = flags
        self._kind = kind

    def __str__(self) -> str:
        return render(self._flags, self._kind)


def render(flags: int, kind: type[enum.IntFlag]) -> str:
    """``MS_RDONLY|MS_BIND|0x40000000``: names for known bits, hex for the others, 0 for none."""
    names = [str(m.name) for m in kind if flags & m.value]
    unknown = flags
    for member in kind:
        unknown &= ~member.value
    if unknown:
        names.append(hex(unknown))
    return "|".join(names) or "0"
