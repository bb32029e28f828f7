"""The errors of this project. Each says what was tried, and where it can, what to do about it."""

from __future__ import annotations

import errno as errno_names
import os


class InterceptorError(Exception):
    """Base of everything that this package raises on purpose.

    ``message`` is one line for an operator; ``hint``, if there is one, says what to do.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        Exception.__init__(self, message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message


class SyscallError(InterceptorError, OSError):
    """A system call that failed, shown as the call: ``umount2("/proc/sys", 0x8): EINVAL (Invalid argument)``.

    ``call`` is the rendered call; flags are symbolic, unknown bits in hex. ``errno`` is positive, as in errno.h.
    Being an `OSError` as well, it can be caught where one of those is expected.
    """

    call: str
    hint: str | None

    def __init__(self, errno: int, call: str) -> None:
        OSError.__init__(self, errno, os.strerror(errno))
        self.call = call
        self.hint = None
        self.message = f"{call}: {errno_name(errno)} ({os.strerror(errno)})"

    def __reduce__(self) -> tuple[type[SyscallError], tuple[int | None, str]]:
        return type(self), (self.errno, self.call)


class NoDaemon(InterceptorError):
    """Nobody listens at the control socket."""


class ConfigError(InterceptorError):
    """The configuration cannot be used; the message names the file, the key and what is allowed."""


class ProtocolError(InterceptorError):
    """Somebody on one of our sockets said something that its protocol does not allow."""


class ContainerError(InterceptorError):
    """A container is not in the state that an operation needs (unknown, gone, already registered)."""


def errno_name(errno: int) -> str:
    """``EINVAL`` for 22; ``errno 512`` for what has no name here, such as the kernel's own ERESTARTSYS."""
    return errno_names.errorcode.get(errno, f"errno {errno}")
