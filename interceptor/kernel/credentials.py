"""Credentials of the calling thread that the kernel looks at for files: filesystem IDs and effective capabilities.

Sources: setfsuid(2), capset(2), capabilities(7), "Effect of user ID changes on capabilities".
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

from interceptor.errors import SyscallError

_VERSION_3 = 0x20080522
_libc = ctypes.CDLL(None, use_errno=True)
_Header = ctypes.c_uint32 * 2
_Sets = ctypes.c_uint32 * 6


@contextmanager
def filesystem_ids(uid: int, gid: int) -> Iterator[None]:
    """The calling thread with these filesystem IDs and all the capabilities that it had.

    Leaving fsuid 0 takes the effective capabilities that concern files, so they are raised again. Raises
    `SyscallError`.
    """
    header, sets = _Header(_VERSION_3, 0), _Sets()
    _checked(_libc.capget(header, sets), "capget")
    before = (_set("setfsuid", uid), _set("setfsgid", gid))
    try:
        _checked(_libc.capset(header, sets), "capset")
        yield
    finally:
        _set("setfsgid", before[1])
        _set("setfsuid", before[0])
        # A process that could not go back would make its next files for somebody else.
        if _libc.capset(header, sets) < 0 or _set("setfsuid", before[0]) != before[0]:
            os.abort()


def _set(name: str, value: int) -> int:
    """The previous ID: setfsuid(2) and setfsgid(2) return no error."""
    return int(getattr(_libc, name)(ctypes.c_uint32(value)))


def _checked(result: int, name: str) -> None:
    if result < 0:
        raise SyscallError(ctypes.get_errno(), f"{name}()")
