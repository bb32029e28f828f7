"""shiftfs, a module of Ubuntu's kernels before ID-mapped mounts: a filesystem that shows another one shifted.

It is mounted twice: by the host's root with ``mark``, which permits it there, and then over the mark by the root of the
user namespace whose IDs are to be used. Which kernel it is does not matter, nor whether the module is listed: it is
mounted, and a file is looked at through it (`interceptor.idshift.probe`).
"""

from __future__ import annotations

import os
import socket

from interceptor.errors import ContainerError, SyscallError
from interceptor.kernel import mount
from interceptor.kernel.fd import OwnedFd
from interceptor.kernel.flags import CLONE_NEWNS, CLONE_NEWUSER, UmountFlag
from interceptor.kernel.namespaces import setns, unshare

_NO_SUCH_FILESYSTEM = 19


def mount_shifted(path: str, namespace: OwnedFd, stage: str) -> OwnedFd:
    """A detached mount of the tree at ``path`` with the IDs of a user namespace. ``stage``: an empty directory in the
    caller's own mount namespace. Raises `SyscallError`, `ContainerError`."""
    os.makedirs(f"{stage}/mark", exist_ok=True)
    try:
        mount.mount(path, f"{stage}/mark", b"shiftfs", 0, b"mark")
    except SyscallError as error:
        if error.errno == _NO_SUCH_FILESYSTEM:
            raise ContainerError(
                "this kernel has no shiftfs (it was Ubuntu's own, and is not needed)"
            ) from None
        raise
    try:
        return mount_inside(namespace, f"{stage}/mark", f"{stage}/mark", b"shiftfs")
    finally:
        mount.umount2(f"{stage}/mark", UmountFlag.MNT_DETACH)


def mount_inside(namespace: OwnedFd, source: str, place: str, fstype: bytes) -> OwnedFd:
    """A detached mount of what the root of a user namespace mounts; ``place``: a directory that it finds. Raises
    `ContainerError` with what it was told."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child = os.fork()
    if child == 0:
        words = b"it ended without a word"
        try:
            setns(namespace, CLONE_NEWUSER)
            os.setgroups([])
            os.setresgid(0, 0, 0)
            os.setresuid(0, 0, 0)
            unshare(CLONE_NEWNS)
            mount.mount(source, place, fstype)
            with mount.clone_mount(mount.AT_FDCWD, place) as tree:
                socket.send_fds(theirs, [b"done"], [tree.fileno()])
            words = b""
        except OSError as error:
            words = str(error).encode()
        finally:
            if words:
                theirs.send(words)
            os._exit(0)
    theirs.close()
    with ours:
        words, fds, _, _ = socket.recv_fds(ours, 4096, 1)
    os.waitpid(child, 0)
    if not fds:
        raise ContainerError(words.decode(errors="replace") or "what mounts inside ended without a word")
    return OwnedFd(fds[0])
