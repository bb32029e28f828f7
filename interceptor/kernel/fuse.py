"""The view's pump (native/pump.c): requests from /dev/fuse, but for those that it answers by itself."""

from __future__ import annotations

import errno
from enum import IntFlag

from interceptor._native import ffi, lib
from interceptor.errors import SyscallError
from interceptor.kernel.call import checked


class NodeFlag(IntFlag):
    """IX_NODE_*: what the pump may do with a node beside opening it."""

    READ = lib.IX_NODE_READ
    KEEP = lib.IX_NODE_KEEP
    DIRECTORY = lib.IX_NODE_DIRECTORY
    TEXT = lib.IX_NODE_TEXT


class Pump:
    """Reads one connection. Nodes that it has learned, and their envoys, it serves alone."""

    def __init__(self, device: int, proc: int, handle: int, buffer: bytearray) -> None:
        """Requests are put into ``buffer``; ``handle`` is a number above all that were given out before.

        ``proc`` is a descriptor of the host's procfs.
        """
        pump = lib.ix_pump_new(device, proc, handle)
        if pump == ffi.NULL:
            raise MemoryError
        self._pump = ffi.gc(pump, lib.ix_pump_free)
        self._buffer = ffi.from_buffer(buffer, require_writable=True)
        self._size = len(buffer)
        self._asked = ffi.new("uint32_t *")

    def receive(self, others: int, wait_s: float) -> tuple[int, int] | None:
        """Length of the next request for us, and the number under which an envoy has been asked for it, or 0.

        None if there is none for ``wait_s`` seconds (negative: however long that takes), or if ``others``, an epoll
        instance, is ready. Raises `SyscallError`: ENODEV once unmounted.
        """
        wait_ns = int(wait_s * 1e9)
        length = lib.ix_pump_receive(self._pump, others, wait_ns, self._buffer, self._size, self._asked)
        if length >= 0:
            return int(length), int(self._asked[0])
        if length == -errno.EAGAIN:
            return None
        raise SyscallError(-length, "read(/dev/fuse)")

    def add_envoy(self, fd: int, proc_mount: int, namespaces: tuple[int, int, int, int]) -> int:
        """A number for an envoy's socket. It stays its owner's, who says when it is gone.

        ``proc_mount`` is the unique mount ID of its bare procfs, ``namespaces`` are the inode numbers of its network,
        IPC, UTS and user namespaces; 0 where not known.
        """
        home = ffi.new("struct ix_home *", {"proc_mount": proc_mount, "ns": namespaces})
        return checked(lib.ix_pump_envoy(self._pump, fd, home), "ix_pump_envoy", fd)

    def envoy_gone(self, envoy: int) -> None:
        """The socket is about to be closed."""
        lib.ix_pump_envoy_gone(self._pump, envoy)

    def envoy_owes(self, envoy: int, answers: int) -> None:
        """How many answers it owes to its owner, who takes all that it says until it owes none."""
        lib.ix_pump_envoy_owes(self._pump, envoy, answers)

    def learn(self, number: int, envoy: int, base: int, path: bytes, flags: int, namespace: int) -> None:
        """A node that everybody may read; ``flags`` are `NodeFlag`, ``namespace`` the index of its kind, or -1."""
        result = lib.ix_pump_learn(self._pump, number, envoy, base, flags, namespace, path, len(path))
        checked(result, "ix_pump_learn", number)

    def say(self, number: int, content: bytes) -> None:
        """What a node says from now on that it has learned, and that is no real one."""
        checked(lib.ix_pump_say(self._pump, number, content, len(content)), "ix_pump_say", number)

    def forget(self, number: int) -> None:
        """The kernel does not know it any more, or it is not like that any more."""
        lib.ix_pump_forget(self._pump, number)

    def page_slot(self, directory: int, offset: int) -> int:
        """Which slot a part of a listing has: what is in there goes when that is kept."""
        return int(lib.ix_pump_page_slot(directory, offset))

    def keep_page(self, directory: int, offset: int, size: int, life_ns: int, data: bytes) -> bool:
        """Answer READDIRPLUS with this from now on, while it lives. False where there is no room."""
        result = lib.ix_pump_page_keep(self._pump, directory, offset, size, life_ns, data, len(data))
        return int(result) >= 0

    def drop_page(self, slot: int) -> int:
        """How often it was given out since that was asked last; no more from now on."""
        given = int(lib.ix_pump_page_given(self._pump, slot))
        lib.ix_pump_page_drop(self._pump, slot)
        return given

    def page_given(self, slot: int) -> int:
        """How often it was given out since that was asked last."""
        return int(lib.ix_pump_page_given(self._pump, slot))

    def pages_given(self) -> bool:
        """Whether any was since that was asked last."""
        return bool(lib.ix_pump_pages_given(self._pump))
