"""Containers for tests that attack: fixtures, and what to do and ask inside. A plugin::

    pytest_plugins = ["tests.guarded"]

Everything but the fixtures runs inside a container, as ``child.call(raw_nodes)`` or ``child.run(function, …)``.
Functions defined in a test can be run there too; modules must be imported outside.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Literal

import pytest

from interceptor.errors import SyscallError
from interceptor.kernel import mount as km
from interceptor.kernel import stat
from interceptor.kernel.fd import OwnedFd
from interceptor.kernel.flags import PROC_SUPER_MAGIC, SYSFS_MAGIC
from interceptor.library import GuardedChild, Interceptor
from interceptor.spawn.create import spawn

Mode = Literal["real", "continue", "random"]
MODES: tuple[Mode, ...] = ("real", "continue", "random")

# ---- fixtures ----------------------------------------------------------------------------------------------

Interceptors = Callable[[Mode], Interceptor]


@pytest.fixture(scope="session")
def interceptors() -> Iterator[Interceptors]:
    """A function that gives the daemon with guards of a mode: one for the whole run, started when first asked for."""
    with ExitStack() as stack:
        running: dict[str, Interceptor] = {}

        def get(mode: Mode) -> Interceptor:
            if mode not in running:
                daemon = Interceptor(
                    guard_mode=mode, log_level="debug", environment={"INTERCEPTOR_TESTING": "1"}
                )
                running[mode] = stack.enter_context(daemon)
            return running[mode]

        yield get


@pytest.fixture(params=MODES)
def interceptor(request: pytest.FixtureRequest, interceptors: Interceptors) -> Iterator[Interceptor]:
    """Each of the three daemons in turn: what must hold whatever guards answer (I5)."""
    yield from _whole(interceptors(request.param))


@pytest.fixture
def real_interceptor(interceptors: Interceptors) -> Iterator[Interceptor]:
    """The daemon whose guards decide."""
    yield from _whole(interceptors("real"))


def _whole(daemon: Interceptor) -> Iterator[Interceptor]:
    yield daemon
    assert daemon.is_running, daemon.log_path.read_text()[-4000:]


@pytest.fixture
def guarded(interceptor: Interceptor) -> Iterator[GuardedChild]:
    """An idle container under guards of each mode."""
    with interceptor.spawn() as child:
        yield child


@pytest.fixture
def real_guarded(real_interceptor: Interceptor) -> Iterator[GuardedChild]:
    """An idle container under a guard that decides."""
    with real_interceptor.spawn() as child:
        yield child


@pytest.fixture
def unguarded() -> Iterator[GuardedChild]:
    """The same container without filter and welds: what the kernel alone does."""
    with spawn(None, None) as child:
        yield child


# ---- inside: is anything raw to be seen? -------------------------------------------------------------------

RAW_MAGIC = {PROC_SUPER_MAGIC: "proc", SYSFS_MAGIC: "sysfs"}

#: Paths below a base that must never be the kernel's own node (DESIGN.md, "managed path").
MANAGED: dict[str, tuple[bytes, ...]] = {
    "proc": (b"/uptime", b"/swaps", b"/sys", b"/sys/kernel/hostname"),
    "sysfs": (b"/kernel", b"/devices/virtual", b"/module/nf_conntrack/parameters"),
}
_COVERS = {"proc": (b"/uptime", b"/swaps", b"/sys"), "sysfs": MANAGED["sysfs"]}


def filesystem(path: bytes | str, dir_fd: int | None = None) -> str:
    """``proc``, ``sysfs``, or the magic number in hex, of what the path leads to. Raises `OSError`."""
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        magic = stat.fs_magic(fd)
    finally:
        os.close(fd)
    return RAW_MAGIC.get(magic, hex(magic))


def is_raw(path: bytes | str, dir_fd: int | None = None) -> bool:
    """Whether the path leads to a node of a procfs or sysfs; False where it leads nowhere."""
    try:
        return filesystem(path, dir_fd) in MANAGED
    except OSError:
        return False


def raw_below(base: bytes, dir_fd: int | None = None) -> list[bytes]:
    """Managed paths of the base at ``base`` that are raw. With ``dir_fd`` and ``b"."`` one that is held open."""
    try:
        kind = filesystem(base, dir_fd)
    except OSError:
        return []
    return [base + path for path in MANAGED.get(kind, ()) if is_raw(base + path, dir_fd)]


def raw_nodes(root: bytes = b"/") -> list[bytes]:
    """Every raw node that can be reached by path: below ``root``/proc and ``root``/sys, and through every mount of a
    procfs or sysfs, or of a part of one, in this mount namespace. Empty if invariant I1 holds.
    """
    prefix = root.rstrip(b"/")
    found = {node for base in (b"/proc", b"/sys") for node in raw_below(prefix + base)}
    for line in _mountinfo():
        kind, top, point = line.fstype, line.root.rstrip(b"/"), line.point.rstrip(b"/")
        for path in MANAGED.get(kind, ()):
            if path.startswith(top + b"/") and is_raw(point + path[len(top) :]):
                found.add(point + path[len(top) :])
        # A mount of a managed node itself, or of something below it.
        if any((top + b"/").startswith(cover + b"/") for cover in _COVERS.get(kind, ())) and is_raw(
            line.point
        ):
            found.add(line.point)
    return sorted(found)


class MountinfoLine:
    """The columns of proc_pid_mountinfo(5) that are used here, unescaped."""

    def __init__(self, line: bytes) -> None:
        left, right = line.split(b" - ", 1)
        columns = left.split(b" ")
        self.mnt_id = int(columns[0])
        self.parent_id = int(columns[1])
        self.root, self.point = (_unescape(column) for column in columns[3:5])
        self.options = columns[5].split(b",")
        self.fstype = right.split(b" ")[0].decode()


def _unescape(column: bytes) -> bytes:
    for octal in (b"040", b"011", b"012", b"134"):
        column = column.replace(b"\\" + octal, bytes([int(octal, 8)]))
    return column


def _mountinfo() -> list[MountinfoLine]:
    """Of this process, wherever a procfs of its PID namespace can be found: /proc may be gone."""
    try:
        with open("/proc/thread-self/mountinfo", "rb") as file:
            return [MountinfoLine(line) for line in file.read().splitlines()]
    except OSError:
        return []


# ---- inside: which mounts are there? -----------------------------------------------------------------------


def mounts() -> list[stat.MountStat]:
    """Every mount of this mount namespace that can be reached from the root, by statmount(2)."""
    found = []
    for mnt_id in stat.listmount():
        try:
            found.append(stat.statmount(mnt_id))
        except SyscallError as error:
            if error.errno != errno.ENOENT:  # unmounted by somebody in between
                raise
    return found


def mount_ids(points: Iterable[bytes] | None = None) -> dict[bytes, int]:
    """Unique mount ID by mount point (of the one on top), for all or for the mount points given."""
    found = {m.point: m.mnt_id for m in mounts()}
    return found if points is None else {point: found[point] for point in points if point in found}


def originals() -> dict[bytes, int]:
    """Unique mount IDs of the bases /proc and /sys and of everything mounted below them. Compare before and after."""
    return {
        point: mnt_id
        for point, mnt_id in mount_ids().items()
        if point in (b"/proc", b"/sys") or point.startswith((b"/proc/", b"/sys/"))
    }


def mount_id_at(path: bytes) -> int:
    """The unique mount ID of what the path leads to. Raises `OSError`."""
    with OwnedFd(os.open(path, os.O_PATH | os.O_CLOEXEC)) as fd:
        return stat.statx(fd).mnt_id


# ---- inside: calls that may fail ---------------------------------------------------------------------------


def errno_of(function: Callable[..., object], *arguments: object, **options: object) -> int:
    """0 if the function returns, else the errno of its `OSError`. A returned descriptor is closed."""
    try:
        result = function(*arguments, **options)
    except OSError as error:
        return error.errno or -1
    if isinstance(result, OwnedFd):
        if result.fileno() > 2:
            result.close()
        else:
            result.take()  # standard input: a guard that decides at random has said 0, and made nothing
    return 0


def raw_in(
    make: Callable[[], OwnedFd], look: Callable[[int], list[bytes]] = lambda fd: raw_below(b".", fd)
) -> tuple[int, list[bytes]]:
    """The errno of a call that returns a tree, and the raw nodes in the tree."""
    try:
        tree = make()
    except OSError as error:
        return error.errno or -1, []
    if tree.fileno() == 0:
        tree.take()  # standard input, as above
        return 0, []
    with tree:
        return 0, look(tree.fileno())


def try_umount(path: bytes, flags: int = 0) -> int:
    """umount2(2): 0 or errno."""
    return errno_of(km.umount2, path, flags)


def try_mount(
    source: bytes | None,
    target: bytes,
    fstype: bytes | None = None,
    flags: int = 0,
    data: bytes | None = None,
) -> int:
    """mount(2): 0 or errno."""
    return errno_of(km.mount, source, target, fstype, flags, data)


def umount_recursive(prefix: bytes, flags: int = 8) -> int:
    """systemd's umount_recursive(): every mount below ``prefix``, parents first, again after every success.

    Returns how many calls it made; gives up, with `AssertionError`, after 10,000.
    """
    calls = 0
    again = True
    while again:
        again = False
        for line in _mountinfo():
            if line.point != prefix and not line.point.startswith(prefix + b"/"):
                continue
            calls += 1
            assert calls < 10000, "a storm"
            if try_umount(line.point, flags) == 0:
                again = True
                break
    return calls


def int80(number: int, *arguments: int) -> int:
    """A system call of i386 from this 64-bit process, by ``int 0x80``: its result, negative for an errno."""
    words = (*arguments, 0, 0, 0, 0)[:4]
    code = b"\x53" + b"\xb8" + struct.pack("<I", number)  # push rbx; mov eax
    for opcode, word in zip((0xBB, 0xB9, 0xBA, 0xBE), words, strict=True):  # mov ebx, ecx, edx, esi
        code += bytes([opcode]) + struct.pack("<I", word)
    code += b"\xcd\x80\x5b\xc3"  # int 0x80; pop rbx; ret
    with mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as page:
        page.write(code)
        view = ctypes.c_char.from_buffer(page)
        try:
            return int(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(view))())
        finally:
            del view


def i386_umount(path: bytes) -> int:
    """The umount of i386, number 22, which has no flags: 0 or errno."""
    map_32bit = 0x40
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | map_32bit
    with mmap.mmap(-1, mmap.PAGESIZE, flags=flags) as page:
        page.write(path + b"\0")
        view = ctypes.c_char.from_buffer(page)
        try:
            return -int80(22, ctypes.addressof(view))
        finally:
            del view


def seccomp_mode() -> int:
    """2 where this thread is under a filter (proc_pid_status(5))."""
    with open("/proc/thread-self/status") as file:
        (line,) = [line for line in file if line.startswith("Seccomp:")]
    return int(line.split()[1])
