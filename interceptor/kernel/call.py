"""From the compiled module's return values to exceptions: at once, and in one place."""

from __future__ import annotations

import os

from interceptor._native import ffi
from interceptor.errors import SyscallError
from interceptor.kernel.fd import FdLike, OwnedFd

Path = str | bytes | None


def checked(result: int, name: str, *arguments: object) -> int:
    """``result`` if it is no error; else raises `SyscallError` with the call as it was made."""
    if result >= 0:
        return result
    raise SyscallError(-result, f"{name}({', '.join(show(a) for a in arguments)})")


def owned(result: int, name: str, *arguments: object) -> OwnedFd:
    """A returned descriptor with its owner. Raises `SyscallError`."""
    return OwnedFd(checked(result, name, *arguments))


def show(argument: object) -> str:
    """An argument as errors show it."""
    if isinstance(argument, bytes):
        return '"' + argument.decode("utf-8", "backslashreplace") + '"'
    if isinstance(argument, OwnedFd):
        return str(argument.fileno())
    return "NULL" if argument is None else str(argument)


def c_path(path: Path) -> object:
    """A path as the compiled module takes it; a NUL inside raises `ValueError` instead of cutting it short."""
    if path is None:
        return ffi.NULL
    raw = path if isinstance(path, bytes) else os.fsencode(path)
    if b"\0" in raw:
        raise ValueError("embedded NUL in a path")
    return raw


def c_fd(fd: FdLike) -> int:
    """A descriptor as the compiled module takes it."""
    return fd if isinstance(fd, int) else fd.fileno()
