"""The workshop's places: where composites are put together, welded, and where their material is kept.

Trees are put together attached, on the bench: kernels before 6.15 allow nothing to be mounted on a detached tree, and
later ones only what came from the same mount namespace.
"""

from __future__ import annotations

import errno
import os
import socket
import stat as stat_module
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from interceptor.errors import InterceptorError, SyscallError
from interceptor.kernel import mount, stat
from interceptor.kernel.fd import OwnedFd
from interceptor.kernel.flags import UmountFlag


class Bench:
    """A private place where one tree at a time is put together."""

    def __init__(self, place: str) -> None:
        self.place = place

    @contextmanager
    def holding(self, tree: OwnedFd) -> Iterator[str]:
        """The path at which a detached tree stands. What is still there at the end of the block goes."""
        before = stat.statx(mount.AT_FDCWD, self.place).mnt_id
        mount.attach(tree, mount.AT_FDCWD, self.place)
        tree.close()
        try:
            yield self.place
        finally:
            if stat.statx(mount.AT_FDCWD, self.place).mnt_id != before:
                mount.umount2(self.place, UmountFlag.MNT_DETACH)


class Welder:
    """The weld: locks on everything below a tree's root, and on the flags of all of it.

    A tree is moved to the staging place in one step; it propagates into the standing welder's mount namespace, which
    belongs to another user namespace, so the kernel locks it on the way (lock_mnt_tree() of fs/namespace.c). The welder
    answers with a clone, which keeps the locks wherever it is attached. One weld at a time.
    """

    def __init__(self, sock: OwnedFd, staging: str) -> None:
        self._sock = socket.socket(fileno=sock.take())
        self._slot = os.path.join(staging, "w")

    def weld(self, tree: OwnedFd | str) -> OwnedFd:
        """A welded clone of a tree, detached or on the bench, which is used up. Raises `InterceptorError`."""
        if isinstance(tree, OwnedFd):
            with tree:
                mount.attach(tree, mount.AT_FDCWD, self._slot)
        else:
            mount.move_mount(mount.AT_FDCWD, tree, mount.AT_FDCWD, self._slot)
        try:
            return self._clone()
        finally:
            mount.umount2(self._slot, UmountFlag.MNT_DETACH)

    def _clone(self) -> OwnedFd:
        self._sock.send(b"w")
        data, ancillary, _, _ = self._sock.recvmsg(4, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
        if len(data) != 4:
            raise InterceptorError("the welder is gone", "restart the service")
        (error,) = struct.unpack("i", data)
        if error or not ancillary:
            raise SyscallError(error, "open_tree in the welder's namespace")
        (fd,) = struct.unpack("i", ancillary[0][2])
        return OwnedFd(fd)


class Kept:
    """A tree that stands on a shelf to be cloned from."""

    def __init__(self, path: str) -> None:
        self.path = path

    @property
    def name(self) -> str:
        return os.path.basename(self.path)

    def clone(self, path: bytes = b"") -> OwnedFd:
        """A detached clone of it, or of a directory or file in it. Raises `SyscallError`."""
        inside = os.path.join(os.fsencode(self.path), path) if path else self.path
        return mount.clone_mount(mount.AT_FDCWD, inside)

    def open(self) -> OwnedFd:
        """An O_PATH descriptor of its root."""
        return OwnedFd(os.open(self.path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC))


class Shelf:
    """The material of one container: a tmpfs of the workshop's with trees mounted in it, gone in one step."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._serial = 0

    @classmethod
    def create(cls, path: str) -> Shelf:
        """A new, empty one; what stood there before goes."""
        shelf = cls(path)
        shelf.clear()
        os.mkdir(path, 0o700)
        mount.mount(b"interceptor-shelf", path, b"tmpfs", 2 | 4 | 8, b"mode=0700")
        return shelf

    def put(self, tree: OwnedFd) -> Kept:
        """Keeps a detached tree, which is used up."""
        while os.path.lexists(path := os.path.join(self._path, str(self._serial))):
            self._serial += 1
        with tree:
            if stat_module.S_ISDIR(stat.statx(tree).mode):
                os.mkdir(path, 0o700)
            else:
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            mount.attach(tree, mount.AT_FDCWD, path)
        return Kept(path)

    def get(self, name: str) -> Kept:
        """What a predecessor put there."""
        return Kept(os.path.join(self._path, name))

    def drop(self, kept: Kept) -> None:
        """Lets one tree go."""
        mount.umount2(kept.path, UmountFlag.MNT_DETACH)
        os.rmdir(kept.path)

    def clear(self) -> None:
        """Lets everything go, and the shelf."""
        try:
            mount.umount2(self._path, UmountFlag.MNT_DETACH)
        except SyscallError as error:
            if error.errno not in (errno.ENOENT, errno.EINVAL):
                raise
        if os.path.isdir(self._path):
            os.rmdir(self._path)
