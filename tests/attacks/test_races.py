"""What a call is about changes while it is being looked at: 10,000 tries of each, 100,000 with INTERCEPTOR_LONG=1.

INTERCEPTOR_TRIES sets how many, for every guard in every place.
"""

from __future__ import annotations

import os
import subprocess

import pytest

from interceptor.kernel.flags import MountFlag
from tests.attacks.conftest import Box
from tests.attacks.contexts import WORK, Where, propagation, rbind, tmpfs

LONG = os.environ.get("INTERCEPTOR_LONG") == "1"
#: Where a guard decides, in the place where the container starts; `integration/check --long` makes more, everywhere.
TRIES = 10_000
#: What by another process makes mounts, and so waits for the kernel a millisecond each time or more.
SLOW_TRIES = 1_000
#: The kernel's answer to a race does not depend on where it is run, so most of it is run once; and what a guard that
#: decides nothing lets through is the kernel's own.
UNDECIDED, ELSEWHERE = 5, 100
ASKED = int(os.environ.get("INTERCEPTOR_TRIES", "0"))
SECONDS = 7200.0 if LONG or ASKED else 300.0
SLOW = ("bind", "procfs", "swap")
SENTINELS = (b"proc/sys/kernel/hostname", b"proc/uptime", b"sys/kernel", b"sys/devices/virtual")


def race(where: Where, *words: bytes, watched: tuple[bytes, ...] = ()) -> tuple[int, int, int]:
    """Tries done, raw nodes seen, and how often a watched path could be opened."""
    argv = [where.path(b"tools/race"), *words, b"--", *(where.path(s) for s in SENTINELS), *watched]
    # In the chroot it runs where the relative paths start, and makes no other use of them.
    done = subprocess.run(argv, check=True, capture_output=True)
    count, raw, opened = (int(word) for word in done.stdout.split())
    assert raw == 0, done.stderr[-2000:]
    return count, raw, opened


def tries(box: Box, context: str = "plain", normal: int = TRIES) -> int:
    """How often."""
    if ASKED:
        return ASKED
    if LONG:
        return 100_000 if context == "plain" else 10_000
    if context != "plain":
        return ELSEWHERE
    return normal if box.decides else normal // UNDECIDED


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
        words = (b"memory", what.encode(), b"%d" % tries(box, context), harmless, source, source)
        return race(where, *words, watched=(where.path(b"target/virtual"),))

    judge(box.attack(context, attack, SECONDS), tries(box, context))


@pytest.mark.parametrize("what", ["umount", "detach", "bind"])
def test_parent_directory(box: Box, context: str, what: str) -> None:
    def attack(where: Where) -> tuple[int, int, int]:
        one, two = where.work(b"one"), where.path(b"run/spot/two")
        os.makedirs(one + b"/sys")
        # As a link it is resolved where it stands.
        os.symlink(b"../../proc", two)
        _target(where)
        return race(where, b"parent", what.encode(), b"%d" % tries(box, context), one, two, one + b"/sys")

    judge(box.attack(context, attack, SECONDS), tries(box, context))


@pytest.mark.parametrize("what", ["umount", "detach", "bind"])
def test_descriptor_number(box: Box, context: str, what: str) -> None:
    def attack(where: Where) -> tuple[int, int, int]:
        one, two = where.work(b"one"), where.path(b"sys/devices" if what == "bind" else b"proc/sys")
        _target(where)
        number = where.path(b"proc/self/fd/77")
        return race(where, b"number", what.encode(), b"%d" % tries(box, context), one, two, number)

    judge(box.attack(context, attack, SECONDS), tries(box, context))


def test_filesystem_type(box: Box) -> None:
    def attack(where: Where) -> tuple[int, int, int]:
        target = where.work(b"new")
        return race(
            where,
            b"fstype",
            b"%d" % tries(box),
            target,
            watched=(target + b"/sys", target + b"/kernel"),
        )

    judge(box.attack("plain", attack, SECONDS), tries(box))


