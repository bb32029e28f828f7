"""What a mount is: original or copy, base or submount, shield, immutable or free. Pure: facts in, class out.

Identity is the unique mount ID, before Linux 6.8 the reusable one with device and root. A mount of another namespace
than the container's first has IDs of its own; it is an original if it stands where the original stands, reached through
the same filesystems (DESIGN.md, section 3).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from interceptor.mounts.managed import BASE_TYPES, Plan

#: Unique IDs of mounts, which are never used again, begin here (MNT_UNIQUE_ID_OFFSET of fs/namespace.c); others end.
UNIQUE_FROM = 1 << 31


class MountClass(enum.Enum):
    """The words of DESIGN.md, section 3."""

    ORIGINAL_BASE = "original-base"
    ORIGINAL_SUBMOUNT = "original-submount"
    COPIED_BASE = "copied-base"
    COPIED_SUBMOUNT = "copied-submount"
    SHIELD = "shield"
    IMMUTABLE = "immutable"
    FREE = "free"


class Mount(Protocol):
    """The facts that lineage needs of a mount (`interceptor.kernel.stat.MountStat` has them)."""

    @property
    def mnt_id(self) -> int: ...
    @property
    def parent_id(self) -> int: ...
    @property
    def dev(self) -> tuple[int, int]: ...
    @property
    def root(self) -> bytes: ...
    @property
    def point(self) -> bytes: ...
    @property
    def fstype(self) -> bytes: ...
    @property
    def peer_group(self) -> int: ...
    @property
    def master(self) -> int: ...


M = TypeVar("M", bound=Mount)


@dataclass(frozen=True, slots=True)
class Recorded:
    """One mount of the baseline."""

    mnt_id: int
    kind: MountClass
    point: bytes
    """Within the container's root, ``/`` for the root itself."""
    dev: tuple[int, int]
    root: bytes
    attributes: int


@dataclass(frozen=True)
class Baseline:
    """What the container was created with, recorded once everything was welded."""

    namespace: int
    """ID of the container's first mount namespace."""
    plan: Plan
    mounts: Mapping[int, Recorded]
    shield_dev: tuple[int, int]

    def bases(self) -> list[Recorded]:
        """The original bases."""
        return [m for m in self.mounts.values() if m.kind is MountClass.ORIGINAL_BASE]


def is_base(mount: Mount) -> bool:
    """procfs or sysfs, from the filesystem's own root."""
    return mount.fstype in BASE_TYPES and mount.root == b"/"


def carries_submounts(mount: Mount, plan: Plan) -> bool:
    """Whether it is a directory of procfs or sysfs with managed paths below: its welded submounts came along."""
    inside = mount.root.strip(b"/") + b"/"
    return mount.fstype in BASE_TYPES and any(path.startswith(inside) for path in plan.paths(mount.fstype))


def path_in_fs(mount: Mount, point: bytes) -> bytes:
    """The path of ``point``, which lies on ``mount``, within that mount's filesystem; no slash at either end."""
    inside = point[len(mount.point.rstrip(b"/")) :].strip(b"/")
    return b"/".join(p for p in (mount.root.strip(b"/"), inside) if p)


def welded_to(chain: Sequence[M], plan: Plan) -> M | None:
    """The base (or clone of a base's directory) that ``chain[0]`` is welded to; None if it is no submount of one.

    ``chain`` goes from the mount to the root of its namespace. Only the first mount at a managed path is welded: what
    was put on top of it later has the cover as its parent, at the same point.
    """
    mount = chain[0]
    for index, above in enumerate(chain[1:], start=1):
        if chain[index - 1].point == above.point:
            return None
        if above.fstype in BASE_TYPES and path_in_fs(above, mount.point) in plan.paths(above.fstype):
            between = chain[1:index]
            welded = all(path_in_fs(above, m.point) in plan.paths(above.fstype) for m in between)
            return above if welded else None
    return None


