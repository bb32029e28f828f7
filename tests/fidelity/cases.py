"""What is tried: every combination where combinations can be counted, as tables of scripts."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable, Iterator, Sequence

from tests.fidelity.calls import (
    AT_EMPTY_PATH,
    AT_FDCWD,
    AT_NO_AUTOMOUNT,
    AT_RECURSIVE,
    AT_SYMLINK_NOFOLLOW,
    KERNEL,
    UNMAPPED,
    Argument,
    Call,
    Data,
    Opened,
)
from tests.fidelity.stage import (
    CLOSED,
    CONTEXT,
    DELETED,
    DETACHED,
    DIR,
    FILE,
    LINK,
    MADE,
    MNT,
    MS_BIND,
    MS_MOVE,
    MS_PRIVATE,
    MS_RDONLY,
    MS_REC,
    MS_REMOUNT,
    MS_SHARED,
    MS_SLAVE,
    MS_UNBINDABLE,
    OPEN_FILE,
    in_f,
)

Script = tuple[Call, ...]

MS_MGC_VAL = 0xC0ED0000
OPERATIONS = (MS_REMOUNT, MS_BIND, MS_REC, MS_MOVE, MS_SHARED, MS_PRIVATE, MS_SLAVE, MS_UNBINDABLE)


def every(bits: Sequence[int]) -> Iterator[int]:
    """All combinations."""
    for chosen in itertools.product((0, 1), repeat=len(bits)):
        yield sum(bit for bit, taken in zip(bits, chosen, strict=True) if taken)


#: Paths on the stage, by every way and none.
PATHS: tuple[Argument, ...] = (
    *map(in_f, ("dir", "dir/", "dir/.", "dir/..", "file", "file/", "file/x", "file/..", "link", "link/")),
    *map(in_f, ("filelink", "filelink/", "dangling", "dangling/", "loop", "loop/x", "mntlink", "mntlink/")),
    *map(in_f, ("mnt", "mnt/", "mnt/.", "mnt/..", "mnt/in", "mnt/in/..", "stack", "stack/..", "filemnt")),
    *map(in_f, ("shared", "slave", "unbind", "ro", "ro/x", "nowhere", "nowhere/x", "new", "a,b", "a b")),
    *(b"", b"/", b"//", b".", b"..", b"sub", b"../mnt", b"../link", b"../stack/", b"/usr", b"/usr/", b"/tmp"),
    *(b"//tmp//f///mnt", b"/tmp/f/./dir/../mnt", b"/../tmp/f/mnt", b"/dev/null", b"/dev/pts", b"/run"),
    *(b"/proc/self/fd/%d" % n for n in (DIR, MNT, DETACHED, DELETED, FILE, OPEN_FILE, LINK, CLOSED)),
    *(b"/proc/thread-self/fd/%d" % MNT, b"/dev/fd/%d" % MNT, b"/proc/self/fd/%d/" % MNT),
    *(
        b"/proc/self/cwd",
        b"/proc/self/cwd/../mnt",
        b"/proc/self/root/tmp/f/mnt",
        b"/proc/self/fd/%d/in" % MNT,
    ),
    *(b"/proc/self/../self/root/tmp/f/mnt", b"/proc/self/task/../root/tmp/f/stack", b"/proc/self/ns/mnt"),
    *(in_f("x" * 255), in_f("x" * 256), in_f("dir/" + "./" * 2000 + ".."), b"/tmp/f/mnt" + b"/" * 4085),
    *(b"/" * 4086 + b"tmp/f/mnt", b"/tmp/f/mnt" + b"/" * 4086, b"x" * 5000, b"/tmp/f/m\xff\x01nt"),
    *(None, UNMAPPED, KERNEL, Data(b"/tmp/f/mnt", edge=True), Data(b"/tmp/f/mnt\0", edge=True)),
)

#: What one call can be asked for: filesystem type and flags of mount(2).
KINDS = (
    (b"tmpfs", 0),
    (b"tmpfs", MS_RDONLY | MS_MGC_VAL),
    (None, MS_BIND),
    (None, MS_BIND | MS_REC),
    (None, MS_MOVE),
    (None, MS_REMOUNT),
    (None, MS_REMOUNT | MS_BIND | MS_RDONLY),
    (None, MS_REMOUNT | MS_BIND),
    (None, MS_PRIVATE),
    (None, MS_SHARED | MS_REC),
)


def one(name: str, *arguments: Argument, abi: str = "native") -> Script:
    """A script of one call."""
    return (Call(name, arguments, abi),)


def mount_flags(extras: Sequence[int], pairs: Iterable[tuple[Argument, Argument]]) -> Iterator[Script]:
    """All 256 combinations of the flags that say what is to be done, with each of ``extras``."""
    for (source, target), extra, flags in itertools.product(pairs, extras, every(OPERATIONS)):
        yield one("mount", source, target, b"tmpfs", flags | extra, None)


SOME_PAIRS: tuple[tuple[Argument, Argument], ...] = (
    (in_f("dir"), in_f("new")),
    (in_f("mnt"), in_f("stack")),
    (in_f("file"), in_f("filemnt")),
    (in_f("shared"), in_f("slave")),
)
MORE_PAIRS: tuple[tuple[Argument, Argument], ...] = (
    (in_f("unbind"), in_f("new")),
    (in_f("mnt"), in_f("mnt/in")),
    (in_f("mnt/in"), in_f("shared/in")),
    (in_f("stack"), in_f("link")),
    (in_f("ro"), in_f("file")),
    (in_f("nowhere"), in_f("nowhere")),
    (None, in_f("mnt")),
    (b"", b"."),
)
SOME_EXTRAS = (0, MS_MGC_VAL)
#: read-only with nosuid, nodev, noexec; access times; the superblock's; kernel-internal bits; the upper half; too long.
MORE_EXTRAS = (
    15,
    0x400 | 0x800 | 1 << 21 | 1 << 24,
    0x10 | 0x80 | 1 << 25,
    0xFC000000,
    1 << 8 | 1 << 9,
    1 << 32,
)


def mount_paths(abi: str) -> Iterator[Script]:
    """Each kind of call with each path as target, and as source."""
    for (fstype, flags), path in itertools.product(KINDS, PATHS):
        yield one("mount", in_f("mnt"), path, fstype, flags, None, abi=abi)
        if flags & (MS_BIND | MS_MOVE) and not flags & MS_REMOUNT:
            yield one("mount", path, in_f("new"), fstype, flags, None, abi=abi)


def mount_pointers(abi: str) -> Iterator[Script]:
    """Source, type and data that are no strings, or too long ones."""
    odd: tuple[Argument, ...] = (
        *(
            None,
            UNMAPPED,
            KERNEL,
            b"",
            b"x" * 300,
            b"x" * 4095,
            b"x" * 4096,
            b"x" * 9000,
            b"tmpfs\n",
            b"\xff",
        ),
        *(Data(b"tmpfs", edge=True), Data(b"tmpfs\0", edge=True), Data(b"x" * 4096), Data(b"\0" * 4096)),
        *(b"size=4k" + b"," * 4000, Data(b"size=8k\0" + b"\xff" * 4088), Data(b"size=8k\0", edge=True)),
    )
    for value in odd:
        yield one("mount", value, in_f("new"), b"tmpfs", 0, None, abi=abi)
        yield one("mount", b"x", in_f("new"), value, 0, None, abi=abi)
        yield one("mount", b"x", in_f("new"), b"tmpfs", 0, value, abi=abi)
        yield one("mount", value, in_f("new"), value, MS_BIND, value, abi=abi)
        yield one("mount", value, in_f("mnt"), value, MS_REMOUNT, value, abi=abi)
        yield one("mount", value, in_f("mnt"), value, MS_REMOUNT | MS_BIND | MS_RDONLY, value, abi=abi)
        yield one("mount", value, in_f("mnt"), value, MS_PRIVATE, value, abi=abi)
        yield one("mount", in_f("mnt"), in_f("new"), value, MS_MOVE, value, abi=abi)


def umounts(abi: str) -> Iterator[Script]:
    """Every flag with every path."""
    for path in PATHS:
        for flags in (*range(16), 0x10, 0x80000000, 1 << 32, 1 << 32 | 2):
            yield one("umount2", path, flags, abi=abi)
        if abi == "i386":
            yield one("umount", path, abi=abi)
    twice = Call("umount2", (in_f("stack"), 4), abi)
    yield (twice, twice)
    yield (twice, Call("chdir", (in_f("stack"),), abi), twice)
    yield (
        Call("chdir", (in_f("mnt"),), abi),
        Call("umount2", (in_f("mnt"), 2), abi),
        Call("umount2", (b".", 2), abi),
    )


FROMS: tuple[tuple[int, Argument], ...] = (
    (AT_FDCWD, in_f("mnt")),
    (AT_FDCWD, in_f("mntlink")),
    (DETACHED, b""),
    (MNT, b""),
    (MNT, b"in"),
    (OPEN_FILE, b""),
    (CLOSED, b""),
    (DELETED, b""),
    (LINK, b""),
    (AT_FDCWD, b""),
    (DETACHED, None),
    (DETACHED, UNMAPPED),
)
TOS: tuple[tuple[int, Argument], ...] = (
    (AT_FDCWD, in_f("new")),
    (AT_FDCWD, in_f("link")),
    (AT_FDCWD, in_f("stack")),
    (DIR, b""),
    (DIR, b"sub"),
    (MNT, b""),
    (FILE, b""),
    (CLOSED, b""),
    (DETACHED, b""),
    (DIR, None),
)
MOVE_FLAGS = (1, 2, 4, 0x10, 0x20, 0x40, 0x100, 0x200)


def move_mounts(flags: Iterable[int]) -> Iterator[Script]:
    """Every flag with every pair."""
    for flag, source, target in itertools.product(flags, FROMS, TOS):
        yield one("move_mount", source[0], source[1], target[0], target[1], flag)


AT_PATHS: tuple[tuple[int, Argument], ...] = (
    *FROMS,
    (AT_FDCWD, in_f("file")),
    (AT_FDCWD, in_f("shared")),
    (AT_FDCWD, in_f("unbind")),
    (AT_FDCWD, in_f("nowhere")),
    (AT_FDCWD, b"/"),
    (AT_FDCWD, b"/proc/self/fd/%d" % DETACHED),
    (DIR, b"../mnt"),
    (FILE, b"x"),
    (CLOSED, in_f("mnt")),
)
TREE_FLAGS = (1, 0x80000, AT_EMPTY_PATH, AT_NO_AUTOMOUNT, AT_RECURSIVE, AT_SYMLINK_NOFOLLOW)


def open_trees() -> Iterator[Script]:
    """Every flag with every path; and what can be done with a clone."""
    for flag, (fd, path) in itertools.product((*every(TREE_FLAGS), 0x2, 0x10, 1 << 32 | 1), AT_PATHS):
        yield one("open_tree", fd, path, flag)
    for flag in (1, 1 | AT_RECURSIVE):
        clone = Call("open_tree", (AT_FDCWD, in_f("mnt"), flag))
        yield (clone, Call("move_mount", (Opened(0), b"", AT_FDCWD, in_f("new"), 4)))
        yield (clone, Call("umount2", (b"/proc/self/fd/%d" % 112, 2)))
        yield (clone, Call("open_tree", (Opened(0), b"", 1 | AT_EMPTY_PATH)))
        yield (clone, Call("move_mount", (AT_FDCWD, in_f("stack"), Opened(0), b"in", 0)))


def attributes(
    set_: int = 0, clear: int = 0, propagation: int = 0, userns: int = 0, extra: bytes = b"", size: int = 32
) -> Data:
    """``struct mount_attr``, cut to ``size`` bytes."""
    return Data((struct.pack("<4Q", set_, clear, propagation, userns) + extra)[:size])


def setattrs() -> Iterator[Script]:
    """mount_setattr(2) and open_tree_attr(2)."""
    some: tuple[tuple[Argument, int], ...] = (
        (attributes(1), 32),
        (attributes(clear=1), 32),
        (attributes(15), 32),
        (attributes(propagation=MS_SHARED), 32),
        (attributes(propagation=MS_SHARED | MS_SLAVE), 32),
        (attributes(1 << 20), 32),
        (attributes(0x10, 0x70), 32),
        (attributes(1 << 40), 32),
        (attributes(), 32),
        (attributes(1), 0),
        (attributes(1), 16),
        (attributes(1, extra=b"\0" * 8), 40),
        (attributes(1, extra=b"\1" * 8), 40),
        (attributes(1), 1 << 40),
        (UNMAPPED, 32),
        (None, 0),
    )
    flags = tuple(every((AT_EMPTY_PATH, AT_RECURSIVE, AT_SYMLINK_NOFOLLOW)))
    for flag, (fd, path), (pointer, size) in itertools.product(flags, AT_PATHS[:8], some):
        yield one("mount_setattr", fd, path, flag, pointer, size)
        yield one("open_tree_attr", fd, path, flag | 1, pointer, size)


def contexts() -> Iterator[Script]:
    """fsopen, fsconfig, fsmount and fspick on filesystems of the container's own."""
    names: tuple[Argument, ...] = (
        b"tmpfs",
        b"nothing",
        b"",
        b"x" * 256,
        b"x" * 4096,
        None,
        UNMAPPED,
        b"ramfs",
        b"ext4",
    )
    for name, flag in itertools.product(names, (0, 1, 2, 0x80000, 1 << 32)):
        yield one("fsopen", name, flag)
    for fd, flag, attr in itertools.product(
        (CONTEXT, MADE, CLOSED, FILE, OPEN_FILE, -1, 1 << 31),
        (0, 1, 2),
        (0, 1, 15, 0x10, 0x20, 0x70, 1 << 20, 1 << 31),
    ):
        yield one("fsmount", fd, flag, attr)
    for command in range(10):
        yield one("fsconfig", CONTEXT, command, b"size", b"4k", 0)
        yield one("fsconfig", MADE, command, None, None, 0)
    for fd, path in AT_PATHS:
        yield one("fspick", fd, path, 8)
    opened = Call("fsopen", (b"tmpfs", 1))
    made = (opened, Call("fsconfig", (Opened(0), 6, None, None, 0)), Call("fsmount", (Opened(0), 1, 2)))
    yield made
    yield (*made, Call("move_mount", (Opened(1), b"", AT_FDCWD, in_f("new"), 4)))
    yield (*made, Call("fsmount", (Opened(0), 1, 2)))
    yield (
        *made,
        Call("move_mount", (Opened(1), b"", AT_FDCWD, in_f("nowhere"), 4)),
        Call("close", (Opened(1),)),
    )
    yield (
        Call("dup2", (MADE, 115)),
        Call("fsmount", (115, 0, 0)),
        Call("move_mount", (Opened(0), b"", DIR, b"", 0x44)),
    )


