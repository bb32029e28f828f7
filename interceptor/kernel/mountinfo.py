"""What statmount(2) and listmount(2) say, read from mountinfo (proc_pid_mountinfo(5)): for kernels before Linux 6.8.

IDs of mounts are then the reusable ones. What stands beneath the root of the namespace is not in it.
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from interceptor.kernel.fd import OwnedFd
from interceptor.kernel.flags import MountAttr, MountFlag

_ATTRIBUTES = {
    b"ro": MountAttr.MOUNT_ATTR_RDONLY,
    b"nosuid": MountAttr.MOUNT_ATTR_NOSUID,
    b"nodev": MountAttr.MOUNT_ATTR_NODEV,
    b"noexec": MountAttr.MOUNT_ATTR_NOEXEC,
    b"noatime": MountAttr.MOUNT_ATTR_NOATIME,
    b"nodiratime": MountAttr.MOUNT_ATTR_NODIRATIME,
    b"nosymfollow": MountAttr.MOUNT_ATTR_NOSYMFOLLOW,
    b"idmapped": MountAttr.MOUNT_ATTR_IDMAP,
}
#: Of those that anybody asks about; else 0, which is nobody's.
_MAGIC = {
    b"proc": 0x9FA0,
    b"sysfs": 0x62656572,
    b"fuse": 0x65735546,
    b"fuseblk": 0x65735546,
    b"virtiofs": 0x65735546,
}
_ESCAPE = re.compile(rb"\\([0-7]{3})")


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


def parse(text: bytes) -> dict[int, MountStat]:
    """The mounts of a mountinfo by ID, in its order. Raises `ValueError` where it is none."""
    # Not by splitlines(): the kernel leaves carriage returns as they are.
    lines = text.removesuffix(b"\n").split(b"\n") if text else []
    return {found.mnt_id: found for found in map(_mount, lines)}


def _mount(line: bytes) -> MountStat:
    number, parent, dev, root, point, options, *rest = line.split(b" ")
    end = rest.index(b"-")
    tags = dict(tag.partition(b":")[::2] for tag in rest[:end])
    major, _, minor = dev.partition(b":")
    # A subtype follows the type and a dot.
    fstype = rest[end + 1].partition(b".")[0]
    propagation = (
        (MountFlag.MS_SHARED if b"shared" in tags else 0)
        | (MountFlag.MS_SLAVE if b"master" in tags else 0)
        | (MountFlag.MS_UNBINDABLE if b"unbindable" in tags else 0)
    )
    return MountStat(
        mnt_id=int(number),
        parent_id=int(parent),
        dev=(int(major), int(minor)),
        magic=_MAGIC.get(fstype, 0),
        attributes=_attributes(options.split(b",")),
        propagation=int(propagation or MountFlag.MS_PRIVATE),
        peer_group=int(tags.get(b"shared", 0)),
        master=int(tags.get(b"master", 0)),
        root=_unescaped(root),
        point=_unescaped(point),
        fstype=fstype,
    )


def _attributes(options: list[bytes]) -> int:
    attributes = 0
    for option in options:
        attributes |= _ATTRIBUTES.get(option, 0)
    if b"relatime" not in options and b"noatime" not in options:
        attributes |= MountAttr.MOUNT_ATTR_STRICTATIME
    return int(attributes)


def _unescaped(text: bytes) -> bytes:
    """Blanks, line feeds and backslashes are written as three octal digits."""
    return _ESCAPE.sub(lambda found: bytes([int(found[1], 8) & 0xFF]), text) if b"\\" in text else text


def below(mounts: dict[int, MountStat], mnt_id: int) -> list[int]:
    """The IDs of every mount below one, in the order of the file."""
    under = {mnt_id}
    while True:
        more = {m.mnt_id for m in mounts.values() if m.parent_id in under} - under
        if not more:
            return [number for number in mounts if number in under and number != mnt_id]
        under |= more


def read(proc: OwnedFd | None = None) -> dict[int, MountStat]:
    """The mounts of the calling thread's mount namespace, by the procfs given, which must be one of its own PID
    namespace; else by ``/proc``. Raises `OSError`.
    """
    name = "thread-self/mountinfo" if proc is not None else "/proc/thread-self/mountinfo"
    directory = proc.fileno() if proc is not None else None
    with open(name, "rb", opener=lambda path, flags: os.open(path, flags, dir_fd=directory)) as file:
        return parse(file.read())
