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
from interceptor.kernel.namespaces import start_janitor, visiting

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
        self._empty = stat.statx(mount.AT_FDCWD, place).mnt_id

    @contextmanager
    def holding(self, tree: OwnedFd) -> Iterator[str]:
        """The path at which a detached tree stands. What is still there at the end of the block goes."""
        mount.attach(tree, mount.AT_FDCWD, self.place)
        tree.close()
        try:
            yield self.place
        finally:
            if stat.statx(mount.AT_FDCWD, self.place).mnt_id != self._empty:
                mount.umount2(self.place, UmountFlag.MNT_DETACH)


class Janitor:
    """Unmounts what is no longer needed, in a native thread of its own (native/workshop.c).

    The end of a mount waits for an RCU grace period, up to milliseconds; nobody who asks for something is to wait for
    that as well.
    """

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        start_janitor(OwnedFd(theirs.detach()))

    def take(self, path: str) -> None:
        """Lets the mount at ``path`` go, with all that is below it, and the directory that it stands on."""
        self._socket.send(os.fsencode(path))

    def take_tree(self, tree: OwnedFd) -> None:
        """Lets a detached tree go."""
        with tree:
            socket.send_fds(self._socket, [b"t"], [tree.fileno()])

    def close(self) -> None:
        """Waits until all that was taken has gone."""
        self._socket.shutdown(socket.SHUT_WR)
        self._socket.recv(1)
        self._socket.close()


class Welder:
    """The weld: locks on everything below a tree's root, and on the flags of all of it.

    A tree is moved to the staging place in one step; it propagates into the standing welder's mount namespace, which
    belongs to another user namespace, so the kernel locks it on the way (lock_mnt_tree() of fs/namespace.c). A clone
    taken in there keeps the locks wherever it is attached. One weld at a time, by a thread that may visit namespaces.

    Trees are welded on a tray, a tmpfs of the staging place, and go together with it some time after the last weld.
    Those that are to be had again stand on another one, the rack.
    """

    def __init__(
        self,
        sock: OwnedFd,
        staging: str,
        home: OwnedFd,
        later: Callable[[float, Callable[[], None]], object],
        janitor: Janitor,
    ) -> None:
        self._staging = staging
        self._home = home
        self._later = later
        self._janitor = janitor
        self._namespace = _namespace_of(sock)
        for name in os.listdir(staging):  # left by a predecessor
            clear(os.path.join(staging, name))
            os.rmdir(os.path.join(staging, name))
        self._serial = 0
        self._clear_due = False
        self._rack = self._new_place("rack")
        self._racked = 0
        self._lay_out()

    def weld(self, tree: OwnedFd) -> OwnedFd:
        """A welded clone of a detached tree, which is used up. Raises `SyscallError`."""
        slot = self._slot()
        with tree:
            if stat_module.S_ISDIR(stat.statx(tree).mode):
                os.mkdir(slot, 0o700)
            else:
                os.close(os.open(slot, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            mount.attach(tree, mount.AT_FDCWD, slot)
        with visiting(self._namespace, self._home):
            welded = mount.clone_mount(mount.AT_FDCWD, slot, recursive=True)
        # Until the tray is taken away it is a slave, and the container would see that.
        mount.mount_setattr(welded, propagation=MountFlag.MS_PRIVATE, recursive=True)
        return welded

    def weld_at(self, place: str) -> OwnedFd:
        """A welded clone of the directory tree that stands at ``place``, which is used up. Raises `SyscallError`."""
        return mount.weld(place, self._slot(), self._namespace, self._home)

    def weld_to_keep(self, place: str) -> tuple[OwnedFd, str]:
        """As `weld_at`, and the slot from which it can be had `again` until it is let go."""
        slot = os.path.join(self._rack, str(self._racked))
        self._racked += 1
        return mount.weld(place, slot, self._namespace, self._home), slot

    def again(self, slot: str) -> OwnedFd:
        """Another welded clone. Raises `SyscallError`."""
        return mount.weld_again(slot, self._namespace, self._home)

    def let_go(self, slot: str) -> None:
        """What was kept goes, soon."""
        self._janitor.take(slot)

    def _slot(self) -> str:
        if self._used == TRAY_SLOTS:
            self._take_tray_away()
        if not self._clear_due:
            self._clear_due = True
            self._later(TRAY_SECONDS, self.clear)
        slot = os.path.join(self._tray, str(self._used))
        self._used += 1
        return slot

    def clear(self) -> None:
        """Lets go what was welded."""
        self._clear_due = False
        if self._used:
            self._take_tray_away()

    def _take_tray_away(self) -> None:
        self._janitor.take(self._tray)
        self._lay_out()

    def _lay_out(self) -> None:
        """A tray ahead of need."""
        self._tray = self._new_place(str(self._serial))
        self._serial += 1
        self._used = 0

    def _new_place(self, name: str) -> str:
        place = os.path.join(self._staging, name)
        os.mkdir(place, 0o700)
        mount.mount(b"interceptor-weld", place, b"tmpfs", 2 | 4 | 8, b"mode=0700")
        return place


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


def _is_made(path: str, is_directory: bool) -> bool:
    """Makes what a tree can be mounted upon; false if something is there, a predecessor's."""
    try:
        if is_directory:
            os.mkdir(path, 0o700)
        else:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        return False
    return True


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

    def __init__(self, path: str, janitor: Janitor) -> None:
        self.path = path
        self.janitor = janitor
        self._serial = 0

    @classmethod
    def create(cls, path: str, janitor: Janitor) -> Shelf:
        """A new, empty one; what stood there before goes."""
        shelf = cls(path, janitor)
        shelf.clear()
        os.mkdir(path, 0o700)
        mount.mount(b"interceptor-shelf", path, b"tmpfs", 2 | 4 | 8, b"mode=0700")
        return shelf

    def put(self, tree: OwnedFd) -> Kept:
        """Keeps a detached tree, which is used up."""
        with tree:
            is_directory = stat_module.S_ISDIR(stat.statx(tree).mode)
            while not _is_made(path := os.path.join(self.path, str(self._serial)), is_directory):
                self._serial += 1
            self._serial += 1
            mount.attach(tree, mount.AT_FDCWD, path)
        return Kept(path)

    def get(self, name: str) -> Kept:
        """What a predecessor put there."""
        return Kept(os.path.join(self.path, name))

    def all(self) -> list[Kept]:
        """Everything that stands there, also what a predecessor has put."""
        kept = [self.get(name) for name in sorted(os.listdir(self.path), key=int)]
        return [k for k in kept if stat.statx(mount.AT_FDCWD, k.path).mount_root]

    def drop(self, kept: Kept) -> None:
        """Lets one tree go, soon."""
        self.janitor.take(kept.path)

    def clear(self) -> None:
        """Lets everything go, and the shelf."""
        try:
            mount.umount2(self.path, UmountFlag.MNT_DETACH)
        except SyscallError as error:
            if error.errno not in (errno.ENOENT, errno.EINVAL):
                raise
        if os.path.isdir(self.path):
            os.rmdir(self.path)