def pivots() -> Iterator[Script]:
    """pivot_root(2)."""
    paths: tuple[Argument, ...] = (
        in_f("mnt"),
        in_f("mnt/in"),
        in_f("stack"),
        in_f("dir"),
        b".",
        b"/",
        in_f("shared"),
        in_f("file"),
        UNMAPPED,
    )
    for new in paths:
        for old in paths:
            yield one("pivot_root", new, old)


def walks() -> Iterator[Script]:
    """Calls after the caller has got another root, working directory or namespace."""
    pivot = Call("pivot_root", (in_f("mnt"), in_f("mnt/in")))
    yield (pivot, Call("umount2", (b"/in", 2)))
    yield (
        pivot,
        Call("chdir", (b"/",)),
        Call("umount2", (b"/in/tmp/f/stack", 0)),
        Call("umount2", (b"/in", 2)),
    )
    yield (
        Call("chdir", (in_f("stack"),)),
        Call("pivot_root", (b".", b".")),
        Call("umount2", (b".", 2)),
        Call("mount", (b"x", b"/", b"tmpfs", 0, None)),
    )
    yield (Call("chroot", (in_f("mnt"),)), Call("umount2", (b"/in", 0)), Call("umount2", (b"/", 0)))
    yield (Call("chroot", (in_f("dir"),)), Call("umount2", (b"../mnt/in", 0)), Call("umount2", (b"..", 2)))
    yield (
        Call("unshare", (0x20000,)),
        Call("umount2", (in_f("stack"), 0)),
        Call("umount2", (in_f("mnt"), 2)),
    )
    yield (Call("rename", (in_f("dir"), in_f("dir2"))), Call("mount", (b"x", b".", b"tmpfs", 0, None)))
    yield (Call("rename", (in_f("mnt"), in_f("mnt2"))), Call("umount2", (in_f("mnt2"), 2)))
    yield (Call("mkdir", (b"gone", 0o755)), Call("chdir", (b"gone",)), Call("rmdir", (in_f("dir/gone"),)),
           Call("mount", (b"x", b".", b"tmpfs", 0, None)), Call("umount2", (b".", 0)))  # fmt: skip


