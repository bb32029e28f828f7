"""New procfs and sysfs, by both mount APIs, wherever a container can ask for them."""

from __future__ import annotations

import ctypes
import errno
import os

from interceptor.kernel import mount as km
from interceptor.kernel.flags import CLONE_NEWNET, CLONE_NEWNS, CLONE_NEWPID, CLONE_NEWUSER, MountFlag
from interceptor.kernel.namespaces import unshare
from tests.attacks.conftest import Box
from tests.attacks.contexts import Where, apart, become_root
from tests.guarded import raw_below, raw_in, raw_nodes, try_mount

OPTIONS = (None, b"hidepid=2", b"subset=pid")
INNER = (
    0,
    CLONE_NEWPID,
    CLONE_NEWNET,
    CLONE_NEWUSER | CLONE_NEWNS,
    CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID,
)
FSCONFIG_SET_STRING, FSCONFIG_CMD_RECONFIGURE = 1, 7
SYS_FSPICK = 433


#: errno, and raw nodes seen.
Attempt = tuple[int, list[bytes]]


def by_mount(where: Where, fstype: bytes, data: bytes | None = None) -> tuple[int, list[bytes]]:
    target = where.work(b"new")
    error = try_mount(b"x", target, fstype, MountFlag.MS_NOSUID, data)
    return error, raw_below(target) + raw_nodes()


def by_fsmount(fstype: bytes) -> list[Attempt]:
    """The same by descriptor, with options that hide something at first: errno, and what is raw in it, unattached."""
    options: list[dict[bytes, bytes | None]] = [{}, {b"ro": None}]
    if fstype == b"proc":
        options += [{b"subset": b"pid"}, {b"hidepid": b"2"}, {b"subset": b"pid", b"hidepid": b"invisible"}]
    return [_made(fstype, o) for o in options]


def _made(fstype: bytes, options: dict[bytes, bytes | None]) -> tuple[int, list[bytes]]:
    return raw_in(lambda: km.new_mount(fstype, options))


def _in_order(made: list[Attempt], box: Box) -> None:
    """The kernel refuses what would reveal; the real guard may give a composite in its place."""
    assert [raw for _, raw in made] == [[]] * len(made)
    allowed = {"real": {0, errno.EPERM}, "continue": {errno.EPERM}}
    assert box.mode == "random" or {error for error, _ in made} <= allowed[box.mode]


def _in_inner(where: Where, inner: int) -> tuple[list[Attempt], list[Attempt]]:
    """Each kind by each API in namespaces of one's own: what mounting said and showed, what fsmount said."""

    def innermost() -> tuple[list[Attempt], list[Attempt]]:
        mounted = [by_mount(where, b"proc", data) for data in OPTIONS] + [by_mount(where, b"sysfs")]
        return mounted, by_fsmount(b"proc") + by_fsmount(b"sysfs")

    if inner:
        unshare(inner)
    if inner & CLONE_NEWUSER:
        become_root()
    return apart(innermost)


def test_none_is_raw(box: Box, context: str) -> None:
    # The kernel makes no user namespace for somebody in a chroot.
    inners = [i for i in INNER if context != "chroot" or not i & CLONE_NEWUSER]

    def attack(where: Where) -> dict[int, tuple[list[Attempt], list[Attempt]]]:
        return {inner: apart(_in_inner, where, inner) for inner in inners}

    for inner, (mounted, made) in box.attack(context, attack).items():
        assert [raw for _, raw in mounted] == [[]] * len(mounted)
        _in_order(made, box)
        if box.decides and not inner & CLONE_NEWUSER and context != "nested":
            assert {error for error, _ in mounted} == {0}
        elif box.decides and inner & CLONE_NEWUSER and inner & CLONE_NEWPID:
            assert {error for error, _ in mounted[:-1]} == {0}


def reconfigure(path: bytes, key: bytes, value: bytes) -> int:
    """fspick(2), fsconfig(2): errno."""
    try:
        fd = kernel_fspick(path)
        try:
            km.fsconfig(fd, FSCONFIG_SET_STRING, key, value)
            km.fsconfig(fd, FSCONFIG_CMD_RECONFIGURE)
        finally:
            os.close(fd)
    except OSError as error:
        return error.errno or -1
    return 0


def kernel_fspick(path: bytes) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    fd: int = libc.syscall(SYS_FSPICK, -100, path, 1)
    if fd < 0:
        raise OSError(ctypes.get_errno(), "fspick")
    return fd


def test_what_subset_pid_hides_cannot_be_had_back(box: Box, context: str) -> None:
    """proc_parse_subset_param() of fs/proc/root.c takes a lone comma for "no subset at all"."""

    def attack(where: Where) -> list[bytes]:
        target = where.work(b"new")
        try_mount(b"x", target, b"proc", 0, b"subset=pid")
        for value in (b"", b",", b",,"):
            reconfigure(target, b"subset", value)
            try_mount(b"x", target, b"proc", MountFlag.MS_REMOUNT, b"subset=" + value)
        return raw_below(target) + raw_nodes()

    assert box.attack(context, attack) == []


def test_no_raw_procfs_after_one_with_subset_pid(box: Box) -> None:
    def attack(where: Where) -> list[Attempt]:
        try_mount(b"x", where.work(b"new"), b"proc", 0, b"subset=pid")
        results = by_fsmount(b"proc")

        def inner() -> list[Attempt]:
            unshare(CLONE_NEWUSER | CLONE_NEWNS)
            become_root()
            unshare(CLONE_NEWPID)
            return apart(by_fsmount, b"proc")

        return results + apart(inner)

    _in_order(box.attack("plain", attack), box)
