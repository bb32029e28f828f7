"""What containers, executions and failures leave behind: nothing."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from interceptor.errors import ContainerError, InterceptorError
from interceptor.kernel.fd import OwnedFd
from interceptor.library import GuardedChild, Interceptor
from interceptor.spawn.container import State
from interceptor.spawn.create import spawn
from tests import guarded as inside
from tests.robust import support
from tests.robust.support import Truth, eventually, family, holdings, settles_at

pytestmark = pytest.mark.root

#: What a guard serves at most (native/guard.h).
LISTENERS = 192


def _work(rounds: int) -> list[str]:
    truth = Truth()
    truth.prepare()
    for _ in range(rounds):
        truth.round()
    return truth.wrong


def _used(daemon: Interceptor) -> dict[str, int]:
    """What is held once everything has been done once."""
    with daemon.spawn() as child:
        assert child.run(_work, 1).value == []
    eventually(lambda: not family(daemon).guards | family(daemon).envoys, "the end of guard and envoy")
    return holdings(daemon)


@pytest.mark.slow
def test_two_hundred_containers_leave_nothing(daemon: Interceptor) -> None:
    before = _used(daemon)
    for number in range(200):
        with daemon.spawn() as child:
            if number % 10 == 0:
                assert child.run(_work, 1).value == []
    settles_at(daemon, before)
    assert daemon.request("ps") == []


@pytest.mark.slow
def test_two_thousand_handled_calls_leave_nothing(daemon: Interceptor, child: GuardedChild) -> None:
    assert child.run(_work, 5).value == []
    before = holdings(daemon)
    guard = support.guard_pid(daemon, child.cid)
    guards = support.descriptors(guard)
    # Five handled calls a round.
    assert child.run(_work, 400, timeout=120).value == []
    bare = holdings(daemon)
    # Of bases that a container made itself 64 bare clones are kept; those of the first rounds are among them.
    grown = bare["mounts in the workshop"] - before["mounts in the workshop"]
    assert 0 <= grown <= 64, grown
    before["mounts in the workshop"] = bare["mounts in the workshop"]
    settles_at(daemon, before)
    assert support.descriptors(guard) == guards


def test_failed_set_ups_leave_nothing(daemon: Interceptor) -> None:
    before = _used(daemon)
    for _ in range(20):
        # The container's root is the host's: refused.
        with pytest.raises(ContainerError, match="user namespace"):
            daemon.spawn(user_namespace=False)
        with spawn(None, None) as stranger:
            # Its root is no mount point below the bundle's root any more: nothing can be rebuilt.
            with pytest.raises(ContainerError):
                daemon.create(stranger.state("creating"))
            # No such bundle, no such process.
            for change in ({"bundle": "/nonexistent"}, {"pid": 0}, {"pid": 2**22 + 1}):
                with pytest.raises(ContainerError):
                    daemon.create({**stranger.state("creating"), **change})
    settles_at(daemon, before)
    assert daemon.request("ps") == []


@pytest.mark.parametrize("by", ["poststop", "death", "both"])
def test_the_end_of_a_container_leaves_nothing(daemon: Interceptor, by: str) -> None:
    before = _used(daemon)
    child = daemon.spawn()
    assert child.run(_work, 1).value == []
    (guard,), (envoy,) = family(daemon).guards, family(daemon).envoys
    if by != "death":
        daemon.request("poststop", state=child.state("stopped"))
        assert daemon.request("ps") == []
    if by != "poststop":
        support.kill(child.pid)
    assert support.has_ended(guard) and support.has_ended(envoy)
    child.close()
    settles_at(daemon, before)
    assert daemon.request("ps") == []


def test_a_hundred_executions_leave_nothing(daemon: Interceptor, child: GuardedChild) -> None:
    assert child.run(["umount", "/proc/sys"]).returncode == 32
    before = holdings(daemon)
    guard = support.guard_pid(daemon, child.cid)

    def of_guard() -> tuple[int, int]:
        return support.descriptors(guard), support.threads(guard)

    expected = of_guard()
    for _ in range(100):
        assert child.run(["umount", "/proc/sys"]).returncode == 32
    eventually(
        lambda: of_guard() == expected, f"descriptors and threads of the guard {expected}: {of_guard()}", 10
    )
    settles_at(daemon, before)
    assert support.guard_pid(daemon, child.cid) == guard
    assert daemon.request("ps")[0]["listeners"] == 1


# ---- the hook never ran ------------------------------------------------------------------------------------


class ForgetsTheHook:
    """A runtime without our hook: only the listener is handed over."""

    def __init__(self, daemon: Interceptor) -> None:
        self._daemon = daemon
        self.hand_over = daemon.hand_over
        self.poststop = daemon.poststop

    def create(self, state: State) -> None:
        """Nothing is said of the container."""


def _as_welded() -> tuple[list[str], dict[str, int], list[bytes]]:
    """What is wrong, what the first calls answer, what is raw."""
    first = {
        path: inside.try_umount(path.encode())
        for path in ("/proc/sys", "/proc/uptime", "/sys/kernel", "/proc")
    }
    truth = Truth()
    truth.prepare()
    truth.round()
    return truth.wrong, first, inside.raw_nodes()


def test_without_the_hook_a_container_is_set_up_when_its_listener_comes(daemon: Interceptor) -> None:
    expected = {
        "/proc/sys": errno.EINVAL,
        "/proc/uptime": errno.EINVAL,
        "/sys/kernel": errno.EINVAL,
        "/proc": errno.EBUSY,
    }
    before = _used(daemon)
    # As its main process, so that its first call comes with the container's first listener.
    with spawn(ForgetsTheHook(daemon), _as_welded, masked_paths=["/proc/kcore"]) as child:
        done = child.main.wait(30)
        assert done.value == ([], expected, [])
    daemon.request("poststop", state=child.state("stopped"))
    settles_at(daemon, before)


def test_without_the_hook_before_and_after_executions_are_the_same(daemon: Interceptor) -> None:
    with spawn(ForgetsTheHook(daemon), None) as child:
        for _ in range(3):
            wrong, _, raw = child.call(_as_welded)
            assert (wrong, raw) == ([], [])
        (known,) = daemon.request("ps")
        assert known["id"] == child.cid
        assert any('"late": true' in line for line in Path(daemon.log_path).read_text().splitlines())


def test_a_listener_of_a_container_that_ended_meanwhile(daemon: Interceptor) -> None:
    before = _used(daemon)

    class Late(ForgetsTheHook):
        def __init__(self) -> None:
            super().__init__(daemon)
            self.hand_over = self._after_the_end

        def _after_the_end(self, process_state: State, listener: object) -> None:
            pid = process_state["pid"]
            assert isinstance(pid, int)
            support.kill(pid)
            daemon.hand_over(process_state, listener)  # type: ignore[arg-type]

    with pytest.raises(InterceptorError):
        spawn(Late(), None)
    settles_at(daemon, before)
    assert daemon.request("ps") == []
    assert os.path.exists(daemon.control_socket)


# ---- no listener comes -------------------------------------------------------------------------------------


class KeepsTheListener(ForgetsTheHook):
    """A runtime with our hook, whose seccomp section names another agent."""

    def __init__(self, daemon: Interceptor) -> None:
        super().__init__(daemon)
        self.create = daemon.create  # type: ignore[method-assign]
        self.hand_over = self._keep
        self.kept: list[tuple[State, int]] = []

    def _keep(self, process_state: State, listener: OwnedFd) -> None:
        self.kept.append((process_state, os.dup(listener.fileno())))


def _warnings(daemon: Interceptor) -> list[str]:
    lines = [json.loads(line) for line in daemon.log_path.read_text().splitlines() if line.startswith("{")]
    return [line["container"] for line in lines if line["event"].startswith("no listener has come")]


@pytest.mark.slow
def test_a_container_without_a_listener_is_told_of_and_kept(leak_check: None) -> None:
    with Interceptor(registered_timeout=1.0) as daemon:
        runtime = KeepsTheListener(daemon)
        with daemon.spawn() as guarded, spawn(runtime, None, cid="alone") as alone:
            eventually(lambda: _warnings(daemon) == ["alone"], "a warning")
            # Its view goes on being served, and so will its calls be once the listener comes.
            assert os.listdir(f"/proc/{alone.pid}/root/proc/sys/kernel")
            runtime.hand_over = daemon.hand_over
            ((state, listener),) = runtime.kept
            with OwnedFd(listener) as late:
                daemon.hand_over(state, late)
            assert alone.run(["umount", "/proc/sys"]).returncode == 32
            known = {c["id"]: c["listeners"] for c in daemon.request("ps")}
            assert known.keys() == {guarded.cid, "alone"}
            assert known[guarded.cid] == 1
        assert _warnings(daemon) == ["alone"]


@pytest.mark.slow
def test_a_listener_too_many_is_closed(daemon: Interceptor) -> None:
    """Its calls fail, and nobody waits for ever; those that have a listener are served (I7)."""
    runtime = KeepsTheListener(daemon)
    before = _used(daemon)
    with spawn(runtime, None) as child:
        runtime.hand_over = daemon.hand_over
        ((state, listener),) = runtime.kept
        with OwnedFd(listener) as first:
            for _ in range(LISTENERS):
                daemon.hand_over(state, first)
            eventually(lambda: daemon.request("ps")[0]["listeners"] == LISTENERS, "as many as a guard serves")
            assert child.call(inside.try_umount, b"/proc/sys") == errno.ENOSYS
            assert daemon.request("ps")[0]["listeners"] == LISTENERS
    daemon.request("poststop", state=child.state("stopped"))
    settles_at(daemon, before)
