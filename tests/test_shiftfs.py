"""shiftfs, as far as a machine without it can tell: the way it is mounted, and what is said where it is not there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from interceptor.errors import ContainerError
from interceptor.idshift.idmapped import user_namespace
from interceptor.idshift.shiftfs import mount_inside, mount_shifted
from interceptor.idshift.subid import Block
from interceptor.kernel import mount
from interceptor.kernel.credentials import filesystem_ids
from tests.test_clone import private

IDS = Block(200000, 65536)


@pytest.mark.root
def test_what_the_container_s_root_mounts_arrives_here_with_its_owners() -> None:
    """The second of the two mounts: with tmpfs, which the root of a user namespace may mount as well."""

    def body() -> None:
        with tempfile.TemporaryDirectory(dir="/var/tmp") as name, user_namespace(IDS, IDS) as namespace:
            place = Path(name)
            place.chmod(0o755)
            for one in ("inside", "here"):
                (place / one).mkdir(mode=0o755)
            with mount_inside(namespace, "shown", str(place / "inside"), b"tmpfs") as tree:
                mount.attach(tree, mount.AT_FDCWD, str(place / "here"))
            assert os.stat(place / "here").st_uid == IDS.first
            with filesystem_ids(IDS.first, IDS.first):
                (place / "here/file").write_text("")
            assert not (place / "inside/file").exists(), "nothing stays mounted where it was made"
            mount.umount2(str(place / "here"))

    private(body)


@pytest.mark.root
def test_a_refusal_inside_is_told_in_its_words() -> None:
    def body() -> None:
        with user_namespace(IDS, IDS) as namespace, pytest.raises(ContainerError, match="ENODEV"):
            mount_inside(namespace, "x", "/var/tmp", b"no-such-filesystem")

    private(body)


@pytest.mark.root
def test_where_there_is_none_that_is_the_reason() -> None:
    """Were there one here, this would be the test that it shows owners shifted."""

    def body() -> None:
        with (
            tempfile.TemporaryDirectory(dir="/var/tmp") as name,
            user_namespace(IDS, IDS) as namespace,
        ):
            if "shiftfs" in Path("/proc/filesystems").read_text():
                with mount_shifted("/etc", namespace, name) as tree:
                    assert os.fstat(tree.fileno()).st_uid == IDS.first
                return
            with pytest.raises(ContainerError, match="this kernel has no shiftfs"):
                mount_shifted("/etc", namespace, name)
            os.rmdir(f"{name}/mark")

    private(body)