_LOWER = b":".join(in_f(f"low{i}") for i in range(40))
_UPPER = b",upperdir=" + in_f("upper") + b",workdir=" + in_f("work")

#: Filesystem types with data that has been got wrong.
AWKWARD: tuple[tuple[bytes, Argument], ...] = (
    (b"overlay", b"lowerdir=" + _LOWER),
    (b"overlay", b"lowerdir=" + _LOWER + _UPPER),
    (b"overlay", b"lowerdir=" + b":".join(in_f(f"low{i % 40}/" + "./" * 20) for i in range(80))),
    (b"overlay", b"lowerdir=" + _LOWER + b":" + b":".join([in_f("low0")] * 300)),
    (b"overlay", b"lowerdir=/tmp/f/a\\,b:/tmp/f/a\\:b" + _UPPER),
    (b"overlay", b"lowerdir=/tmp/f/a,b" + _UPPER),
    (b"overlay", b"lowerdir=/tmp/f/a\\\\b:/tmp/f/a b"),
    (b"overlay", b"lowerdir+=/tmp/f/low1,lowerdir+=/tmp/f/low2"),
    (b"overlay", b"lowerdir=low0"),
    (b"overlay", b"lowerdir=/tmp/f/low0::/tmp/f/low1"),
    (b"overlay", b"lowerdir=/tmp/f/low0,userxattr,metacopy=on"),
    (b"overlay", b"nonsense"),
    (b"overlay", None),
    (b"overlay", Data((b"lowerdir=" + _LOWER).ljust(4096, b"/"))),
    *((b"tmpfs", f"size={n}".encode()) for n in ("4k", "50%", "0", "-1", "1e3", "1844674407370955161", "", "8g,", "k")),
    *((b"tmpfs", t) for t in (b"mode=1777,uid=5,gid=5", b"uid=70000", b"mode=9", b"nr_inodes=3,nr_blocks=9,,,")),
    *((b"tmpfs", t) for t in (b"mpol=bind:0", b"mpol=prefer=static:0", b"size=4k,nonsense", b"noswap", b"ro")),
    *((b"tmpfs", t) for t in (b"huge=always", b"inode32")),
    (b"ramfs", b"mode=700,nonsense=1"),
    (b"devpts", b"newinstance,ptmxmode=0666,mode=0620,gid=5"),
    (b"devpts", b"gid=70000"),
    (b"mqueue", None),
    (b"mqueue", b"x=1"),
    (b"cgroup2", None),
    (b"cgroup2", b"nsdelegate"),
    (b"cgroup", b"none,name=systemd"),
    (b"cgroup", b"cpu"),
    (b"binfmt_misc", None),
    (b"autofs", b"fd=111,pgrp=1,minproto=5,maxproto=5,direct"),
    (b"autofs", None),
    *((t, None) for t in (b"bpf", b"devtmpfs", b"debugfs", b"tracefs", b"securityfs", b"hugetlbfs", b"squashfs")),
    *((t, None) for t in (b"nfs", b"fusectl", b"pstore", b"pipefs", b"sockfs", b"rootfs", b"cpuset", b"fuse.x")),
    *((t, None) for t in (b"ext4", b"nosuch")),
)  # fmt: skip


