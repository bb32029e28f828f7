"""What a call is about changes while it is being looked at: 10,000 tries of each."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.attacks.conftest import Box
from tests.attacks.contexts import Where, rbind, tmpfs

TRIES = 10_000
SENTINELS = (b"proc/sys/kernel/hostname", b"proc/uptime", b"sys/kernel", b"sys/devices/virtual")


def race(where: Where, *words: bytes, watched: tuple[bytes, ...] = ()) -> tuple[int, int, int]:
    """Tries done, raw nodes seen, and how often a watched path could be opened."""
    argv = [where.path(b"tools/race"), *words, b"--", *(where.path(s) for s in SENTINELS), *watched]
    # In the chroot it runs where the relative paths start, and makes no other use of them.
    done = subprocess.run(argv, check=True, capture_output=True)
    tries, raw, opened = (int(word) for word in done.stdout.split())
    assert raw == 0, done.stderr[-2000:]
    return tries, raw, opened


def judge(result: tuple[int, int, int]) -> None:
    tries, raw, opened = result
    assert (tries, raw) == (TRIES, 0)
    assert opened > 0, "nobody looked"


@pytest.mark.parametrize("what", ["umount", "detach", "bind", "move"])
def test_argument_memory(box: Box, context: str, what: str) -> None:
    def attack(where: Where) -> tuple[int, int, int]:
        source = where.path(b"sys/devices" if what == "bind" else b"proc/sys")
        harmless = where.work(b"harmless")
        _target(where)
        words = (b"memory", what.encode(), b"%d" % TRIES, harmless, source, source)
        return race(where, *words, watched=(where.path(b"target/virtual"),))

    judge(box.attack(context, attack))


@pytest.mark.parametrize("what", ["umount", "detach", "bind"])
def test_parent_directory(box: Box, context: str, what: str) -> None:
    def attack(where: Where) -> tuple[int, int, int]:
        one, two = where.work(b"one"), where.path(b"run/work/two")
        os.makedirs(one + b"/sys")
        # As a link it is resolved where it stands: relative to the directory that it is in.
        os.symlink(os.path.relpath(where.path(b"proc"), os.path.dirname(two)), two)
        _target(where)
        return race(where, b"parent", what.encode(), b"%d" % TRIES, one, two, one + b"/sys")

    judge(box.attack(context, attack))


@pytest.mark.parametrize("what", ["umount", "detach", "bind"])
def test_descriptor_number(box: Box, context: str, what: str) -> None:
    def attack(where: Where) -> tuple[int, int, int]:
        one, two = where.work(b"one"), where.path(b"sys/devices" if what == "bind" else b"proc/sys")
        _target(where)
        number = where.path(b"proc/self/fd/77")
        return race(where, b"number", what.encode(), b"%d" % TRIES, one, two, number)

    judge(box.attack(context, attack))


def test_filesystem_type(box: Box) -> None:
    def attack(where: Where) -> tuple[int, int, int]:
        target = where.work(b"new")
        return race(where, b"fstype", b"%d" % TRIES, target, watched=(target + b"/sys", target + b"/kernel"))

    judge(box.attack("plain", attack))


def test_target_of_a_new_procfs(box: Box) -> None:
    def attack(where: Where) -> tuple[int, int, int]:
        one, two = where.work(b"one"), where.work(b"two")
        words = (b"memory", b"procfs", b"1000", one, two, one)
        return race(where, *words, watched=(one + b"/sys", two + b"/sys"))

    tries, _, opened = box.attack("plain", attack)
    assert tries == 1000
    assert opened > 0


def _target(where: Where) -> None:
    """The directory "target" of the racer's working directory, on a mount of the attacker's own."""
    place = where.path(b"target")
    os.makedirs(place, exist_ok=True)
    tmpfs(place)
    rbind(where.path(b"proc"), where.work(b"copy"))
    if where.root:
        os.chdir(where.root)
