"""What a call is about changes while it is being looked at: 10,000 tries of each."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.attacks.conftest import Box
from tests.attacks.contexts import Where, rbind, tmpfs

LONG = os.environ.get("INTERCEPTOR_LONG") == "1"
#: Binds take a tenth of a second a hundred; `integration/check --long` makes 10,000 of each, everywhere.
TRIES = {"detach": 10_000, "fstype": 10_000, "umount": 1_000, "move": 1_000, "bind": 500, "procfs": 200}
ELSEWHERE = 100
SENTINELS = (b"proc/sys/kernel/hostname", b"proc/uptime", b"sys/kernel", b"sys/devices/virtual")


def race(where: Where, *words: bytes, watched: tuple[bytes, ...] = ()) -> tuple[int, int, int]:
    """Tries done, raw nodes seen, and how often a watched path could be opened."""
    argv = [where.path(b"tools/race"), *words, b"--", *(where.path(s) for s in SENTINELS), *watched]
    # In the chroot it runs where the relative paths start, and makes no other use of them.
    done = subprocess.run(argv, check=True, capture_output=True)
    count, raw, opened = (int(word) for word in done.stdout.split())
    assert raw == 0, done.stderr[-2000:]
    return count, raw, opened


def tries(context: str, what: str) -> int:
    """How often: the kernel's answer to a race does not depend on where it is run, so most of it is run once."""
    if LONG:
        return 10_000
    return TRIES[what] if context == "plain" else ELSEWHERE


def judge(result: tuple[int, int, int], expected: int) -> None:
    done, raw, opened = result
    assert (done, raw) == (expected, 0)
    assert opened > 0, "nobody looked"


@pytest.mark.parametrize("what", ["umount", "detach", "bind", "move"])
def test_argument_memory(box: Box, context: str, what: str) -> None:
    def attack(where: Where) -> tuple[int, int, int]:
        source = where.path(b"sys/devices" if what == "bind" else b"proc/sys")
        harmless = where.work(b"harmless")
        _target(where)
        words = (b"memory", what.encode(), b"%d" % tries(context, what), harmless, source, source)
        return race(where, *words, watched=(where.path(b"target/virtual"),))

    judge(box.attack(context, attack), tries(context, what))


@pytest.mark.parametrize("what", ["umount", "detach", "bind"])
def test_parent_directory(box: Box, context: str, what: str) -> None:
    def attack(where: Where) -> tuple[int, int, int]:
        one, two = where.work(b"one"), where.path(b"run/spot/two")
        os.makedirs(one + b"/sys")
        # As a link it is resolved where it stands.
        os.symlink(b"../../proc", two)
        _target(where)
        return race(where, b"parent", what.encode(), b"%d" % tries(context, what), one, two, one + b"/sys")

    judge(box.attack(context, attack), tries(context, what))


@pytest.mark.parametrize("what", ["umount", "detach", "bind"])
def test_descriptor_number(box: Box, context: str, what: str) -> None:
    def attack(where: Where) -> tuple[int, int, int]:
        one, two = where.work(b"one"), where.path(b"sys/devices" if what == "bind" else b"proc/sys")
        _target(where)
        number = where.path(b"proc/self/fd/77")
        return race(where, b"number", what.encode(), b"%d" % tries(context, what), one, two, number)

    judge(box.attack(context, attack), tries(context, what))


def test_filesystem_type(box: Box) -> None:
    def attack(where: Where) -> tuple[int, int, int]:
        target = where.work(b"new")
        return race(
            where,
            b"fstype",
            b"%d" % tries("plain", "fstype"),
            target,
            watched=(target + b"/sys", target + b"/kernel"),
        )

    judge(box.attack("plain", attack), tries("plain", "fstype"))


def test_target_of_a_new_procfs(box: Box) -> None:
    def attack(where: Where) -> tuple[int, int, int]:
        one, two = where.work(b"one"), where.work(b"two")
        words = (b"memory", b"procfs", b"%d" % tries("plain", "procfs"), one, two, one)
        return race(where, *words, watched=(one + b"/sys", two + b"/sys"))

    judge(box.attack("plain", attack), tries("plain", "procfs"))


def _target(where: Where) -> None:
    """The directory "target" of the racer's working directory, on a mount of the attacker's own."""
    place = where.path(b"target")
    os.makedirs(place, exist_ok=True)
    tmpfs(place)
    rbind(where.path(b"proc"), where.work(b"copy"))
    if where.root:
        os.chdir(where.root)
