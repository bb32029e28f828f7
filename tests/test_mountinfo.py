"""mountinfo says what statmount and listmount say: read in Python, for the daemon, and in C, for guards."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interceptor._native import ffi, lib
from interceptor.kernel import mount, mountinfo, stat
from interceptor.kernel.flags import CLONE_NEWNS, MountFlag
from interceptor.kernel.mountinfo import MountStat
from interceptor.kernel.namespaces import open_namespace, unshare
from interceptor.kernel.whereabouts import BY_INODE, remember, within
from interceptor.mounts.lineage import UNIQUE_FROM
from tests.child import told_by_a_child

NAMES = [
    b"plain",
    b"a b",
    b"a\tb",
    b"a\nb",
    b"a\rb",
    b"\v\x1c",
    b"a\\b",
    b"a#b",
    b"\\040",
    b"\xc3\xa4\xff",
    b"d" * 250,
    b"stack",
]
FLAGS = [0, 1, 2, 4, 8, 15, 256, 1024, 2048, 1 << 21, 1 << 24]


def _odd_mounts(top: bytes) -> None:
    """In a mount namespace of the calling process's own: every propagation, every flag, names that are escaped."""
    unshare(CLONE_NEWNS)
    mount.mount(b"none", b"/", None, MountFlag.MS_REC | MountFlag.MS_PRIVATE)
    mount.mount(b"x y", top, b"tmpfs", 0, b"mode=0755")
    for name in NAMES:
        os.mkdir(top + b"/" + name)
        mount.mount(name, top + b"/" + name, b"tmpfs")
    mount.mount(b"x", top + b"/stack", b"proc")
    for flags in FLAGS:
        place = top + b"/%d" % flags
        os.mkdir(place)
        mount.mount(b"x", place, b"tmpfs", flags)
    kinds = (MountFlag.MS_SHARED, MountFlag.MS_SLAVE, MountFlag.MS_UNBINDABLE)
    for i, kind in enumerate([*kinds, MountFlag.MS_SHARED | MountFlag.MS_SLAVE]):
        place = top + b"/kind%d" % i
        os.mkdir(place)
        mount.mount(top + b"/plain", place, None, MountFlag.MS_BIND)
        if kind & MountFlag.MS_SLAVE:
            # Of what is its peer before.
            mount.mount(None, place, None, MountFlag.MS_SHARED)
            other = top + b"/of%d" % i
            os.mkdir(other)
            mount.mount(place, other, None, MountFlag.MS_BIND)
            mount.mount(None, place, None, MountFlag.MS_SLAVE)
        if kind & ~MountFlag.MS_SLAVE:
            mount.mount(None, place, None, kind & ~MountFlag.MS_SLAVE)
    # A root within its filesystem, of a file, with a blank; and one that is gone.
    for name in (b"a file", b"gone"):
        with open(top + b"/" + name, "wb"):
            mount.mount(top + b"/" + name, top + b"/" + name, None, MountFlag.MS_BIND)
    os.mkdir(top + b"/plain/lost")
    os.mkdir(top + b"/last")
    mount.mount(top + b"/plain/lost", top + b"/last", None, MountFlag.MS_BIND)
    os.rmdir(top + b"/plain/lost")
    os.chdir(top)


def _among_odd_mounts(look: Callable[[], list[str]]) -> list[str]:
    """What is wrong, found by a process of its own, with which the mounts go."""

    def among(top: bytes) -> list[str]:
        _odd_mounts(top)
        return look()

    return told_by_a_child(among)


def _facts(mounts: list[MountStat]) -> dict[int, tuple[object, ...]]:
    """All that is said, with the parent's place for IDs, and of the filesystem's type what anybody asks about."""
    points = {m.mnt_id: m.point for m in mounts}
    return {
        m.mnt_id: (
            m.dev,
            m.magic if m.fstype in (b"proc", b"sysfs", b"fuse") else 0,
            *m[4:],
            points.get(m.parent_id),
        )
        for m in mounts
    }


