"""No reveal, originals stay, copies go: by search. `python -m tests.search` does the same for longer, and replays."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from interceptor.kernel.flags import MountFlag as M
from tests import guarded
from tests.search.arena import Arena, arena
from tests.search.program import Op, Program, Step, Walk
from tests.search.search import Failure, report, search

pytestmark = pytest.mark.root

LONG = os.environ.get("INTERCEPTOR_LONG") == "1"
#: Steps under each of the three guards: 5,000 in all, and a million in `integration/check --long`.
STEPS = 333_334 if LONG else 1_700
ROUND = 250 if LONG else 20
RBIND = M.MS_BIND | M.MS_REC


@pytest.fixture(params=guarded.MODES)
def place(request: pytest.FixtureRequest) -> Iterator[Arena]:
    """A container under each kind of guard."""
    with arena(request.param) as made:
        yield made


@pytest.fixture
def real() -> Iterator[Arena]:
    """A container under a guard that decides."""
    with arena("real") as made:
        yield made


def test_random_programs(place: Arena, tmp_path_factory: pytest.TempPathFactory) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    while place.totals.steps < STEPS:
        print(f"guard {place.mode}, seed {seed}: {place.totals}")
        try:
            search(place, seed, ROUND)
        except Failure as failure:
            pytest.fail(report(failure, tmp_path_factory.getbasetemp(), seed))
        seed += 1
    print(place.totals)
    assert place.totals.looks > place.totals.steps, "nobody looked"
    done = place.totals.succeeded
    assert all(
        done[op.name] for op in (Op.MOUNT, Op.UMOUNT, Op.OPEN_TREE, Op.UNSHARE, Op.PIVOT_ROOT, Op.CHROOT)
    )
    if place.mode == "real":
        assert place.totals.walks > 0
        assert place.totals.copies > 0


def mount(source: str, target: str, flags: int = RBIND, worker: int = 0, fstype: str = "") -> Step:
    return Step(Op.MOUNT, worker, (flags,), (source, target, fstype))


@pytest.mark.parametrize("own_namespace", [True, False])
@pytest.mark.parametrize("walk", [Walk.DEEPEST_FIRST, Walk.PARENTS_FIRST])
def test_copies_of_all_kinds_go(real: Arena, walk: Walk, own_namespace: bool) -> None:
    steps = (
        mount("/", "/run/w/a"),
        mount("/proc", "/run/w/b", M.MS_BIND),
        mount("/sys/devices", "/run/w/c", M.MS_BIND),
        mount("x", "/run/w/p/x", 0, fstype="sysfs"),
        mount("/run/w/a", "/run/w/a/run/w/q/x"),
        mount("x", "/run/w/b/1", 0, fstype="tmpfs"),
        Step(Op.UMOUNT, 0, (0,), ("/run/w/a/proc/uptime",)),
        Step(Op.UMOUNT, 1, (8,), ("/run/w/c/virtual",)),
        mount("/proc", "/proc"),
    )
    outcome = real.run(Program(steps, own_namespace, walk))
    assert not outcome.wrong
    assert outcome.errors[:5] == (0,) * 5
    assert outcome.errors[6:] == (0,) * 3
    assert outcome.before > 70
    assert outcome.left == 0
    assert outcome.calls <= outcome.before**2


# ---- whether the search would find anything -----------------------------------------------------------------


@pytest.mark.parametrize("step", [
    Step(Op.OPEN, 0, (0, 0x200000), ("/sys/class",)),
    Step(Op.CHDIR, 0, (), ("/sys/class/net",)),
    mount("/sys/class", "/run/w/a"),
    mount("/", "/run/w/a"),
])  # fmt: skip
def test_what_nobody_may_reach_is_found_by_path_and_descriptor(step: Step) -> None:
    """One node more than the covered ones is declared to be such, and it can be reached."""
    with arena("real", forbidden=["/sys/class"]) as place:
        looking = [Step(Op.OPEN, 1, (1, 0x200000), ("/run/w/a/sys/class",))] * 20
        outcome = place.run(Program((step, *looking)))
    assert "raw: " in outcome.wrong


def test_a_finding_is_made_small_and_can_be_repeated(tmp_path: Path) -> None:
    with arena("continue", forbidden=["/sys/devices", "/sys/fs"]) as place:
        with pytest.raises(Failure) as caught:
            for seed in range(10):
                search(place, seed, 20)
        program = caught.value.program
        assert len(program.steps) <= 3, program
        text = report(caught.value, tmp_path, 1)
        path = tmp_path / "search-continue-1.json"
        assert str(path) in text
        assert Program.load(path) == program
        assert any("raw: " in place.run(Program.load(path)).wrong for _ in range(50))


def test_a_lost_flag_and_a_lost_original_are_found() -> None:
    """What a container without any guard may do to its first mounts is no secret to the engine."""
    with arena("continue") as place:
        outcome = place.run(Program((Step(Op.UMOUNT, 0, (2,), ("/proc",)),), own_namespace=False))
        assert outcome.errors == (0,)
        assert outcome.dirty
        assert not outcome.wrong, "whole, the base may be lost"
    with arena("continue") as place:
        place.mode = "real"
        outcome = place.run(Program((Step(Op.UMOUNT, 0, (2,), ("/proc",)),), own_namespace=False))
    assert "the original /proc is gone" in outcome.wrong
