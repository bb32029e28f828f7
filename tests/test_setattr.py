"""What mount_setattr(2) does is done without it, by mount(2), to trees that stand and to trees that nobody sees."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Sequence
from typing import NamedTuple

import pytest

from interceptor._native import lib
from interceptor.errors import SyscallError
from interceptor.kernel import mount, mountinfo
from interceptor.kernel.fd import OwnedFd
from interceptor.kernel.flags import (
    CLONE_NEWNS,
    MOUNT_ATTR__ATIME,
    MountAttr,
    MountFlag,
    OpenTreeFlag,
    UmountFlag,
)
from interceptor.kernel.namespaces import unshare
from tests.child import told_by_a_child
from tests.without import refuse

pytestmark = pytest.mark.root

_CLONE = OpenTreeFlag.OPEN_TREE_CLONE
_LIMITS = MountAttr.MOUNT_ATTR_NOSUID | MountAttr.MOUNT_ATTR_NODEV | MountAttr.MOUNT_ATTR_NOEXEC


class Case(NamedTuple):
    """What is changed: ``place`` in the tree, detached or where it stands; and how."""

    place: bytes
    detached: bool
    recursive: bool
    set_: int = 0
    clear: int = 0
    propagation: int = 0


CHANGES = (
    (MountAttr.MOUNT_ATTR_RDONLY, 0, 0),
    (_LIMITS, MountAttr.MOUNT_ATTR_RDONLY, 0),
    (MountAttr.MOUNT_ATTR_NOATIME, MOUNT_ATTR__ATIME, 0),
    (MountAttr.MOUNT_ATTR_STRICTATIME | MountAttr.MOUNT_ATTR_NODIRATIME, MOUNT_ATTR__ATIME, 0),
    (0, MOUNT_ATTR__ATIME | MountAttr.MOUNT_ATTR_NODEV, 0),
    (0, 0, MountFlag.MS_PRIVATE),
    (0, 0, MountFlag.MS_SHARED),
    (MountAttr.MOUNT_ATTR_NOSYMFOLLOW, 0, MountFlag.MS_SLAVE),
)
CASES = [
    Case(place, detached, recursive, *change)
    for place, detached, recursive, change in itertools.product(
        (b"top", b"top/file", b"top/a b"), (True, False), (True, False), CHANGES
    )
]


def _build(root: bytes) -> None:
    """Mounts of every kind on one another, in a mount namespace of the calling process's own."""
    unshare(CLONE_NEWNS)
    mount.mount(b"none", b"/", None, MountFlag.MS_REC | MountFlag.MS_PRIVATE)
    mount.mount(b"x", root, b"tmpfs")
    os.chdir(root)
    os.mkdir("top")
    os.mkdir("after")
    mount.mount(b"x", b"top", b"tmpfs", MountFlag.MS_NODEV | MountFlag.MS_NOSYMFOLLOW)
    mount.mount(None, b"top", None, MountFlag.MS_SHARED)
    for name in ("a b", "ro", "slave"):
        os.mkdir(f"top/{name}")
    for name in ("top/file", "after-file"):
        with open(name, "x"):
            pass
    mount.mount(b"x", b"top/a b", b"tmpfs")
    os.mkdir("top/a b/in")
    mount.mount(b"x", b"top/a b/in", b"proc", MountFlag.MS_NOEXEC | MountFlag.MS_NOATIME)
    mount.mount(b"x", b"top/ro", b"tmpfs", MountFlag.MS_RDONLY)
    mount.mount(b"top/a b", b"top/slave", None, MountFlag.MS_BIND)
    mount.mount(None, b"top/slave", None, MountFlag.MS_SLAVE)
    mount.mount(b"top/file", b"top/file", None, MountFlag.MS_BIND)


def _change(case: Case) -> str:
    flags = _CLONE | (OpenTreeFlag.AT_RECURSIVE if case.recursive else 0)
    with mount.open_tree(mount.AT_FDCWD, case.place, flags if case.detached else 0) as tree:
        number = tree.fileno()
        try:
            mount.mount_setattr(
                tree,
                set_=case.set_,
                clear=case.clear,
                propagation=case.propagation,
                recursive=case.recursive,
            )
        except SyscallError as error:
            return errno.errorcode[error.errno or 0]
        assert tree.fileno() == number
        assert not os.get_inheritable(number)
        if case.detached:
            mount.attach(tree, mount.AT_FDCWD, b"after-file" if case.place == b"top/file" else b"after")
    return "done"


def _state(root: bytes) -> list[tuple[object, ...]]:
    """The mounts, and with how many others each shares; IDs differ from one time to the next."""
    mounts = [m for m in mountinfo.read().values() if m.point.startswith(root)]
    groups = [m.peer_group for m in mounts if m.peer_group]
    return sorted(
        (
            *(m.point.removeprefix(root), m.root, m.fstype, m.attributes, m.propagation),
            *(groups.count(m.peer_group), groups.count(m.master)),
        )
        for m in mounts
    )


def _outcomes(cases: Sequence[Case], *, older: bool) -> list[tuple[str, object]]:
    """Of each case: how it ended, and the mounts then. With the errno of a kernel that is ``older``, if so."""

    def play(root: bytes) -> list[tuple[str, object]]:
        if older:
            refuse(["mount_setattr"])
        said: list[tuple[str, object]] = []
        for case in cases:
            _build(root)
            said.append((_change(case), _state(root)))
            os.chdir("/")
            mount.umount2(root, UmountFlag.MNT_DETACH)
        return said

    return told_by_a_child(play)


def test_the_same_becomes_of_trees_without_mount_setattr() -> None:
    now, before = _outcomes(CASES, older=False), _outcomes(CASES, older=True)
    assert len(now) == len(before) == len(CASES), (now[-1], before[-1])
    for case, ours, theirs in zip(CASES, before, now, strict=True):
        assert theirs[0] == "done"
        assert ours == theirs, case


def test_what_stands_elsewhere_is_left_to_who_has_it() -> None:
    """Guards change what stands in the caller's mount namespace, and nothing else."""

    def older(top: bytes) -> list[int]:
        refuse(["mount_setattr"])
        _build(top)
        with (
            OwnedFd(os.open("/proc", os.O_PATH | os.O_CLOEXEC)) as proc,
            mount.open_tree(mount.AT_FDCWD, b"top", _CLONE) as detached,
            mount.open_tree(mount.AT_FDCWD, b"top", 0) as standing,
        ):
            return [
                lib.ix_set_attributes_here(proc.fileno(), tree.fileno(), False, _LIMITS, 0, 0)
                for tree in (detached, standing)
            ]

    assert told_by_a_child(older) == [-errno.EINVAL, 0]
