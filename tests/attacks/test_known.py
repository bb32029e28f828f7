"""Attacks that are known, one by one, beside those that the search makes up."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import socket
from collections.abc import Callable
from functools import partial

import prctl
import pytest

from interceptor.kernel import mount as km
from interceptor.kernel.flags import (
    AT_FDCWD,
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWUSER,
    MountFlag,
    MoveMountFlag,
    UmountFlag,
)
from interceptor.kernel.namespaces import unshare
from tests.attacks import audit
from tests.attacks.conftest import Box
from tests.attacks.contexts import WORK, Where, apart, become_root, propagation, rbind
from tests.attacks.test_races import LONG
from tests.guarded import errno_of, is_raw, mount_id_at, raw_below, raw_nodes, try_mount, try_umount

LAZY, EXPIRE, NOFOLLOW = UmountFlag.MNT_DETACH, UmountFlag.MNT_EXPIRE, UmountFlag.UMOUNT_NOFOLLOW
BIND, REC, MOVE = MountFlag.MS_BIND, MountFlag.MS_REC, MountFlag.MS_MOVE
SHARED, SLAVE, PRIVATE, UNBINDABLE = (
    MountFlag.MS_SHARED,
    MountFlag.MS_SLAVE,
    MountFlag.MS_PRIVATE,
    MountFlag.MS_UNBINDABLE,
)
BASES = (b"proc", b"sys")
COVERS = (b"proc/sys", b"proc/uptime", b"sys/kernel", b"sys/devices/virtual")
SYS_PTRACE, PTRACE_ATTACH, PTRACE_SEIZE = 101, 16, 0x4206


def seen() -> list[bytes]:
    """What this process could see and may not, by its mount table and by path."""
    return raw_nodes() + [line.encode() for line in audit.uncovered(audit.table())]


# ---- what carries originals ---------------------------------------------------------------------------------


def test_an_ancestor_of_originals_is_moved(box: Box, context: str) -> None:
    def attack(where: Where) -> list[bytes]:
        target = where.work(b"target")
        found = []
        for path in (where.path(b"") or b".", where.path(b"proc/self/root"), where.path(b"proc/1/root")):
            try_mount(path, target, None, MOVE)
            found += raw_below(target + b"/proc") + raw_below(target + b"/sys")
            errno_of(km.move_mount, AT_FDCWD, path, AT_FDCWD, target, 0x11)
            found += raw_below(target + b"/proc") + raw_below(target + b"/sys")
        return found

    assert box.attack(context, attack) == []


def test_a_root_that_was_pivoted_away_is_not_unmounted_with_its_originals(box: Box) -> None:
    """Nor what carries that root."""

    def attack(where: Where) -> tuple[list[int], list[bytes]]:
        held = {name: os.open(where.path(name), os.O_PATH | os.O_CLOEXEC) for name in BASES}
        carriers = (where.path(b""), b"/run", b"/proc/thread-self/root/run", b"/proc/thread-self/cwd/run/")
        errors = [try_umount(path, flags) for path in carriers for flags in (LAZY, LAZY | NOFOLLOW)]
        return errors, [path for fd in held.values() for path in raw_below(b".", fd)]

    errors, raw = box.attack("pivot", attack)
    assert raw == []
    if box.decides:
        assert errors == [errno.EBUSY] * 8


@pytest.mark.parametrize(
    "flags", [CLONE_NEWPID, CLONE_NEWPID | CLONE_NEWNS, CLONE_NEWPID | CLONE_NEWUSER | CLONE_NEWNS]
)
def test_proc_is_overmounted_from_an_inner_pid_namespace(box: Box, flags: int) -> None:
    def inner() -> tuple[list[int], list[bytes]]:
        errors = [try_mount(b"proc", b"/proc", b"proc")]
        found = raw_below(b"/proc")
        for path in (b"/proc/sys", b"/proc/uptime", b"/proc"):
            errors.append(try_umount(path))
            found += raw_below(b"/proc")
        errors.append(try_umount(b"/proc", LAZY))
        return errors, found + seen()

    def attack(where: Where) -> tuple[list[int], list[bytes]]:
        unshare(flags)
        if flags & CLONE_NEWUSER:
            become_root()
        return apart(inner)

    errors, found = box.attack("plain", attack)
    assert found == []
    if box.decides:
        # It comes, its covers go, it goes; below it is the original, which stays. (In a user namespace it is locked.)
        below = {errno.EBUSY} | ({errno.EINVAL} if flags & CLONE_NEWUSER else set())
        assert errors[:4] == [0, 0, 0, 0]
        assert errors[4] in below


def test_expire_twice(box: Box, context: str) -> None:
    def attack(where: Where) -> tuple[list[int], list[bytes]]:
        copies = [where.work(b"copy-" + name) for name in BASES]
        for name, copy in zip(BASES, copies, strict=True):
            rbind(where.path(name), copy)
        paths = (
            [where.path(p) for p in (*COVERS, *BASES)]
            + copies
            + [copies[0] + b"/sys", copies[1] + b"/kernel"]
        )
        errors, found = [], []
        for path in paths:
            for flags in (EXPIRE, EXPIRE, EXPIRE | NOFOLLOW, EXPIRE | NOFOLLOW):
                errors.append(try_umount(path, flags))
                found += raw_below(where.path(b"proc")) + raw_below(where.path(b"sys"))
                found += [raw for copy in copies for raw in raw_below(copy)]
        return errors, found

    errors, found = box.attack(context, attack)
    assert found == []
    if box.mode != "random":
        # What has locked mounts on it is busy and never expires, and what is locked is not unmounted.
        assert set(errors) <= {errno.EBUSY, errno.EINVAL}


# ---- peer groups ------------------------------------------------------------------------------------------------


def set_group(from_: bytes, to: bytes) -> int:
    """move_mount(MOVE_MOUNT_SET_GROUP): ``to`` joins the peer group of ``from_``."""
    flag = MoveMountFlag.MOVE_MOUNT_SET_GROUP
    return errno_of(km.move_mount, AT_FDCWD, from_, AT_FDCWD, to, flag)


def _join_private(peer: bytes) -> None:
    propagation(peer, PRIVATE, recursive=True)
    set_group(b"/", peer)


def _join_slave(peer: bytes) -> None:
    propagation(peer, SLAVE, recursive=True)
    propagation(b"/", PRIVATE)
    set_group(peer, b"/")


def _join_the_other_way(peer: bytes) -> None:
    propagation(b"/", PRIVATE, recursive=True)
    propagation(peer, SHARED, recursive=True)
    set_group(peer, b"/")


def _join_bases(peer: bytes) -> None:
    for name in BASES:
        propagation(peer + b"/" + name, PRIVATE, recursive=True)
        set_group(b"/" + name, peer + b"/" + name)


def _split_and_unbindable(peer: bytes) -> None:
    propagation(b"/", UNBINDABLE)
    propagation(b"/", SHARED)
    propagation(peer, UNBINDABLE)
    set_group(b"/", peer)


JOINS = (_join_private, _join_slave, _join_the_other_way, _join_bases, _split_and_unbindable)


@pytest.mark.parametrize("join", JOINS)
def test_peer_groups_are_split_and_joined_before_an_unmount(box: Box, join: Callable[[bytes], None]) -> None:
    """No original may go with its new peer; the box looks for each by its unique mount ID."""

    def attack(where: Where) -> list[bytes]:
        peer = where.work(b"peer")
        propagation(b"/", SHARED, recursive=True)
        rbind(b"/", peer)
        join(peer)
        found = []
        for path in (*COVERS, *BASES, b""):
            for flags in (0, LAZY):
                try_umount(peer + b"/" + path, flags)
                found += seen()
        return found

    assert box.attack("plain", attack) == []


# ---- other processes of the container --------------------------------------------------------------------------


class Other:
    """A process in a mount namespace of its own, which does what it is told: one function, then a look around."""

    def __init__(self, flags: int, before: Callable[[socket.socket], None]) -> None:
        self.socket, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid:
            theirs.close()
            assert self.socket.recv(1) == b"r", "it did not come up"
            return
        try:
            unshare(flags)
            if flags & CLONE_NEWUSER:
                become_root()
            # It must not outlive who waits for the end of all that holds a pipe. (Credentials clear this.)
            prctl.set_pdeathsig(signal.SIGKILL)
            before(theirs)
            theirs.send(b"r")
            theirs.recv(1)
            theirs.send(b"".join(seen())[:4000] or b"-")
        finally:
            os._exit(0)

    def end(self) -> bytes:
        """What it sees in the end that it may not."""
        self.socket.send(b"e")
        found = self.socket.recv(4096)
        os.waitpid(self.pid, 0)
        return b"" if found == b"-" else found


@pytest.mark.parametrize("flags", [CLONE_NEWNS, CLONE_NEWNS | CLONE_NEWUSER])
def test_detached_mounts_are_passed_to_another_namespace(box: Box, flags: int) -> None:
    def give(theirs: socket.socket) -> None:
        trees = []
        for name in BASES:
            fstype = b"sysfs" if name == b"sys" else b"proc"
            ways = (
                partial(km.clone_mount, AT_FDCWD, b"/" + name, recursive=True),
                partial(km.clone_mount, AT_FDCWD, b"/" + name),
                partial(km.new_mount, fstype, {}),
            )
            for way in ways:
                with contextlib.suppress(OSError):
                    tree = way()
                    if tree.fileno() > 2:
                        trees.append(tree)
                    else:
                        tree.take()  # a guard that decides at random has said 0, of nothing
        socket.send_fds(theirs, [b"f"], [tree.fileno() for tree in trees])

    def attack(where: Where) -> tuple[int, list[bytes], bytes]:
        found: list[bytes] = []
        attached = 0
        ours, theirs = socket.socketpair()
        other = Other(flags, lambda _: give(theirs))
        _, trees, _, _ = socket.recv_fds(ours, 1, 16)
        for n, tree in enumerate(trees):
            found += raw_below(b".", tree)
            target = where.work(b"attached%d" % n)
            for _ in range(20):
                if errno_of(km.attach, tree, AT_FDCWD, target) == 0:
                    attached += 1
                    break
            found += raw_below(target) + raw_below(b".", tree)
            for path in (b"/sys", b"/uptime", b"/kernel", b"/devices/virtual", b""):
                try_umount(target + path, LAZY)
                found += raw_below(target) + raw_below(b".", tree)
        return attached, found, other.end()

    attached, found, there = box.attack("plain", attack)
    assert (found, there) == ([], b"")
    if box.decides:
        assert attached >= 2


def test_what_another_namespace_has_is_source_and_target(box: Box, context: str) -> None:
    def before(_: socket.socket) -> None:
        place = WORK + b"/theirs"
        os.makedirs(place, exist_ok=True)
        rbind(b"proc" if os.path.exists(b"proc") else b"/proc", place)
        os.dup2(os.open(place, os.O_PATH), 77, inheritable=True)
        os.chdir(place)

    def attack(where: Where) -> tuple[list[bytes], bytes]:
        other = Other(CLONE_NEWNS, before)
        target, found = where.work(b"target"), []
        base = where.path(b"proc/%d/" % other.pid)
        places = [
            base + p for p in (b"root/proc", b"root/sys", b"root/" + WORK + b"/theirs", b"cwd", b"fd/77")
        ]
        for path in places:
            for source in (path, path + b"/sys", path + b"/uptime", path + b"/kernel", path + b"/devices"):
                for flags in (BIND, BIND | REC, MOVE):
                    try_mount(source, target, None, flags)
                    found += raw_below(target) + ([target] if is_raw(target + b"/virtual") else [])
                    try_umount(target, LAZY)
                for umount in (0, LAZY):
                    try_umount(source, umount)
                errno_of(km.clone_mount, AT_FDCWD, source)
                errno_of(km.move_mount, AT_FDCWD, source, AT_FDCWD, target, 0x11)
                try_mount(b"x", source, b"proc")
                try_mount(where.path(b"sys"), source, None, BIND)
                found += raw_below(path) + raw_below(target)
        return found, other.end()

    found, there = box.attack(context, attack)
    assert (found, there) == ([], b"")


# ---- files, shields ------------------------------------------------------------------------------------------------


def test_a_file_is_bound_over_a_managed_file(box: Box, context: str) -> None:
    def attack(where: Where) -> tuple[list[int], list[bytes]]:
        files = [where.path(p) for p in (b"proc/uptime", b"proc/swaps", b"proc/sys/kernel/hostname")]
        errors, found = [], []
        for path in files:
            before = mount_id_at(path)
            for source in (where.path(b"dev/null"), path, where.path(b"dev/zero")):
                for flags in (BIND, BIND | REC):
                    errors.append(try_mount(source, path, None, flags))
                    for umount in (0, LAZY, 0):
                        if mount_id_at(path) != before:
                            try_umount(path, umount)
                    found += raw_below(where.path(b"proc"))
            while mount_id_at(path) != before and try_umount(path, LAZY) == 0:
                pass
            found += [path] if is_raw(path) else []
        return errors, found

    errors, found = box.attack(context, attack)
    assert found == []
    if box.decides and context != "chroot":
        assert 0 in errors


def test_shields_are_not_unmounted_nor_moved(box: Box, context: str) -> None:
    def attack(where: Where) -> tuple[list[tuple[int, ...]], list[bytes]]:
        results, found = [], []
        target = where.work(b"target")
        for name, covers in ((b"proc", (b"/sys", b"/uptime")), (b"sys", (b"/kernel", b"/devices/virtual"))):
            copy = where.work(b"copy-" + name)
            rbind(where.path(name), copy)
            for cover in covers:
                gone = try_umount(copy + cover)
                tried = [try_umount(copy + cover, flags) for flags in (0, LAZY, NOFOLLOW, LAZY | NOFOLLOW)]
                tried.append(try_mount(copy + cover, target, None, MOVE))
                tried.append(errno_of(km.move_mount, AT_FDCWD, copy + cover, AT_FDCWD, target, 0))
                results.append((gone, *tried))
                found += raw_below(copy) + raw_below(target)
            try_mount(b"x", copy + covers[0], None, MountFlag.MS_REMOUNT | BIND)
            found += [copy] if not os.statvfs(copy + covers[0]).f_flag & os.ST_RDONLY and box.decides else []
        return results, found

    results, found = box.attack(context, attack)
    assert found == []
    if box.decides:
        # MS_MOVE and move_mount to a directory: a file is refused for what it is, after it has been for its lock.
        assert set(results) == {(0, *[errno.EINVAL] * 6)}


# ---- too much, too late ------------------------------------------------------------


def test_ten_thousand_composites(box: Box) -> None:
    """They come and go, and leave nothing with the daemon; some that are held stay whole."""
    count = 10_000 if LONG else 1_000

    def attack(where: Where) -> tuple[int, list[bytes]]:
        target = where.work(b"new")
        held, made = [], 0
        for n in range(count):
            made += try_mount(b"x", target, (b"proc", b"sysfs")[n % 2]) == 0
            if n % (count // 20) == 0:
                held.append(os.open(target, os.O_PATH | os.O_CLOEXEC))
            try_umount(target, LAZY)
        return made, [raw for fd in held for raw in raw_below(b".", fd)]

    before = _descriptors(box)
    made, found = box.attack("plain", attack, 600.0)
    assert found == []
    if box.decides:
        assert made == count
        # What is kept of a superblock goes when the container goes; for each call nothing may be kept.
        assert _descriptors(box) < before + 100


def _descriptors(box: Box) -> int:
    return len(os.listdir(f"/proc/{box.daemon.pid}/fd"))


def _family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        children = [int(word) for word in file.read().split()]
    return [pid, *(p for child in children for p in _family(child))]


def test_nothing_of_ours_can_be_seen_read_or_traced(box: Box) -> None:
    mine = os.stat(f"/proc/{box.child.pid}/ns/pid").st_ino
    ours = [p for p in _family(box.daemon.pid) if os.stat(f"/proc/{p}/ns/pid").st_ino != mine]
    assert len(ours) >= 4, "daemon, keeper, view, welder, guard, envoy"

    def attack(where: Where) -> list[str]:
        libc = ctypes.CDLL(None, use_errno=True)
        wrong = []
        target = where.work(b"new")
        try_mount(b"x", target, b"proc")
        visible = [int(n) for n in os.listdir("/proc") if n.isdigit()]
        for pid in visible:
            # The container's own process 1 lets nobody look.
            if pid != 1 and os.stat(f"/proc/{pid}/ns/pid").st_ino != mine:
                wrong.append(f"{pid} is visible")
        for pid in set(ours) - set(visible):
            for name in (f"/proc/{pid}/mem", f"/proc/{pid}/maps", f"{os.fsdecode(target)}/{pid}/mem"):
                if os.path.exists(name):
                    wrong.append(name)
            for request in (PTRACE_ATTACH, PTRACE_SEIZE):
                if libc.syscall(SYS_PTRACE, request, pid, 0, 0) == 0 or ctypes.get_errno() != errno.ESRCH:
                    wrong.append(f"ptrace({request}, {pid})")
            try:
                os.kill(pid, 0)
                wrong.append(f"kill({pid}, 0)")
            except ProcessLookupError:
                pass
        return wrong

    assert box.attack("plain", attack) == []
