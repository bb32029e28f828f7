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
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from interceptor.errors import InterceptorError, SyscallError
from interceptor.kernel import mount, stat
from interceptor.kernel.fd import OwnedFd
from interceptor.kernel.flags import MountFlag, UmountFlag
from interceptor.kernel.namespaces import visiting

#: How many trees are welded before the first of them must go, and how long the last stays: seconds.
TRAY_SLOTS = 32
TRAY_SECONDS = 0.05


def clear(place: str) -> None:
    """Takes away every mount that a killed predecessor left at a place of its own."""
    while stat.statx(mount.AT_FDCWD, place).mount_root:
        mount.umount2(place, UmountFlag.MNT_DETACH)


class Bench:
    """A private place where one tree at a time is put together."""

    def __init__(self, place: str) -> None:
        self.place = place
        clear(place)

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
    belongs to another user namespace, so the kernel locks it on the way (lock_mnt_tree() of fs/namespace.c). A clone
    taken in there keeps the locks wherever it is attached. One weld at a time, by a thread that may visit namespaces.

    Trees are welded on a tray, a tmpfs of the staging place, and go together with it some time after the last weld:
    the end of a mount waits for an RCU grace period, which whoever waits for a weld need not wait for as well.
    """

    def __init__(
        self, sock: OwnedFd, staging: str, home: OwnedFd, later: Callable[[float, Callable[[], None]], object]
    ) -> None:
        self._tray = os.path.join(staging, "w")
        self._home = home
        self._later = later
        self._namespace = _namespace_of(sock)
        self._used = 0
        self._clear_due = False
        while stat.statx(mount.AT_FDCWD, self._tray).mount_root:  # left by a predecessor
            mount.umount2(self._tray, UmountFlag.MNT_DETACH)

    def weld(self, tree: OwnedFd | str) -> OwnedFd:
        """A welded clone of a tree, detached or on the bench, which is used up. Raises `InterceptorError`."""
        slot = self._slot(tree)
        if isinstance(tree, OwnedFd):
            with tree:
                mount.attach(tree, mount.AT_FDCWD, slot)
        else:
            mount.move_mount(mount.AT_FDCWD, tree, mount.AT_FDCWD, slot)
        if not self._clear_due:
            self._clear_due = True
            self._later(TRAY_SECONDS, self.clear)
        with visiting(self._namespace, self._home):
            welded = mount.clone_mount(mount.AT_FDCWD, slot, recursive=True)
        # Until the tray is taken away it is a slave, and the container would see that.
        mount.mount_setattr(welded, propagation=MountFlag.MS_PRIVATE, recursive=True)
        return welded

    def _slot(self, tree: OwnedFd | str) -> str:
        if self._used == TRAY_SLOTS:
            self._take_tray_away()
        if not self._used:
            mount.mount(b"interceptor-tray", self._tray, b"tmpfs", 2 | 4 | 8, b"mode=0700")
        slot = os.path.join(self._tray, str(self._used))
        self._used += 1
        found = stat.statx(tree) if isinstance(tree, OwnedFd) else stat.statx(mount.AT_FDCWD, tree)
        if stat_module.S_ISDIR(found.mode):
            os.mkdir(slot, 0o700)
        else:
            os.close(os.open(slot, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        return slot

    def clear(self) -> None:
        """Lets go what was welded."""
        self._clear_due = False
        self._take_tray_away()

    def _take_tray_away(self) -> None:
        if self._used:
            self._used = 0
            mount.umount2(self._tray, UmountFlag.MNT_DETACH)


def _namespace_of(sock: OwnedFd) -> OwnedFd:
    """The welder's mount namespace. Raises `InterceptorError`."""
    with socket.socket(fileno=sock.take()) as asked:
        asked.send(b"n")
        data, ancillary, _, _ = asked.recvmsg(4, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
    if len(data) != 4:
        raise InterceptorError("the welder is gone", "restart the service")
    (error,) = struct.unpack("i", data)
    if error or not ancillary:
        raise SyscallError(error, "open of the welder's mount namespace")
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
