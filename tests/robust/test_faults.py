"""kill -9 of the guard, of the daemon, of both: every call gets its true answer."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import time

import pytest

from interceptor.library import GuardedChild, Interceptor
from interceptor.packets import receive_packet, send_packet
from tests import guarded as inside
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


# ---- the daemon --------------------------------------------------------------------------------------------


def _answers_without_a_daemon(truth: Truth) -> None:
    for _ in range(20):
        truth.denied()
        truth.free()


def test_native_and_cached_answers_go_on_without_a_daemon(daemon: Interceptor, child: GuardedChild) -> None:
    def calls(go: int, said: int) -> list[str]:
        truth = Truth()
        truth.prepare()
        _answers_without_a_daemon(truth)
        os.write(said, b"warm")
        assert os.read(go, 2) == b"go"
        _answers_without_a_daemon(truth)
        return truth.wrong

    with pipe() as (go, order), pipe() as (heard, said):
        process = child.start(calls, go, said, pass_fds=[go, said])
        assert os.read(heard, 4) == b"warm"
        daemon.kill()
        os.write(order, b"go")
        assert process.wait(PATIENCE).value == []
    daemon.start()


@pytest.mark.parametrize("stop", ["kill", "terminate"])
def test_a_question_waits_for_the_next_daemon(daemon: Interceptor, stop: str) -> None:
    def calls(go: int, said: int) -> list[str]:
        truth = Truth()
        truth.prepare()
        truth.denied()
        os.write(said, b"warm")
        os.read(go, 1)
        truth.note = lambda: os.write(said, b".")
        truth.new()
        truth.copy()
        return truth.wrong

    with daemon.spawn() as first, daemon.spawn() as second, pipe() as (go, order), pipe() as (heard, said):
        processes = [c.start(calls, go, said, pass_fds=[go, said]) for c in (first, second)]
        for _ in processes:
            assert os.read(heard, 4) == b"warm"
        getattr(daemon, stop)()
        os.write(order, b"gogo")
        for _ in processes:
            assert os.read(heard, 1)
        daemon.start()
        for process in processes:
            assert process.wait(PATIENCE).value == []
        assert {c["id"] for c in daemon.request("ps")} == {first.cid, second.cid}
        with daemon.spawn() as third:
            os.write(order, b"gogo")
            assert third.run(calls, go, said, pass_fds=[go, said]).value == []


@pytest.mark.parametrize("fstype", [b"proc", b"sysfs"])
def test_copies_of_what_was_mounted_before_go_after_a_restart(
    daemon: Interceptor, child: GuardedChild, fstype: bytes
) -> None:
    """The next daemon finds what it takes to make a composite like it anew."""
    cover = {b"proc": b"/mnt/sys", b"sysfs": b"/mnt/kernel"}[fstype]

    def copied() -> tuple[int, list[bytes], int]:
        return inside.try_umount(cover), inside.raw_below(b"/mnt"), inside.try_umount(b"/mnt")

    for stop in ("kill", "terminate"):
        assert child.call(inside.try_mount, b"x", b"/mnt", fstype) == 0
        getattr(daemon, stop)()
        daemon.start()
        assert child.call(copied) == (0, [], 0)


@pytest.mark.slow
def test_a_loop_of_calls_sees_nothing_of_ten_daemons(daemon: Interceptor) -> None:
    with daemon.spawn() as child, pipe() as (progress, theirs):
        process = child.start(support.rounds_until_eof, theirs, pass_fds=[theirs])
        os.close(theirs)
        chance = random.Random(1)
        for number in range(10):
            os.read(progress, 1 << 16)
            assert os.read(progress, 1), "the container ended"
            _spin(chance.uniform(0, 0.0015))
            if number % 2:
                daemon.kill()
            else:
                daemon.terminate()
            daemon.start()
        os.close(progress)
        truth = process.wait(PATIENCE).value
        assert isinstance(truth, Truth)
        assert truth.wrong == []
        assert len(support.family(daemon).guards) == 1


def test_a_guard_that_dies_without_a_daemon_is_replaced_by_the_next(daemon: Interceptor) -> None:
    def calls(go: int) -> list[str]:
        truth = Truth()
        truth.prepare()
        assert os.read(go, 2) == b"go"
        truth.round()
        return truth.wrong

    with daemon.spawn() as child, pipe() as (go, order):
        process = child.start(calls, go, pass_fds=[go])
        guard = guard_pid(daemon, child.cid)
        daemon.kill()
        kill(guard)
        os.write(order, b"go")
        daemon.start()
        assert process.wait(PATIENCE).value == []
        assert guard_pid(daemon, child.cid) not in (0, guard)


def test_a_container_that_ends_without_a_daemon_takes_everything_along(leak_check: None) -> None:
    with Interceptor() as daemon:
        before = support.mount_count()
        child = daemon.spawn()
        assert child.run(["umount", "/proc/sys"]).returncode == 32
        who = support.family(daemon)
        assert len(who.guards) == len(who.envoys) == 1
        daemon.kill()
        child.close()
        for pid in who.all:
            assert support.has_ended(pid), f"of {who}, {pid} still runs"
        assert support.mount_count() == before
        # And a daemon starts anew.
        daemon.start()
        with daemon.spawn() as another:
            assert another.run(["umount", "/proc/sys"]).returncode == 32


def test_one_of_two_containers_ends_without_a_daemon(daemon: Interceptor) -> None:
    """Nothing of it is with the next daemon, and its ID can be used again."""
    with daemon.spawn() as stays:
        assert stays.run(["umount", "/proc/sys"]).returncode == 32
        expected = support.holdings(daemon)
        goes = daemon.spawn(cid="goes")
        ends = [c for c in daemon.request("ps") if c["id"] == "goes"]
        daemon.kill()
        goes.close()
        for container in ends:
            assert support.has_ended(container["guard_pid"])
            assert support.has_ended(container["envoy_pid"])
        daemon.start()
        assert [c["id"] for c in daemon.request("ps")] == [stays.cid]
        with daemon.spawn(cid="goes") as again:
            assert again.run(["mount", "-t", "proc", "x", "/mnt"]).returncode == 0
            assert again.run(["cat", "/mnt/uptime"]).returncode == 0
        expected["descriptors of the daemon"] = support.holdings(daemon)["descriptors of the daemon"]
        support.settles_at(daemon, expected)


def test_the_end_of_a_container_takes_nothing_of_one_with_a_longer_name(daemon: Interceptor) -> None:
    with daemon.spawn(cid="web-2") as stays, daemon.spawn(cid="web"):
        pass_id = stays.cid
        (goes,) = [c for c in daemon.request("ps") if c["id"] == "web"]
        daemon.request(
            "poststop",
            state={"ociVersion": "1.0.2", "id": "web", "status": "stopped", "bundle": goes["bundle"]},
        )
        daemon.kill()
        daemon.start()
        assert [c["id"] for c in daemon.request("ps")] == [pass_id]


def test_the_end_of_a_listener_takes_no_other_along(daemon: Interceptor) -> None:
    """Number 1 ends, number 10 is still there for the next daemon."""

    def listeners() -> int:
        (known,) = daemon.request("ps")
        return int(known["listeners"])

    with daemon.spawn() as child, contextlib.ExitStack() as execs:
        first, *_ = [execs.enter_context(child.start(["sleep", "1000"])) for _ in range(11)]
        eventually(lambda: listeners() == 12, "twelve listeners")
        first.close()
        eventually(lambda: listeners() == 11, "eleven listeners")
        daemon.kill()
        daemon.start()
        assert listeners() == 11


@pytest.mark.parametrize("who", ["guards", "envoys", "standing"])
def test_without_daemon_and_keeper_all_end_with_the_container(leak_check: None, who: str) -> None:
    """Calls that need no daemon are answered all the same; nobody is left to end the guard but itself."""
    with Interceptor() as daemon, daemon.spawn() as child, contextlib.ExitStack() as ended:
        assert child.run(["umount", "/proc/sys"]).returncode == 32
        found = support.family(daemon)
        for pid in set(found.all) - {daemon.pid}:
            # What the test is about must not outlive it.
            ended.callback(support.end, pid)
        daemon.kill()
        kill(found.keeper)
        child.close()
        those = found.standing.values() if who == "standing" else getattr(found, who)
        assert all(support.has_ended(pid, 3) for pid in those)


def test_a_guard_that_dies_again_and_again_leaves_nobody_waiting(daemon: Interceptor) -> None:
    """Fail closed: what cannot be guarded is refused, it does not hang (I7)."""
    with daemon.spawn() as child, pipe() as (go, order):
        process = child.start(lambda: (os.read(go, 2), inside.try_umount(b"/proc/sys")), pass_fds=[go])
        while guard := guard_pid(daemon, child.cid):
            kill(guard)
            eventually(lambda guard=guard: guard_pid(daemon, child.cid) != guard, "the daemon saw it")  # type: ignore[misc]
        os.write(order, b"go")
        assert process.wait(PATIENCE).value != 0


def test_a_keeper_of_another_version_says_what_to_do(daemon: Interceptor) -> None:
    with daemon.spawn() as child:
        daemon.kill()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as keeper:
            keeper.settimeout(PATIENCE)
            keeper.connect(daemon.config.keeper_socket)
            send_packet(keeper, {"op": "what is to be invented"}, [])
            reply, _ = receive_packet(keeper)
        assert reply is not None
        assert not reply["ok"]
        assert "restart the service when no container runs" in reply["error"]
        daemon.start()
        assert child.run(["umount", "/proc/sys"]).returncode == 32
