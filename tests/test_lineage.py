"""Originals are told from copies by identity and position, never by name."""

from __future__ import annotations

import pytest

from interceptor.mounts.lineage import MountClass, classify, path_in_fs, reaches, receivers, welded_to
from interceptor.mounts.managed import make_plan
from tests.mount_facts import PLAN, SHIELD, VIEW, Facts, container


def kind_of(point: bytes, space: object, baseline: object) -> MountClass:
    mount = space.at(point)  # type: ignore[attr-defined]
    return classify(space.chain(mount), baseline, space.number)  # type: ignore[attr-defined, arg-type]


@pytest.mark.parametrize(
    ("point", "kind"),
    [
        (b"/proc", MountClass.ORIGINAL_BASE),
        (b"/proc/sys", MountClass.ORIGINAL_SUBMOUNT),
        (b"/sys/devices/virtual", MountClass.ORIGINAL_SUBMOUNT),
        (b"/sys/fs/cgroup", MountClass.IMMUTABLE),
        (b"/data", MountClass.IMMUTABLE),
        (b"/", MountClass.IMMUTABLE),
    ],
)
def test_what_the_container_was_created_with_is_original_or_immutable(point: bytes, kind: MountClass) -> None:
    space, baseline = container()
    assert kind_of(point, space, baseline) is kind


def test_a_composite_bound_elsewhere_is_a_copy() -> None:
    space, baseline = container()
    space.composite(b"/run/systemd/mount-rootfs/sys", space.at(b"/"), b"sysfs")
    assert kind_of(b"/run/systemd/mount-rootfs/sys", space, baseline) is MountClass.COPIED_BASE
    assert kind_of(b"/run/systemd/mount-rootfs/sys/kernel", space, baseline) is MountClass.COPIED_SUBMOUNT


def test_a_composite_mounted_over_an_original_is_a_copy() -> None:
    space, baseline = container()
    space.composite(b"/proc", space.at(b"/proc"))
    assert kind_of(b"/proc", space, baseline) is MountClass.COPIED_BASE


def test_a_cloned_namespace_has_originals_of_its_own() -> None:
    space, baseline = container()
    clone = space.cloned(200)
    assert kind_of(b"/proc", clone, baseline) is MountClass.ORIGINAL_BASE
    assert kind_of(b"/proc/sys", clone, baseline) is MountClass.ORIGINAL_SUBMOUNT
    clone.composite(b"/mnt/proc", clone.at(b"/"))
    assert kind_of(b"/mnt/proc", clone, baseline) is MountClass.COPIED_BASE
    assert kind_of(b"/mnt/proc/sys", clone, baseline) is MountClass.COPIED_SUBMOUNT


def test_in_a_cloned_namespace_another_procfs_at_an_originals_place_is_a_copy() -> None:
    space, baseline = container()
    clone = space.cloned(200)
    base = clone.add(b"/proc", clone.at(b"/proc"), fstype=b"proc", dev=(0, 99))
    assert classify(clone.chain(base), baseline, 200) is MountClass.COPIED_BASE


@pytest.mark.parametrize("dev", [(0, 77), (0, 99)])
def test_what_was_put_beneath_an_original_of_a_cloned_namespace_changes_nothing(dev: tuple[int, int]) -> None:
    space, baseline = container()
    clone = space.cloned(200)
    original = clone.at(b"/proc")
    beneath = clone.add(b"/proc", clone.at(b"/"), fstype=b"proc" if dev == (0, 99) else b"tmpfs", dev=dev)
    chain = clone.chain(original)
    assert classify([chain[0], beneath, *chain[1:]], baseline, 200) is MountClass.ORIGINAL_BASE


def test_in_a_cloned_namespace_the_same_procfs_bound_over_an_original_is_a_copy() -> None:
    space, baseline = container()
    clone = space.cloned(200)
    original = clone.at(b"/proc")
    copy = clone.composite(b"/proc", original)
    cover = clone.at(b"/proc/sys")
    assert classify(clone.chain(copy), baseline, 200) is MountClass.COPIED_BASE
    assert classify(clone.chain(cover), baseline, 200) is MountClass.COPIED_SUBMOUNT
    assert classify(clone.chain(original), baseline, 200) is MountClass.ORIGINAL_BASE


def test_an_original_of_a_cloned_namespace_is_none_on_a_root_that_was_pivoted_away() -> None:
    """pivot_root(".", "."), after a recursive bind of the root: the old root stands on one that is like it."""
    space, baseline = container()
    clone = space.cloned(200)
    new_root = clone.add(b"/", clone.at(b"/"), dev=clone.at(b"/").dev, root=clone.at(b"/").root)
    upon_it = clone.composite(b"/proc", new_root)
    assert classify(clone.chain(upon_it), baseline, 200) is MountClass.COPIED_BASE


def test_a_shield_is_known_by_its_device() -> None:
    space, baseline = container()
    space.composite(b"/mnt", space.at(b"/"), shields=frozenset({b"sys"}))
    assert kind_of(b"/mnt/sys", space, baseline) is MountClass.SHIELD


def test_what_is_stacked_on_a_submount_is_free() -> None:
    space, baseline = container()
    space.add(b"/proc/sys", space.at(b"/proc/sys"), dev=VIEW, root=b"/c/proc/sys")
    assert kind_of(b"/proc/sys", space, baseline) is MountClass.FREE