def awkward(abi: str) -> Iterator[Script]:
    """Each with several flags, and taken away again."""
    for fstype, data in AWKWARD:
        yield one("mount", b"some source", in_f("new"), fstype, 0, data, abi=abi)
        yield (
            Call("mount", (b"x", in_f("new"), fstype, 7, data), abi),
            Call("mount", (in_f("new"), in_f("new2"), None, MS_BIND, None), abi),
            Call("mount", (b"x", in_f("new"), None, MS_REMOUNT, data), abi),
            Call("umount2", (in_f("new"), 8), abi),
        )
    yield from fuse(abi)


def fuse(abi: str) -> Iterator[Script]:
    """A filesystem whose server never answers: nobody but its own users may wait for it."""
    begin = (Call("open", (b"/dev/fuse", 2), abi), Call("dup2", (Opened(0), CLOSED), abi))
    for options in (
        b"fd=111,rootmode=40000,user_id=0,group_id=0",
        b"fd=111,rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions,max_read=4096",
        b"fd=111,rootmode=100000,user_id=0,group_id=0",
        b"fd=111,rootmode=40000,user_id=70000,group_id=0",
        b"fd=0111,rootmode=40000,user_id=0,group_id=0",
        b"fd=99,rootmode=40000,user_id=0,group_id=0",
        b"fd=105,rootmode=40000,user_id=0,group_id=0",
        b"rootmode=40000,user_id=0,group_id=0",
    ):
        made = (*begin, Call("mount", (b"x", in_f("new"), b"fuse", 6, options), abi))
        yield made
        yield (*made, Call("umount2", (in_f("new"), 0), abi))
        yield (*made, Call("umount2", (in_f("new"), 2), abi))
        yield (
            *made,
            Call("mount", (in_f("new"), in_f("new2"), None, MS_BIND, None), abi),
            Call("mount", (b"x", in_f("new2"), None, MS_REMOUNT | MS_BIND | MS_RDONLY, None), abi),
            Call("mount", (in_f("new2"), in_f("old"), None, MS_MOVE, None), abi),
            Call("umount2", (in_f("old"), 8), abi),
        )
        yield (*made, Call("open_tree", (AT_FDCWD, in_f("new"), 1)))
        yield (
            *made,
            Call("mount", (b"x", in_f("new"), b"tmpfs", 0, None), abi),
            Call("umount2", (in_f("new"), 0), abi),
        )
