"""A copied submount goes; what the container has mounted on the copy itself is not touched by that."""

from __future__ import annotations

import errno
import os
import select

import pytest

from interceptor.kernel import mount
from interceptor.kernel.flags import CLONE_NEWNS
from interceptor.kernel.namespaces import unshare
from interceptor.library import GuardedChild, Interceptor
from tests import guarded as inside
from tests.robust.support import (
    COPY,
    MNT_DETACH,
    MS_BIND,
    MS_REC,
    MS_REMOUNT,
    PATIENCE,
    Truth,
    needs_no_question,
    pipe,
    stack_at,
)

pytestmark = pytest.mark.root

MS_UNBINDABLE, MS_PRIVATE, MS_SLAVE = 1 << 17, 1 << 18, 1 << 19
TARGET = COPY + b"/devices/virtual"


def _copy() -> None:
    Truth().prepare()
    assert inside.try_mount(b"/sys", COPY, None, MS_BIND | MS_REC) == 0


def _own(point: bytes) -> bytes:
    assert inside.try_mount(b"own", point, b"tmpfs") == 0
    os.mkdir(point + b"/mark")
    return point


def _as_a_service(new_root: bytes) -> int:
    """As systemd and container runtimes leave their old root: one upon the other, and the upper one away."""
    unshare(CLONE_NEWNS)
    for flags in (MS_SLAVE | MS_REC, MS_PRIVATE | MS_REC):
        assert inside.try_mount(b"none", b"/", None, flags) == 0
    os.makedirs(new_root, exist_ok=True)
    assert inside.try_mount(b"/", new_root, None, MS_BIND | MS_REC) == 0
    os.chdir(new_root)
    mount.pivot_root(b".", b".")
    return inside.try_umount(b".", MNT_DETACH)


def test_who_has_a_mount_namespace_of_its_own_leaves_its_old_root(child: GuardedChild) -> None:
    def body() -> tuple[list[int], list[bytes]]:
        results = [_as_a_service(b"/run/new-root") for _ in range(3)]
        return results, inside.raw_nodes()

    assert child.call(body) == ([0, 0, 0], [])


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


def _go_there(spelling: str, place: bytes) -> bytes:
    """A path that leads to a directory however it will be covered by then."""
    held = os.open(place, os.O_PATH)
    os.fchdir(held)
    return {
        "dot": b".",
        "dot slash": b"./",
        "descriptor": b"/proc/self/fd/%d" % held,
        "by number": b"/proc/%d/fd/%d" % (os.getpid(), held),
        "cwd": b"/proc/thread-self/cwd",
    }[spelling]


@pytest.mark.parametrize("spelling", ["dot", "dot slash", "descriptor", "by number", "cwd"])
def test_a_copied_base_on_top_of_where_one_stands_goes_whole(child: GuardedChild, spelling: str) -> None:
    """The kernel takes the top of the stack at the place, whatever the path led to."""

    def body() -> tuple[int, int, int]:
        Truth().prepare()
        path = _go_there(spelling, COPY)
        assert inside.try_mount(b"below", COPY, b"tmpfs") == 0
        assert inside.try_mount(b"/sys", COPY, None, MS_BIND | MS_REC) == 0
        return inside.try_umount(path), len(stack_at(COPY)), inside.try_umount(path)

    assert child.call(body) == (0, 1, 0)


def test_what_is_on_top_of_a_copied_file_goes_by_descriptor(child: GuardedChild) -> None:
    def body() -> tuple[int, int, int]:
        Truth().prepare()
        assert inside.try_mount(b"/proc", COPY, None, MS_BIND | MS_REC) == 0
        point = COPY + b"/uptime"
        held = b"/proc/self/fd/%d" % os.open(point, os.O_PATH)
        with open("/tmp/file", "w"):
            pass
        top = len(stack_at(point))
        assert inside.try_mount(b"/tmp/file", point, None, MS_BIND) == 0
        return inside.try_umount(held), len(stack_at(point)) - top, inside.try_umount(held, 8)

    assert child.call(body) == (0, 0, errno.EINVAL)


def test_an_original_base_stays_while_others_rename(child: GuardedChild) -> None:
    """The kernel gives some lookups up while anybody renames (EAGAIN of openat2): the guard does not."""

    def renames(go_on: int) -> None:
        os.close(os.open("/tmp/a", os.O_CREAT))
        os.mkdir("/tmp/x")
        while not select.select([go_on], [], [], 0)[0]:
            for _ in range(100):
                os.rename("/tmp/a", "/tmp/x/a")
                os.rename("/tmp/x/a", "/tmp/a")

    def body() -> set[int]:
        return {inside.try_umount(b"/proc", MNT_DETACH) for _ in range(5000)}

    with pipe() as (end, stop):
        process = child.start(renames, end, pass_fds=[end])
        assert child.call(body) == {errno.EBUSY}
        os.close(stop)
        process.wait(PATIENCE)


# ---- copied bases, which the guard lets go by itself ---------------------------------------------------------


def test_a_copied_base_goes_without_a_question(daemon: Interceptor, child: GuardedChild) -> None:
    def body() -> None:
        Truth().prepare()
        for _ in range(5):
            assert inside.try_mount(b"/sys", COPY, None, MS_BIND | MS_REC) == 0
            assert (inside.try_umount(COPY), len(stack_at(COPY))) == (0, 0)

    needs_no_question(daemon, child, body)


def test_what_the_kernel_refuses_needs_no_question(daemon: Interceptor, child: GuardedChild) -> None:
    def body() -> None:
        unshare(CLONE_NEWNS)
        Truth().prepare()
        assert inside.try_mount(b"/sys", COPY, None, MS_BIND | MS_REC) == 0
        own = _own(COPY + b"/fs")
        assert [inside.try_umount(COPY) for _ in range(3)] == [errno.EBUSY] * 3
        assert inside.try_umount(own) == 0
        # The cover goes, and the shield in its place does not.
        assert [inside.try_umount(TARGET) for _ in range(3)] == [0, errno.EINVAL, errno.EINVAL]

    needs_no_question(daemon, child, body)


def test_an_old_root_goes_without_a_question(daemon: Interceptor, child: GuardedChild) -> None:
    def body() -> None:
        assert _as_a_service(b"/run/new-root") == 0

    needs_no_question(daemon, child, body)


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


# ---- flags -------------------------------------------------------------------------------------------------------


#: MS_NOSUID, MS_NODEV, MS_NOEXEC: a remount states all flags, and covers must keep these.
HARDENED = 2 | 4 | 8


def test_a_cover_made_read_only_stays_so_when_its_base_is_remounted(child: GuardedChild) -> None:
    """As systemd does it for ProtectKernelTunables=: /proc/sys read-only, then flags of /proc that are not."""

    def read_only(path: bytes) -> bool:
        return bool(os.statvfs(path).f_flag & os.ST_RDONLY)

    def body() -> list[bool]:
        Truth().prepare()
        assert inside.try_mount(b"x", COPY, b"proc", HARDENED) == 0
        cover, seen = COPY + b"/sys", []
        for path, flags in ((cover, 1), (COPY, 0), (COPY, 1), (COPY, 0)):
            assert inside.try_mount(None, path, None, MS_BIND | MS_REMOUNT | HARDENED | flags) == 0
            seen.append(read_only(cover))
        return seen

    assert child.call(body) == [True, True, True, False]
