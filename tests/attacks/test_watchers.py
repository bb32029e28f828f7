"""Somebody looks, without a pause, at places where something is being built, replaced or taken down."""

from __future__ import annotations

import select
import subprocess
from collections.abc import Callable

import pytest

from interceptor.kernel.flags import CLONE_NEWNS, MountFlag, UmountFlag
from interceptor.kernel.namespaces import unshare
from tests.attacks.conftest import Box
from tests.attacks.contexts import Where, propagation, rbind
from tests.guarded import try_mount, try_umount

ROUNDS = 60
#: From other places than the first the same once more, but not as long.
ELSEWHERE = 9
#: How often more of them are made as long as nobody has seen any.
MORE = 20
PROC = (b"/sys/kernel/hostname", b"/sys", b"/uptime")
SYS = (b"/devices/virtual/net/lo/mtu", b"/devices/virtual", b"/kernel", b"/kernel/mm")


def watching(where: Where, paths: list[bytes], rounds: Callable[[], int]) -> tuple[int, int, int]:
    """``rounds`` under watch: what it returns, raw nodes seen, paths opened."""
    argv = [where.path(b"tools/race"), b"watch", b"--", *paths]
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as watcher:
        assert watcher.stdout is not None
        assert watcher.stdout.readline() == b"ready\n"
        done = rounds()
        # A few quick rounds may be over before anybody has looked.
        for _ in range(MORE):
            if select.select([watcher.stdout], [], [], 0)[0]:
                break
            rounds()
        out, errors = watcher.communicate()
    raw, opened = (int(word) for word in out.split()[-2:])
    assert raw == 0, errors[-2000:]
    return done, raw, opened


def rounds_in(context: str) -> int:
    return ROUNDS if context == "plain" else ELSEWHERE


def _clear(target: bytes) -> None:
    for _ in range(50):
        if try_umount(target, UmountFlag.MNT_DETACH):
            break


@pytest.mark.parametrize("lazy", [0, UmountFlag.MNT_DETACH])
@pytest.mark.parametrize("shared", [False, True])
def test_while_copies_are_removed(box: Box, context: str, lazy: int, shared: bool) -> None:
    def attack(where: Where) -> tuple[int, int, int]:
        copies = {b"proc": where.work(b"copy-proc"), b"sys": where.work(b"copy-sys")}
        if shared:
            propagation(where.path(b"") or b".", MountFlag.MS_SHARED, recursive=True)

        def rounds() -> int:
            removed = 0
            for _ in range(rounds_in(context) // 3):
                for name, below in (
                    (b"proc", (b"/sys", b"/uptime")),
                    (b"sys", (b"/devices/virtual", b"/kernel")),
                ):
                    rbind(where.path(name), copies[name])
                    removed += sum(try_umount(copies[name] + path, lazy) == 0 for path in below)
                    removed += try_umount(copies[name], lazy) == 0
                    _clear(copies[name])
            return removed

        paths = [copies[b"proc"] + p for p in PROC] + [copies[b"sys"] + p for p in SYS]
        return watching(where, paths, rounds)

    removed, _, opened = box.attack(context, attack)
    assert opened > 0
    if box.decides:
        assert removed == rounds_in(context) // 3 * 6


@pytest.mark.parametrize("fstype", [b"proc", b"sysfs"])
def test_while_a_new_one_is_mounted(box: Box, context: str, fstype: bytes) -> None:
    def attack(where: Where) -> tuple[int, int, int]:
        new = where.work(b"new")

        def rounds() -> int:
            mounted = 0
            for _ in range(rounds_in(context)):
                mounted += try_mount(b"x", new, fstype) == 0
                _clear(new)
            return mounted

        return watching(where, [new + p for p in (PROC if fstype == b"proc" else SYS)], rounds)

    mounted, _, opened = box.attack(context, attack)
    if box.decides and context != "nested":
        assert mounted == rounds_in(context)
        assert opened > 0


@pytest.mark.parametrize("source", [b"proc", b"sys"])
def test_while_a_base_is_bound(box: Box, context: str, source: bytes) -> None:
    def attack(where: Where) -> tuple[int, int, int]:
        new = where.work(b"new")

        def rounds() -> int:
            bound = 0
            for _ in range(rounds_in(context)):
                bound += try_mount(where.path(source), new, None, MountFlag.MS_BIND) == 0
                _clear(new)
            return bound

        return watching(where, [new + p for p in (PROC if source == b"proc" else SYS)], rounds)

    bound, _, opened = box.attack(context, attack)
    if box.decides:
        assert bound == rounds_in(context)
        assert opened > 0


def test_from_a_namespace_that_receives_all_of_it(box: Box) -> None:
    def attack(where: Where) -> tuple[int, int, int]:
        copy = where.work(b"copy")
        propagation(b"/", MountFlag.MS_SHARED, recursive=True)
        argv = ["/tools/race", "watch", "--", *((copy + p).decode() for p in PROC)]
        pipe = subprocess.PIPE
        with subprocess.Popen(
            argv, stdin=pipe, stdout=pipe, preexec_fn=lambda: unshare(CLONE_NEWNS)
        ) as watcher:
            assert watcher.stdout is not None
            assert watcher.stdout.readline() == b"ready\n"
            for _ in range(ROUNDS):
                rbind(b"/proc", copy)
                try_umount(copy + b"/sys")
                try_umount(copy)
                _clear(copy)
            out, _ = watcher.communicate()
        done, raw, opened = (int(word) for word in out.split()[-3:])
        return done, raw, opened

    _, raw, opened = box.attack("plain", attack)
    assert raw == 0
    assert opened > 0
