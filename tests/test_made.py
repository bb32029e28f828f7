"""Composites that are had again: the same to the last lock, for their own container only, and never out of date."""

from __future__ import annotations

import errno
import os
import signal

import pytest

from interceptor.kernel import mount, stat
from interceptor.kernel.flags import AT_FDCWD, CLONE_NEWPID
from interceptor.kernel.namespaces import unshare
from interceptor.library import Interceptor
from tests import guarded as inside
from tests.robust.support import (
    COPY,
    MS_BIND,
    MS_REC,
    MS_REMOUNT,
    Truth,
    eventually,
    guard_pid,
    needs_no_question,
    stack_at,
)

pytestmark = pytest.mark.root

#: A process ID that a container's procfs has once a process was told to have it.
LATE_PID = 77
MS_RDONLY = 1
#: nosuid, nodev and noexec, which are locked.
LOCKED = 2 | 4 | 8


def _take_apart(source: bytes, cover: bytes) -> tuple[list[tuple[bytes, bytes, bytes, int]], set[int], int]:
    """Copies a base and has one cover go: what stands there then, the unique IDs, and what another umount gets."""
    assert inside.try_mount(source, COPY, None, MS_BIND | MS_REC) == 0
    assert inside.try_umount(COPY + cover) == 0
    found = [m for m in inside.mounts() if (m.point + b"/").startswith(COPY + b"/")]
    refused = inside.errno_of(mount.umount2, COPY + cover, 0)
    shapes = sorted((m.point, m.root, m.fstype, m.attributes) for m in found)
    raw = inside.raw_below(COPY)
    assert raw == []
    while stack_at(COPY):
        assert inside.try_umount(COPY) == 0
    return shapes, {m.mnt_id for m in found}, refused


def test_one_that_is_had_again_is_like_the_first(real_interceptor: Interceptor) -> None:
    def body() -> list[tuple[list[tuple[bytes, bytes, bytes, int]], set[int], int]]:
        Truth().prepare()
        return [_take_apart(b"/sys", b"/devices/virtual") for _ in range(4)]

    with real_interceptor.spawn() as child:
        (first, ids, refused), *others = child.call(body)
        assert any(root == b"/shield" for _, root, _, _ in first)
        assert refused == errno.EINVAL
        for shapes, more, again in others:
            assert (shapes, again) == (first, refused)
            assert not ids & more, "mounts of their own"
            ids |= more


def test_flags_are_those_of_the_base_that_is_taken_apart(real_interceptor: Interceptor) -> None:
    def body() -> list[int]:
        Truth().prepare()
        attributes = []
        for flags in (0, MS_RDONLY, 0):
            assert inside.try_mount(b"/sys", COPY, None, MS_BIND | MS_REC) == 0
            if flags:
                assert inside.try_mount(b"none", COPY, None, MS_REMOUNT | MS_BIND | LOCKED | flags) == 0
            assert inside.try_umount(COPY + b"/devices/virtual") == 0
            (base,) = [m for m in inside.mounts() if m.point == COPY]
            attributes.append(base.attributes & MS_RDONLY)
            assert inside.try_umount(COPY) == 0
        return attributes

    with real_interceptor.spawn() as child:
        assert child.call(body) == [0, MS_RDONLY, 0]


def test_another_container_gets_its_own(real_interceptor: Interceptor) -> None:
    """Two containers of one network namespace share the sysfs, but not what is masked in it."""

    def body() -> tuple[bool, int]:
        Truth().prepare()
        shapes, _, _ = _take_apart(b"/sys", b"/devices/virtual")
        return any(point == COPY + b"/power" for point, _, _, _ in shapes), stat.statx(AT_FDCWD, b"/sys").dev[
            1
        ]

    with (
        real_interceptor.spawn(network="none") as one,
        real_interceptor.spawn(network="none", masked_paths=["/sys/power"]) as two,
    ):
        assert [one.call(body)[0], two.call(body)[0], one.call(body)[0]] == [False, True, False]


def _process(pid: int) -> int:
    """A child of this process ID, which does nothing (``ns_last_pid``: pid_namespaces(7))."""
    for _ in range(1000):
        child = os.fork()
        if child == 0:
            signal.pause()
        if child >= pid:
            return child
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    raise AssertionError("no such process ID came up")


def test_one_is_out_of_date_once_something_appears_that_it_does_not_cover(
    real_interceptor: Interceptor,
) -> None:
    late = b"/%d" % LATE_PID

    def body() -> list[bool]:
        Truth().prepare()
        covered = []
        for appeared in (False, False, True):
            child = _process(LATE_PID) if appeared else None
            assert child in (None, LATE_PID)
            shapes, _, _ = _take_apart(b"/proc", b"/uptime")
            covered.append(any(point == COPY + late for point, _, _, _ in shapes))
        return covered

    with real_interceptor.spawn(masked_paths=[f"/proc/{LATE_PID}"]) as child:
        assert child.call(body) == [False, False, True]


