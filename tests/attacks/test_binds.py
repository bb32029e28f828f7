"""Binds that would leave the submounts behind, by either mount API and by filesystems that make clones of their own."""

from __future__ import annotations

import errno
import os

import pytest

from interceptor.kernel import mount as km
from interceptor.kernel.flags import AT_FDCWD, MountFlag
from tests.attacks.conftest import Box
from tests.attacks.contexts import Where
from tests.guarded import errno_of, mount_ids, raw_below, try_mount

SOURCES = (
    b"proc",
    b"proc/.",
    b"proc/",
    b"proc/self/root/proc",
    b"proc/../proc",
    b"sys",
    b"sys/.",
    b"sys/devices",
)


@pytest.mark.parametrize("source", SOURCES)
def test_mount_not_recursive(box: Box, context: str, source: bytes) -> None:
    def attack(where: Where) -> tuple[int, list[bytes], bool]:
        target = where.work(b"copy")
        error = try_mount(where.path(source), target, None, MountFlag.MS_BIND)
        came = os.path.ismount(target + (b"/virtual" if source.endswith(b"devices") else b"/kernel")) or (
            os.path.ismount(target + b"/sys")
        )
        raw = raw_below(target)
        raw += [target + b"/virtual"] if _is_raw(target + b"/virtual") else []
        return error, raw, came

    error, raw, came = box.attack(context, attack)
    assert raw == []
    if context == "chroot" and b"root" in source:
        assert error != 0 or not box.decides
    elif box.decides:
        assert (error, came) == (0, True)


def _is_raw(path: bytes) -> bool:
    from tests.guarded import is_raw

    return is_raw(path)


@pytest.mark.parametrize("source", SOURCES)
def test_open_tree_not_recursive(box: Box, context: str, source: bytes) -> None:
    def attack(where: Where) -> int:
        return errno_of(km.clone_mount, AT_FDCWD, where.path(source))

    error = box.attack(context, attack)
    if context == "chroot" and b"root" in source:
        assert error != 0
    else:
        assert error == errno.EINVAL


@pytest.mark.parametrize("lower", [b"proc", b"sys", b"sys/devices"])
def test_overlayfs_has_no_way_below(box: Box, context: str, lower: bytes) -> None:
    def attack(where: Where) -> list[bytes]:
        target, other = where.work(b"merged"), where.work(b"other")
        try_mount(b"o", target, b"overlay", 0, b"lowerdir=" + where.path(lower) + b":" + other)
        tried = errno_of(km.new_mount, b"overlay", {b"lowerdir": where.path(lower) + b":" + other})
        assert tried != 0
        return [p for p in (b"/sys/kernel/hostname", b"/kernel", b"/virtual") if os.path.exists(target + p)]

    assert box.attack(context, attack) == []


def test_a_bind_of_part_of_a_base_that_has_no_covers_is_the_kernel_s(box: Box) -> None:
    def attack(where: Where) -> tuple[int, bool]:
        target = where.work(b"copy")
        error = try_mount(b"/proc/self", target, None, MountFlag.MS_BIND)
        return error, bool(mount_ids([target]))

    error, there = box.attack("plain", attack)
    if box.mode != "random":
        assert (error, there) == (0, True)
