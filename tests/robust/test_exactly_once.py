"""
Without WAIT_KILLABLE_RECV a signal breaks a trapped call off, and it is notified again: it must count once (I6).

Of a listener that is not WAIT_KILLABLE_RECV the kernel throws a reply away that meets the caller between the signal and
the end of its wait, and reports it as sent: nothing can be seen of that from outside (kernel/seccomp.c), and the call
that is made again then cannot be told from the thread's next one. `native/guard.c:await_sleep` makes that rare; here it
is held to THROWN_AWAY. With WAIT_KILLABLE_RECV, and on a listener without signals, there is no such thing.
"""

from __future__ import annotations

import ctypes
import errno
import os
import random
import signal
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import pytest

from interceptor.kernel import mount as km
from interceptor.kernel.flags import CLONE_NEWNS
from interceptor.kernel.namespaces import unshare
from interceptor.library import Interceptor
from tests import guarded as inside
from tests.robust import support
from tests.robust.support import COPY, MNT_DETACH, MS_BIND, NEW, Truth, stack_at

pytestmark = [pytest.mark.root, pytest.mark.slow]

T = TypeVar("T")

#: Replies of one run that the kernel may throw away; about one in 50,000 handled calls under INTERVAL is. If it were
#: ours, it would be each of the hundred or more that come too late.
THROWN_AWAY = 1

#: Handled calls of each run.
CALLS = 2000

#: Seconds between two signals: about as long as a handled call takes, so that they hit any part of one.
INTERVAL = 0.001


#: personality(2): uname(2) says 2.6.N to this process and all that it starts.
_UNAME26 = 0x0020000


def _personality(persona: int) -> int:
    """Sets this process's; returns what it was."""
    former: int = ctypes.CDLL(None).personality(persona)
    return former


def _again(call: Callable[[], T]) -> T:
    """A call that is made again while a signal breaks it off."""
    while True:
        try:
            return call()
        except OSError as error:
            if error.errno != errno.EINTR:
                raise


def _by_descriptors(truth: Truth) -> None:
    """A new procfs by fsopen, fsmount and move_mount, each of which is trapped."""
    try:
        with _again(lambda: km.fsopen(b"proc")) as context:
            km.fsconfig(context, 6)
            with _again(lambda: km.fsmount(context)) as tree:
                truth.comes("move_mount", NEW, lambda: inside.errno_of(km.attach, tree, km.AT_FDCWD, NEW))
        truth.goes("umount of what was moved there", NEW, lambda: inside.try_umount(NEW))
        with _again(lambda: km.clone_mount(km.AT_FDCWD, b"/proc")) as tree:
            truth.comes(
                "move_mount of a clone", NEW, lambda: inside.errno_of(km.attach, tree, km.AT_FDCWD, NEW)
            )
        truth.goes("umount of a clone", NEW, lambda: inside.try_umount(NEW))
    except OSError as error:
        truth.wrong.append(f"call {truth.calls}: {error}")
    truth.calls += 3


#: Calls of each kind of mixed run; 20,000 for all of them, or for each in the long run.
MIXED = 20000 if os.environ.get("INTERCEPTOR_LONG") == "1" else 5000


def _round(truth: Truth) -> None:
    truth.new()
    truth.bind()


def _mixed_round(truth: Truth) -> None:
    """What a container does all day: refused, let through, and handled calls of every kind."""
    truth.round()
    truth.new(b"sysfs")
    for _ in range(10):
        truth.denied()
        truth.free()


def _under_signals(
    restart: bool, calls: int, a_round: Callable[[Truth], None] = _round, *, killable: bool = False
) -> Truth:
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.siginterrupt(signal.SIGALRM, not restart)
    truth = Truth(twice=None if killable else [])
    truth.prepare()
    before, originals, opened = support.table(), inside.originals(), support.descriptors(os.getpid())
    signal.setitimer(signal.ITIMER_REAL, INTERVAL, INTERVAL)
    try:
        while truth.calls < calls and len(truth.wrong) < 20:
            a_round(truth)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if support.table() != before:
        truth.wrong.append(f"the mount table differs: {set(support.table()) ^ set(before)}")
    if support.descriptors(os.getpid()) != opened:
        truth.wrong.append(f"{opened} descriptors before, {support.descriptors(os.getpid())} now")
    if inside.originals() != originals:
        truth.wrong.append("the originals are not the same")
    truth.note = support.nothing
    return truth


@pytest.mark.parametrize("by_descriptors", [False, True], ids=["mount", "move_mount"])
@pytest.mark.parametrize("restart", [True, False], ids=["SA_RESTART", "EINTR"])
def test_a_call_under_a_storm_of_signals_counts_once(
    daemon: Interceptor, restart: bool, by_descriptors: bool
) -> None:
    with daemon.spawn(wait_killable=False) as child:
        calls = CALLS // 2 if by_descriptors else CALLS
        a_round = _by_descriptors if by_descriptors else _round
        truth = child.run(_under_signals, restart, calls, a_round, timeout=120).value
        assert isinstance(truth, Truth)
        stats = daemon.request("stats", id=child.cid)
        print(
            f"{truth.calls} calls, {truth.interrupted} of them EINTR, {stats['lost']} replies came too late, "
            f"thrown away: {truth.twice}"
        )
        assert truth.wrong == []
        assert len(truth.twice or []) <= THROWN_AWAY, truth.twice
        assert truth.calls >= calls
        # It was tried.
        assert stats["lost"] > 10
        assert by_descriptors or (truth.interrupted > 0) is not restart


