"""Setting a container up: its mounts rebuilt as welded ones, in place, and recorded.

Between the runtime's mounts and pivot_root (createRuntime hook) the whole tree is built anew in the workshop and takes
the old one's place in one step; what the runtime mounts after the hook is taken in when the listener arrives. A
container whose hook never ran is set up when its listener arrives: then each base and each protected mount is replaced
where it stands.
"""

from __future__ import annotations

import contextlib
import os
import stat as stat_module
from collections.abc import Iterator
from dataclasses import dataclass

from interceptor.errors import ContainerError, SyscallError
from interceptor.kernel import mount, process, stat
from interceptor.kernel.fd import OwnedFd
from interceptor.kernel.flags import MountAttr, MountFlag, MoveMountFlag, ResolveFlag, UmountFlag
from interceptor.kernel.namespaces import visiting
from interceptor.kernel.stat import MountStat
from interceptor.mounts.composite import Composer, Material
from interceptor.mounts.lineage import Baseline, MountClass, Recorded, is_base, path_in_fs, welded_to
from interceptor.mounts.managed import BASE_TYPES, Plan
from interceptor.mounts.tree import Node, chain_to_root, visible_tree
from interceptor.mounts.weld import Kept

# As numbers, here and below: an enum.Flag takes longer to combine than most calls.
PROTECTED = int(
    MountAttr.MOUNT_ATTR_RDONLY
    | MountAttr.MOUNT_ATTR_NOSUID
    | MountAttr.MOUNT_ATTR_NODEV
    | MountAttr.MOUNT_ATTR_NOEXEC
)
_SAME_GROUP = int(
    MoveMountFlag.MOVE_MOUNT_SET_GROUP
    | MoveMountFlag.MOVE_MOUNT_F_EMPTY_PATH
    | MoveMountFlag.MOVE_MOUNT_T_EMPTY_PATH
)
_GONE = int(UmountFlag.MNT_DETACH | UmountFlag.UMOUNT_NOFOLLOW)
_NO_LINKS = int(ResolveFlag.RESOLVE_NO_SYMLINKS | ResolveFlag.RESOLVE_NO_MAGICLINKS)
_IN_ROOT = int(ResolveFlag.RESOLVE_IN_ROOT) | _NO_LINKS


@dataclass
class Site:
    """The mount namespace that is worked on."""

    namespace: OwnedFd
    namespace_id: int
    home: OwnedFd
    """The workshop's namespace, to which the visiting thread returns."""
    top: bytes
    """Path of the container's root within the namespace: the rootfs before pivot_root, ``/`` after."""

    def mounts(self) -> list[MountStat]:
        """Every mount of the namespace; those that vanish meanwhile are left out."""
        if mounts := stat.read_at_once(self.namespace_id):
            return list(mounts.values())
        ids = stat.listmount(namespace=self.namespace_id)
        found = (stat.find_mount(mount_id, self.namespace_id) for mount_id in ids)
        return [m for m in found if m is not None]

    def inside(self, point: bytes) -> bytes:
        """A mount point as the container will see it."""
        return b"/" + point[len(self.top.rstrip(b"/")) :].strip(b"/")


def _walk(node: Node[MountStat]) -> Iterator[Node[MountStat]]:
    yield node
    for child in node.children:
        yield from _walk(child)


def _open_exactly(found: MountStat) -> OwnedFd:
    """The root of that very mount, in its own namespace. Raises `SyscallError`, `ContainerError`."""
    fd = process.openat2(mount.AT_FDCWD, found.point, os.O_PATH | os.O_NOFOLLOW, _NO_LINKS)
    if stat.statx(fd).mnt_id != found.mnt_id:
        fd.close()
        raise ContainerError(f"{os.fsdecode(found.point)} changed while it was looked at")
    return fd


@dataclass
class _Piece:
    """A detached clone of one mount, and what it was cloned from."""

    node: Node[MountStat]
    tree: OwnedFd
    original: OwnedFd
    """The root of the mount itself."""


def _clone_pieces(site: Site, node: Node[MountStat]) -> list[_Piece]:
    """Clones of the mounts of a tree, parents first. Runs in the visiting thread."""
    fd = _open_exactly(node.mount)
    try:
        tree = mount.clone_mount(fd)
    except SyscallError:
        # Something on it came locked from the host, and stays with it. A base's place is taken by a bare clone.
        tree = mount.clone_mount(fd, recursive=True)
        if not is_base(node.mount):
            return [_Piece(node, tree, fd)]
    pieces = [_Piece(node, tree, fd)]
    for child in node.children:
        pieces.extend(_clone_pieces(site, child))
    return pieces