def _differences() -> list[str]:
    if stat.reads_mountinfo():
        return []
    read = mountinfo.read()
    ours = _facts(list(read.values()))
    theirs = _facts([stat.statmount(number) for number in stat.listmount()])
    wrong = [f"read only: {f}" for f in ours.values() if f not in theirs.values()]
    wrong += [f"told only: {f}" for f in theirs.values() if f not in ours.values()]
    alike = list(theirs.values())
    for number, fact in ours.items():
        if alike.count(fact) != 1:
            continue
        (told,) = [n for n, f in theirs.items() if f == fact]
        under = sorted(repr(theirs[n]) for n in stat.listmount(told))
        if under != sorted(repr(ours[n]) for n in mountinfo.below(read, number)):
            wrong.append(f"below {fact}: {under}")
    return wrong if len(theirs) > 30 else [f"only {len(theirs)} mounts"]


def _wrong_picks() -> list[str]:
    """More of them than are listed at once."""
    for i in range(600):
        os.mkdir(f"more{i}")
        mount.mount(b"plain", b"more%d" % i, None, MountFlag.MS_BIND)
    table = [stat.statmount(number) for number in stat.listmount()]
    top = next(m for m in table if m.point == os.fsencode(os.getcwd()))
    points = [top.point + b"/" + name for name in (*NAMES, b"more599", b"more17", b"absent")]
    picks: dict[stat.Pick, Callable[[MountStat], object]] = {
        stat.Pick.BASES: lambda m: m.fstype in (b"proc", b"sysfs"),
        stat.Pick.BETWEEN: lambda m: m.peer_group and m.master,
        stat.Pick.POINTS: lambda m: m.point in points,
    }
    wrong = []
    for pick, is_wanted in picks.items():
        for of in (stat.LSMT_ROOT, top.mnt_id):
            picked = [stat.statmount(n) for n in stat.listmount(of, pick=pick, points=points)]
            wanted = [m for m in map(stat.statmount, stat.listmount(of)) if is_wanted(m)]
            if stat.reads_mountinfo():
                picked = list(filter(is_wanted, picked))
            if picked != wanted or (of == stat.LSMT_ROOT and not wanted):
                wrong.append(f"{pick.name} of {of:#x}: {picked} instead of {wanted}")
    return wrong


@pytest.mark.root
def test_those_that_are_picked_are_those_that_are_wanted() -> None:
    assert _among_odd_mounts(_wrong_picks) == []


@pytest.mark.root
def test_mountinfo_says_what_statmount_says() -> None:
    assert _among_odd_mounts(_differences) == []


def _look(fd: int, number: int, mask: int = 0x3B, size: int = 20000) -> MountStat | int:
    buffer, s = ffi.new("char[]", size), ffi.new("struct ix_mount_view *")
    os.lseek(fd, 0, os.SEEK_SET)
    result = lib.ix_mountinfo_look(fd, number, mask, buffer, size)
    if result < 0:
        return int(result)
    lib.ix_view_of(buffer, s)
    texts = [ffi.string(t) if t else b"" for t in (s.root, s.point, s.fstype)]
    dev = (s.dev_major, s.dev_minor)
    numbers = (s.magic, s.attributes, s.propagation, s.peer_group, s.master)
    return MountStat(s.mnt_id, s.parent_id, dev, *numbers, *texts)


def _list(fd: int, number: int, at_once: int) -> list[int]:
    ids, found = ffi.new("uint64_t[]", at_once), list[int]()
    while True:
        os.lseek(fd, 0, os.SEEK_SET)
        n = lib.ix_mountinfo_list(fd, number, found[-1] if found else 0, ids, at_once)
        assert n >= 0, errno.errorcode[-n]
        found += ffi.unpack(ids, n)
        if n < at_once:
            return found


def _in_c() -> list[str]:
    read = mountinfo.read()
    fd = os.open("/proc/thread-self/mountinfo", os.O_RDONLY)
    wrong = [f"{m} {_look(fd, number)}" for number, m in read.items() if _look(fd, number) != m]
    for number in read:
        wrong += [f"{number}" for k in (1, 3, 500) if _list(fd, number, k) != mountinfo.below(read, number)]
    return wrong


@pytest.mark.root
def test_guards_read_what_the_daemon_reads() -> None:
    assert _among_odd_mounts(_in_c) == []


