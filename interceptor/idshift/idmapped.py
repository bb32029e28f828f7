"""ID-mapped mounts: of a plain tree, and of an overlay through its layers (mount_setattr(2), "ID-mapped mounts").

On disk everything stays as it is, owned by 0 and up; through the mount it belongs to the container's IDs, both ways.
An overlay cannot be mapped itself, so a second one is made over the same layers, each of them mapped. It is mounted
with the filesystem IDs of the container's root: those of the mounter are what the overlay writes with, and the host's
root is not in the map.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from interceptor.errors import ContainerError
from interceptor.idshift import stack
from interceptor.idshift.overlay import Layers
from interceptor.idshift.subid import Block
from interceptor.kernel import mount
from interceptor.kernel.fd import OwnedFd
from interceptor.kernel.flags import CLONE_NEWUSER, MountAttr
from interceptor.kernel.namespaces import open_namespace, unshare

#: What the kernel shows for an owner that is not mapped: /proc/sys/kernel/overflowuid.
OVERFLOW = 65534


@contextmanager
def user_namespace(uids: Block, gids: Block) -> Iterator[OwnedFd]:
    """A user namespace that maps 0 and up to these IDs, for `mount_setattr`. Raises `OSError`."""
    ours, theirs = os.pipe2(os.O_CLOEXEC), os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        try:
            unshare(CLONE_NEWUSER)
            os.write(theirs[1], b"x")
            os.close(ours[1])
            os.read(ours[0], 1)
        finally:
            os._exit(0)
    try:
        os.close(theirs[1])
        if os.read(theirs[0], 1) != b"x":
            raise ContainerError("no user namespace can be made", "see: interceptor doctor")
        for table, ids in (("uid_map", uids), ("gid_map", gids)):
            with open(f"/proc/{child}/{table}", "w") as file:
                file.write(f"0 {ids.first} {ids.size}")
        namespace = open_namespace(child, "user")
    finally:
        for fd in (theirs[0], *ours):
            os.close(fd)
        os.waitpid(child, 0)
    with namespace:
        yield namespace


class Mapper:
    """Makes mapped mounts in the calling process's mount namespace, which is to be private."""

    def __init__(self, namespace: OwnedFd, uids: Block, gids: Block, stage: str) -> None:
        """``stage``: an empty directory on a tmpfs, in which layers are attached."""
        self._namespace = namespace
        self._uids = uids
        self._gids = gids
        self._stage = stage
        self._overlays = 0

    def owned_inside(self, status: os.stat_result) -> bool:
        """Whether a file belongs to one of the container's IDs already."""
        return self._uids.first <= status.st_uid < self._uids.end

    def tree(self, path: str, recursive: bool = False) -> OwnedFd:
        """A detached mapped clone of what is at ``path``, of the mounts below it as well if ``recursive``.

        Whether the mapping takes effect is seen from the owner of its root. Raises `SyscallError`, `ContainerError`.
        """
        tree = mount.clone_mount(mount.AT_FDCWD, path, recursive=recursive)
        try:
            mount.mount_setattr(
                tree, set_=MountAttr.MOUNT_ATTR_IDMAP, userns=self._namespace, recursive=recursive
            )
            self._verify(path, os.lstat(path), os.fstat(tree.fileno()))
        except BaseException:
            tree.close()
            raise
        return tree

    def overlay(self, layers: Layers, work: str) -> OwnedFd:
        """A detached overlay over the same layers, mapped. ``work``: the name of its work directory, which is made
        beside the upper one; overlays that are mounted at the same time must not share it."""
        self._overlays += 1
        stage = f"{self._stage}/o{self._overlays}"
        os.mkdir(stage, 0o755)
        lower = [
            self._attached(os.path.realpath(path), f"{stage}/{i}") for i, path in enumerate(layers.lower)
        ]
        options: list[stack.Option] = [("index", "off"), *layers.options]
        if layers.upper is not None:
            parent, name = os.path.split(os.path.realpath(layers.upper))
            os.makedirs(f"{parent}/{work}", 0o700, exist_ok=True)
            self._attached(parent, f"{stage}/u")
            options += [("upperdir", f"{stage}/u/{name}"), ("workdir", f"{stage}/u/{work}")]
        tree = stack.mount_layers(lower, options, stage, (self._uids.first, self._gids.first))
        top = layers.upper if layers.upper is not None else layers.lower[0]
        self._verify(top, os.stat(top), os.fstat(tree.fileno()))
        return tree

    def _attached(self, path: str, place: str) -> str:
        os.mkdir(place, 0o755)
        with self.tree(path) as tree:
            mount.attach(tree, mount.AT_FDCWD, place)
        return place

    def _verify(self, path: str, disk: os.stat_result, seen: os.stat_result) -> None:
        wanted = (_through(self._uids, disk.st_uid), _through(self._gids, disk.st_gid))
        if (seen.st_uid, seen.st_gid) != wanted:
            raise ContainerError(
                f"{path}: owned by {disk.st_uid}:{disk.st_gid}, through its mapped mount by {seen.st_uid}:"
                f"{seen.st_gid} instead of {wanted[0]}:{wanted[1]}",
                "its filesystem says that it can be mapped, and does not do it",
            )


def _through(ids: Block, owner: int) -> int:
    return ids.first + owner if owner < ids.size else OVERFLOW