def test_the_view_bound_elsewhere_is_free() -> None:
    space, baseline = container()
    space.add(b"/tmp/x", space.at(b"/"), dev=VIEW, root=b"/c/proc/sys", fstype=b"fuse")
    assert kind_of(b"/tmp/x", space, baseline) is MountClass.FREE


def test_a_shield_of_the_containers_making_is_free() -> None:
    space, baseline = container()
    space.add(b"/tmp/x", space.at(b"/"), dev=SHIELD, root=b"/shield", fstype=b"tmpfs")
    assert kind_of(b"/tmp/x", space, baseline) is MountClass.FREE


def test_the_containers_own_mount_on_a_base_is_free() -> None:
    space, baseline = container()
    space.add(b"/proc/tty", space.at(b"/proc"), fstype=b"tmpfs", dev=(0, 77))
    assert kind_of(b"/proc/tty", space, baseline) is MountClass.FREE


def test_a_clone_of_a_directory_of_a_base_carries_welded_submounts() -> None:
    space, baseline = container()
    directory = space.add(b"/mnt", space.at(b"/"), fstype=b"sysfs", dev=(0, 51), root=b"/devices")
    cover = space.add(b"/mnt/virtual", directory, dev=VIEW, root=b"/c/sys/devices/virtual", fstype=b"fuse")
    assert classify(space.chain(cover), baseline, space.number) is MountClass.COPIED_SUBMOUNT
    found = welded_to(space.chain(cover), PLAN)
    assert found is not None and found.mnt_id == directory.mnt_id
    assert classify(space.chain(directory), baseline, space.number) is MountClass.COPIED_BASE


def test_a_clone_of_a_directory_without_managed_paths_is_free() -> None:
    space, baseline = container()
    directory = space.add(b"/mnt", space.at(b"/"), fstype=b"sysfs", dev=(0, 51), root=b"/class")
    assert classify(space.chain(directory), baseline, space.number) is MountClass.FREE


def test_a_masked_path_inside_the_view_is_welded_to_the_base() -> None:
    plan = make_plan(masked=[b"/sys/devices/virtual/powercap"])
    space, baseline = container(plan)
    mask = space.add(
        b"/sys/devices/virtual/powercap", space.at(b"/sys/devices/virtual"), dev=SHIELD, root=b"/masked"
    )
    found = welded_to(space.chain(mask), plan)
    assert found is not None and found.point == b"/sys"
    assert classify(space.chain(mask), baseline, space.number) is MountClass.ORIGINAL_SUBMOUNT


@pytest.mark.parametrize(
    ("root", "mounted", "point", "inside"),
    [
        (b"/", b"/proc", b"/proc/sys", b"sys"),
        (b"/devices", b"/mnt", b"/mnt/virtual/net", b"devices/virtual/net"),
        (b"/", b"/", b"/proc", b"proc"),
        (b"/", b"/proc", b"/proc", b""),
    ],
)
def test_path_within_the_filesystem(root: bytes, mounted: bytes, point: bytes, inside: bytes) -> None:
    assert path_in_fs(Facts(1, 0, mounted, root=root), point) == inside


def test_unmounting_in_a_peer_reaches_the_original() -> None:
    root = Facts(1, 0, b"/", peer_group=7)
    original = Facts(2, 1, b"/proc", fstype=b"proc")
    peer = Facts(3, 1, b"/mnt", peer_group=7)
    copy = Facts(4, 3, b"/mnt/proc", fstype=b"proc")
    assert reaches(copy, peer, original, root, {})


def test_unmounting_elsewhere_in_a_peer_does_not_reach_the_original() -> None:
    root = Facts(1, 0, b"/", peer_group=7)
    original = Facts(2, 1, b"/proc", fstype=b"proc")
    peer = Facts(3, 1, b"/mnt", peer_group=7)
    other = Facts(4, 3, b"/mnt/srv/proc", fstype=b"proc")
    assert not reaches(other, peer, original, root, {})


def test_unmounting_in_the_master_of_the_originals_parent_reaches_it() -> None:
    root = Facts(1, 0, b"/", master=7)
    original = Facts(2, 1, b"/proc", fstype=b"proc")
    peer = Facts(3, 0, b"/", peer_group=7)
    copy = Facts(4, 3, b"/proc", fstype=b"proc")
    assert reaches(copy, peer, original, root, {})


def test_unmounting_in_a_slave_or_private_mount_reaches_nobody() -> None:
    root = Facts(1, 0, b"/", peer_group=7)
    original = Facts(2, 1, b"/proc", fstype=b"proc")
    slave = Facts(3, 0, b"/", master=7)
    copy = Facts(4, 3, b"/proc", fstype=b"proc")
    assert not reaches(copy, slave, original, root, {})


def test_unmounting_reaches_slaves_of_slaves() -> None:
    root = Facts(1, 0, b"/", peer_group=9, master=8)
    original = Facts(2, 1, b"/proc", fstype=b"proc")
    peer = Facts(3, 0, b"/", peer_group=7)
    copy = Facts(4, 3, b"/proc", fstype=b"proc")
    assert not reaches(copy, peer, original, root, {9: 8})
    assert reaches(copy, peer, original, root, {9: 8, 8: 7})


def test_groups_that_are_each_others_masters_end_the_search() -> None:
    assert receivers(1, {2: 1, 1: 2}) == {1, 2}
