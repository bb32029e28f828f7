"""Every way to name an original, times every way to unmount or move it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest

from interceptor.kernel import mount as km
from interceptor.kernel import stat
from interceptor.kernel.fd import OwnedFd
from interceptor.kernel.flags import AT_FDCWD, MountFlag, UmountFlag
from tests.attacks.conftest import Box
from tests.attacks.contexts import Where
from tests.guarded import errno_of, mount_id_at, raw_below, try_mount, try_umount

BASES = (b"proc", b"sys")
SUBMOUNTS = (b"proc/sys", b"proc/uptime", b"proc/bus", b"sys/kernel", b"sys/devices/virtual", b"sys/firmware")
FLAGS = (
    UmountFlag(0),
    UmountFlag.MNT_DETACH,
    UmountFlag.MNT_FORCE,
    # Twice: the first would only mark it.
    UmountFlag.MNT_EXPIRE,
    UmountFlag.MNT_EXPIRE,
    UmountFlag.UMOUNT_NOFOLLOW,
    UmountFlag.MNT_DETACH | UmountFlag.UMOUNT_NOFOLLOW,
    UmountFlag.MNT_FORCE | UmountFlag.MNT_DETACH,
)


def spellings(where: Where, name: bytes) -> Iterator[bytes]:
    """Each is yielded with the working directory that it is meant for; the caller's is lost."""
    proc, full = where.path(b"proc"), where.path(name)
    parent, _, last = full.rpartition(b"/")
    above = where.path(b"") or b"."
    yield full
    yield full + b"/"
    yield full + b"//."
    yield full.replace(b"/", b"/./")
    yield full.replace(b"/", b"//")
    yield (parent or above) + b"/../" * 40 + full.lstrip(b"/")
    yield full + b"/../" + last
    for root in (
        b"self/root",
        b"thread-self/root",
        b"1/root",
        b"self/cwd",
        b"self/task/%d/root" % os.getpid(),
    ):
        yield proc + b"/" + root + b"/" + name
        yield b"/" * (where.root != b"") + proc + b"/" + root + b"/./" + name + b"/"
    link = where.work(b"links") + b"/" + last
    for target in (full, b"../" * 9 + full.lstrip(b"/")):
        os.symlink(target, link)
        yield link
        yield link + b"/."
        os.unlink(link)
    os.symlink(parent or above, link)
    yield link + b"/" + last
    os.unlink(link)
    with OwnedFd(os.open(full, os.O_PATH | os.O_CLOEXEC)) as fd:
        yield proc + b"/self/fd/%d" % fd.fileno()
        yield proc + b"/thread-self/fd/%d" % fd.fileno()
        yield proc + b"/self/fd/%d/" % fd.fileno()
    home = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    with OwnedFd(home), OwnedFd(os.open(parent or above, os.O_PATH | os.O_CLOEXEC)) as directory:
        os.fchdir(directory.fileno())
        yield last
        yield b"./" + last
        yield b"../" * 40 + b"./" + full.lstrip(b"/")
        os.fchdir(home)
        if os.path.isdir(full):
            os.chdir(full)
            yield b"."
            yield b"./"
            yield b"../" + last
            os.fchdir(home)


def _names(path: bytes, flags: int, mnt_id: int) -> bool:
    """Whether the kernel, asked now, takes the path for that mount."""
    nofollow = os.O_NOFOLLOW if flags & UmountFlag.UMOUNT_NOFOLLOW else 0
    try:
        with OwnedFd(os.open(path, os.O_PATH | os.O_CLOEXEC | nofollow)) as fd:
            found = stat.statx(fd)
    except OSError:
        return False
    return found.mount_root and found.mnt_id == mnt_id


def _unmount_everyhow(where: Where, name: bytes) -> dict[str, int]:
    """The errno of each attempt that meant the mount; attempts end with its loss."""
    tried: dict[str, int] = {}
    mnt_id = mount_id_at(where.path(name))
    for path in spellings(where, name):
        for flags in FLAGS:
            meant = _names(path, flags, mnt_id)
            error = try_umount(path, flags)
            if meant:
                tried[f"{path!r} {flags!r} {len(tried)}"] = error
            if not stat.mount_exists(mnt_id):
                tried["gone"] = 0
                return tried
    return tried


