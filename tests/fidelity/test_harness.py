"""The harness itself: that it sees a difference where there is one, and none where there is none."""

from __future__ import annotations

import pytest

from interceptor.library import Interceptor
from tests.fidelity import mountinfo
from tests.fidelity.calls import AT_FDCWD, Call
from tests.fidelity.differences import meaning
from tests.fidelity.stage import MS_BIND, in_f
from tests.fidelity.twins import twins

LINES = """\
20 10 0:40 / / rw,relatime - tmpfs tmpfs rw
{a} 20 0:{d} / /a rw shared:{g} - tmpfs a rw
{b} {a} 0:{d} /x /a rw master:{g} - tmpfs a rw
{c} {b} 0:50 /ix-0123456789ab/proc/sys /a/sys rw - fuse.interceptor interceptor rw
30 {c} 0:51 / /a/sys rw - tmpfs b rw,fd=7
"""


def test_numbers_and_order_do_not_count() -> None:
    one = mountinfo.parse(LINES.format(a=21, b=22, c=23, d=41, g=5))
    other = mountinfo.parse(LINES.format(a=91, b=82, c=73, d=61, g=9))
    assert mountinfo.normal(one) == mountinfo.normal(other[::-1])
    assert mountinfo.normal(one) != mountinfo.normal(one[:-1])
    assert "/a[0] on /[0] dev 3 root / rw shared:0 - tmpfs a rw" in mountinfo.normal(one)


def test_what_stands_on_a_cover_stands_on_the_base_without_it() -> None:
    bare = mountinfo.normal(
        mountinfo.without_covers(mountinfo.parse(LINES.format(a=21, b=22, c=23, d=41, g=5)))
    )
    assert "/a/sys[0] on /a[1] dev 1 root / rw - tmpfs b rw,fd=N" in bare


@pytest.mark.root
def test_without_a_guard_the_welds_are_seen(real_interceptor: Interceptor) -> None:
    """What the interceptor is for shows as differences between the trapped container and the welded one."""
    scripts = [
        (Call("mount", (b"x", in_f("new"), b"proc", 0, None)),),
        (Call("mount", (b"/proc", in_f("new"), None, MS_BIND, None)),),
        (Call("umount2", (in_f("proc/sys"), 0)),),
        (Call("open_tree", (AT_FDCWD, b"/proc", 1)),),
        (Call("umount2", (in_f("mnt/in"), 0)),),
    ]
    with twins(real_interceptor, welded=True) as both:
        found = both.differences("root", scripts)
    assert [difference.script for difference in found] == scripts[:4]
    assert [difference.theirs[0] for difference in found] == [
        ("EPERM",),
        ("EINVAL",),
        ("EINVAL",),
        ("EINVAL",),
    ]
    assert [meaning(difference) for difference in found[:2]] == [None, None]
