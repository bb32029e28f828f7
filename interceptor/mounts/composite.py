"""Composites: a base with its covers, welded into one."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from interceptor.kernel import mount, stat
from interceptor.kernel.fd import OwnedFd
from interceptor.kernel.flags import MOUNT_ATTR__ATIME, MountAttr
from interceptor.mounts.arguments import (
    SIMPLE_ATTRIBUTES,
    NewMount,
    atime_attributes,
    options,
    simple_attributes,
)
from interceptor.mounts.made import Likeness, Made
from interceptor.mounts.managed import Cover, Covered, Plan
from interceptor.mounts.weld import Bench, Kept, Shelf, Welder

_CLEARABLE = int(SIMPLE_ATTRIBUTES | MountAttr.MOUNT_ATTR_NODIRATIME)
HARDENED = int(MountAttr.MOUNT_ATTR_NOSUID | MountAttr.MOUNT_ATTR_NODEV | MountAttr.MOUNT_ATTR_NOEXEC)
#: Bare clones kept of bases that the container made itself; older ones are let go, and their copies then stay whole.
BARE_MAX = 64


class Shields:
    """The workshop's inert mounts: empty, read-only, made once."""

    def __init__(self, workshop_root: str) -> None:
        self._root = Kept(os.path.join(workshop_root, "shield"))
        self.dev = stat.statx(mount.AT_FDCWD, self._root.path).dev

    def sources(self, cover: Cover) -> tuple[bytes, bytes]:
        """What to clone for a directory and for a file."""
        name = os.path.join(os.fsencode(self._root.path), b"shield" if cover is Cover.SHIELD else b"masked")
        return name, name + b"-file"


@dataclass
class Material:
    """What the composites of one container are made of: the view's parts, and bare clones of bases by device."""

    plan: Plan
    shelf: Shelf
    made: Made
    view: dict[tuple[bytes, bytes], Kept] = field(default_factory=dict)
    """The view's submounts by (filesystem type, path): cloned for each composite."""
    bare: OrderedDict[tuple[int, int], Kept] = field(default_factory=OrderedDict)
    prepared: dict[bytes, mount.Covers] = field(default_factory=dict)
    """All covers of a base, by filesystem type."""

    def keep_bare(self, dev: tuple[int, int], tree: OwnedFd) -> Kept:
        """Keeps a bare clone; the oldest goes when there are too many (a container can ask for any number).

        The first two are the originals' (containers/setup.py), which are never let go.
        """
        if dev in self.bare:
            tree.close()
            return self.bare[dev]
        kept = self.bare[dev] = self.shelf.put(tree)
        if len(self.bare) > BARE_MAX:
            oldest = list(self.bare)[2]
            self.made.forget(self.shelf.path, oldest)
            self.shelf.drop(self.bare.pop(oldest))
        return kept

    def find_bare(self) -> None:
        """Takes up the bare clones that a predecessor put on the shelf after it had left its record."""
        known = {kept.path for kept in (*self.view.values(), *self.bare.values())}
        for kept in self.shelf.all():
            if kept.path not in known:
                self.bare.setdefault(stat.statx(mount.AT_FDCWD, kept.path).dev, kept)

    def close(self) -> None:
        self.made.forget(self.shelf.path)
        self.shelf.clear()
        self.view.clear()
        self.bare.clear()


