"""fanotify(7), as far as it is needed to hear that something happened in a filesystem, not what."""

from __future__ import annotations

import ctypes
import enum

from interceptor.errors import SyscallError
from interceptor.kernel.fd import FdLike, OwnedFd, fileno

_FAN_CLOEXEC = 0x1
_FAN_NONBLOCK = 0x2
_FAN_REPORT_FID = 0x200
_FAN_MARK_ADD = 0x1
_FAN_MARK_FILESYSTEM = 0x100
_FAN_ONDIR = 0x40000000

_libc = ctypes.CDLL(None, use_errno=True)


class Watched(enum.Enum):
    """What is listened for; the value is the mask."""

    NAMES = 0x4 | 0x40 | 0x80 | 0x100 | 0x200 | _FAN_ONDIR
    """ATTRIB, MOVED_FROM, MOVED_TO, CREATE, DELETE: what caches of names and inodes go stale by."""
    USE = 0x20 | 0x8 | 0x10 | _FAN_ONDIR
    """OPEN, CLOSE_WRITE, CLOSE_NOWRITE: somebody works there. Overlays have no events for names."""


def watch_filesystem(root: FdLike, what: Watched) -> OwnedFd:
    """A descriptor that becomes readable once something of that kind happens in the filesystem of ``root``, which may
    be opened by O_PATH. Needs CAP_SYS_ADMIN. Raises `SyscallError`.

    Close it without reading: reading an event may open the file that it is about. And close it where nobody waits: that
    takes an SRCU grace period, and until another listener, an on-access scanner for one, has answered those who wait
    for it (fsnotify_destroy_group() of fs/notify/group.c).
    """
    flags = _FAN_CLOEXEC | _FAN_NONBLOCK | (_FAN_REPORT_FID if what is Watched.NAMES else 0)
    group = OwnedFd(_checked(_libc.fanotify_init(flags, 0), "fanotify_init"))
    path = f"/proc/self/fd/{fileno(root)}".encode()
    mark = _FAN_MARK_ADD | _FAN_MARK_FILESYSTEM
    _checked(
        _libc.fanotify_mark(group.fileno(), mark, ctypes.c_uint64(what.value), -100, path),
        f"fanotify_mark({what.name})",
    )
    return group


def _checked(result: int, call: str) -> int:
    if result < 0:
        raise SyscallError(ctypes.get_errno(), call)
    return int(result)
