"""System calls of i386 from a 64-bit process: what a filter for one architecture would not see."""

from __future__ import annotations

import errno
import os
import subprocess

import pytest

from interceptor.kernel.flags import MountFlag, UmountFlag
from tests.attacks.conftest import Box
from tests.attacks.contexts import Where, rbind
from tests.guarded import raw_below

pytestmark = pytest.mark.skipif(os.uname().machine != "x86_64", reason="int 0x80 is the x86-64's")

MOUNT, UMOUNT, UMOUNT2 = 21, 22, 52
SUBMOUNTS = (b"proc/sys", b"sys/kernel", b"sys/devices/virtual")


def call(where: Where, number: int, *arguments: bytes | int) -> int:
    """errno of a call, 0 for success."""
    words = [b"=%d" % a if isinstance(a, int) else a for a in arguments]
    argv = [where.path(b"tools/i386"), b"%d" % number, *words]
    return int(subprocess.run(argv, check=True, capture_output=True).stdout)


def test_a_submount_stays(box: Box, context: str) -> None:
    def attack(where: Where) -> set[int]:
        tried = set()
        for path in map(where.path, SUBMOUNTS):
            tried |= {call(where, UMOUNT, spelling) for spelling in (path, path + b"/", path + b"/.")}
            tried |= {call(where, UMOUNT2, path, flags) for flags in (0, int(UmountFlag.MNT_DETACH), 1, 8)}
            move = int(MountFlag.MS_MOVE)
            tried.add(call(where, MOUNT, path, where.work(b"target"), b"none", move, 0))
        return tried

    tried = box.attack(context, attack)
    if box.decides and context != "pivot-unshared":
        assert tried == {errno.EINVAL}


@pytest.mark.parametrize("name", [b"proc", b"sys"])
def test_a_base_is_busy(box: Box, context: str, name: bytes) -> None:
    def attack(where: Where) -> tuple[set[int], list[bytes]]:
        path = where.path(name)
        held = os.open(path, os.O_PATH | os.O_CLOEXEC)
        tried = {call(where, UMOUNT, path), call(where, UMOUNT2, path, int(UmountFlag.MNT_DETACH))}
        return tried, raw_below(b".", held)

    tried, raw = box.attack(context, attack)
    assert raw == []
    if box.decides and context != "pivot-unshared":
        assert tried <= {errno.EBUSY} | ({errno.EINVAL} if context == "nested" else set())


def test_binds_and_new_bases_have_their_covers(box: Box, context: str) -> None:
    def attack(where: Where) -> list[bytes]:
        found = []
        for n, (source, fstype, flags) in enumerate(
            (
                (where.path(b"proc"), b"none", MountFlag.MS_BIND),
                (where.path(b"sys/devices"), b"none", MountFlag.MS_BIND),
                (b"x", b"proc", 0),
                (b"x", b"sysfs", 0),
            )
        ):
            target = where.work(b"new%d" % n)
            call(where, MOUNT, source, target, fstype, int(flags), 0)
            found += raw_below(target)
        return found

    assert box.attack(context, attack) == []


def test_a_copy_goes(box: Box) -> None:
    def attack(where: Where) -> tuple[int, int]:
        copy = where.work(b"copy")
        rbind(b"/proc", copy)
        return call(where, UMOUNT, copy + b"/sys"), call(where, UMOUNT, copy)

    results = box.attack("plain", attack)
    if box.decides:
        assert results == (0, 0)
