"""A delegated cgroup v2 for the container: found wherever the host mounts it, chowned, and removed afterwards.

The container's systemd needs a writable cgroup v2 as ``/sys/fs/cgroup``. runc with its own (cgroupfs) driver puts the
container into ``cgroupsPath`` of that hierarchy too where it is mounted beside version 1 ("hybrid", since runc 1.1),
but it never gives the directory to the container's root. So it is made and chowned before runc starts.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

#: Files that delegation gives away besides the directory itself (cgroups(7), "Cgroup delegation").
_DELEGATED = ("cgroup.procs", "cgroup.subtree_control", "cgroup.threads")


class NoCgroup2(Exception):
    """No cgroup v2 hierarchy is mounted where runc looks for one."""


def find(root: Path = Path("/sys/fs/cgroup")) -> Path:
    """Return where cgroup v2 is mounted: ``root`` itself, or ``root/unified`` beside version 1."""
    for candidate in (root, root / "unified"):
        if (candidate / "cgroup.controllers").exists():
            return candidate
    raise NoCgroup2(f"no cgroup v2 at {root} or {root}/unified; try: mount -t cgroup2 none {root}/unified")


@contextlib.contextmanager
def delegated(name: str, first_id: int) -> Iterator[Path]:
    """Make the cgroup ``name`` below the root, give it to ``first_id``, and remove it with all below at the end."""
    directory = find() / name
    directory.mkdir()
    try:
        os.chown(directory, first_id, first_id)
        for file in _DELEGATED:
            os.chown(directory / file, first_id, first_id)
        yield directory
    finally:
        remove(directory)


def remove(directory: Path) -> None:
    """Remove an empty cgroup and its empty descendants; nothing to do when the runtime has done so already."""
    for path, _, _ in os.walk(directory, topdown=False):
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(path)