def _file(text: bytes) -> int:
    fd = os.memfd_create("mountinfo", os.MFD_CLOEXEC)
    os.write(fd, text)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


LINE = b"%d %d 0:5 /%s /x rw,relatime shared:3 master:4 propagate_from:5 - tmpfs none rw\n"


def test_what_has_no_room_is_no_answer() -> None:
    fd = _file(LINE % (7, 1, b"r" * 5000))
    try:
        assert _look(fd, 7, size=9000) == -errno.EOVERFLOW
        assert isinstance(_look(fd, 7, size=20000), MountStat)
        assert _look(fd, 8) == -errno.ENOENT
        # Nobody asked for texts.
        os.lseek(fd, 0, os.SEEK_SET)
        assert lib.ix_mountinfo_look(fd, 7, 3, ffi.new("char[]", 560), 560) == 0
    finally:
        os.close(fd)


def test_there_is_an_end_to_what_a_guard_looks_through() -> None:
    ids = ffi.new("uint64_t[]", 8)
    few, many = (_file(b"".join(LINE % (i, i - 1, b"") for i in range(2, n + 2))) for n in (4096, 4097))
    try:
        assert lib.ix_mountinfo_list(few, 2, 0, ids, 8) == 8
        assert lib.ix_mountinfo_list(many, 2, 0, ids, 8) == -errno.E2BIG
        os.lseek(few, 0, os.SEEK_SET)
        assert lib.ix_mountinfo_list(few, 2, 9999, ids, 8) == -errno.EAGAIN
        # A circle, which no kernel writes.
        circle = _file(LINE % (2, 3, b"") + LINE % (3, 2, b""))
        assert lib.ix_mountinfo_list(circle, 9, 0, ids, 8) == 0
        os.close(circle)
    finally:
        os.close(few)
        os.close(many)


@given(
    st.one_of(
        st.binary(max_size=300),
        st.lists(st.sampled_from([*b" \n\\-/0123456789,:ro"]), max_size=200).map(bytes),
    )
)
def test_any_bytes_are_read_to_an_end(text: bytes) -> None:
    for whole in (text, LINE % (7, 1, text)):
        fd = _file(whole)
        try:
            found = _look(fd, 7)
            assert isinstance(found, MountStat) or found in (-errno.ENOENT, -errno.EOVERFLOW)
            os.lseek(fd, 0, os.SEEK_SET)
            assert lib.ix_mountinfo_list(fd, 7, 0, ffi.new("uint64_t[]", 4), 4) >= 0
        finally:
            os.close(fd)


def _elsewhere() -> list[str]:
    """From outside of a namespace, known by inode number as before Linux 6.11."""
    with open_namespace(os.getpid(), "mnt") as there:
        number = BY_INODE | os.fstat(there.fileno()).st_ino
        inside = mountinfo.read()
        ids = stat.listmount()
        unshare(CLONE_NEWNS)
        mount.umount2(b"/proc", 2)
        mount.mount(b"proc", b"/proc", b"proc")
        remember(number, there)
        with within(number) as proc:
            wrong = [] if mountinfo.read(proc) == inside else ["another mountinfo"]
        if stat.listmount(namespace=number) != ids or not stat.mount_exists(ids[-1], number):
            wrong.append("other mounts")
        if stat.mount_exists(ids[-1]):
            wrong.append("not gone home")
    # Those of namespaces begin at 0xf0000000 (fs/proc/generic.c).
    try:
        stat.listmount(namespace=BY_INODE | 1)
        wrong.append("found")
    except OSError as error:
        wrong += [] if error.errno == errno.ENOENT else [str(error)]
    return wrong


@pytest.mark.root
def test_a_namespace_without_an_id_is_visited() -> None:
    assert _among_odd_mounts(_elsewhere) == []


@pytest.mark.root
def test_unique_ids_are_told_from_others() -> None:
    ids = mountinfo.read()
    assert all(number < UNIQUE_FROM for number in ids)
    if not stat.reads_mountinfo():
        assert all(number >= UNIQUE_FROM for number in stat.listmount())
        assert stat.statx(mount.AT_FDCWD, b"/").mnt_id >= UNIQUE_FROM