class Builder:
    """Rebuilds the mounts of one container."""

    def __init__(self, composer: Composer, material: Material, site: Site, network: OwnedFd) -> None:
        self._composer = composer
        self._material = material
        self._site = site
        self._network = network
        self._parents: dict[int, MountStat] = {}
        self._listed: list[MountStat] | None = None

    def _mounts(self) -> list[MountStat]:
        """Those of the namespace, listed again after each change of ours: a call for each mount, and there are many."""
        if self._listed is None:
            self._listed = self._site.mounts()
        return self._listed

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """For the visiting thread: in the container's namespace, whose mounts are not what they were after it."""
        with visiting(self._site.namespace, self._site.home):
            self._listed = None
            yield

    def survey(self) -> Node[MountStat]:
        """The container's mounts as they are. Raises `ContainerError`."""
        try:
            tree = visible_tree(self._mounts(), self._site.top)
        except LookupError as error:
            raise ContainerError(f"the root filesystem is no mount point: {error}") from None
        self._parents = {c.mount.mnt_id: n.mount for n in _walk(tree) for c in n.children}
        return tree

    def take_bare_clones(self, tree: Node[MountStat]) -> dict[bytes, Kept]:
        """Bare clones of the first procfs and sysfs base, for the workshop and for the envoy."""
        found: dict[bytes, Kept] = {}
        for node in _walk(tree):
            fstype = node.mount.fstype
            if is_base(node.mount) and fstype not in found:
                found[fstype] = self._bare_base(node.mount)
        return found

    def _bare_base(self, base: MountStat) -> Kept:
        if base.dev in self._material.bare:
            return self._material.bare[base.dev]
        tree: OwnedFd | None = None
        with visiting(self._site.namespace, self._site.home), _open_exactly(base) as fd:
            try:
                tree = mount.clone_mount(fd)
            except SyscallError:
                if base.fstype != b"sysfs":
                    raise
        if tree is None:
            # A bind of the host's sysfs comes with locked mounts on it; a fresh one of that network namespace is alike.
            tree = mount.fresh_mount(b"sysfs", {}, network_namespace=self._network)
        return self._material.keep_bare(base.dev, tree)

    def rebuild_whole(self, tree: Node[MountStat], root_readonly: bool) -> None:
        """Replaces everything at the container's root in one step; nothing of the container runs yet."""
        with visiting(self._site.namespace, self._site.home):
            pieces = _clone_pieces(self._site, tree)
        new = self._assemble(pieces, root_readonly)
        with new, self._changing():
            with _open_exactly(tree.mount):
                mount.umount2(self._site.top, UmountFlag.MNT_DETACH)
            mount.attach(new, mount.AT_FDCWD, self._site.top)

    def rebuild_in_place(self, tree: Node[MountStat]) -> None:
        """Replaces each base and each protected mount where it stands, without a gap."""
        if tree.mount.attributes & PROTECTED:
            self._replace_root(tree)
            return
        for node in tree.children:
            self._replace(node)

    def _replace_root(self, tree: Node[MountStat]) -> None:
        """Replaces the root and everything on it by pivot_root(2), which moves every process that has it for its root.

        A working directory elsewhere on the old one stays there; nothing is mounted on it any more.
        """
        with visiting(self._site.namespace, self._site.home):
            pieces = _clone_pieces(self._site, tree)
        new = self._assemble(pieces, root_readonly=False)
        with new, self._changing(), _open_exactly(tree.mount) as old:
            # pivot_root() refuses a shared root; the new one has taken its place in the peer group.
            mount.mount_setattr(old, propagation=MountFlag.MS_PRIVATE)
            mount.attach(new, mount.AT_FDCWD, self._site.top)
            os.fchdir(new.fileno())
            mount.pivot_root(b".", b".")
            mount.umount2(b".", UmountFlag.MNT_DETACH)

    def settle(self, baseline: Baseline) -> None:
        """Takes in what the runtime has mounted since the hook: runc applies maskedPaths and readonlyPaths after it.

        What lies on a cover goes: the cover is as masked or read-only as the bundle says, and welded. Anything else is
        welded as it would have been by the hook. Raises `SyscallError`, `ContainerError`.
        """
        mounts = self._mounts()
        ids = {m.mnt_id: m for m in mounts}
        for found in reversed(mounts):
            base = _base_of_covered(chain_to_root(found, ids), baseline)
            if base is not None and found.mnt_id not in baseline.mounts:
                self._take_off(found, base)
        self._weld_new(self.survey(), baseline)

    def _take_off(self, found: MountStat, base: MountStat) -> None:
        """Unmounts what lies on a cover of a base. Raises `SyscallError`, `ContainerError`."""
        inside, name = os.path.split(found.point[len(base.point.rstrip(b"/")) :].strip(b"/"))
        with self._changing(), _open_exactly(base) as root:
            with process.openat2(root, inside or b".", os.O_PATH, _NO_LINKS) as parent:
                if stat.statx(parent, name).mnt_id != found.mnt_id:
                    raise ContainerError(f"{os.fsdecode(found.point)} changed while it was looked at")
                os.fchdir(parent.fileno())
            try:
                mount.umount2(name, _GONE)
            finally:
                os.chdir("/")

    def _weld_new(self, node: Node[MountStat], baseline: Baseline) -> None:
        for child in node.children:
            if child.mount.mnt_id in baseline.mounts:
                self._weld_new(child, baseline)
            else:
                self._replace(child)

    def _replace(self, node: Node[MountStat]) -> None:
        if not any(is_base(n.mount) or n.mount.attributes & PROTECTED for n in _walk(node)):
            return
        with visiting(self._site.namespace, self._site.home):
            pieces = _clone_pieces(self._site, node)
        new = self._assemble(pieces, root_readonly=False)
        with new, self._changing(), _open_exactly(node.mount) as old:
            try:
                mount.attach(new, old, beneath=True)
            except SyscallError:
                _detach(old, node.mount.point)
                mount.attach(new, mount.AT_FDCWD, node.mount.point)
            else:
                _detach(old, node.mount.point)
        if stat.mount_exists(node.mount.mnt_id, self._site.namespace_id):
            raise ContainerError(f"{os.fsdecode(node.mount.point)} changed while it was replaced")

    def _assemble(self, pieces: list[_Piece], root_readonly: bool) -> OwnedFd:
        """One detached tree of welded clones; the locks are below bases only, the flags are locked everywhere."""
        top = pieces[0].node.mount.point
        trees = [self._weld_piece(p, root_readonly and p is pieces[0]) for p in pieces]
        assert trees[0] is not None
        with self._composer.bench.holding(trees[0]) as place:
            for piece, tree in zip(pieces[1:], trees[1:], strict=True):
                if tree is None:
                    continue
                inside = piece.node.mount.point[len(top.rstrip(b"/")) :].strip(b"/")
                with (
                    tree,
                    process.openat2(mount.AT_FDCWD, place, os.O_PATH) as root,
                    process.openat2(root, inside, os.O_PATH | os.O_NOFOLLOW, _IN_ROOT) as at,
                ):
                    mount.attach(tree, at)
            return mount.clone_mount(mount.AT_FDCWD, place, recursive=True)

    def _weld_piece(self, piece: _Piece, readonly: bool) -> OwnedFd | None:
        found = piece.node.mount
        if is_base(found):
            piece.tree.close()
            bare = self._bare_base(found)
            base = bare.clone()
            mount.mount_setattr(base, set_=found.attributes & PROTECTED)
            covers = self._material.plan.of(found.fstype)
            readonly = bool(found.attributes & MountAttr.MOUNT_ATTR_RDONLY)
            return self._composer.composite(
                base, b"", found.fstype, self._material, covers, readonly=readonly
            )
        if self._is_planned(piece):
            piece.tree.close()
            return None
        if readonly:
            mount.mount_setattr(piece.tree, set_=MountAttr.MOUNT_ATTR_RDONLY)
        if not (readonly or found.attributes & PROTECTED):
            return piece.tree
        welded = self._composer.weld(piece.tree)
        if found.peer_group or found.master:
            # What it shared mounts with before, it goes on sharing with; before Linux 5.15 with nobody.
            with contextlib.suppress(SyscallError):
                mount.move_mount(piece.original, b"", welded, b"", _SAME_GROUP)
        return welded

    def _is_planned(self, piece: _Piece) -> bool:
        """Whether the runtime mounted something where the plan has a cover: the cover is enough."""
        found = piece.node.mount
        parent = self._parents.get(found.mnt_id)
        if parent is None or parent.fstype not in BASE_TYPES:
            return False
        return path_in_fs(parent, found.point) in self._material.plan.paths(parent.fstype)

    def record(self, shield_dev: tuple[int, int]) -> Baseline:
        """The baseline: every mount of the container by unique mount ID."""
        mounts = self._mounts()
        ids = {m.mnt_id: m for m in mounts}
        recorded: dict[int, Recorded] = {}
        plan = self._material.plan
        # What the root itself was mounted upon stays behind at pivot_root.
        for node in _walk(visible_tree(mounts, self._site.top)):
            found = node.mount
            chain = chain_to_root(found, ids)
            recorded[found.mnt_id] = Recorded(
                mnt_id=found.mnt_id,
                kind=_original_class(chain, plan),
                point=self._site.inside(found.point),
                dev=found.dev,
                root=found.root,
                attributes=found.attributes,
            )
        return Baseline(self._site.namespace_id, plan, recorded, shield_dev)


def _original_class(chain: list[MountStat], plan: Plan) -> MountClass:
    if is_base(chain[0]):
        return MountClass.ORIGINAL_BASE
    return MountClass.IMMUTABLE if welded_to(chain, plan) is None else MountClass.ORIGINAL_SUBMOUNT


def _detach(fd: OwnedFd, point: bytes) -> None:
    """Lazily unmounts the mount of a descriptor, which is the top one at ``point``; for the visiting thread."""
    if not stat_module.S_ISDIR(stat.statx(fd).mode):
        mount.umount2(point, _GONE)
        return
    os.fchdir(fd.fileno())
    try:
        mount.umount2(b".", _GONE)
    finally:
        os.chdir("/")


def _base_of_covered(chain: list[MountStat], baseline: Baseline) -> MountStat | None:
    """The original base on one of whose covers the mount lies; None if it lies on none."""
    covers = [m for m in chain[1:] if m.point == chain[0].point and m.mnt_id in baseline.mounts]
    if not any(baseline.mounts[m.mnt_id].kind is MountClass.ORIGINAL_SUBMOUNT for m in covers):
        return None
    return next((m for m in chain if is_base(m) and m.mnt_id in baseline.mounts), None)