def test_a_submount_is_never_unmounted(box: Box, context: str) -> None:
    def attack(where: Where) -> tuple[dict[bytes, dict[str, int]], list[bytes]]:
        tried = {name: _unmount_everyhow(where, name) for name in SUBMOUNTS}
        return tried, raw_below(where.path(b"proc")) + raw_below(where.path(b"sys"))

    tried, raw = box.attack(context, attack)
    assert raw == []
    if box.decides and context != "pivot-unshared":
        for name, results in tried.items():
            assert len(results) > 40
            assert set(results.values()) == {errno.EINVAL}, (name, results)


def test_a_base_is_busy(box: Box, context: str) -> None:
    def attack(where: Where) -> tuple[dict[str, int], list[bytes]]:
        tried: dict[str, int] = {}
        raw = []
        # procfs last: without it some spellings of the other one would say nothing.
        for name in reversed(BASES):
            with OwnedFd(os.open(where.path(name), os.O_PATH | os.O_CLOEXEC)) as held:
                tried |= _unmount_everyhow(where, name)
                raw += raw_below(b".", held.fileno())
        return tried, raw

    tried, raw = box.attack(context, attack)
    assert raw == []
    if box.decides and context != "pivot-unshared":
        # In a nested user namespace the bases themselves are locked, as the kernel says of all that came along.
        allowed = {errno.EBUSY} | ({errno.EINVAL} if context == "nested" else set())
        assert len(tried) > 80
        wrong = {k: v for k, v in tried.items() if v not in allowed}
        # can_umount() of fs/namespace.c: sysfs belongs to the host's user namespace, whose rights MNT_FORCE demands.
        assert not [k for k, v in wrong.items() if (v, "FORCE" in k) != (errno.EPERM, True)], wrong


def _move_everyhow(where: Where, name: bytes, target: bytes) -> tuple[set[int], set[int]]:
    """errnos of mount(MS_MOVE) and of move_mount."""
    old, new = set(), set()
    mnt_id = mount_id_at(where.path(name))
    for path in spellings(where, name):
        if _names(path, 0, mnt_id):
            old.add(try_mount(path, target, None, MountFlag.MS_MOVE))
        if _names(path, 0, mnt_id):
            new.add(errno_of(km.move_mount, AT_FDCWD, path, AT_FDCWD, target, 0x11))
    return old, new


def test_no_submount_is_moved(box: Box, context: str) -> None:
    def attack(where: Where) -> list[tuple[set[int], set[int]]]:
        target = where.work(b"target")
        return [_move_everyhow(where, name, target) for name in SUBMOUNTS]

    # Relative paths are tried from several directories; from most the chroot's relative target is not there.
    missing = {errno.ENOENT} if context == "chroot" else set()
    for old, new in box.attack(context, attack):
        # What a guard that decides at random says is no evidence; what has moved, the box itself sees.
        if box.mode != "random":
            assert (old - missing, new - missing) == ({errno.EINVAL}, {errno.EINVAL})


@pytest.mark.parametrize("name", BASES)
def test_a_base_is_moved_by_mount_never_and_uncovers_nothing(box: Box, context: str, name: bytes) -> None:
    def attack(where: Where) -> tuple[int, list[bytes]]:
        target = where.work(b"target")
        error = try_mount(where.path(name), target, None, MountFlag.MS_MOVE)
        raw = raw_below(target)
        errno_of(km.move_mount, AT_FDCWD, where.path(name), AT_FDCWD, target, 0)
        return error, raw + raw_below(target)

    error, raw = box.attack(context, attack)
    assert raw == []
    if box.decides and context != "pivot-unshared":
        assert error == errno.EINVAL


def test_the_root_is_not_unmounted_with_all_that_is_on_it(box: Box, context: str) -> None:
    def attack(where: Where) -> list[bytes]:
        held = {name: os.open(where.path(name), os.O_PATH | os.O_CLOEXEC) for name in BASES}
        for path in (where.path(b"") or b".", where.path(b"proc/self/root"), where.path(b"proc/1/root")):
            for flags in FLAGS:
                try_umount(path, flags)
        return [path for fd in held.values() for path in raw_below(b".", fd)]

    assert box.attack(context, attack) == []