def is_same(recorded: Recorded, mount: Mount) -> bool:
    """Whether a mount is the one that was recorded with its ID. Before Linux 6.8 that may be another's by now: one that
    shows the same, or it is not taken for this one.
    """
    return mount.mnt_id >= UNIQUE_FROM or (recorded.dev, recorded.root) == (mount.dev, mount.root)


def classify(chain: Sequence[Mount], baseline: Baseline, namespace: int) -> MountClass:
    """The class of ``chain[0]``, a mount in the mount namespace ``namespace``."""
    mount = chain[0]
    recorded = baseline.mounts.get(mount.mnt_id) if namespace == baseline.namespace else None
    if recorded is not None and is_same(recorded, mount):
        return recorded.kind
    if is_base(mount):
        return (
            MountClass.ORIGINAL_BASE if _same_position(chain, baseline, namespace) else MountClass.COPIED_BASE
        )
    base = welded_to(chain, baseline.plan)
    if base is None:
        return MountClass.COPIED_BASE if carries_submounts(mount, baseline.plan) else MountClass.FREE
    if mount.dev == baseline.shield_dev and mount.root.startswith(b"/shield"):
        return MountClass.SHIELD
    above = chain[next(i for i, m in enumerate(chain) if m.mnt_id == base.mnt_id) :]
    if is_base(base) and classify(above, baseline, namespace) is MountClass.ORIGINAL_BASE:
        return MountClass.ORIGINAL_SUBMOUNT
    return MountClass.COPIED_SUBMOUNT


def _same_position(chain: Sequence[Mount], baseline: Baseline, namespace: int) -> bool:
    """Whether a base in a namespace cloned from the first one stands where an original stands."""
    if namespace == baseline.namespace:
        return False
    mount = chain[0]
    originals = [b for b in baseline.bases() if (b.point, b.dev) == (mount.point, mount.dev)]
    if not originals or _alike(chain) > len(originals):
        return False
    if sum(m.point == b"/" for m in chain[1:]) > roots(baseline):
        return False  # on a root that was pivoted away, beneath one that is like it
    by_point = {m.point: m for m in baseline.mounts.values()}
    return all(
        m.point in by_point and (by_point[m.point].dev, by_point[m.point].root) == (m.dev, m.root)
        for m in chain[1:]
        # The kernel's own rootfs, below the root of every namespace, has none.
        if m.point and m.point != mount.point
    )


def roots(baseline: Baseline) -> int:
    """How many mounts are stacked at the container's root."""
    return sum(m.point == b"/" for m in baseline.mounts.values())


def _alike(chain: Sequence[Mount]) -> int:
    """How many bases like ``chain[0]`` stand at its place, itself and older ones that it covers: an original covers no
    copy. What is younger has come beneath: the kernel puts what propagates beneath what stands there.
    """
    mount = chain[0]
    return sum(
        is_base(m) and (m.point, m.dev) == (mount.point, mount.dev) and not _is_younger(m, mount)
        for m in chain
    )


def _is_younger(one: Mount, other: Mount) -> bool:
    """By their unique IDs; no where these are not unique."""
    return min(one.mnt_id, other.mnt_id) >= UNIQUE_FROM and one.mnt_id > other.mnt_id


def receivers(group: int, masters: Mapping[int, int]) -> set[int]:
    """Peer groups that a mount or unmount in ``group`` reaches: itself, its slaves, theirs, and so on.

    ``masters`` gives the master of each peer group that has one.
    """
    reached = {group}
    while more := {slave for slave, master in masters.items() if master in reached} - reached:
        reached |= more
    return reached


def reaches(
    target: Mount, parent: Mount, original: Mount, original_parent: Mount, masters: Mapping[int, int]
) -> bool:
    """Whether unmounting ``target`` unmounts ``original`` too, by propagation from ``parent`` to its peers and slaves.

    propagate_umount() of fs/pnode.c: what stands at the same place on every mount that receives from the parent.
    """
    if not parent.peer_group or target.mnt_id == original.mnt_id:
        return False
    groups = receivers(parent.peer_group, masters)
    if original_parent.peer_group not in groups and original_parent.master not in groups:
        return False
    return path_in_fs(parent, target.point) == path_in_fs(original_parent, original.point)
