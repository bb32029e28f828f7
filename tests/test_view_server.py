"""The view's server: its control socket, its end, many readers at once, and envoys that break."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from interceptor.view.protocol import (
    CONTROL_MAX,
    Add,
    HandOver,
    List,
    Ping,
    Quit,
    Remove,
    Version,
    encode_message,
)
from interceptor.view.server import FAREWELL_S
from interceptor.view.version import version
from tests.robust.support import eventually
from tests.view_support import (
    MOUNTPOINT,
    SANDBOX_IDS,
    TIME_LIMIT_S,
    WAIT_S,
    Sandbox,
    ViewProcess,
    forked,
    node,
    outcome,
    read,
    reap,
)

pytestmark = pytest.mark.root


@pytest.fixture
def server() -> Iterator[ViewProcess]:
    view = ViewProcess()
    yield view
    view.stop()


@pytest.fixture
def sandboxes() -> Iterator[Callable[[str], Sandbox]]:
    with contextlib.ExitStack() as stack:

        def make(name: str) -> Sandbox:
            sandbox = Sandbox(name)
            stack.callback(sandbox.stop)
            return sandbox

        yield make


# Many at once, and things that break


def test_many_readers_each_get_their_containers_value(
    server: ViewProcess, sandboxes: Callable[[str], Sandbox]
) -> None:
    boxes = [sandboxes(f"box{n}") for n in range(2)]
    for sandbox in boxes:
        server.add(sandbox)
        server.run(partial(socket.sethostname, sandbox.name), sandbox)

    def readers() -> list[str]:
        wrong: list[str] = []

        def reader(name: str) -> None:
            for _ in range(50):
                text = outcome(lambda: read(node("proc/sys/kernel/hostname", name)))
                if text != f"{name}\n":
                    wrong.append(f"{name}: {text}")

        threads = [
            threading.Thread(target=reader, args=(sandbox.name,)) for sandbox in boxes for _ in range(12)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return wrong

    assert server.run(readers) == []


def timed(work: Callable[[], object]) -> tuple[Any, float]:
    begin = time.monotonic()
    result = outcome(work)
    return result, time.monotonic() - begin


def test_dead_envoy_is_eio_at_once_and_nobody_elses_trouble(
    server: ViewProcess, sandboxes: Callable[[str], Sandbox]
) -> None:
    dies, lives = sandboxes("dies"), sandboxes("lives")
    server.add(dies)
    server.add(lives)
    path = node("proc/sys/kernel/hostname", "dies")
    before = server.run(lambda: read(path))
    os.kill(dies.envoy, signal.SIGKILL)
    reap(dies.envoy)
    result, took = server.run(lambda: timed(lambda: read(path)))
    assert result == "EIO" and took < TIME_LIMIT_S
    assert server.run(lambda: outcome(lambda: read(node("proc/sys/kernel/hostname", "lives")))) == before
    assert server.run(lambda: read(node("proc/uptime", "dies"))).endswith("\n")
    assert server.tell(List())["containers"] == {"dies": False, "lives": True}
    server.add(dies)
    assert server.run(lambda: read(path)) == before


def test_stuck_envoy_is_eio_in_time_and_delays_nobody_else(
    server: ViewProcess, sandboxes: Callable[[str], Sandbox]
) -> None:
    stuck, free = sandboxes("stuck"), sandboxes("free")
    server.add(stuck)
    server.add(free)
    os.kill(stuck.envoy, signal.SIGSTOP)
    os.waitpid(stuck.envoy, os.WUNTRACED)

    def crowd() -> list[Any]:
        """Many wait for the stuck one while the other is read again and again."""
        results: list[Any] = []
        path = node("proc/sys/kernel/hostname", "stuck")
        threads = [
            threading.Thread(target=lambda: results.append(timed(lambda: read(path)))) for _ in range(64)
        ]
        for thread in threads:
            thread.start()
        others = [timed(lambda: read(node("proc/sys/kernel/hostname", "free"))) for _ in range(20)]
        waiting = sum(thread.is_alive() for thread in threads)
        for thread in threads:
            thread.join()
        return [results, others, waiting]

    results, others, waiting = server.run(crowd)
    assert {result for result, _ in results} == {"EIO"}
    assert max(took for _, took in results) < TIME_LIMIT_S + 5
    assert all(result.endswith("\n") for result, _ in others)
    assert waiting == 64, "the others were read while all of them waited"
    os.kill(stuck.envoy, signal.SIGCONT)
    assert server.run(lambda: read(node("proc/sys/kernel/hostname", "stuck"))).endswith("\n")


def test_caller_that_is_killed_does_not_wait_for_a_stuck_envoy(
    sandboxes: Callable[[str], Sandbox],
) -> None:
    """A container that dies in mid-operation; one whose processes are frozen holds up nobody either."""
    limit_s = 60.0
    server = ViewProcess("--envoy-timeout", str(limit_s))
    stuck, free = sandboxes("stuck"), sandboxes("free")
    try:
        server.add(stuck)
        server.add(free)
        path = node("proc/sys/kernel/hostname", "stuck")
        assert server.run(lambda: read(path)).endswith("\n")
        os.kill(stuck.envoy, signal.SIGSTOP)
        os.waitpid(stuck.envoy, os.WUNTRACED)
        begin = time.monotonic()
        pids = []
        for _ in range(3):
            pid = os.fork()
            if pid == 0:
                server.enter_namespace()
                outcome(read, path)
                os._exit(0)
            pids.append(pid)
        while not all("fuse" in _blocked_in(pid) or "request_wait" in _blocked_in(pid) for pid in pids):
            assert time.monotonic() - begin < WAIT_S, [_blocked_in(pid) for pid in pids]
        os.kill(pids[0], signal.SIGSTOP)  # frozen: it stays where it is
        os.kill(pids[1], signal.SIGKILL)
        assert reap(pids[1]) == -signal.SIGKILL
        assert server.run(lambda: read(node("proc/sys/kernel/hostname", "free"))).endswith("\n")
        assert server.tell(Remove("stuck")) == {"ok": True}
        assert reap(pids[2]) == 0, "the container is gone: whoever still waits hears of it"
        os.kill(pids[0], signal.SIGKILL)
        reap(pids[0])
        assert time.monotonic() - begin < limit_s / 2
    finally:
        server.stop()


def _blocked_in(pid: int) -> str:
    with open(f"/proc/{pid}/stack") as file:
        return file.read()


def _state(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


def _stat_under_signals(path: str) -> int:
    """stat(2), which Python does not start again: what is read(2) of a signal here is EINTR there."""
    signal.signal(signal.SIGUSR1, lambda *_: None)
    signal.siginterrupt(signal.SIGUSR1, True)
    return 0 if stat.S_ISREG(os.stat(path).st_mode) else 1


def test_a_signal_that_does_not_end_its_caller_ends_no_operation(
    sandboxes: Callable[[str], Sandbox],
) -> None:
    """procfs has no EINTR. A cgroup that is frozen interrupts a wait just as a signal with a handler does."""
    server, box = ViewProcess("--envoy-timeout", "60"), sandboxes("box")
    try:
        server.add(box)
        path = node("proc/sys/kernel/hostname", "box")
        os.kill(box.envoy, signal.SIGSTOP)
        os.waitpid(box.envoy, os.WUNTRACED)
        pid = os.fork()
        if pid == 0:
            server.enter_namespace()
            os._exit(_stat_under_signals(path))
        deadline = time.monotonic() + WAIT_S
        while "request_wait" not in _blocked_in(pid):
            assert time.monotonic() < deadline, _blocked_in(pid)
        os.kill(pid, signal.SIGUSR1)
        while _state(pid) != "D":  # it has told the view, and waits on
            assert _state(pid) != "Z" and time.monotonic() < deadline, _state(pid)
        # Of two requests that are there, an interruption comes first.
        assert server.run(lambda: read(node("proc/uptime", "box"))).endswith("\n")
        os.kill(box.envoy, signal.SIGCONT)
        assert reap(pid) == 0
    finally:
        server.stop()


def test_envoy_that_talks_nonsense_is_dropped(
    server: ViewProcess, sandboxes: Callable[[str], Sandbox]
) -> None:
    sandbox = sandboxes("liar")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        ours.settimeout(WAIT_S)
        with theirs:
            message = Add("liar", SANDBOX_IDS[0], SANDBOX_IDS[0], sandbox.created_ns)
            assert server.tell(message, [theirs.fileno()]) == {"ok": True}
        ours.send(b"nonsense")
        assert ours.recv(1) == b"", "the server hangs up"
    assert server.tell(List())["containers"] == {"liar": False}
    assert server.run(lambda: outcome(lambda: os.listdir(node("proc/sys", "liar")))) == "EIO"


# The control socket


def test_orders_that_make_no_sense_are_refused_and_leak_nothing(server: ViewProcess) -> None:
    add = encode_message(Add("a", 1, 1, 1))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs, open("/dev/null") as null:
        server.tell(Ping())
        before = server.fds()
        assert server.send(add)["ok"] is False
        assert server.send(add, [null.fileno()])["ok"] is False
        assert server.send(add, [theirs.fileno()])["ok"] is False
        assert server.send(add, [null.fileno()] * 2)["ok"] is False
        assert server.send(add, [null.fileno()] * 20)["ok"] is False
        assert server.send(encode_message(Ping()), [null.fileno()])["ok"] is False
        assert server.send(b"{" + b" " * (CONTROL_MAX * 2) + b"}")["ok"] is False
        assert server.send(b"nonsense")["ok"] is False
        assert server.tell(Remove("a"))["ok"] is False
        assert server.tell(Ping()) == {"ok": True}
        assert server.fds() == before


def test_container_comes_once_and_goes_without_a_trace(
    server: ViewProcess, sandboxes: Callable[[str], Sandbox]
) -> None:
    sandbox = sandboxes("once")
    server.run(lambda: os.listdir(MOUNTPOINT))  # libfuse makes itself a pipe for the first request
    assert server.tell(List())["containers"] == {}
    before = server.fds()
    server.add(sandbox)
    first = sandbox.envoy
    with sandbox.start_envoy() as sock:
        answer = server.tell(Add("once", 1, 1, 1), [sock.fileno()])
    assert answer == {"ok": False, "error": "container once is served already"}
    assert reap(sandbox.envoy) == 0, "the second envoy is hung up on"
    assert server.run(lambda: os.listdir(MOUNTPOINT)) == ["once"]
    assert server.tell(Remove("once")) == {"ok": True}
    assert reap(first) == 0, "an envoy ends with its socket"
    assert server.run(lambda: outcome(lambda: os.stat(node("proc/uptime", "once")))) == "ENOENT"
    assert server.fds() == before


def test_open_file_of_a_container_that_went_is_eio(
    server: ViewProcess, sandboxes: Callable[[str], Sandbox]
) -> None:
    sandbox = sandboxes("gone")
    server.add(sandbox)
    go, went = os.pipe(), os.pipe()

    def hold() -> Any:
        with open(node("proc/sys/kernel/hostname", "gone"), "rb", buffering=0) as file:
            os.write(went[1], b"x")
            os.read(go[0], 1)
            return outcome(lambda: file.read(10))

    results: list[Any] = []
    holder = threading.Thread(target=lambda: results.append(server.run(hold)))
    holder.start()
    assert select.select([went[0]], [], [], WAIT_S)[0]
    assert server.tell(Remove("gone")) == {"ok": True}
    os.write(go[1], b"x")
    holder.join()
    assert results == ["EIO"]
    for fd in (*go, *went):
        os.close(fd)


def test_quit_unmounts_and_ends(server: ViewProcess, sandboxes: Callable[[str], Sandbox]) -> None:
    sandbox = sandboxes("c")
    server.add(sandbox)
    assert server.tell(Quit()) == {"ok": True}
    assert server.wait() == 0
    assert reap(sandbox.envoy) == 0


def test_hand_over_answers_what_was_begun_and_leaves_the_rest_to_a_successor(
    server: ViewProcess, sandboxes: Callable[[str], Sandbox]
) -> None:
    box = sandboxes("box")
    server.add(box, keep=True)

    def read_all_the_time() -> None:
        server.enter_namespace()
        box.enter()
        while not select.select([stop], [], [], 0)[0]:
            # One by the pump, one by an envoy, one of the container's own.
            names = ("sys/net/ipv4/ip_forward", "sys/kernel/osrelease", "sys/vm/swappiness", "uptime")
            assert all(read(node(f"proc/{name}")) for name in names)
            os.write(said, b"x")

    stop, tell = os.pipe()
    heard, said = os.pipe()
    pids = [forked(read_all_the_time) for _ in range(4)]
    try:
        os.close(said)
        for _ in range(5):
            assert len(os.read(heard, 1 << 16)) > 0
            assert server.tell(HandOver()) == {"ok": True}
            assert server.wait() == 0
            server.successor()
    finally:
        os.write(tell, b"x")
    # Not one of them has failed.
    while os.read(heard, 1 << 16):
        pass
    assert [reap(pid) for pid in pids] == [0] * 4
    for fd in (stop, tell, heard):
        os.close(fd)


def test_hand_over_does_not_wait_for_a_stuck_envoy_for_ever(
    sandboxes: Callable[[str], Sandbox],
) -> None:
    server = ViewProcess("--envoy-timeout", "60")
    stuck, other = sandboxes("stuck"), sandboxes("other")
    server.add(stuck, keep=True)
    server.add(other, keep=True)
    try:
        os.kill(stuck.envoy, signal.SIGSTOP)
        os.waitpid(stuck.envoy, os.WUNTRACED)
        pid = os.fork()
        if pid == 0:
            server.enter_namespace()
            os._exit(outcome(read, node("proc/sys/kernel/hostname", "stuck")) != "EIO")
        eventually(lambda: server.unread_by(stuck) > 0, "the envoy is asked")
        begin = time.monotonic()
        assert server.tell(HandOver()) == {"ok": True}
        assert server.wait() == 0
        assert time.monotonic() - begin >= FAREWELL_S * 0.9, "it might have answered"
        server.successor()
        assert reap(pid) == 0
        assert server.run(lambda: read(node("proc/swaps", "other")), other).startswith("Filename")
    finally:
        os.kill(stuck.envoy, signal.SIGCONT)
        server.stop()


def test_an_order_behind_a_hand_over_is_the_successors(server: ViewProcess) -> None:
    server.control.send(encode_message(HandOver()))
    server.control.send(encode_message(Version(n=7)))
    assert server.receive() == {"ok": True}
    assert server.wait() == 0
    server.successor()
    assert server.receive() == {"ok": True, "version": version(), "n": 7}


def test_a_server_starts_without_the_daemons_libraries() -> None:
    """All containers wait while one does."""
    code = "import sys, interceptor.view.server; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "msgspec" in said.split()
    assert not set(said.split()) & {"structlog", "rich", "asyncio", "logging", "attr", "prctl"}


def test_sigterm_ends_and_sigint_does_not(server: ViewProcess) -> None:
    server.process.send_signal(signal.SIGINT)
    server.process.send_signal(signal.SIGHUP)
    assert server.tell(Ping()) == {"ok": True}
    server.process.send_signal(signal.SIGTERM)
    assert server.wait() == 0


def test_end_of_control_without_containers_ends_the_server(server: ViewProcess) -> None:
    server.control.close()
    assert server.wait() == 0


def test_view_outlives_its_daemon_until_the_last_container_is_gone(
    server: ViewProcess, sandboxes: Callable[[str], Sandbox]
) -> None:
    sandbox = sandboxes("c")
    server.add(sandbox)
    server.control.close()
    assert server.run(lambda: read(node("proc/sys/kernel/hostname", "c")), sandbox).endswith("\n")
    assert server.run(lambda: read(node("proc/swaps", "c")), sandbox).startswith("Filename")
    os.kill(sandbox.envoy, signal.SIGKILL)
    reap(sandbox.envoy)
    assert server.wait() == 0
