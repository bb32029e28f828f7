"""Composites: a base with its covers, welded into one."""

from __future__ import annotations

import errno
import os
import stat as stat_module
from collections import OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from interceptor.errors import SyscallError
from interceptor.kernel import mount, process, stat
from interceptor.kernel.fd import OwnedFd
from interceptor.kernel.flags import MOUNT_ATTR__ATIME, MountAttr, ResolveFlag
from interceptor.mounts.arguments import SIMPLE_ATTRIBUTES, NewMount, atime_attributes, options, simple_attributes
from interceptor.mounts.managed import Cover, Covered, Plan
from interceptor.mounts.weld import Bench, Kept, Shelf, Welder

_CLEARABLE = SIMPLE_ATTRIBUTES | MountAttr.MOUNT_ATTR_NODIRATIME
HARDENED = MountAttr.MOUNT_ATTR_NOSUID | MountAttr.MOUNT_ATTR_NODEV | MountAttr.MOUNT_ATTR_NOEXEC
_O_PATH = os.O_PATH | os.O_NOFOLLOW
_INSIDE = ResolveFlag.RESOLVE_IN_ROOT | ResolveFlag.RESOLVE_NO_MAGICLINKS | ResolveFlag.RESOLVE_NO_SYMLINKS
_ABSENT = (errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.EACCES)
#: Bare clones kept of bases that the container made itself; older ones are let go, and their copies then stay whole.
BARE_MAX = 64


class Shields:
    """The workshop's inert mounts: empty, read-only, made once."""

    def __init__(self, workshop_root: str) -> None:
        self._root = Kept(os.path.join(workshop_root, "shield"))
        self.dev = stat.statx(mount.AT_FDCWD, self._root.path).dev

    def clone(self, cover: Cover, directory: bool) -> OwnedFd:
        """A detached mount to put over a directory or a file."""
        name = (b"shield" if cover is Cover.SHIELD else b"masked") + (b"" if directory else b"-file")
        return self._root.clone(name)


@dataclass
class Material:
    """What the composites of one container are made of: the view's parts, and bare clones of bases by device."""

    plan: Plan
    shelf: Shelf
    view: dict[tuple[bytes, bytes], Kept] = field(default_factory=dict)
    """The view's submounts by (filesystem type, path): cloned for each composite."""
    bare: OrderedDict[tuple[int, int], Kept] = field(default_factory=OrderedDict)

    def keep_bare(self, dev: tuple[int, int], tree: OwnedFd) -> Kept:
        """Keeps a bare clone; the oldest goes when there are too many (a container can ask for any number).

        The first two are the originals' (containers/setup.py), which are never let go.
        """
        if dev in self.bare:
            tree.close()
            return self.bare[dev]
        kept = self.bare[dev] = self.shelf.put(tree)
        if len(self.bare) > BARE_MAX:
            self.shelf.drop(self.bare.pop(list(self.bare)[2]))
        return kept

    def close(self) -> None:
        self.view.clear()
        self.bare.clear()
        self.shelf.clear()


class Composer:
    """Builds composites in the workshop."""

    def __init__(self, shields: Shields, welder: Welder, bench: Bench) -> None:
        self.shields = shields
        self.bench = bench
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
        bare: Kept,
        *,
        readonly: bool = False,
    ) -> OwnedFd:
        """A welded composite of a bare tree, whose root is ``inside`` its filesystem (empty: the filesystem's root).

        The tree is used up. Paths that it does not have are passed over. A procfs with subset=pid is given all its
        paths while it is covered: the container can take the option back by fspick(2), and must find them covered.
        """
        with self.bench.holding(tree) as place, OwnedFd(os.open(place, os.O_PATH | os.O_CLOEXEC)) as root:
            subset = fstype == b"proc" and not inside and not _exists(root, b"sys")
            if subset:
                mount.reconfigure(root, {b"subset": b","})
            for covered in covers:
                if _is_below(covered.path, inside):
                    self._cover(root, _below(covered.path, inside), covered, fstype, material, bare)
            if subset:
                mount.reconfigure(root, {b"subset": b"pid"})
            if readonly:
                mount.mount_setattr(root, set_=MountAttr.MOUNT_ATTR_RDONLY, recursive=True)
            root.close()
            return self._welder.weld(place)

    def _cover(
        self, root: OwnedFd, path: bytes, covered: Covered, fstype: bytes, material: Material, bare: Kept
    ) -> None:
        try:
            target = process.openat2(root, path, _O_PATH, _INSIDE)
        except SyscallError as error:
            if error.errno in _ABSENT:
                return
            raise
        with target, self._cover_tree(covered, target, fstype, material, bare) as tree:
            mount.attach(tree, target)

    def _cover_tree(
        self, covered: Covered, target: OwnedFd, fstype: bytes, material: Material, bare: Kept
    ) -> OwnedFd:
        readonly = covered.cover is Cover.READONLY or covered.readonly
        if covered.cover is Cover.VIEW:
            # Hardened already, on the shelf.
            tree = material.view[fstype, covered.path].clone()
            if readonly:
                mount.mount_setattr(tree, set_=MountAttr.MOUNT_ATTR_RDONLY)
        elif covered.cover is Cover.READONLY:
            tree = bare.clone(covered.path)
            mount.mount_setattr(tree, set_=HARDENED | MountAttr.MOUNT_ATTR_RDONLY)
        else:
            directory = stat_module.S_ISDIR(stat.statx(target).mode)
            tree = self.shields.clone(covered.cover, directory)
        return tree

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
        known = material.bare.get(dev)
        bare = known or material.keep_bare(dev, base)
        tree = base if known else bare.clone()
        welded = self.composite(tree, b"", fstype, material, material.plan.of(fstype), bare)
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
        tree = bare.clone(inside)
        # The clone that is kept may be of another mount of the same superblock.
        others = MOUNT_ATTR__ATIME | (_CLEARABLE & ~base.attributes)
        mount.mount_setattr(tree, set_=base.attributes, clear=others)
        covers = [
            Covered(c.path, Cover.SHIELD, c.readonly) if c.path in shielded else c
            for c in material.plan.of(base.fstype)
            if not _hidden(c.path, shielded)
        ]
        return self.composite(tree, inside, base.fstype, material, covers, bare)


def _exists(root: OwnedFd, path: bytes) -> bool:
    try:
        process.openat2(root, path, _O_PATH, _INSIDE).close()
    except SyscallError as error:
        if error.errno in _ABSENT:
            return False
        raise
    return True


def _is_below(path: bytes, inside: bytes) -> bool:
    return not inside or path.startswith(inside + b"/")


def _below(path: bytes, inside: bytes) -> bytes:
    return path[len(inside) + 1 :] if inside else path


def _hidden(path: bytes, shielded: Collection[bytes]) -> bool:
    """Whether a shield stands above the path: nothing is there any more."""
    return any(path.startswith(s + b"/") for s in shielded)
