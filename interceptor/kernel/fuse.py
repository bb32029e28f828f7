"""The view's pump (native/pump.c): requests from /dev/fuse, but for those that it answers by itself."""

from __future__ import annotations

import errno

from interceptor._native import ffi, lib
from interceptor.errors import SyscallError
from interceptor.kernel.call import checked


class Pump:
    """Reads one connection. Nodes that it has learned, and their envoys, it serves alone."""

    def __init__(self, device: int, handle: int, buffer: bytearray) -> None:
        """Requests are put into ``buffer``; ``handle`` is a number above all that were given out before."""
        pump = lib.ix_pump_new(device, handle)
        if pump == ffi.NULL:
            raise MemoryError
        self._pump = ffi.gc(pump, lib.ix_pump_free)
        self._buffer = ffi.from_buffer(buffer, require_writable=True)
        self._size = len(buffer)
        self._asked = ffi.new("uint32_t *")

    def receive(self, others: int) -> tuple[int, int] | None:
        """Length of the next request for us, and the number under which an envoy has been asked for it, or 0.

        None if there is none now, or if ``others``, an epoll instance, is ready. Raises `SyscallError`: ENODEV once
        unmounted.
        """
        length = lib.ix_pump_receive(self._pump, others, self._buffer, self._size, self._asked)
        if length >= 0:
            return int(length), int(self._asked[0])
        if length == -errno.EAGAIN:
            return None
        raise SyscallError(-length, "read(/dev/fuse)")

    def add_envoy(self, fd: int) -> int:
        """A number for an envoy's socket. It stays its owner's, who says when it is gone."""
        return checked(lib.ix_pump_envoy(self._pump, fd), "ix_pump_envoy", fd)

    def envoy_gone(self, envoy: int) -> None:
        """The socket is about to be closed."""
        lib.ix_pump_envoy_gone(self._pump, envoy)

    def envoy_owes(self, envoy: int, answers: int) -> None:
        """How many answers it owes to its owner, who takes all that it says until it owes none."""
        lib.ix_pump_envoy_owes(self._pump, envoy, answers)

    def learn(self, number: int, envoy: int, base: int, path: bytes) -> None:
        """A real node that everybody may read."""
        checked(lib.ix_pump_learn(self._pump, number, envoy, base, path, len(path)), "ix_pump_learn", number)

    def forget(self, number: int) -> None:
        """The kernel does not know it any more, or it is not like that any more."""
        lib.ix_pump_forget(self._pump, number)
