"""Mounts as plain data, for tests of what is pure."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace

from interceptor.mounts.lineage import Baseline, MountClass, Recorded
from interceptor.mounts.managed import Plan, make_plan

VIEW, SHIELD, PROC, SYS, ROOT = (0, 40), (0, 41), (0, 50), (0, 51), (254, 0)
FIRST_NAMESPACE = 100
_ids = itertools.count(1000)


@dataclass(frozen=True)
class Facts:
    """What statmount(2) says, as far as lineage and tree look at it."""

    mnt_id: int
    parent_id: int
    point: bytes
    dev: tuple[int, int] = ROOT
    root: bytes = b"/"
    fstype: bytes = b"ext4"
    peer_group: int = 0
    master: int = 0


@dataclass
class Namespace:
    """A mount namespace to be filled with mounts."""

    number: int = FIRST_NAMESPACE
    mounts: list[Facts] = field(default_factory=list)

    def add(self, point: bytes, parent: Facts | None = None, **facts: object) -> Facts:
        new = Facts(next(_ids), parent.mnt_id if parent else 0, point, **facts)  # type: ignore[arg-type]
        self.mounts.append(new)
        return new

    def composite(
        self, point: bytes, parent: Facts, fstype: bytes = b"proc", shields: frozenset[bytes] = frozenset()
    ) -> Facts:
        """A base with everything that the view covers of it; ``shields`` are paths where shields stand."""
        dev = PROC if fstype == b"proc" else SYS
        base = self.add(point, parent, fstype=fstype, dev=dev)
        for covered in PLAN.of(fstype):
            if covered.path in shields:
                self.add(point + b"/" + covered.path, base, dev=SHIELD, root=b"/shield", fstype=b"tmpfs")
            else:
                self.add(
                    point + b"/" + covered.path,
                    base,
                    dev=VIEW,
                    root=b"/c" + point + b"/" + covered.path,
                    fstype=b"fuse",
                )
        return base

    def chain(self, mount: Facts) -> list[Facts]:
        ids = {m.mnt_id: m for m in self.mounts}
        chain = [mount]
        while chain[-1].parent_id in ids:
            chain.append(ids[chain[-1].parent_id])
        return chain

    def at(self, point: bytes) -> Facts:
        """The youngest mount at a point."""
        return [m for m in self.mounts if m.point == point][-1]

    def cloned(self, number: int) -> Namespace:
        """What unshare(CLONE_NEWNS) makes of it: the same mounts with IDs of their own."""
        new = {m.mnt_id: next(_ids) for m in self.mounts}
        return Namespace(
            number,
            [replace(m, mnt_id=new[m.mnt_id], parent_id=new.get(m.parent_id, 0)) for m in self.mounts],
        )


PLAN: Plan = make_plan()


def container(plan: Plan = PLAN) -> tuple[Namespace, Baseline]:
    """A container as its creation leaves it, and the baseline of it."""
    space = Namespace()
    root = space.add(b"/")
    space.composite(b"/proc", root)
    sys = space.composite(b"/sys", root, b"sysfs")
    space.add(b"/sys/fs/cgroup", sys, fstype=b"cgroup2", dev=(0, 60))
    space.add(b"/data", root, dev=(254, 1))
    recorded = {}
    for mount in space.mounts:
        kind = MountClass.IMMUTABLE
        if mount.fstype in (b"proc", b"sysfs"):
            kind = MountClass.ORIGINAL_BASE
        elif mount.dev == VIEW:
            kind = MountClass.ORIGINAL_SUBMOUNT
        recorded[mount.mnt_id] = Recorded(mount.mnt_id, kind, mount.point, mount.dev, mount.root, 0)
    return space, Baseline(FIRST_NAMESPACE, plan, recorded, SHIELD)
