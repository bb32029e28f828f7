"""The mount family, one wrapper a system call, each raising `SyscallError` with the call rendered.

Sources: mount(2), umount2(2), pivot_root(2), open_tree(2), move_mount(2), fsopen(2), fsconfig(2), fsmount(2),
mount_setattr(2).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from interceptor._native import ffi, lib
from interceptor.errors import SyscallError
from interceptor.kernel.call import Path, c_fd, c_path, checked, owned
from interceptor.kernel.fd import FdLike, OwnedFd
from interceptor.kernel.flags import (
    AT_EMPTY_PATH,
    AT_FDCWD,
    MountAttr,
    MountFlag,
    MoveMountFlag,
    OpenTreeFlag,
    Shown,
    UmountFlag,
)

# As numbers: an enum.Flag takes longer to combine than most of these calls.
_RECURSIVE = int(OpenTreeFlag.AT_RECURSIVE)
_CLONE = int(OpenTreeFlag.OPEN_TREE_CLONE | OpenTreeFlag.AT_SYMLINK_NOFOLLOW | OpenTreeFlag.AT_EMPTY_PATH)
_CLONE_RECURSIVE = _CLONE | _RECURSIVE
_BENEATH = int(MoveMountFlag.MOVE_MOUNT_BENEATH)
_FROM_TREE = int(MoveMountFlag.MOVE_MOUNT_F_EMPTY_PATH)
_FROM_TREE_TO_FD = int(MoveMountFlag.MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlag.MOVE_MOUNT_T_EMPTY_PATH)


def open_tree(dirfd: FdLike, path: Path, flags: int) -> OwnedFd:
    """open_tree(2), always CLOEXEC."""
    shown = Shown(flags, OpenTreeFlag)
    return owned(lib.ix_open_tree(c_fd(dirfd), c_path(path), flags), "open_tree", dirfd, path, shown)


def clone_mount(dirfd: FdLike, path: Path = b"", *, recursive: bool = False) -> OwnedFd:
    """A detached copy of the mount at ``path`` (symbolic links are not followed), with what is below if recursive."""
    return open_tree(dirfd, path, _CLONE_RECURSIVE if recursive else _CLONE)


def move_mount(from_fd: FdLike, from_path: Path, to_fd: FdLike, to_path: Path, flags: int = 0) -> None:
    """move_mount(2); an empty path with a descriptor needs MOVE_MOUNT_{F,T}_EMPTY_PATH."""
    result = lib.ix_move_mount(c_fd(from_fd), c_path(from_path), c_fd(to_fd), c_path(to_path), flags)
    shown = Shown(flags, MoveMountFlag)
    checked(result, "move_mount", from_fd, from_path, to_fd, to_path, shown)


def attach(tree: FdLike, to_fd: FdLike, to_path: Path = b"", *, beneath: bool = False) -> None:
    """Attaches a detached tree at a descriptor, or at a path below it; beneath the top mount there if asked (6.5+)."""
    flags = _FROM_TREE if to_path else _FROM_TREE_TO_FD
    move_mount(tree, b"", to_fd, to_path, flags | _BENEATH if beneath else flags)


def mount(source: Path, target: Path, fstype: Path, flags: int = 0, data: Path = None) -> None:
    """mount(2)."""
    result = lib.ix_mount(c_path(source), c_path(target), c_path(fstype), flags, c_path(data))
    checked(result, "mount", source, target, fstype, Shown(flags, MountFlag), data)


def umount2(target: Path, flags: int = 0) -> None:
    """umount2(2)."""
    checked(lib.ix_umount2(c_path(target), flags), "umount2", target, Shown(flags, UmountFlag))


def pivot_root(new_root: Path, put_old: Path) -> None:
    """pivot_root(2)."""
    checked(lib.ix_pivot_root(c_path(new_root), c_path(put_old)), "pivot_root", new_root, put_old)


def fsopen(fstype: Path) -> OwnedFd:
    """fsopen(2), always CLOEXEC."""
    return owned(lib.ix_fsopen(c_path(fstype), 0), "fsopen", fstype)


def fsconfig(context: FdLike, command: int, key: Path = None, value: Path = None, aux: int = 0) -> None:
    """fsconfig(2): command 0 sets a flag, 1 a string, 6 creates the superblock."""
    result = lib.ix_fsconfig(c_fd(context), command, c_path(key), c_path(value), aux)
    checked(result, "fsconfig", context, command, key, value, aux)


def fsmount(context: FdLike, attributes: int = 0) -> OwnedFd:
    """fsmount(2), always CLOEXEC: a detached mount."""
    result = lib.ix_fsmount(c_fd(context), 0, attributes)
    return owned(result, "fsmount", context, Shown(attributes, MountAttr))


def new_mount(fstype: bytes, options: Mapping[bytes, bytes | None], attributes: int = 0) -> OwnedFd:
    """fsopen, fsconfig of every option (None: a flag), fsmount: a detached mount of a new superblock."""
    with fsopen(fstype) as context:
        for key, value in options.items():
            fsconfig(context, 0 if value is None else 1, key, value)
        fsconfig(context, 6)
        return fsmount(context, attributes)


_STEPS = ("open own namespaces", "setns(pid)", "setns(net)", "fsopen", "fsconfig", "fsmount")


def fresh_mount(
    fstype: bytes,
    options: Mapping[bytes, bytes | None],
    attributes: int = 0,
    *,
    pid_namespace: FdLike | None = None,
    network_namespace: FdLike | None = None,
) -> OwnedFd:
    """`new_mount` for the PID or network namespace given: joined and left again within this one call.

    procfs takes its namespace from nsproxy->pid_ns_for_children, so no process appears in there.
    """
    keep = [ffi.new("char[]", text) for pair in options.items() for text in pair if text is not None]
    texts = iter(keep)
    pairs = [next(texts) if text is not None else ffi.NULL for pair in options.items() for text in pair]
    array = ffi.new("const char *[]", [*pairs, ffi.NULL, ffi.NULL])
    step = ffi.new("int *")
    pid = -1 if pid_namespace is None else c_fd(pid_namespace)
    net = -1 if network_namespace is None else c_fd(network_namespace)
    result = lib.ix_fresh_mount(fstype, pid, net, array, attributes, step)
    if result < 0:
        raise SyscallError(-result, f"{_STEPS[step[0]]} of a new {fstype.decode()}")
    return OwnedFd(result)


class CoverSource(NamedTuple):
    """What is to stand on a path of a tree, and what that is cloned from; None: from the path itself."""

    path: bytes
    directory: bytes | None
    file: bytes | None
    attributes: int
    """`MountAttr` bits to set."""


class Covers:
    """Covers of a tree as the compiled module takes them: made once for many trees that are alike."""

    def __init__(self, covers: Sequence[CoverSource]) -> None:
        self._paths = [c.path for c in covers]
        # A text that occurs twice is one pointer: where the sources are the same, nobody has to look what is to be
        # covered.
        self._texts = {text: ffi.new("char[]", text) for c in covers for text in c[:3] if text is not None}
        self._array = ffi.new(
            "struct ix_cover[]",
            [
                (*(ffi.NULL if text is None else self._texts[text] for text in c[:3]), c.attributes)
                for c in covers
            ],
        )

    def put(self, place: str) -> None:
        """Covers the tree that stands at ``place``, in one go; paths that it does not have are passed over.

        Raises `SyscallError` with the path of the cover that failed.
        """
        step = ffi.new("int *")
        result = lib.ix_put_covers(os.fsencode(place), self._array, len(self._paths), step)
        if result < 0:
            raise SyscallError(-result, f"covering of {os.fsdecode(self._paths[step[0]])} at {place}")


_WELDING = ("mkdir", "move_mount", "setns", "open_tree", "mount_setattr")


def weld(place: str, slot: str, welder: FdLike, home: FdLike) -> OwnedFd:
    """Moves what stands at ``place`` to the new directory ``slot``, and clones what arrives there in ``welder``.

    ``welder`` and ``home`` are mount namespaces, the second the calling thread's own. Raises `SyscallError`.
    """
    step = ffi.new("int *")
    result = lib.ix_weld(os.fsencode(place), os.fsencode(slot), c_fd(welder), c_fd(home), step)
    if result < 0:
        raise SyscallError(-result, f"{_WELDING[step[0]]} of {place} at {slot}, to be welded")
    return OwnedFd(result)


def weld_again(slot: str, welder: FdLike, home: FdLike) -> OwnedFd:
    """Another welded clone of what `weld` has moved to ``slot``. Raises `SyscallError`."""
    step = ffi.new("int *")
    result = lib.ix_weld_again(os.fsencode(slot), c_fd(welder), c_fd(home), step)
    if result < 0:
        raise SyscallError(-result, f"{_WELDING[step[0]]} of {slot}, to be welded")
    return OwnedFd(result)


def reconfigure(dirfd: FdLike, options: Mapping[bytes, bytes]) -> None:
    """fspick(2), fsconfig of every option, FSCONFIG_CMD_RECONFIGURE: changes the superblock of a mount."""
    result = lib.ix_fspick(c_fd(dirfd), b"", 8)
    with owned(result, "fspick", dirfd, b"", "FSPICK_EMPTY_PATH") as context:
        for key, value in options.items():
            fsconfig(context, 1, key, value)
        fsconfig(context, 7)


def fsopen_for(
    fstype: bytes, *, pid_namespace: FdLike | None = None, network_namespace: FdLike | None = None
) -> OwnedFd:
    """A context of procfs or sysfs for the PID or network namespace given, as fsopen(2) would give it in there."""
    step = ffi.new("int *")
    pid = -1 if pid_namespace is None else c_fd(pid_namespace)
    net = -1 if network_namespace is None else c_fd(network_namespace)
    result = lib.ix_fsopen_for(fstype, pid, net, step)
    if result < 0:
        raise SyscallError(-result, f"{_STEPS[step[0]]} of a new {fstype.decode()}")
    return OwnedFd(result)


def mount_setattr(
    dirfd: FdLike,
    path: Path = b"",
    *,
    set_: int = 0,
    clear: int = 0,
    propagation: int = 0,
    recursive: bool = False,
    userns: FdLike | None = None,
) -> None:
    """mount_setattr(2); with an empty path the mount of ``dirfd`` itself.

    Before Linux 5.12 of such a mount only, and a detached tree is then another with other IDs. Raises `SyscallError`.
    """
    flags = (0 if path else AT_EMPTY_PATH) | (_RECURSIVE if recursive else 0)
    if path or userns is not None:
        user = -1 if userns is None else c_fd(userns)
        result = lib.ix_mount_setattr(c_fd(dirfd), c_path(path), flags, set_, clear, propagation, user)
    else:
        result = lib.ix_set_attributes(c_fd(dirfd), recursive, set_, clear, propagation)
    shown = (Shown(set_, MountAttr), Shown(clear, MountAttr), hex(propagation))
    checked(result, "mount_setattr", dirfd, path, hex(flags), "{set, clr, propagation} =", *shown)


__all__ = [
    "AT_FDCWD",
    "attach",
    "clone_mount",
    "fresh_mount",
    "fsconfig",
    "fsmount",
    "fsopen",
    "mount",
    "mount_setattr",
    "move_mount",
    "new_mount",
    "open_tree",
    "pivot_root",
    "umount2",
]