@pytest.mark.parametrize("killable", [True, False], ids=["WAIT_KILLABLE_RECV", "interruptible"])
@pytest.mark.parametrize("restart", [True, False], ids=["SA_RESTART", "EINTR"])
def test_of_mixed_calls_under_a_storm_of_signals_each_tells_the_truth(
    daemon: Interceptor, restart: bool, killable: bool
) -> None:
    """As Go programs live, whose runtime preempts threads by a signal."""
    with daemon.spawn(wait_killable=killable) as child:
        truth = child.run(
            partial(_under_signals, killable=killable), restart, MIXED, _mixed_round, timeout=900
        ).value
        assert isinstance(truth, Truth)
        stats = daemon.request("stats", id=child.cid)
        outcomes = {name: stats["latency_us"][name]["count"] for name in ("continued", "denied", "handled")}
        print(f"{truth.calls} calls, {truth.interrupted} EINTR, {stats['lost']} replies too late, {outcomes}")
        assert truth.wrong == []
        assert len(truth.twice or []) <= THROWN_AWAY, truth.twice
        assert truth.calls >= MIXED
        assert outcomes["handled"] > MIXED // 20


def _stacks(depth: int) -> tuple[list[int], int]:
    """Mounts on top of each other with the same call: results, and how many are there."""
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.siginterrupt(signal.SIGALRM, False)
    Truth().prepare()
    signal.setitimer(signal.ITIMER_REAL, INTERVAL, INTERVAL)
    results = [inside.try_mount(b"x", NEW, b"proc") for _ in range(depth)]
    results += [inside.try_mount(b"/proc", COPY, None, MS_BIND) for _ in range(depth)]
    there = len(stack_at(NEW)) + len(stack_at(COPY))
    results += [inside.try_umount(NEW, MNT_DETACH) for _ in range(depth)]
    results += [inside.try_umount(COPY, MNT_DETACH) for _ in range(depth)]
    # Nothing is left of what was made once for each call.
    results += [0 if inside.try_umount(point) == errno.EINVAL else -1 for point in (NEW, COPY)]
    signal.setitimer(signal.ITIMER_REAL, 0)
    return results, there


def test_equal_calls_one_after_the_other_count_each(daemon: Interceptor) -> None:
    """The restart of a call must not be mistaken for the next one, which looks the same."""
    depth = 40
    with daemon.spawn(wait_killable=False) as child:
        for _ in range(4):
            assert child.call(_stacks, depth) == ([0] * (4 * depth + 2), 2 * depth)


#: How often the caller changes namespaces between two tries of the same call.
CHANGES = 400


def _changes_namespaces() -> tuple[int, int, list[str]]:
    """The same mount again and again; whenever a signal breaks it off, from another mount namespace or root."""
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.siginterrupt(signal.SIGALRM, True)
    Truth().prepare()
    wrong: list[str] = []
    changes = calls = 0
    instants = random.Random(7)
    while changes < CHANGES and not wrong:
        # At any instant of a call, which takes a tenth of the interval where what it asks for was made ahead.
        signal.setitimer(signal.ITIMER_REAL, instants.uniform(0.01, 1) * INTERVAL, INTERVAL)
        result = inside.try_mount(b"x", NEW, b"proc")
        calls += 1
        if result == errno.EINTR:
            changes += 1
            _again(lambda: unshare(CLONE_NEWNS))
            if changes % 5 == 0:
                os.chroot("/")
            continue
        signal.setitimer(signal.ITIMER_REAL, 0)
        if result != 0 or not stack_at(NEW):
            wrong.append(f"call {calls}: {result}")
        wrong += [f"call {calls}: raw: {node!r}" for node in (*inside.raw_below(NEW), *inside.raw_nodes())]
        while stack_at(NEW) and inside.try_umount(NEW) == 0:
            pass
    signal.setitimer(signal.ITIMER_REAL, 0)
    return calls, changes, wrong


def test_a_caller_that_changes_namespaces_before_it_calls_again(daemon: Interceptor) -> None:
    """What was made in the old mount namespace is not taken for what is asked for in the new one."""
    with daemon.spawn(wait_killable=False) as child:
        before = child.call(inside.originals)
        calls, changes, wrong = child.call(_changes_namespaces)
        print(f"{calls} calls, {changes} changes of namespace")
        assert (changes, wrong) == (CHANGES, [])
        assert child.call(inside.originals) == before


def _switches() -> int:
    """How often this thread has gone to sleep."""
    with open("/proc/thread-self/status", encoding="ascii", errors="replace") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("voluntary_ctxt_switches"))


def _sleeps_of_an_effect() -> int:
    """How often a caller sleeps while its call is handled: the median of many."""
    Truth().prepare()
    sleeps = []
    for _ in range(41):
        before = _switches()
        assert inside.try_mount(b"x", NEW, b"proc") == 0
        sleeps.append(_switches() - before)
        assert inside.try_umount(NEW, MNT_DETACH) == 0
    return sorted(sleeps)[len(sleeps) // 2]


def test_before_linux_6_17_a_caller_lies_down_anew_before_an_effect(
    leak_check: None, daemon: Interceptor
) -> None:
    """Then only a signal that kills wakes it up, and none meets the reply. The kernel says that it is an older one."""
    release = tuple(int(part) for part in os.uname().release.split(".")[:2])
    with daemon.spawn() as child:
        assert child.call(_sleeps_of_an_effect) == (1 if release >= (6, 17) else 2)
    former = _personality(_UNAME26)
    try:
        with Interceptor(question_timeout=60.0) as old, old.spawn() as child:
            assert child.call(_sleeps_of_an_effect) == 2
            truth = child.run(
                partial(_under_signals, killable=True), False, CALLS, _mixed_round, timeout=120
            ).value
            assert isinstance(truth, Truth)
            assert truth.wrong == []
    finally:
        _personality(former)
