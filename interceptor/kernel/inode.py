"""What Python's ``os`` does not know of files: inode flags, data with its holes, syncfs(2).

Sources: ioctl_iflags(2), ioctl_ficlone(2), statx(2), lseek(2) "Seeking file data and holes", copy_file_range(2).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct

from interceptor.errors import SyscallError
from interceptor.kernel.fd import FdLike, fileno
from interceptor.kernel.flags import AT_SYMLINK_NOFOLLOW

_FICLONE = 0x40049409
_GETFLAGS, _SETFLAGS = 0x80086601, 0x40086602
_AT_FDCWD = -100

#: Letters of chattr(1), with the bits of FS_IOC_GETFLAGS; those of STATX_ATTR_* are the same.
FLAGS = {"i": 0x10, "a": 0x20}

#: What one copy_file_range(2) is asked for: short enough to be interrupted.
_CHUNK = 1 << 26
#: Not between these filesystems, or not of such files.
_NOT_HERE = {errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY}

_libc = ctypes.CDLL(None, use_errno=True)
_statx = ctypes.create_string_buffer(256)


def inode_flags(path: bytes) -> str:
    """``i`` if a file is immutable, ``a`` if it can only be appended to, as an overlay tells it, too. Symbolic links
    are not followed. Raises `SyscallError`."""
    if _libc.statx(_AT_FDCWD, path, AT_SYMLINK_NOFOLLOW, 0, _statx) < 0:
        raise SyscallError(ctypes.get_errno(), f"statx({path!r})")
    (attributes,) = struct.unpack_from("=Q", _statx, 8)
    return "".join(letter for letter, bit in FLAGS.items() if attributes & bit)


def set_inode_flags(path: bytes, flags: str) -> None:
    """Makes a file or directory have these of `FLAGS` and no others of them. Raises `OSError`."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        (now,) = struct.unpack("l", fcntl.ioctl(fd, _GETFLAGS, bytes(struct.calcsize("l"))))
        wanted = now & ~sum(FLAGS.values()) | sum(FLAGS[letter] for letter in flags)
        if wanted != now:
            fcntl.ioctl(fd, _SETFLAGS, struct.pack("l", wanted))
    finally:
        os.close(fd)


def reflink(source: int, target: int) -> bool:
    """Has ``target`` share the data of ``source``; False where these files cannot. Raises `OSError`."""
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as error:
        if error.errno in _NOT_HERE:
            return False
        raise
    return True


def copy_data(source: int, target: int) -> None:
    """Copies the data of an open file to an empty one: by reference where that can be, else with its holes.
    Raises `OSError`."""
    if reflink(source, target):
        return
    size = os.fstat(source).st_size
    os.ftruncate(target, size)
    at = 0
    while at < size:
        try:
            start = os.lseek(source, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return  # nothing but a hole up to the end
            raise
        at = os.lseek(source, start, os.SEEK_HOLE)
        _copy_range(source, target, start, at)


def _copy_range(source: int, target: int, start: int, end: int) -> None:
    while start < end:
        try:
            copied = os.copy_file_range(source, target, min(_CHUNK, end - start), start, start)
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise
            copied = os.pwrite(target, os.pread(source, min(1 << 20, end - start), start), start)
        if copied == 0:
            return  # it has become shorter meanwhile
        start += copied


def syncfs(fd: FdLike) -> None:
    """syncfs(2): all of the filesystem is on disk afterwards. Raises `SyscallError`."""
    if _libc.syncfs(fileno(fd)) < 0:
        raise SyscallError(ctypes.get_errno(), f"syncfs({fileno(fd)})")
