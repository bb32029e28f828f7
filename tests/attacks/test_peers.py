"""Propagation: unmounting at one place unmounts at its peers and slaves. An original must not go that way."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import pytest

from interceptor.kernel.flags import CLONE_NEWNS, CLONE_NEWUSER, MountFlag, UmountFlag
from interceptor.kernel.namespaces import unshare
from tests.attacks import audit
from tests.attacks.conftest import Box
from tests.attacks.contexts import Where, apart, become_root, propagation, rbind, tmpfs
from tests.guarded import mount_ids, raw_below, raw_nodes, try_mount, try_umount

SHARED, SLAVE, PRIVATE = MountFlag.MS_SHARED, MountFlag.MS_SLAVE, MountFlag.MS_PRIVATE
BASES = (b"/proc", b"/sys")


def share_root() -> None:
    """mount --make-rshared /"""
    propagation(b"/", SHARED, recursive=True)


def unmount_all(prefix: bytes) -> dict[bytes, int]:
    """Every base and submount below, plain and lazy."""
    below = [b"/proc/sys", b"/proc/uptime", b"/sys/kernel", b"/sys/devices/virtual", *BASES]
    tried = {}
    for path in below:
        for flags in (0, UmountFlag.MNT_DETACH):
            tried[prefix + path + b" %d" % flags] = try_umount(prefix + path, flags)
    return tried


def test_in_a_peer_of_the_same_namespace(box: Box) -> None:
    def attack(where: Where) -> dict[bytes, int]:
        share_root()
        peer = where.work(b"peer")
        rbind(b"/", peer)
        return unmount_all(peer)

    tried = box.attack("plain", attack)
    if box.decides:
        assert {tried[p] for p in tried if p.split()[0].endswith((b"/peer/proc", b"/peer/sys"))} == {
            errno.EBUSY
        }
        assert set(tried.values()) == {errno.EBUSY, errno.EINVAL}


@pytest.mark.parametrize("user", [0, CLONE_NEWUSER])
def test_in_a_peer_namespace(box: Box, user: int) -> None:
    def attack(where: Where) -> dict[bytes, int]:
        share_root()

        def peer() -> dict[bytes, int]:
            unshare(CLONE_NEWNS | user)
            if user:
                become_root()
            return unmount_all(b"")

        tried = apart(peer)
        assert raw_nodes() == []
        return tried

    tried = box.attack("plain", attack)
    if box.decides:
        assert set(tried.values()) <= {errno.EBUSY, errno.EINVAL}


@pytest.mark.parametrize("cpu", [0, -1], ids=["first CPU", "last CPU"])
@pytest.mark.parametrize("user", [0, CLONE_NEWUSER])
def test_in_a_third_namespace(box: Box, user: int, cpu: int) -> None:
    """Neither the container's first nor the caller's own, which is in no group with it any more: found by search.

    Each CPU takes the IDs of namespaces from a batch of its own: what is made later may come before the first.
    """

    def attack(where: Where) -> tuple[int, bool, int]:
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[cpu]})
        unshare(CLONE_NEWNS)
        share_root()
        before = mount_ids(BASES)

        def caller() -> int:
            unshare(CLONE_NEWNS | user)
            if user:
                become_root()
                propagation(b"/", SHARED, recursive=True)
            peer = where.work(b"peer")
            rbind(b"/", peer)
            propagation(b"/", PRIVATE)
            return try_umount(peer + b"/proc", UmountFlag.MNT_DETACH)

        error = apart(caller)
        stays = mount_ids(BASES) == before
        return error, stays, len(before)

    error, stays, count = box.attack("plain", attack)
    assert count == 2
    if box.decides:
        # In a user namespace inside, what came along is locked, and nothing propagates outwards.
        assert (error, stays) == (errno.EINVAL if user else errno.EBUSY, True)


def test_by_way_of_slaves_of_slaves(box: Box) -> None:
    def attack(where: Where) -> int:
        os.makedirs("/one")
        os.makedirs("/two")
        share_root()
        rbind(b"/", b"/one")
        propagation(b"/", SLAVE)
        propagation(b"/", SHARED)
        rbind(b"/", b"/two")
        propagation(b"/", SLAVE)
        return try_umount(b"/one/proc", UmountFlag.MNT_DETACH)

    error = box.attack("plain", attack)
    if box.decides:
        assert error == errno.EBUSY


def test_with_the_whole_of_a_peer(box: Box) -> None:
    def attack(where: Where) -> int:
        share_root()
        os.makedirs("/peer")
        rbind(b"/", b"/peer")
        return try_umount(b"/peer", UmountFlag.MNT_DETACH)

    error = box.attack("plain", attack)
    if box.decides:
        assert error == errno.EBUSY


def _own_mount_on_sys() -> bytes:
    share_root()
    own = b"/sys/fs/cgroup"
    tmpfs(own)
    propagation(own, SHARED)
    return own


def _remove_copied_submount(copy: bytes) -> int:
    rbind(b"/sys", copy)
    return try_umount(copy + b"/kernel")


def _bind_not_recursively(copy: bytes) -> int:
    return try_mount(b"/sys", copy, None, MountFlag.MS_BIND)


@pytest.mark.parametrize("deed", [_remove_copied_submount, _bind_not_recursively])
def test_what_is_done_to_a_copy_leaves_the_original_s_other_mounts(
    box: Box, deed: Callable[[bytes], int]
) -> None:
    """Such as /sys/fs/cgroup, in a container whose / is shared, as systemd makes it."""

    def attack(where: Where) -> tuple[int, bool]:
        own = _own_mount_on_sys()
        before = mount_ids([own])
        return deed(where.work(b"copy")), mount_ids([own]) == before

    error, stays = box.attack("plain", attack)
    assert stays
    if box.decides:
        assert error == 0


def test_a_slave_with_a_mount_of_its_own_keeps_its_covers(box: Box) -> None:
    """A base that stays, because something is on it, must not lose submounts that go elsewhere."""

    def attack(where: Where) -> list[str]:
        copy = where.work(b"copy")
        share_root()
        rbind(b"/proc", copy)

        def slave() -> list[str]:
            unshare(CLONE_NEWNS)
            propagation(copy, SLAVE)
            tmpfs(copy + b"/bus")
            held = os.open(copy, os.O_PATH)

            for path in (copy + b"/sys", copy, b"/proc"):
                for flags in (0, UmountFlag.MNT_DETACH):
                    try_umount(path, flags)
            wrong = audit.uncovered(audit.table())
            return wrong + [repr(path) for path in raw_below(b".", held) + raw_nodes()]

        return apart(slave)

    assert box.attack("plain", attack) == []


@pytest.mark.parametrize("kind", [MountFlag.MS_UNBINDABLE, PRIVATE, SLAVE, SHARED])
@pytest.mark.parametrize("name", [b"sys", b"uptime"])
def test_a_submount_of_another_propagation_is_copied_along(box: Box, kind: int, name: bytes) -> None:
    def attack(where: Where) -> list[bytes]:
        propagation(b"/proc/" + name, kind)
        found = []
        for n, flags in enumerate((MountFlag.MS_BIND, MountFlag.MS_BIND | MountFlag.MS_REC)):
            target = where.work(b"copy%d" % n)
            try_mount(b"/proc", target, None, flags)
            found += raw_below(target)
        return found

    assert box.attack("plain", attack) == []
