"""Binds that would leave the submounts behind, by either mount API and by filesystems that make clones of their own."""

from __future__ import annotations

import errno
import os

from interceptor.kernel import mount as km
from interceptor.kernel import stat
from interceptor.kernel.fd import OwnedFd
from interceptor.kernel.flags import AT_FDCWD, MountFlag
from tests.attacks.conftest import Box
from tests.attacks.contexts import Where
from tests.guarded import errno_of, is_raw, mount_ids, raw_below, raw_in, try_mount

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


def _is_mount(path: bytes) -> bool:
    """os.path.ismount needs to know the working directory's path, and outside a chroot there is none."""
    try:
        with OwnedFd(os.open(path, os.O_PATH | os.O_CLOEXEC)) as fd:
            return stat.statx(fd).mount_root
    except OSError:
        return False


def test_mount_not_recursive(box: Box, context: str) -> None:
    def bind(where: Where, number: int, source: bytes) -> tuple[int, list[bytes], bool]:
        target = where.work(b"copy%d" % number)
        error = try_mount(where.path(source), target, None, MountFlag.MS_BIND)
        covers = [target + b"/" + name for name in (b"virtual", b"kernel", b"sys")]
        came = any(_is_mount(path) for path in covers)
        virtual = [covers[0]] if is_raw(covers[0]) else []
        return error, raw_below(target) + virtual, came

    def attack(where: Where) -> dict[bytes, tuple[int, list[bytes], bool]]:
        return {source: bind(where, n, source) for n, source in enumerate(SOURCES)}

    for source, (error, raw, came) in box.attack(context, attack).items():
        assert raw == []
        if box.decides and not (context == "chroot" and b"root" in source):
            assert (error, came) == (0, True), source


def test_open_tree_not_recursive(box: Box, context: str) -> None:
    def look(tree: int) -> list[bytes]:
        return raw_below(b".", tree) + ([b"virtual"] if is_raw(b"virtual", tree) else [])

    def clone(path: bytes) -> tuple[int, list[bytes]]:
        return raw_in(lambda: km.clone_mount(AT_FDCWD, path), look)

    def attack(where: Where) -> dict[bytes, tuple[int, list[bytes]]]:
        return {source: clone(where.path(source)) for source in SOURCES}

    for source, (error, raw) in box.attack(context, attack).items():
        assert raw == []
        if box.mode == "continue" and (context != "chroot" or b"root" not in source):
            assert error == errno.EINVAL, source


def test_overlayfs_has_no_way_below(box: Box, context: str) -> None:
    def attack(where: Where) -> list[bytes]:
        return [path for lower in (b"proc", b"sys", b"sys/devices") for path in overlay(where, lower)]

    def overlay(where: Where, lower: bytes) -> list[bytes]:
        target, other = where.work(b"merged"), where.work(b"other")
        try_mount(b"o", target, b"overlay", 0, b"lowerdir=" + where.path(lower) + b":" + other)
        tried = errno_of(km.new_mount, b"overlay", {b"lowerdir": where.path(lower) + b":" + other})
        assert tried != 0 or box.mode == "random"
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
