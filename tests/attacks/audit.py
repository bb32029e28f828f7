"""What must be true of a mount table, read from outside a container or from inside, by filesystem identity alone."""

from __future__ import annotations

from collections.abc import Iterable

from interceptor.errors import SyscallError
from interceptor.kernel import stat
from interceptor.kernel.flags import MountAttr
from interceptor.mounts.lineage import path_in_fs
from interceptor.mounts.managed import VIEW_PROC, VIEW_SYS

VIEWED = {b"proc": VIEW_PROC, b"sysfs": VIEW_SYS}

LOCKABLE = (
    MountAttr.MOUNT_ATTR_RDONLY
    | MountAttr.MOUNT_ATTR_NOSUID
    | MountAttr.MOUNT_ATTR_NODEV
    | MountAttr.MOUNT_ATTR_NOEXEC
)


def table(namespace: int = 0) -> list[stat.MountStat]:
    """The mounts of a mount namespace, 0: of this process, below its root. One that goes meanwhile is left out."""
    found = []
    for mnt_id in stat.listmount(namespace=namespace):
        try:
            found.append(stat.statmount(mnt_id, namespace))
        except SyscallError:
            continue
    return found


def uncovered(mounts: Iterable[stat.MountStat]) -> list[str]:
    """Bases, and parts of bases, that lack a cover; also where something else hides them from every path."""
    mounts = list(mounts)
    wrong = []
    for mount in mounts:
        if mount.fstype not in VIEWED:
            continue
        top = mount.root.strip(b"/")
        covers = {path_in_fs(mount, m.point) for m in mounts if m.parent_id == mount.mnt_id}
        for path in VIEWED[mount.fstype]:
            shown = f"{mount.point!r} ({mount.fstype.decode()} from /{top.decode()}): {path.decode()}"
            if (top + b"/").startswith(path + b"/"):
                wrong.append(f"{shown} is mounted raw")
            elif (not top or path.startswith(top + b"/")) and not _is_covered(path, covers):
                wrong.append(f"{shown} has no cover")
    return wrong


def _is_covered(path: bytes, covers: set[bytes]) -> bool:
    return any(path == c or path.startswith(c + b"/") for c in covers if c)
