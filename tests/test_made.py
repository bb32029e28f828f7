"""Composites that are had again: the same to the last lock, for their own container only, and never out of date."""

from __future__ import annotations

import errno
import os
import signal

import pytest

from interceptor.kernel import mount, stat
from interceptor.kernel.flags import AT_FDCWD
from interceptor.library import Interceptor
from tests import guarded as inside
from tests.robust.support import COPY, MS_BIND, MS_REC, MS_REMOUNT, Truth, stack_at

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