def test_target_of_a_new_procfs(box: Box) -> None:
    def attack(where: Where) -> tuple[int, int, int]:
        one, two = where.work(b"one"), where.work(b"two")
        words = (b"memory", b"procfs", b"%d" % tries(box), one, two, one)
        return race(where, *words, watched=(one + b"/sys", two + b"/sys"))

    judge(box.attack("plain", attack, SECONDS), tries(box))


# ---- by other processes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["umount", "detach", "bind", "move"])
def test_argument_memory_from_another_process(box: Box, what: str) -> None:
    count = tries(box, normal=SLOW_TRIES if what in SLOW else TRIES)

    def attack(where: Where) -> tuple[int, int, int]:
        source = b"/sys/devices" if what == "bind" else b"/proc/sys"
        harmless = where.work(b"harmless")
        _target(where)
        words = (b"outside", what.encode(), b"%d" % count, harmless, source, source)
        return race(where, *words, watched=(b"/target/virtual",))

    judge(box.attack("plain", attack, SECONDS), count)


@pytest.mark.parametrize("what", ["umount", "detach", "bind"])
def test_parent_directory_from_another_mount_namespace(box: Box, what: str) -> None:
    count = tries(box, normal=SLOW_TRIES if what in SLOW else TRIES)

    def attack(where: Where) -> tuple[int, int, int]:
        one, two = where.work(b"one"), where.path(WORK + b"/two")
        os.makedirs(one + b"/sys")
        os.symlink(b"../../proc", two)
        _target(where)
        return race(where, b"peer", what.encode(), b"%d" % count, one, two, one + b"/sys")

    judge(box.attack("plain", attack, SECONDS), count)


@pytest.mark.parametrize("what", ["umount", "detach", "bind", "procfs"])
def test_root_and_working_directory_shared_with_a_sibling(box: Box, what: str) -> None:
    """It is a thread: they share an fs_struct, in which it calls chroot and fchdir (and setns, which is refused)."""

    count = tries(box, normal=SLOW_TRIES if what in SLOW else TRIES)

    def attack(where: Where) -> tuple[int, int, int]:
        one = where.work(b"one")
        for name in (b"/proc/sys", b"/target", b"/proc/self/ns"):
            os.makedirs(one + name)
        _target(where)
        path = {"bind": b"/proc", "procfs": b"/target"}.get(what, b"/proc/sys")
        watched = (b"/target/sys", one + b"/target/sys")
        return race(where, b"root", what.encode(), b"%d" % count, one, path, watched=watched)

    judge(box.attack("plain", attack, SECONDS), count)


@pytest.mark.parametrize("what", ["umount", "detach", "bind", "procfs", "swap"])
def test_a_caller_that_is_killed_and_its_thread_id_taken(box: Box, what: str) -> None:
    count = tries(box, normal=SLOW_TRIES if what in SLOW else TRIES)

    def attack(where: Where) -> tuple[int, int, int]:
        new = where.work(b"new")
        _target(where)
        path = {"bind": b"/proc", "swap": b"/proc", "procfs": new}.get(what, where.path(WORK + b"/copy/sys"))
        watched = (b"/target/sys", new + b"/sys", where.path(WORK + b"/copy/sys"))
        return race(where, b"kill", what.encode(), b"%d" % count, path, watched=watched)

    judge(box.attack("plain", attack, SECONDS), count)


def test_two_namespaces_that_ask_for_the_same_covers_at_once(box: Box) -> None:
    count = tries(box, normal=SLOW_TRIES)

    def attack(where: Where) -> tuple[int, int, int]:
        work = where.work(b"twins")
        tmpfs(work)
        propagation(work, MountFlag.MS_SHARED)
        copy = work + b"/copy"
        os.mkdir(copy)
        watched = (copy + b"/sys", copy + b"/uptime", copy + b"/swaps")
        return race(where, b"twins", b"%d" % count, b"/proc", copy, watched=watched)

    judge(box.attack("plain", attack, SECONDS), count)


def _target(where: Where) -> None:
    """The directory "target" of the racer's working directory, on a mount of the attacker's own."""
    place = where.path(b"target")
    os.makedirs(place, exist_ok=True)
    tmpfs(place)
    rbind(where.path(b"proc"), where.work(b"copy"))
    if where.root:
        os.chdir(where.root)
