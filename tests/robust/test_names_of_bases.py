"""An original base that is unmounted lazily again and again: by whatever name, the answer is that of a proper look."""

from __future__ import annotations

import errno
import os

import prctl
import pytest

from interceptor.kernel.flags import UmountFlag
from interceptor.library import GuardedChild
from tests.guarded import try_mount, try_umount
from tests.robust.support import MNT_DETACH, MS_BIND, MS_REC

pytestmark = pytest.mark.root

NOFOLLOW = int(UmountFlag.UMOUNT_NOFOLLOW)
JAIL = b"/tmp/jail"


def _ask_first() -> None:
    """From now on the guard knows the answers."""
    for base in (b"/proc", b"/sys"):
        assert [try_umount(base, MNT_DETACH) for _ in range(2)] == [errno.EBUSY] * 2


def test_links_are_followed_or_not(child: GuardedChild) -> None:
    def body() -> list[int]:
        _ask_first()
        os.symlink("/proc", "/absolute")
        os.symlink("proc", "/relative")
        os.symlink("../../proc/.", "/above")
        followed = [b"/absolute", b"/relative", b"/above", b"//proc", b"/nothing"]
        answers = [try_umount(name, MNT_DETACH) for name in followed]
        return [*answers, try_umount(b"/relative", MNT_DETACH | NOFOLLOW)]

    assert child.call(body) == [errno.EBUSY] * 4 + [errno.ENOENT, errno.EINVAL]


def test_in_a_chroot_the_name_is_that_of_the_copy(child: GuardedChild) -> None:
    def body() -> list[int]:
        _ask_first()
        os.mkdir(JAIL)
        assert try_mount(b"/", JAIL, None, MS_BIND | MS_REC) == 0
        os.symlink("../../proc", JAIL + b"/tmp/up")
        os.chroot(JAIL)
        os.chdir("/")
        # Both lead to copies, and a step above the jail would lead to an original.
        return [
            try_umount(b"/tmp/up", MNT_DETACH),
            try_umount(b"/sys", MNT_DETACH),
            try_umount(b"/sys", MNT_DETACH),
        ]

    assert child.call(body) == [0, 0, errno.EINVAL]


def test_what_is_mounted_over_a_base_goes_first(child: GuardedChild) -> None:
    def body() -> list[int]:
        _ask_first()
        assert try_mount(b"mine", b"/proc", b"tmpfs") == 0
        return [try_umount(b"/proc", MNT_DETACH) for _ in range(2)]

    assert child.call(body) == [0, errno.EBUSY]


def test_who_lacks_the_right_is_told_so(child: GuardedChild) -> None:
    def body() -> int:
        _ask_first()
        prctl.cap_effective.sys_admin = False
        return try_umount(b"/proc", MNT_DETACH)

    assert child.call(body) == errno.EPERM
