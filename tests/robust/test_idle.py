"""Nothing polls, and a guard is small."""

from __future__ import annotations

import select
import signal
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from interceptor.library import GuardedChild, Interceptor
from tests.robust import support
from tests.robust.support import Truth

pytestmark = pytest.mark.root

CONTAINERS = 10
SECONDS = 10
GUARD_PRIVATE_KIB_MAX = 500
ENVOY_PRIVATE_KIB_MAX = 120


@pytest.mark.slow
def test_nobody_makes_a_system_call_while_ten_containers_idle(daemon: Interceptor, tmp_path: Path) -> None:
    with ExitStack() as stack:
        children = [stack.enter_context(daemon.spawn()) for _ in range(CONTAINERS)]
        for child in children:
            # Everybody has been at work before: the guard, the daemon, the view and the envoy.
            assert child.run(["mount", "-t", "proc", "x", "/mnt"]).returncode == 0
            assert child.run(["cat", "/proc/uptime", "/mnt/sys/kernel/hostname"]).returncode == 0
        who = support.family(daemon)
        assert (len(who.guards), len(who.envoys)) == (CONTAINERS, CONTAINERS)
        daemon.request("ps")
        # What was welded last goes a moment later, once: that is not polling.
        support.holdings(daemon)
        log = tmp_path / "strace"
        pids = [word for pid in who.all for word in ("-p", str(pid))]
        with subprocess.Popen(
            ["strace", "-f", "-ttt", "-o", str(log), *pids], stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
        ) as tracer:
            assert tracer.stderr is not None
            for _ in who.all:
                assert b"attached" in tracer.stderr.readline()
            # A measured interval, not a wait for something: nothing must happen in it.
            select.select([], [], [], SECONDS)
            lines = log.read_text(errors="replace").splitlines()
            tracer.send_signal(signal.SIGINT)
            tracer.stderr.read()
    # strace shows the call in which it found each thread. A second line of a thread is the end of that call.
    first = {line.split()[0]: line for line in lines}
    assert len(first) >= len(who.all)
    assert len(lines) == len(first), "\n".join(lines)


def _private_kib(pid: int) -> int:
    rows = [line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()]
    return sum(int(row[1]) for row in rows if row[0] in ("Private_Clean:", "Private_Dirty:"))


def test_a_guard_has_less_than_half_a_megabyte_of_its_own(daemon: Interceptor, child: GuardedChild) -> None:
    def calls() -> Truth:
        truth = Truth()
        truth.prepare()
        while truth.calls < 1000:
            truth.round()
        return truth

    truth = child.run(calls).value
    assert isinstance(truth, Truth)
    assert truth.wrong == []
    private = _private_kib(support.guard_pid(daemon, child.cid))
    print(f"private memory of a guard after {truth.calls} calls: {private} KiB")
    assert private <= GUARD_PRIVATE_KIB_MAX


def test_an_envoy_has_next_to_nothing_of_its_own(daemon: Interceptor, child: GuardedChild) -> None:
    assert child.run(["cat", "/proc/uptime", "/proc/sys/kernel/hostname"]).returncode == 0
    (envoy,) = support.family(daemon).envoys
    assert _private_kib(envoy) <= ENVOY_PRIVATE_KIB_MAX


def test_a_killed_nursery_is_replaced_when_it_is_needed(daemon: Interceptor, child: GuardedChild) -> None:
    who = support.family(daemon)
    support.kill(who.nursery)
    # Those that were forked from it go on.
    assert child.run(["umount", "-l", "/proc"]).returncode == 32
    with daemon.spawn() as other:
        assert other.run(["umount", "-l", "/proc"]).returncode == 32
    assert support.family(daemon).nursery != who.nursery
