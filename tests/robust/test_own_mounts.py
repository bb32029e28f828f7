"""A copied submount goes; what the container has mounted on the copy itself is not touched by that."""

from __future__ import annotations

import errno
import os

import pytest

from interceptor.kernel.flags import CLONE_NEWNS
from interceptor.kernel.namespaces import unshare
from interceptor.library import GuardedChild, Interceptor
from tests import guarded as inside
from tests.robust.support import COPY, MNT_DETACH, MS_BIND, MS_REC, Truth, stack_at

pytestmark = pytest.mark.root

MS_UNBINDABLE = 1 << 17
TARGET = COPY + b"/devices/virtual"


def _copy() -> None:
    Truth().prepare()
    assert inside.try_mount(b"/sys", COPY, None, MS_BIND | MS_REC) == 0


def _own(point: bytes) -> bytes:
    assert inside.try_mount(b"own", point, b"tmpfs") == 0
    os.mkdir(point + b"/mark")
    return point


def _directory_in(path: bytes) -> bytes:
    return (
        path
        + b"/"
        + sorted(entry.name for entry in os.scandir(path) if entry.is_dir(follow_symlinks=False))[0]
    )


def test_mounts_on_other_submounts_stay(child: GuardedChild) -> None:
    def body() -> tuple[int, bool, bool]:
        _copy()
        own = _own(_directory_in(COPY + b"/kernel"))
        deeper = _own(own + b"/mark")
        result = inside.try_umount(TARGET)
        return result, os.path.isdir(deeper + b"/mark"), inside.raw_below(COPY) == []

    assert child.call(body) == (0, True, True)


def test_a_mount_on_the_target_keeps_it_busy(child: GuardedChild) -> None:
    def body() -> tuple[int, bool, int, bool]:
        _copy()
        own = _own(_directory_in(TARGET))
        busy = inside.try_umount(TARGET)
        stays = os.path.isdir(own + b"/mark")
        return busy, stays, inside.try_umount(TARGET, MNT_DETACH), os.path.exists(own)

    assert child.call(body) == (errno.EBUSY, True, 0, False)


def test_a_mount_that_cannot_be_carried_over_leaves_all_as_it_was(child: GuardedChild) -> None:
    def body() -> tuple[int, bool, bool]:
        _copy()
        own = _own(COPY + b"/fs")
        assert inside.try_mount(None, own, None, MS_UNBINDABLE) == 0
        before = sorted(inside.mount_ids().values())
        result = inside.try_umount(TARGET)
        return result, os.path.isdir(own + b"/mark"), sorted(inside.mount_ids().values()) == before

    assert child.call(body) == (errno.EBUSY, True, True)


@pytest.mark.xfail(
    strict=True, reason="umount2 takes the top mount at '.', the guard's resolution the covered one"
)
def test_the_mount_on_top_of_a_covered_directory_goes(child: GuardedChild) -> None:
    def body() -> tuple[int, int, bool]:
        _copy()
        os.chdir(TARGET)
        top = len(stack_at(TARGET))
        assert inside.try_mount(b"own", TARGET, b"tmpfs") == 0
        result = inside.try_umount(b".")
        return (
            result,
            len(stack_at(TARGET)) - top,
            [m.root for m in inside.mounts() if m.point == TARGET] != [b"/shield"],
        )

    assert child.call(body) == (0, 0, True)


# ---- copied bases, which the guard lets go by itself ---------------------------------------------------------


def test_a_copied_base_goes_without_a_question(daemon: Interceptor, child: GuardedChild) -> None:
    def body() -> list[int]:
        Truth().prepare()
        results = []
        for _ in range(5):
            assert inside.try_mount(b"/sys", COPY, None, MS_BIND | MS_REC) == 0
            results += [inside.try_umount(COPY), len(stack_at(COPY))]
        return results

    child.call(body)  # what it finds out about filesystems for the first time may be asked
    asked = daemon.request("stats", id=child.cid)["asked"]
    assert child.call(body) == [0, 0] * 5
    assert daemon.request("stats", id=child.cid)["asked"] == asked


def test_in_another_namespace_the_copy_goes_and_the_original_stays(child: GuardedChild) -> None:
    def body() -> tuple[int, int, int, int]:
        Truth().prepare()
        unshare(CLONE_NEWNS)
        assert inside.try_mount(b"/sys", COPY, None, MS_BIND | MS_REC) == 0
        original = len(stack_at(b"/sys"))
        return (
            inside.try_umount(b"/sys"),
            inside.try_umount(COPY),
            len(stack_at(COPY)),
            len(stack_at(b"/sys")) - original,
        )

    assert child.call(body) == (errno.EBUSY, 0, 0, 0)


def test_a_mount_of_its_own_keeps_a_copied_base_busy(child: GuardedChild) -> None:
    def body() -> tuple[int, bool, int, int]:
        _copy()
        own = _own(COPY + b"/fs")
        busy = inside.try_umount(COPY)
        stays = os.path.isdir(own + b"/mark")
        return busy, stays, inside.try_umount(own), inside.try_umount(COPY)

    assert child.call(body) == (errno.EBUSY, True, 0, 0)


def test_a_cover_bound_elsewhere_on_a_copied_base_is_a_mount_of_its_own(child: GuardedChild) -> None:
    def body() -> tuple[int, int, int]:
        _copy()
        assert inside.try_mount(COPY + b"/kernel", COPY + b"/fs", None, MS_BIND) == 0
        return inside.try_umount(COPY), inside.try_umount(COPY + b"/fs"), inside.try_umount(COPY)

    assert child.call(body) == (errno.EBUSY, 0, 0)
