"""Arguments of mount(2) in the terms of the new mount API. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from interceptor.kernel.flags import MountAttr, MountFlag

_SIMPLE = (
    (MountFlag.MS_RDONLY, MountAttr.MOUNT_ATTR_RDONLY),
    (MountFlag.MS_NOSUID, MountAttr.MOUNT_ATTR_NOSUID),
    (MountFlag.MS_NODEV, MountAttr.MOUNT_ATTR_NODEV),
    (MountFlag.MS_NOEXEC, MountAttr.MOUNT_ATTR_NOEXEC),
    (MountFlag.MS_NOSYMFOLLOW, MountAttr.MOUNT_ATTR_NOSYMFOLLOW),
)
_SUPERBLOCK = (
    (MountFlag.MS_RDONLY, b"ro"),
    (MountFlag.MS_SYNCHRONOUS, b"sync"),
    (MountFlag.MS_DIRSYNC, b"dirsync"),
    (MountFlag.MS_MANDLOCK, b"mand"),
    (MountFlag.MS_LAZYTIME, b"lazytime"),
)
#: Attributes that can be set and cleared one by one, in mount(2) and in fsmount(2) alike.
SIMPLE_ATTRIBUTES = sum(attribute.value for _, attribute in _SIMPLE)


@dataclass(frozen=True, slots=True)
class NewMount:
    """A procfs or sysfs that a caller asks for; validated, nothing in it is a path."""

    fstype: bytes
    flags: int
    source: bytes = b""
    hidepid: int | None = None
    subset_pid: bool = False
    gid: int | None = None
    """As the host numbers it."""
    sb_flags: int = 0
    """Flags of mount(2) that the superblock gets."""


def simple_attributes(flags: int) -> int:
    """The attributes of mount(2) flags that can be set and cleared one by one."""
    return sum(attribute.value for flag, attribute in _SIMPLE if flags & flag)


def atime_attributes(flags: int) -> int:
    """The access time attributes of mount(2) flags: relatime unless told otherwise, as path_mount() has it."""
    if flags & MountFlag.MS_STRICTATIME:
        attributes = int(MountAttr.MOUNT_ATTR_STRICTATIME)
    else:
        attributes = int(MountAttr.MOUNT_ATTR_NOATIME) if flags & MountFlag.MS_NOATIME else 0
    return attributes | (MountAttr.MOUNT_ATTR_NODIRATIME if flags & MountFlag.MS_NODIRATIME else 0)


def options(new: NewMount) -> dict[bytes, bytes | None]:
    """What fsconfig(2) is told."""
    told: dict[bytes, bytes | None] = {b"source": new.source}
    if new.hidepid is not None:
        told[b"hidepid"] = b"%d" % new.hidepid
    if new.gid is not None:
        told[b"gid"] = b"%d" % new.gid
    if new.subset_pid:
        told[b"subset"] = b"pid"
    told.update({name: None for flag, name in _SUPERBLOCK if new.sb_flags & flag})
    return told
