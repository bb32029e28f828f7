"""seccomp(2): a filter with a notification listener on the calling thread."""

from __future__ import annotations

from interceptor._native import ffi, lib
from interceptor.kernel.call import owned
from interceptor.kernel.fd import OwnedFd

#: 5.19+: once the listener has received a call, only fatal signals interrupt the caller. Older kernels: EINVAL.
SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV = 1 << 5

_SOCK_FILTER_SIZE = 8


def install_listener(program: bytes, flags: int = 0) -> OwnedFd:
    """Put the calling thread, and all it forks from now on, under ``program`` (classic BPF) and return its listener.

    SECCOMP_FILTER_FLAG_NEW_LISTENER is implied. Raises `SyscallError`: EINVAL for a bad program or an unknown flag,
    EACCES without no_new_privs and CAP_SYS_ADMIN, EBUSY where a filter of the thread has a listener already.
    """
    count, rest = divmod(len(program), _SOCK_FILTER_SIZE)
    if rest or not 0 < count < 1 << 16:
        raise ValueError(f"not a BPF program: {len(program)} bytes")
    result = lib.ix_seccomp_listen(ffi.from_buffer(program), count, flags)
    return owned(
        result, "seccomp", "SECCOMP_SET_MODE_FILTER", f"{flags:#x}|NEW_LISTENER", f"{count} instructions"
    )
