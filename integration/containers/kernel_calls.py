"""Two system calls that Python's standard library lacks, through the C library.

The quickstart does not import the product that it judges: it looks at the container with its own eyes. So these few
lines stand beside those of interceptor.kernel on purpose.
"""

from __future__ import annotations

import ctypes
import os
import struct

_libc = ctypes.CDLL(None, use_errno=True)

_CLONE_NEWNS = 0x00020000
_AT_EMPTY_PATH = 0x1000
_AT_NO_AUTOMOUNT = 0x800
_AT_STATX_DONT_SYNC = 0x4000
_STATX_MNT_ID = 0x1000
_STATX_MNT_ID_UNIQUE = 0x4000
_STATX_SIZE = 256
_STX_MNT_ID_OFFSET = 144  # linux/stat.h, struct statx


def unshare_mounts() -> None:
    """Move this process into a mount namespace of its own (unshare(2)): its mounts end with it."""
    _check(_libc.unshare(_CLONE_NEWNS), "unshare(CLONE_NEWNS)")


def mount_id(path: str) -> int:
    """Return the unique mount ID (statx(2), Linux 6.8) of what is mounted at ``path``, the short one on older kernels.

    The path is opened first: a descriptor pins the mount, so that the number belongs to what was there.
    """
    descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        buffer = ctypes.create_string_buffer(_STATX_SIZE)
        flags = _AT_EMPTY_PATH | _AT_NO_AUTOMOUNT | _AT_STATX_DONT_SYNC
        mask = _STATX_MNT_ID | _STATX_MNT_ID_UNIQUE
        _check(_libc.statx(descriptor, b"", flags, mask, buffer), f"statx({path!r})")
        (number,) = struct.unpack_from("=Q", buffer, _STX_MNT_ID_OFFSET)
        return int(number)
    finally:
        os.close(descriptor)


def _check(result: int, call: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
