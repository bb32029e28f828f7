"""fanotify(7), as far as it is needed to hear that something happened in a filesystem, not what; and to have those who
open a file wait until something has been done."""

from __future__ import annotations

import ctypes
import enum
import os
import struct
from collections.abc import Iterator

from interceptor.errors import SyscallError
from interceptor.kernel.fd import FdLike, OwnedFd, fileno

_FAN_CLOEXEC = 0x1
_FAN_NONBLOCK = 0x2
_FAN_CLASS_CONTENT = 0x4
_FAN_REPORT_FID = 0x200
_FAN_MARK_ADD = 0x1
_FAN_MARK_REMOVE = 0x2
_FAN_MARK_DONT_FOLLOW = 0x4
_FAN_MARK_FILESYSTEM = 0x100
_FAN_ONDIR = 0x40000000
_FAN_OPEN_PERM = 0x10000
_FAN_ALLOW = 1

#: struct fanotify_event_metadata: length, version, reserved, length of this part, mask, descriptor, PID.
_EVENT = struct.Struct("=IBBHQii")
#: struct fanotify_response: descriptor, answer.
_RESPONSE = struct.Struct("=iI")

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


class Gate:
    """Has those who open certain files wait until they are let through. Needs CAP_SYS_ADMIN, and a kernel with
    CONFIG_FANOTIFY_ACCESS_PERMISSIONS.

    Its last descriptor is to be that of a process without other groups: they cannot end while somebody waits here, and
    if they are closed first, as by exit(2), nobody is left to let him through.
    """

    def __init__(self) -> None:
        """Raises `SyscallError`."""
        flags = _FAN_CLASS_CONTENT | _FAN_CLOEXEC | _FAN_NONBLOCK
        events = os.O_RDONLY | os.O_CLOEXEC
        self._group = OwnedFd(
            _checked(_libc.fanotify_init(flags, events), "fanotify_init(FAN_CLASS_CONTENT)")
        )

    def fileno(self) -> int:
        """Readable when somebody waits."""
        return self._group.fileno()

    def add(self, directory: FdLike, name: bytes) -> tuple[int, int]:
        """From now on whoever opens that file waits, this process, too; returns its device and inode numbers. Raises
        `SyscallError`, `OSError`."""
        self._mark(_FAN_MARK_ADD, directory, name)
        status = os.stat(name, dir_fd=fileno(directory), follow_symlinks=False)
        return status.st_dev, status.st_ino

    def remove(self, directory: FdLike, name: bytes) -> None:
        """Nobody waits there any more. Raises `SyscallError`, also where the file is gone, and with it its mark."""
        self._mark(_FAN_MARK_REMOVE, directory, name)

    def waiting(self) -> Iterator[tuple[int, int]]:
        """Each file that somebody waits at, by device and inode numbers; he goes on when the next one is asked for."""
        try:
            events = os.read(self._group.fileno(), 64 * _EVENT.size)
        except BlockingIOError:
            return
        for *_, fd, _pid in _EVENT.iter_unpack(events):
            try:
                status = os.fstat(fd)
                yield status.st_dev, status.st_ino
            finally:
                os.write(self._group.fileno(), _RESPONSE.pack(fd, _FAN_ALLOW))
                os.close(fd)

    def _mark(self, how: int, directory: FdLike, name: bytes) -> None:
        flags, mask = how | _FAN_MARK_DONT_FOLLOW, ctypes.c_uint64(_FAN_OPEN_PERM)
        result = _libc.fanotify_mark(self._group.fileno(), flags, mask, fileno(directory), name)
        _checked(result, f"fanotify_mark({os.fsdecode(name)}, FAN_OPEN_PERM)")


def _checked(result: int, call: str) -> int:
    if result < 0:
        raise SyscallError(ctypes.get_errno(), call)
    return int(result)