class Composer:
    """Builds composites in the workshop."""

    def __init__(self, shields: Shields, welder: Welder, bench: Bench) -> None:
        self.shields = shields
        self.bench = bench
        self.made = Made(welder)
        self._welder = welder

    def weld(self, tree: OwnedFd) -> OwnedFd:
        """See `Welder.weld`."""
        return self._welder.weld(tree)

    def composite(
        self,
        tree: OwnedFd,
        inside: bytes,
        fstype: bytes,
        material: Material,
        covers: Iterable[Covered],
        *,
        readonly: bool = False,
    ) -> OwnedFd:
        """A welded composite of a bare tree, whose root is ``inside`` its filesystem (empty: the filesystem's root).

        The tree is used up. Paths that it does not have are passed over.
        """
        with self.bench.holding(tree) as place:
            self._cover(place, inside, fstype, material, covers)
            if readonly:
                with OwnedFd(os.open(place, os.O_PATH | os.O_CLOEXEC)) as standing:
                    mount.mount_setattr(standing, set_=MountAttr.MOUNT_ATTR_RDONLY, recursive=True)
            return self._welder.weld_at(place)

    def _cover(
        self, place: str, inside: bytes, fstype: bytes, material: Material, covers: Iterable[Covered]
    ) -> None:
        """Covers what stands on the bench.

        A procfs with subset=pid is given all its paths while it is covered: the container can take the option back by
        fspick(2), and must find them covered.
        """
        subset = fstype == b"proc" and not inside and not os.path.lexists(os.path.join(place, "sys"))
        if subset:
            self._set_subset(place, b",")
        self._prepared(inside, fstype, material, covers).put(place)
        if subset:
            self._set_subset(place, b"pid")

    def _prepared(
        self, inside: bytes, fstype: bytes, material: Material, covers: Iterable[Covered]
    ) -> mount.Covers:
        """Those of whole bases are had again: what they are made of is there before the first base is."""
        planned = not inside and covers is material.plan.of(fstype)
        if planned and fstype in material.prepared:
            return material.prepared[fstype]
        made = mount.Covers(
            [
                self._source(_below(covered.path, inside), covered, fstype, material)
                for covered in covers
                if _is_below(covered.path, inside)
            ]
        )
        if planned:
            material.prepared[fstype] = made
        return made

    @staticmethod
    def _set_subset(place: str, value: bytes) -> None:
        with OwnedFd(os.open(place, os.O_PATH | os.O_CLOEXEC)) as root:
            mount.reconfigure(root, {b"subset": value})

    def _source(self, path: bytes, covered: Covered, fstype: bytes, material: Material) -> mount.CoverSource:
        readonly = covered.cover is Cover.READONLY or covered.readonly
        part = material.view.get((fstype, covered.path)) if covered.cover is Cover.VIEW else None
        if part is not None:
            # Hardened already, on the shelf.
            view = os.fsencode(part.path)
            return mount.CoverSource(path, view, view, MountAttr.MOUNT_ATTR_RDONLY if readonly else 0)
        if covered.cover is Cover.READONLY:
            return mount.CoverSource(path, None, None, HARDENED | MountAttr.MOUNT_ATTR_RDONLY)
        # A node that the machine has got since the container was set up is in no part of its view: a shield does.
        cover = Cover.SHIELD if covered.cover is Cover.VIEW else covered.cover
        return mount.CoverSource(path, *self.shields.sources(cover), 0)

    def fresh(
        self, new: NewMount, material: Material, pid_namespace: OwnedFd, network_namespace: OwnedFd
    ) -> OwnedFd:
        """A welded composite on a new superblock for the namespaces given. Raises `SyscallError`."""
        base = mount.fresh_mount(
            new.fstype,
            options(new),
            atime_attributes(new.flags),
            pid_namespace=pid_namespace if new.fstype == b"proc" else None,
            network_namespace=network_namespace if new.fstype == b"sysfs" else None,
        )
        return self.over(base, new.fstype, material, simple_attributes(new.flags))

    def over(self, base: OwnedFd, fstype: bytes, material: Material, attributes: int) -> OwnedFd:
        """A welded composite on a bare, detached base, which is used up; ``attributes`` as `MountAttr` bits.

        They are set after the weld, so that the container can clear again what it asked for itself.
        """
        dev = stat.statx(base).dev
        # A network namespace has one sysfs, and of that a clone may be kept already: another mount, otherwise named.
        with self.bench.holding(base) as place:
            material.keep_bare(dev, mount.clone_mount(mount.AT_FDCWD, place))
            self._cover(place, b"", fstype, material, material.plan.of(fstype))
            welded = self._welder.weld_at(place)
        if attributes:
            mount.mount_setattr(welded, set_=attributes, recursive=True)
        return welded

    def again(
        self, base: stat.MountStat, inside: bytes, shielded: Collection[bytes], material: Material
    ) -> OwnedFd | None:
        """A welded composite like ``base``, from the path ``inside`` its filesystem on (empty: all of it), with shields
        at the paths given; None if no bare clone of it is kept.
        """
        bare = material.bare.get(base.dev)
        if bare is None:
            return None
        like = _likeness(base, inside, shielded, material)
        if (welded := self.made.again(like)) is not None:
            return welded
        tree = bare.clone(inside)
        # The clone that is kept may be of another mount of the same superblock.
        others = MOUNT_ATTR__ATIME | (_CLEARABLE & ~base.attributes)
        mount.mount_setattr(tree, set_=base.attributes, clear=others)
        covers = [
            Covered(c.path, Cover.SHIELD, c.readonly) if c.path in shielded else c
            for c in material.plan.of(base.fstype)
            if not _hidden(c.path, shielded)
        ]
        with self.bench.holding(tree) as place:
            self._cover(place, inside, base.fstype, material, covers)
            return self.made.weld(like, bare, place, covers)

    def absent(
        self, base: stat.MountStat, shielded: Collection[bytes], material: Material
    ) -> tuple[bytes, ...]:
        """What the composite of all of a base that `again` has just made does not cover, as it is not there."""
        return self.made.absent(_likeness(base, b"", shielded, material))


def _likeness(
    base: stat.MountStat, inside: bytes, shielded: Collection[bytes], material: Material
) -> Likeness:
    return Likeness(material.shelf.path, base.dev, base.attributes, inside, frozenset(shielded))


def _is_below(path: bytes, inside: bytes) -> bool:
    return not inside or path.startswith(inside + b"/")


def _below(path: bytes, inside: bytes) -> bytes:
    return path[len(inside) + 1 :] if inside else path


def _hidden(path: bytes, shielded: Collection[bytes]) -> bool:
    """Whether a shield stands above the path: nothing is there any more."""
    return any(path.startswith(s + b"/") for s in shielded)