@pytest.mark.parametrize("fstype", [b"proc", b"sysfs"])
def test_a_new_one_that_was_asked_for_before_needs_no_question(
    real_interceptor: Interceptor, fstype: bytes
) -> None:
    def body() -> None:
        Truth().prepare()
        assert inside.try_mount(b"x", COPY, fstype, MS_RDONLY) == 0
        (base,) = [m for m in inside.mounts() if m.point == COPY]
        assert base.attributes & MS_RDONLY
        assert inside.raw_below(COPY) == []
        # Another one, which shares nothing with the first.
        assert inside.try_mount(b"x", COPY, fstype, 0) == (0 if fstype == b"proc" else errno.EBUSY)
        for _ in stack_at(COPY):
            assert inside.try_umount(COPY) == 0

    with real_interceptor.spawn() as child:
        needs_no_question(real_interceptor, child, body)


def test_what_is_asked_for_in_other_namespaces_is_not_what_was_made_ahead(
    real_interceptor: Interceptor,
) -> None:
    def here() -> int:
        Truth().prepare()
        assert inside.try_mount(b"x", COPY, b"proc") == 0
        first = int(os.readlink(COPY + b"/self"))
        assert inside.try_umount(COPY) == 0
        return first

    def there() -> bool:
        unshare(CLONE_NEWPID)
        child = os.fork()
        if child == 0:
            os._exit(0 if here() == os.getpid() == 1 else 1)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    with real_interceptor.spawn() as child:
        needs_no_question(real_interceptor, child, lambda: None if here() == os.getpid() else os.abort())
        assert child.call(there)
        assert child.call(lambda: here() == os.getpid())


def test_a_copied_cover_that_went_before_needs_no_question(real_interceptor: Interceptor) -> None:
    def body() -> None:
        Truth().prepare()
        _take_apart(b"/sys", b"/devices/virtual")

    with real_interceptor.spawn() as child:
        needs_no_question(real_interceptor, child, body)


def test_covers_that_go_one_after_the_other_leave_a_shield_each(real_interceptor: Interceptor) -> None:
    """In the order in which umount_recursive() of systemd takes them, with a mount of the container's own there."""
    covers = (b"/swaps", b"/sys", b"/uptime")
    own = COPY + b"/bus"

    def body() -> list[bytes]:
        Truth().prepare()
        assert inside.try_mount(b"/proc", COPY, None, MS_BIND | MS_REC) == 0
        assert inside.try_mount(b"x", own, b"tmpfs") == 0
        (mine,) = stack_at(own)
        for cover in covers:
            assert inside.try_umount(COPY + cover) == 0
            assert inside.raw_below(COPY) == []
            assert inside.try_umount(COPY + cover) == errno.EINVAL
        found = {m.point: m for m in inside.mounts()}
        assert len(stack_at(own)) == 1 and mine
        shields = sorted(
            p[len(COPY) :] for p, m in found.items() if p.startswith(COPY) and m.root.startswith(b"/shield")
        )
        assert inside.try_umount(own) == 0
        assert inside.try_umount(COPY) == 0
        return shields

    with real_interceptor.spawn() as child:
        for _ in range(5):
            assert child.call(body) == [b"/swaps", b"/sys", b"/uptime"]


def test_one_made_ahead_is_out_of_date_once_something_appears(real_interceptor: Interceptor) -> None:
    late = b"/%d" % LATE_PID

    def body() -> bool:
        Truth().prepare()
        shapes, _, _ = _take_apart(b"/proc", b"/uptime")
        return any(point == COPY + late for point, _, _, _ in shapes)

    def with_it() -> bool:
        assert _process(LATE_PID) == LATE_PID
        return body()

    with real_interceptor.spawn(masked_paths=[f"/proc/{LATE_PID}"]) as child:
        needs_no_question(real_interceptor, child, lambda: os.abort() if body() else None)
        assert child.call(with_it)
        assert child.call(body), "it is still there"


def test_a_successor_of_the_guard_starts_with_none(real_interceptor: Interceptor) -> None:
    def body() -> None:
        Truth().prepare()
        assert inside.try_mount(b"x", COPY, b"proc") == 0
        assert inside.try_umount(COPY) == 0

    with real_interceptor.spawn() as child:
        needs_no_question(real_interceptor, child, body)
        guard = guard_pid(real_interceptor, child.cid)
        os.kill(guard, signal.SIGKILL)
        eventually(lambda: guard_pid(real_interceptor, child.cid) not in (0, guard), "a successor")
        needs_no_question(real_interceptor, child, body)
