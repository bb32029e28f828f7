"""Lazy unmounts while a descriptor is held: what it leads to stays covered."""

from __future__ import annotations

import os
import subprocess

from interceptor.kernel import mount as km
from interceptor.kernel.fd import OwnedFd
from interceptor.kernel.flags import AT_FDCWD, UmountFlag
from tests.attacks.conftest import Box
from tests.attacks.contexts import Where, rbind
from tests.guarded import errno_of, mount_id_at, raw_below, try_umount

LAZY = UmountFlag.MNT_DETACH
SUBMOUNTS = {b"proc": (b"sys", b"uptime"), b"sys": (b"kernel", b"devices/virtual")}


def _raw(held: dict[bytes, int]) -> list[bytes]:
    """Also after a step down and up again, and with the directory as working directory and as root."""
    found = [path for fd in held.values() for path in raw_below(b".", fd)]
    for base, deeper in ((b"proc", b"fs/.."), (b"sys", b"devices/..")):
        if base in held:
            found += raw_below(deeper, held[base])
    return found


def test_of_originals(box: Box, context: str) -> None:
    def attack(where: Where) -> list[bytes]:
        held = {name: os.open(where.path(name), os.O_PATH | os.O_CLOEXEC) for name in SUBMOUNTS}
        found = []
        for name, below in SUBMOUNTS.items():
            for path in (*(name + b"/" + b for b in below), name):
                try_umount(where.path(path), LAZY)
                found += _raw(held)
        return found

    assert box.attack(context, attack) == []


def test_of_copies(box: Box, context: str) -> None:
    def attack(where: Where) -> tuple[list[bytes], list[int]]:
        found, results = [], []
        for name, below in SUBMOUNTS.items():
            copy = where.work(b"copy-" + name)
            rbind(where.path(name), copy)
            first = os.open(copy, os.O_PATH | os.O_CLOEXEC)
            for path in below:
                gone = mount_id_at(copy + b"/" + path)
                results.append(try_umount(copy + b"/" + path, LAZY))
                if results[-1] == 0 and box.decides:
                    assert mount_id_at(copy + b"/" + path) != gone
                found += _raw({name: first}) + raw_below(copy)
            second = os.open(copy, os.O_PATH | os.O_CLOEXEC)
            results.append(try_umount(copy, LAZY))
            found += _raw({name: first}) + _raw({name: second})
        return found, results

    raw, results = box.attack(context, attack)
    assert raw == []
    if box.decides:
        assert set(results) == {0}


def test_of_what_contains_a_copy(box: Box, context: str) -> None:
    def attack(where: Where) -> list[bytes]:
        copy = where.work(b"root")
        rbind(where.path(b"") or b".", copy)
        held = {n: os.open(copy + b"/" + n, os.O_PATH | os.O_CLOEXEC) for n in SUBMOUNTS}
        above = os.open(copy, os.O_PATH | os.O_CLOEXEC)
        try_umount(copy, LAZY)
        # Bases are not locked to what they stood on: of the root itself only an empty directory is left.
        return _raw(held) + raw_below(b"proc", above) + raw_below(b"sys", above)

    assert box.attack(context, attack) == []


def test_of_detached_trees(box: Box, context: str) -> None:
    def attack(where: Where) -> tuple[list[bytes], set[int]]:
        found, results = [], set()
        for name, below in SUBMOUNTS.items():
            with km.clone_mount(AT_FDCWD, where.path(name), recursive=True) as tree:
                held = os.open(".", os.O_PATH | os.O_CLOEXEC, dir_fd=tree.fileno())
                results.add(errno_of(km.clone_mount, tree))
                for path in below:
                    results.add(errno_of(km.move_mount, tree, path, AT_FDCWD, where.work(b"x"), 0))
                found += _raw({name: held})
            found += _raw({name: held})
        return found, results

    raw, results = box.attack(context, attack)
    assert raw == []
    # What a guard that decides at random says is no evidence.
    assert 0 not in results or box.mode != "continue"


def test_by_a_chroot_into_the_copy(box: Box) -> None:
    def attack(where: Where) -> list[bytes]:
        copy = where.work(b"copy")
        rbind(b"/proc", copy)
        with OwnedFd(os.open(copy, os.O_PATH | os.O_CLOEXEC)) as fd:
            os.fchdir(fd.fileno())
            subprocess.run(["/usr/bin/umount", "-l", copy], check=False, capture_output=True)
            os.chroot(".")
            return raw_below(b"") + raw_below(b"/") + raw_below(b"/../..") + raw_below(b"..")

    assert box.attack("plain", attack) == []
