"""Mounting an overlay over any number of layers."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from interceptor.errors import SyscallError
from interceptor.idshift.overlay import escape
from interceptor.kernel import mount
from interceptor.kernel.credentials import filesystem_ids
from interceptor.kernel.fd import OwnedFd
from interceptor.kernel.flags import UmountFlag

#: A name and its value; None: a flag.
Option = tuple[str, str | None]

_SET_STRING, _SET_FLAG = 1, 0
_CREATE = 6


def mount_layers(
    lower: Sequence[str], options: Sequence[Option], stage: str, ids: tuple[int, int] | None = None
) -> OwnedFd:
    """A detached overlay. ``stage``: an empty directory, or one with a layer at each number; ``ids``: the filesystem
    IDs to mount it with. Raises `SyscallError`."""
    try:
        return one_by_one(lower, options, ids)
    except SyscallError as error:
        if error.errno != errno.EINVAL:
            raise
        return _by_short_names(lower, options, stage, ids)


def one_by_one(lower: Sequence[str], options: Sequence[Option], ids: tuple[int, int] | None) -> OwnedFd:
    """Each layer in an option of its own (Linux 6.8): no limit of size."""
    with mount.fsopen(b"overlay") as context:
        for key, value in [*(("lowerdir+", path) for path in lower), *options]:
            command = _SET_FLAG if value is None else _SET_STRING
            mount.fsconfig(context, command, os.fsencode(key), None if value is None else os.fsencode(value))
        with _as(ids):
            mount.fsconfig(context, _CREATE)
        return mount.fsmount(context)


def _by_short_names(
    lower: Sequence[str], options: Sequence[Option], stage: str, ids: tuple[int, int] | None
) -> OwnedFd:
    """All layers in one string, which has at most a page: so by names of one to three characters."""
    at = f"{stage}/m"
    os.mkdir(at, 0o755)
    for number, path in enumerate(lower):
        if path != f"{stage}/{number}":
            os.symlink(path, f"{stage}/{number}")
    given = [key if value is None else f"{key}={escape(value)}" for key, value in options]
    data = ",".join([f"lowerdir={':'.join(str(i) for i in range(len(lower)))}", *given])
    here = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.chdir(stage)
        with _as(ids):
            mount.mount(b"overlay", at, b"overlay", 0, os.fsencode(data))
    finally:
        os.fchdir(here)
        os.close(here)
    tree = mount.clone_mount(mount.AT_FDCWD, at)
    mount.umount2(at, UmountFlag.MNT_DETACH)
    return tree


def _as(ids: tuple[int, int] | None) -> AbstractContextManager[None]:
    return nullcontext() if ids is None else filesystem_ids(*ids)
