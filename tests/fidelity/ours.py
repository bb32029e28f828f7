"""What is tried on procfs, sysfs and the mounts that a container is made with."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from tests.fidelity.calls import AT_EMPTY_PATH, AT_FDCWD, AT_RECURSIVE, Argument, Call, Opened
from tests.fidelity.cases import KINDS, OPERATIONS, Script, attributes, every, one
from tests.fidelity.stage import (
    MS_BIND,
    MS_MOVE,
    MS_PRIVATE,
    MS_RDONLY,
    MS_REC,
    MS_REMOUNT,
    MS_SHARED,
    PROC,
    in_f,
)

#: Originals, copies, immutables, what is below them, and ways to say so.
PATHS: tuple[bytes, ...] = (
    *(b"/proc", b"/proc/", b"/sys", b"/proc/sys", b"/proc/uptime", b"/proc/swaps", b"/proc/self", b"/proc/mounts"),
    *(b"/proc/sys/kernel", b"/proc/self/..", b"/proc/self/fd/%d" % PROC, b"/sys/kernel", b"/sys/kernel/mm"),
    *(b"/sys/devices", b"/sys/devices/virtual", b"/sys/class", b"/sys/module/nf_conntrack/parameters"),
    *map(in_f, ("proc", "proc/sys", "proc/uptime", "sys", "sys/kernel", "sys/devices", "sys/devices/virtual")),
    *map(in_f, ("proclink", "proc/self", "sys/devices/..", "sys/class", "proc/nowhere")),
    *(b"/", b"/usr", b"/dev", b"/dev/null", b"/run", b"/etc/alternatives", b"/dev/mqueue"),
)  # fmt: skip


def umounts(abi: str) -> Iterator[Script]:
    """Every flag with every path."""
    for path, flags in itertools.product(PATHS, (0, 1, 2, 4, 8, 10, 15, 16)):
        yield one("umount2", path, flags, abi=abi)


def mounts(abi: str) -> Iterator[Script]:
    """Each kind of call with each path as target, and as source."""
    for (fstype, flags), path in itertools.product((*KINDS, (b"proc", 0), (b"sysfs", 1)), PATHS):
        yield one("mount", in_f("mnt"), path, fstype, flags, None, abi=abi)
        if flags & (MS_BIND | MS_MOVE) and not flags & MS_REMOUNT:
            for target in ("new", "shared/in", "file", "nowhere"):
                yield one("mount", path, in_f(target), fstype, flags, None, abi=abi)


def mount_flags() -> Iterator[Script]:
    """All 256 combinations of the flags that say what is to be done."""
    pairs = ((b"/proc", in_f("new")), (in_f("dir"), b"/sys"), (in_f("proc"), in_f("sys")))
    for (source, target), flags in itertools.product(pairs, every(OPERATIONS)):
        yield one("mount", source, target, b"proc", flags, None)


OPTIONS: tuple[Argument, ...] = (
    *(None, b"", b"hidepid=0", b"hidepid=1", b"hidepid=invisible", b"hidepid=ptraceable", b"hidepid=3", b"hidepid="),
    *(b"gid=5", b"gid=70000", b"gid=-1", b"gid=x", b"gid=4294967295", b"subset=pid", b"subset=pid,hidepid=2,gid=0"),
    *(b"subset=", b"subset=pid:pid", b"subset=all", b"nonsense", b"ro", b"rw", b",,hidepid=2,,"),
    *(b"hidepid=1,hidepid=4", b"pidns=/proc/self/ns/pid", b"source=x", b"HIDEPID=2", b" hidepid=2", b"hidepid=0x2"),
    *(b"hidepid=2,nonsense=1", b"hidepid=02", b"hidepid=+2"),
    *(b"gid=05", b"gid=0x5", b"gid=,hidepid=1", b"hidepid", b"gid", b"subset", b"=1"),
    *(b"x" * 300, b"hidepid=2" + b"," * 4000, b"sync", b"mand", b"lazytime", b"dirsync", b"sync,dirsync", b"silent"),
)  # fmt: skip


def fresh(abi: str) -> Iterator[Script]:
    """New procfs and sysfs with every option, by mount(2)."""
    for fstype, options in itertools.product((b"proc", b"sysfs"), OPTIONS):
        yield one("mount", b"x", in_f("new"), fstype, 0, options, abi=abi)
    flags = (
        1,
        2,
        4,
        8,
        15,
        0x10,
        0x80,
        0x400,
        0x800,
        1 << 8,
        1 << 9,
        1 << 21,
        1 << 24,
        1 << 25,
        1 << 15,
        1 << 16,
        1 << 22,
    )
    for fstype, flag in itertools.product(
        (b"proc", b"sysfs"), (*flags, 0x400 | 1 << 24, 0xC0ED0001, 0xFC000000, 1 << 32)
    ):
        yield one("mount", b"x", in_f("new"), fstype, flag, None, abi=abi)
    sources: tuple[Argument, ...] = (
        None,
        b"",
        b"proc",
        b"a b",
        b"a\\b",
        b"a,b",
        b"\xff",
        b"none",
        b"y" * 70,
        b"y" * 300,
    )
    targets = (
        "dir",
        "file",
        "link",
        "dangling",
        "mnt",
        "stack",
        "shared",
        "slave",
        "ro",
        "proc",
        "sys",
        "proc/sys",
        "new/",
    )
    for fstype in (b"proc", b"sysfs"):
        for source in sources:
            yield one("mount", source, in_f("new"), fstype, 0, None, abi=abi)
        for target in targets:
            yield one("mount", b"x", in_f(target), fstype, 0, None, abi=abi)


def lives(abi: str) -> Iterator[Script]:
    """Copies and new ones, and what is done with them."""
    makes = {
        "new proc": (b"x", in_f("new"), b"proc", 0, None),
        "new sysfs": (b"x", in_f("new"), b"sysfs", 1, None),
        "bind": (b"/proc", in_f("new"), None, MS_BIND, None),
        "bind of sys": (in_f("sys"), in_f("new"), None, MS_BIND, None),
        "rbind": (b"/sys", in_f("new"), None, MS_BIND | MS_REC, None),
        "directory": (b"/sys/devices", in_f("new"), None, MS_BIND, None),
        "uncovered": (b"/sys/class", in_f("new"), None, MS_BIND, None),
    }
    new, new2 = in_f("new"), in_f("new2")
    then: tuple[tuple[Call, ...], ...] = (
        (Call("umount2", (new, 0), abi),),
        (Call("umount2", (new, 2), abi),),
        (Call("umount2", (new, 8), abi), Call("umount2", (new, 8), abi)),
        (
            Call("mount", (b"x", new, b"tmpfs", 0, None), abi),
            Call("umount2", (new, 0), abi),
            Call("umount2", (new, 0), abi),
        ),
        (Call("mount", (new, new2, None, MS_MOVE, None), abi), Call("umount2", (new2, 0), abi)),
        (Call("mount", (None, new, None, MS_REMOUNT | MS_BIND | MS_RDONLY, None), abi),),
        (
            Call("mount", (None, new, None, MS_REMOUNT | MS_BIND | 2, None), abi),
            Call("umount2", (new, 0), abi),
        ),
        (
            Call("mount", (None, new, None, MS_SHARED, None), abi),
            Call("mount", (new, new2, None, MS_BIND, None), abi),
        ),
        (Call("mount", (new, new2, None, MS_BIND, None), abi), Call("umount2", (new, 0), abi)),
        (Call("mount", (new, new2, None, MS_BIND | MS_REC, None), abi), Call("umount2", (new2, 2), abi)),
        (Call("mount", (None, new, None, MS_PRIVATE | MS_REC, None), abi),),
        (Call("open_tree", (AT_FDCWD, new, 1)), Call("move_mount", (Opened(0), b"", AT_FDCWD, new2, 4))),
        (
            Call("open_tree", (AT_FDCWD, new, 1 | AT_RECURSIVE)),
            Call("move_mount", (Opened(0), b"", AT_FDCWD, new2, 4)),
        ),
        (Call("move_mount", (AT_FDCWD, new, AT_FDCWD, new2, 0)), Call("umount2", (new2, 0), abi)),
        (
            Call("mount_setattr", (AT_FDCWD, new, AT_RECURSIVE, attributes(1), 32)),
            Call("umount2", (new, 0), abi),
        ),
        (Call("mount", (b"x", in_f("dir"), b"proc", 0, None), abi), Call("umount2", (in_f("dir"), 0), abi)),
        (Call("chdir", (new,), abi), Call("umount2", (new, 0), abi), Call("umount2", (b".", 2), abi)),
        (Call("open", (new, 0), abi), Call("umount2", (new, 0), abi)),
    )
    for made, steps in itertools.product(makes.values(), then):
        yield (Call("mount", made, abi), *steps)


def trees() -> Iterator[Script]:
    """open_tree(2) and move_mount(2)."""
    for flag, path in itertools.product(
        (0, 1, 0x80001, 1 | AT_RECURSIVE, 0x101, 0x801, AT_EMPTY_PATH | 1), PATHS
    ):
        clone = Call("open_tree", (AT_FDCWD, path, flag))
        yield (clone,)
        if flag & 1:
            yield (clone, Call("move_mount", (Opened(0), b"", AT_FDCWD, in_f("new"), 4)))
    yield one("open_tree", PROC, b"", AT_EMPTY_PATH | 1)
    yield one("open_tree", PROC, b"sys", 1)
    for path, flag in itertools.product(PATHS, (0, 1, 0x100, 0x200)):
        yield one("move_mount", AT_FDCWD, path, AT_FDCWD, in_f("new"), flag)
        yield one("move_mount", AT_FDCWD, in_f("mnt"), AT_FDCWD, path, flag)
    for path, size in itertools.product(PATHS, (1, 2, 14)):
        yield one("mount_setattr", AT_FDCWD, path, 0, attributes(size), 32)
        yield one("mount_setattr", AT_FDCWD, path, 0, attributes(clear=size), 32)


def contexts() -> Iterator[Script]:
    """New ones by the mount API of descriptors."""
    create = Call("fsconfig", (Opened(0), 6, None, None, 0))
    settings: tuple[tuple[Argument, ...], ...] = (
        *(
            (1, b"hidepid", b"2", 0),
            (1, b"hidepid", b"9", 0),
            (1, b"subset", b"pid", 0),
            (1, b"gid", b"5", 0),
        ),
        *(
            (0, b"ro", None, 0),
            (1, b"source", b"a b", 0),
            (0, b"nonsense", None, 0),
            (1, b"nonsense", b"1", 0),
        ),
        *(
            (0, b"sync", None, 0),
            (1, b"hidepid", None, 0),
            (0, b"hidepid", None, 0),
            (8, None, None, 0),
            (7, None, None, 0),
        ),
    )
    for fstype in (b"proc", b"sysfs"):
        for flag in (0, 1, 2, 1 << 32):
            yield one("fsopen", fstype, flag)
        opened = Call("fsopen", (fstype, 1))
        for flag, attr in itertools.product(
            (0, 1, 2), (0, 1, 2, 15, 0x10, 0x20, 0x30, 0x80, 0x200000, 1 << 30)
        ):
            yield (opened, create, Call("fsmount", (Opened(0), flag, attr)))
        made = (opened, create, Call("fsmount", (Opened(0), 1, 14)))
        yield (opened, Call("fsmount", (Opened(0), 1, 0)))
        yield (*made, Call("fsmount", (Opened(0), 1, 0)))
        for place in ("new", "file", "nowhere", "mnt", "shared", "proc", "link"):
            yield (*made, Call("move_mount", (Opened(1), b"", AT_FDCWD, in_f(place), 4)))
        there = Call("move_mount", (Opened(1), b"", AT_FDCWD, in_f("new"), 4))
        yield (*made, there, Call("umount2", (in_f("new"), 0)))
        yield (*made, there, there)
        yield (*made, Call("move_mount", (Opened(1), b"", AT_FDCWD, in_f("nowhere"), 4)), there)
        yield (*made, Call("move_mount", (Opened(1), b"", AT_FDCWD, in_f("mnt"), 0x204)))
        yield (*made, Call("open_tree", (Opened(1), b"", 1 | AT_EMPTY_PATH)))
        yield (*made, Call("open_tree", (Opened(1), b"", 1 | AT_EMPTY_PATH | AT_RECURSIVE)))
        yield (*made, Call("mount_setattr", (Opened(1), b"", AT_EMPTY_PATH, attributes(1), 32)), there)
        yield (*made, Call("close", (Opened(1),)))
        yield (*made, Call("fspick", (Opened(1), b"", 8)))
        for setting in settings:
            said = Call("fsconfig", (Opened(0), *setting))
            yield (opened, said, create, Call("fsmount", (Opened(0), 0, 0)), there)
