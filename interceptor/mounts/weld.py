"""The weld: locks on everything below a tree's root, and on the flags of all of it.

A tree is attached in the workshop's staging place; it propagates into the standing welder's mount namespace, which
belongs to another user namespace, so the kernel locks it on the way (lock_mnt_tree() of fs/namespace.c). The welder
answers with a clone, which keeps the locks wherever it is attached. About 60 µs a weld.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from interceptor.errors import InterceptorError, SyscallError
from interceptor.kernel import mount
from interceptor.kernel.fd import OwnedFd
from interceptor.kernel.flags import UmountFlag


class Welder:
    """The workshop's side of the standing welder. One weld at a time: the daemon has one thread that welds."""

    def __init__(self, sock: OwnedFd, staging: str) -> None:
        self._sock = socket.socket(fileno=sock.take())
        self._slot = os.path.join(staging, "w")

    def weld(self, tree: OwnedFd) -> OwnedFd:
        """A welded clone of a detached tree, which is used up. Raises `InterceptorError`."""
        mount.move_mount(tree, b"", mount.AT_FDCWD, self._slot, 4)
        try:
            return self._clone()
        finally:
            mount.umount2(self._slot, UmountFlag.MNT_DETACH)
            tree.close()

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


class Bench:
    """A private place in the workshop where trees are attached for a while.

    The kernel lets a detached tree be cloned or mounted upon only from the mount namespace it was cloned in
    (check_anonymous_mnt() of fs/namespace.c); what comes from a container or from the welder passes through here.
    """

    def __init__(self, place: str) -> None:
        self._place = place

    @contextmanager
    def attached(self, tree: OwnedFd) -> Iterator[str]:
        """The path at which a detached tree stands until the end of the block, when all that is there goes."""
        mount.attach(tree, mount.AT_FDCWD, self._place)
        try:
            yield self._place
        finally:
            mount.umount2(self._place, UmountFlag.MNT_DETACH)

    def our_own(self, tree: OwnedFd) -> OwnedFd:
        """A clone of a detached tree's root that counts as the workshop's own. The tree is used up."""
        with tree, self.attached(tree) as place:
            return mount.clone_mount(mount.AT_FDCWD, place)
