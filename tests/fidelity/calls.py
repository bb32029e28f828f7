"""System calls as a program could make them, by either ABI, with arguments no library would let through."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000
AT_SYMLINK_NOFOLLOW = 0x100
AT_NO_AUTOMOUNT = 0x800

#: Numbers of x86-64 and of i386; None where the ABI has no such call.
NUMBERS: dict[str, tuple[int | None, int | None]] = {
    "mount": (165, 21),
    "umount2": (166, 52),
    "umount": (None, 22),
    "pivot_root": (155, 217),
    "chroot": (161, 61),
    "chdir": (80, 12),
    "fchdir": (81, 133),
    "mkdir": (83, 39),
    "rmdir": (84, 40),
    "rename": (82, 38),
    "open": (2, 5),
    "close": (3, 6),
    "dup2": (33, 63),
    "unshare": (272, 310),
    "openat2": (437, 437),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "open_tree_attr": (467, 467),
}

#: Calls that return a descriptor.
OPENERS = frozenset({"open", "openat2", "open_tree", "fsopen", "fsmount", "fspick", "open_tree_attr"})


@dataclass(frozen=True)
class Data:
    """Bytes as they are, without a NUL; ``edge``: what follows them is not mapped."""

    content: bytes
    edge: bool = False


@dataclass(frozen=True)
class Address:
    """A pointer to nothing of ours."""

    value: int


@dataclass(frozen=True)
class Opened:
    """The descriptor that an earlier call of the script returned; -1 where there is none."""

    index: int


Argument = int | bytes | Data | Address | Opened | None


@dataclass(frozen=True)
class Call:
    """One system call. ``abi``: ``native`` or ``i386``."""

    name: str
    arguments: tuple[Argument, ...]
    abi: str = "native"

    def __str__(self) -> str:
        shown = ", ".join(_shown(a) for a in self.arguments)
        return f"{'' if self.abi == 'native' else self.abi + ' '}{self.name}({shown})"


def _shown(argument: Argument) -> str:
    if isinstance(argument, int):
        return hex(argument) if argument > 9 else str(argument)
    text = str(argument)
    return text if len(text) < 80 else f"{text[:60]}… {len(text)} characters"


UNMAPPED = Address(0x1000)
KERNEL = Address(0xFFFF800000000000)

_SIZE = 1 << 20
_MAP_32BIT = 0x40

#: push rbx; push rbp; eax, ebx, ecx, edx, esi, ebp, edi from [rdi …]; int 0x80; pop rbp; pop rbx; ret.
_INT80 = bytes.fromhex("53558b078b5f048b4f088b570c8b77108b6f188b7f14cd805d5bc3")


class Memory:
    """Argument memory below 4 GiB, which both ABIs can point to, with an unmapped page at its end."""

    def __init__(self) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_32BIT
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        self._map = mmap.mmap(-1, _SIZE, flags=flags, prot=protection)
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._end = _SIZE - mmap.PAGESIZE
        self._libc = ctypes.CDLL(None, use_errno=True)
        if self._libc.mprotect(ctypes.c_void_p(self._base + self._end), mmap.PAGESIZE, 0) < 0:
            raise OSError(ctypes.get_errno(), "mprotect")
        self._used = 0
        self._syscall = self._libc.syscall
        self._syscall.restype = ctypes.c_long
        code = mmap.mmap(-1, mmap.PAGESIZE, prot=protection | mmap.PROT_EXEC)
        code.write(_INT80)
        self._code = code
        entry = ctypes.addressof(ctypes.c_char.from_buffer(code))
        self._int80 = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(entry)
        self._registers = ctypes.create_string_buffer(28)

    def _place(self, content: bytes, edge: bool = False) -> int:
        where = self._end - len(content) if edge else self._used
        if not edge:
            self._used += (len(content) + 15) & ~15
        self._map[where : where + len(content)] = content
        return self._base + where

    def _value(self, argument: Argument, opened: Sequence[int]) -> int:
        if argument is None:
            return 0
        if isinstance(argument, int):
            return argument
        if isinstance(argument, Address):
            return argument.value
        if isinstance(argument, Opened):
            return opened[argument.index] if argument.index < len(opened) else -1
        if isinstance(argument, bytes):
            return self._place(argument + b"\0")
        return self._place(argument.content, argument.edge)

    def make(self, call: Call, opened: Sequence[int] = ()) -> int:
        """The result of the call, negative for an errno."""
        self._used = 0
        values = [self._value(a, opened) for a in call.arguments]
        number = NUMBERS[call.name][call.abi == "i386"]
        assert number is not None, call
        if call.abi == "i386":
            words = [v & 0xFFFFFFFF for v in (number, *values, *(0,) * (6 - len(values)))]
            self._registers.raw = struct.pack("<7I", *words)
            return int(self._int80(ctypes.addressof(self._registers)))
        result = int(
            self._syscall(ctypes.c_long(number), *(ctypes.c_ulong(v & (1 << 64) - 1) for v in values))
        )
        return -ctypes.get_errno() if result < 0 else result


def answer(call: Call, result: int) -> str:
    """A result as it is compared: an errno's name, or what kind of success."""
    if result < 0:
        return errno.errorcode.get(-result, str(result))
    if call.name not in OPENERS:
        return str(result)
    flags = "cloexec" if not os.get_inheritable(result) else "inherited"
    return f"a descriptor, {flags}"
