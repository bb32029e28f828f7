"""Composites: a base with its covers, welded into one."""

from __future__ import annotations

import errno
import os
import stat as stat_module
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from interceptor.errors import SyscallError
from interceptor.kernel import mount, process, stat
from interceptor.kernel.fd import OwnedFd
from interceptor.kernel.flags import MOUNT_ATTR__ATIME, MountAttr, ResolveFlag
from interceptor.mounts.arguments import NewMount, atime_attributes, options, simple_attributes
from interceptor.mounts.managed import ANCHOR, Cover, Covered, Plan
from interceptor.mounts.weld import Bench, Welder

HARDENED = MountAttr.MOUNT_ATTR_NOSUID | MountAttr.MOUNT_ATTR_NODEV | MountAttr.MOUNT_ATTR_NOEXEC
_O_PATH = os.O_PATH | os.O_NOFOLLOW
_INSIDE = ResolveFlag.RESOLVE_IN_ROOT | ResolveFlag.RESOLVE_NO_MAGICLINKS | ResolveFlag.RESOLVE_NO_SYMLINKS
_ABSENT = (errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.EACCES)
#: Bare clones kept of bases that the container made itself; older ones are let go, and their copies then stay whole.
BARE_MAX = 64


class Shields:
    """The workshop's inert mounts: empty, read-only, made once."""

    def __init__(self, workshop_root: str) -> None:
        root = os.path.join(workshop_root, "shield")
        self._trees = {
            name: mount.clone_mount(mount.AT_FDCWD, os.path.join(root, name))
            for name in ("shield", "shield-file", "masked", "masked-file")
        }
        self.dev = stat.statx(self._trees["shield"]).dev

    def clone(self, cover: Cover, directory: bool) -> OwnedFd:
        """A detached mount to put over a directory or a file."""
        name = ("shield" if cover is Cover.SHIELD else "masked") + ("" if directory else "-file")
        return mount.clone_mount(self._trees[name])


@dataclass
class Material:
    """What the composites of one container are made of: the view's parts, and bare clones of bases by device."""

    plan: Plan
    view: dict[tuple[bytes, bytes], OwnedFd]
    """Templates of the view's submounts by (filesystem type, path): detached, cloned for each composite."""
    bare: OrderedDict[tuple[int, int], OwnedFd] = field(default_factory=OrderedDict)

    def keep_bare(self, dev: tuple[int, int], tree: OwnedFd) -> None:
        """Remembers a bare clone; the oldest goes when there are too many (a container can ask for any number).

        The first two are the originals' (containers/setup.py), which are never let go.
        """
        if dev in self.bare:
            tree.close()
            return
        self.bare[dev] = tree
        if len(self.bare) > BARE_MAX:
            self.bare.pop(list(self.bare)[2]).close()

    def close(self) -> None:
        for tree in [*self.view.values(), *self.bare.values()]:
            tree.close()
        self.view.clear()
        self.bare.clear()


class Composer:
    """Builds composites in the workshop."""

    def __init__(self, shields: Shields, welder: Welder, bench: Bench) -> None:
        self.shields = shields
        self.bench = bench
        self._welder = welder

    def weld(self, tree: OwnedFd) -> OwnedFd:
        """See `Welder.weld`."""
        return self._welder.weld(tree)

    def cover(
        self,
        tree: OwnedFd,
        inside: bytes,
        fstype: bytes,
        material: Material,
        covers: Iterable[Covered],
        bare: OwnedFd,
    ) -> None:
        """Puts covers on a detached, bare tree whose root is ``inside`` its filesystem (empty: the filesystem's root).

        Paths that the tree does not have are passed over. A procfs that has none of them (subset=pid) is anchored.
        """
        covered_any = False
        for covered in covers:
            if not _is_below(covered.path, inside):
                continue
            try:
                target = process.openat2(tree, _below(covered.path, inside), _O_PATH, _INSIDE)
            except SyscallError as error:
                if error.errno in _ABSENT:
                    continue
                raise
            with target, self._cover_tree(covered, target, fstype, material, bare) as cover:
                mount.attach(cover, target)
            covered_any = True
        if fstype == b"proc" and not inside and not covered_any:
            self._anchor(tree)

    def _cover_tree(
        self, covered: Covered, target: OwnedFd, fstype: bytes, material: Material, bare: OwnedFd
    ) -> OwnedFd:
        if covered.cover is Cover.VIEW:
            tree = mount.clone_mount(material.view[fstype, covered.path])
        elif covered.cover is Cover.READONLY:
            tree = _subtree(bare, covered.path)
        else:
            directory = stat_module.S_ISDIR(stat.statx(target).mode)
            return self.shields.clone(covered.cover, directory)
        readonly = covered.cover is Cover.READONLY or covered.readonly
        mount.mount_setattr(tree, set_=HARDENED | (MountAttr.MOUNT_ATTR_RDONLY if readonly else 0))
        return tree

    @staticmethod
    def _anchor(base: OwnedFd) -> None:
        """`self` covered by itself: see `interceptor.mounts.managed.ANCHOR`."""
        with (
            mount.clone_mount(base, ANCHOR) as tree,
            process.openat2(base, ANCHOR, _O_PATH) as target,
        ):
            mount.attach(tree, target)

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
        bare = mount.clone_mount(base)
        self.cover(base, b"", new.fstype, material, material.plan.of(new.fstype), bare)
        material.keep_bare(stat.statx(bare).dev, bare)
        welded = self.weld(base)
        # Set after the weld, so that the container can clear again what it asked for itself.
        attributes = simple_attributes(new.flags)
        if attributes:
            mount.mount_setattr(welded, set_=attributes, recursive=True)
        return welded

    def again(
        self, base: stat.MountStat, shielded: Mapping[bytes, bool], material: Material
    ) -> OwnedFd | None:
        """A welded composite like ``base``, with shields at the paths given; None if no bare clone of it is kept.

        ``base`` may be a clone of a directory of a base: then the composite is of that directory.
        """
        bare = material.bare.get(base.dev)
        if bare is None:
            return None
        fstype = base.fstype
        inside = base.root.strip(b"/")
        tree = _subtree(bare, inside) if inside else mount.clone_mount(bare)
        covers = [
            Covered(c.path, Cover.SHIELD, c.readonly) if shielded.get(c.path) else c
            for c in material.plan.of(fstype)
            if not _hidden(c.path, shielded)
        ]
        self.cover(tree, inside, fstype, material, covers, bare)
        simple = base.attributes & ~MOUNT_ATTR__ATIME
        mount.mount_setattr(
            tree, set_=simple | (base.attributes & MOUNT_ATTR__ATIME), clear=MOUNT_ATTR__ATIME
        )
        return self.weld(tree)


def _subtree(bare: OwnedFd, path: bytes) -> OwnedFd:
    with process.openat2(bare, path, _O_PATH, _INSIDE) as at:
        return mount.clone_mount(at)


def _is_below(path: bytes, inside: bytes) -> bool:
    return not inside or path.startswith(inside + b"/")


def _below(path: bytes, inside: bytes) -> bytes:
    return path[len(inside) + 1 :] if inside else path


def _hidden(path: bytes, shielded: Mapping[bytes, bool]) -> bool:
    """Whether a shield stands above the path: nothing is there any more."""
    return any(path.startswith(s + b"/") for s, there in shielded.items() if there)
