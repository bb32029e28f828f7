"""Flags of mount(2) in the terms of the new mount API."""

from __future__ import annotations

import pytest

from interceptor.kernel.flags import MountAttr as A
from interceptor.kernel.flags import MountFlag as M
from interceptor.mounts.arguments import NewMount, atime_attributes, options, simple_attributes


def test_flags_that_can_be_set_one_by_one() -> None:
    flags = M.MS_RDONLY | M.MS_NOSUID | M.MS_NODEV | M.MS_NOEXEC | M.MS_NOATIME
    wanted = A.MOUNT_ATTR_RDONLY | A.MOUNT_ATTR_NOSUID | A.MOUNT_ATTR_NODEV | A.MOUNT_ATTR_NOEXEC
    assert simple_attributes(flags) == wanted


@pytest.mark.parametrize(
    ("flags", "attributes"),
    [
        (0, 0),
        (M.MS_RELATIME, 0),
        (M.MS_NOATIME, A.MOUNT_ATTR_NOATIME),
        (M.MS_STRICTATIME, A.MOUNT_ATTR_STRICTATIME),
        (M.MS_STRICTATIME | M.MS_NOATIME, A.MOUNT_ATTR_STRICTATIME),
        (M.MS_NODIRATIME, A.MOUNT_ATTR_NODIRATIME),
    ],
)
def test_access_time_is_relatime_unless_told_otherwise(flags: int, attributes: int) -> None:
    assert atime_attributes(flags) == attributes


def test_options_of_a_new_procfs() -> None:
    new = NewMount(b"proc", 0, b"none", hidepid=2, subset_pid=True, gid=5, sb_flags=M.MS_RDONLY)
    assert options(new) == {
        b"source": b"none",
        b"hidepid": b"2",
        b"gid": b"5",
        b"subset": b"pid",
        b"ro": None,
    }


def test_an_empty_source_stays_empty() -> None:
    assert options(NewMount(b"sysfs", 0)) == {b"source": b""}
