"""Debian root filesystems, each made once by debootstrap and cached.

Kept below the cache directory are ``trixie`` as debootstrap made it, owned by IDs 0..65535, and ``trixie-100000``, the
same with every ID shifted for a user namespace 0→100000; of larger trees (`Recipe`) only the shifted one. Containers
use the shifted ones as the lower layer of an overlay, so none is ever written to. Each is built beside its final name
and renamed when it is complete: an interrupted run leaves nothing that a later one could take for a root filesystem.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SUITE = "trixie"
#: systemd 257 (the storm needs 254 or newer) and e2fsprogs, whose e2scrub_reap.service started this project.
PACKAGES = ("systemd", "systemd-sysv", "util-linux", "mount", "e2fsprogs", "procps", "dbus")

_CAPABILITY_XATTR = "security.capability"
# linux/capability.h: struct vfs_cap_data (revision 2) and vfs_ns_cap_data (revision 3, with the root's ID).
_VFS_CAP_REVISION_2 = 0x02000000
_VFS_CAP_REVISION_3 = 0x03000000
_VFS_CAP_FLAGS_MASK = 0x00FFFFFF


def ensure(cache: Path, first_id: int) -> Path:
    """Return the cached tree whose IDs start at ``first_id``, building what is missing.

    Raises `subprocess.CalledProcessError` when debootstrap fails (its output is in ``debootstrap.log`` in the cache).
    """
    cache.mkdir(parents=True, exist_ok=True)
    with _only_one(cache):
        pristine = cache / SUITE
        if not _complete(pristine):
            with _under_construction(pristine) as tree:
                debootstrap(tree, SUITE, PACKAGES, cache / "debootstrap.log")
        shifted = cache / f"{SUITE}-{first_id}"
        if not _complete(shifted):
            with _under_construction(shifted) as tree:
                subprocess.run(["cp", "--archive", "--reflink=auto", f"{pristine}/.", str(tree)], check=True)
                shift_ids(tree, first_id)
    return shifted


@dataclass(frozen=True)
class Recipe:
    """Another tree: a suite with packages, finished by ``extras(tree, scratch)``; its name changes with it."""

    name: str
    suite: str
    packages: Sequence[str]
    extras: Callable[[Path, Path], None]


def ensure_of(recipe: Recipe, cache: Path, first_id: int) -> Path:
    """Return the cached tree of a recipe, its IDs starting at ``first_id``; raises as `ensure` does."""
    final = cache / f"{recipe.name}-{first_id}"
    cache.mkdir(parents=True, exist_ok=True)
    with _only_one(cache):
        if not final.is_dir():
            with _under_construction(final) as tree, tempfile.TemporaryDirectory(dir=cache) as scratch:
                debootstrap(tree, recipe.suite, recipe.packages, cache / "debootstrap.log")
                recipe.extras(tree, Path(scratch))
                shift_ids(tree, first_id)
    return final


def cached(cache: Path, first_id: int) -> bool:
    """Whether `ensure` has nothing to build."""
    return _complete(cache / f"{SUITE}-{first_id}")


def shift_ids(tree: Path, first_id: int) -> None:
    """Add ``first_id`` to the owner and group of everything below ``tree``, once even for hard links.

    chown(2) clears the setuid and setgid bits and drops file capabilities: both are put back, capabilities in their
    namespaced form (revision 3), because the kernel ignores the plain one in another user namespace.
    """
    seen: set[int] = set()
    for path in _everything(tree):
        status = os.lstat(path)
        if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
            if status.st_ino in seen:
                continue
            seen.add(status.st_ino)
        capability = _get_capability(path)
        os.lchown(path, status.st_uid + first_id, status.st_gid + first_id)
        if not stat.S_ISLNK(status.st_mode):
            os.chmod(path, stat.S_IMODE(status.st_mode))
        if capability:
            os.setxattr(
                path, _CAPABILITY_XATTR, namespaced_capability(capability, first_id), follow_symlinks=False
            )


def namespaced_capability(value: bytes, root_id: int) -> bytes:
    """Turn a ``security.capability`` value of revision 2 into revision 3 for the root ``root_id``."""
    (magic,) = struct.unpack_from("<I", value)
    if magic & ~_VFS_CAP_FLAGS_MASK != _VFS_CAP_REVISION_2:
        raise ValueError(f"security.capability has revision {magic:#x}, not 2")
    flags = magic & _VFS_CAP_FLAGS_MASK
    return struct.pack("<I", _VFS_CAP_REVISION_3 | flags) + value[4:20] + struct.pack("<I", root_id)


def _complete(tree: Path) -> bool:
    return os.path.lexists(tree / "usr/lib/systemd/systemd") and os.path.lexists(tree / "sbin/e2scrub_all")


@contextlib.contextmanager
def _only_one(cache: Path) -> Iterator[None]:
    """Let one process at a time build in this cache."""
    with open(cache / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _under_construction(final: Path) -> Iterator[Path]:
    scratch = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
    scratch.chmod(0o755)
    try:
        yield scratch
        if final.exists():
            shutil.rmtree(final)
        scratch.rename(final)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def debootstrap(tree: Path, suite: str, packages: Sequence[str], log: Path) -> None:
    """Run debootstrap with its default mirror, as the machine's own apt configuration says how to reach it."""
    argv = ["debootstrap", "--variant=minbase", f"--include={','.join(packages)}", suite, str(tree)]
    with open(log, "wb") as output:
        subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
    shutil.rmtree(tree / "var/cache/apt/archives", ignore_errors=True)
    (tree / "var/cache/apt/archives/partial").mkdir(parents=True)


def _everything(tree: Path) -> Iterator[str]:
    yield str(tree)
    for directory, names, files in os.walk(tree):
        for name in names + files:
            yield os.path.join(directory, name)


def _get_capability(path: str) -> bytes | None:
    try:
        return os.getxattr(path, _CAPABILITY_XATTR, follow_symlinks=False)
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.EOPNOTSUPP):
            return None
        raise
