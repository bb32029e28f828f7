"""kill -9 of the guard, of the daemon, of both: every call gets its true answer."""

from __future__ import annotations

import os
import random
import time

import pytest

from interceptor.library import GuardedChild, Interceptor
from tests.robust import support
from tests.robust.support import PATIENCE, Truth, eventually, guard_pid, kill, pipe

pytestmark = pytest.mark.root

#: Fewer than what makes the daemon give a guard up (interceptor/guards/supervise.py).
KILLS_A_CONTAINER = 16


def _spin(seconds: float) -> None:
    """Let pass a time too short to sleep: where in a call the kill hits is to be any place."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def _kill_guard(daemon: Interceptor, child: GuardedChild) -> None:
    old = guard_pid(daemon, child.cid)
    kill(old)
    eventually(lambda: guard_pid(daemon, child.cid) not in (0, old), "a new guard")


@pytest.mark.slow
@pytest.mark.parametrize("wait_killable", [True, False])
def test_every_call_gets_its_true_answer_while_guards_are_killed(
    daemon: Interceptor, wait_killable: bool
) -> None:
    chance = random.Random(wait_killable)
    for _ in range(6):
        with daemon.spawn(wait_killable=wait_killable) as child, pipe() as (progress, theirs):
            process = child.start(support.rounds_until_eof, theirs, pass_fds=[theirs])
            os.close(theirs)
            for _ in range(KILLS_A_CONTAINER):
                os.read(progress, 1 << 16)
                assert os.read(progress, 1), "the container ended"
                _spin(chance.uniform(0, 0.0015))
                _kill_guard(daemon, child)
            os.close(progress)
            truth = process.wait(PATIENCE).value
            assert isinstance(truth, Truth)
            assert truth.wrong == []
            assert truth.calls > KILLS_A_CONTAINER
