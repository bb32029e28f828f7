"""kill -9 of the view's server: within a second new opens work again, in every container, and nothing else changed."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest

from interceptor.errors import InterceptorError
from interceptor.library import GuardedChild, Interceptor
from tests import guarded as inside
from tests.robust.support import (
    COPY,
    MS_BIND,
    MS_REC,
    PATIENCE,
    Truth,
    descriptors,
    eventually,
    family,
    kill,
    needs_no_question,
    pipe,
    view_of,
)

pytestmark = pytest.mark.root

KILLS = 5
OUTAGE_S = 1.0


def _read(path: str) -> str:
    with open(path) as file:
        return file.read()


def _mounts() -> list[str]:
    return sorted(line.split(" ", 2)[2] for line in _read("/proc/self/mountinfo").splitlines())


def _read_until_told(go: int, said: int) -> dict[str, object]:
    """Reads what is made up, stored and real, all the time, and keeps an eye on gaps, errors and what is shown."""
    with open("/proc/sys/vm/swappiness", "w") as file:
        file.write("7\n")
    with open("/proc/sys/net/ipv4/ip_default_ttl", "w") as file:
        file.write("77\n")
    held = os.open("/proc/sys/net/ipv4/ip_default_ttl", os.O_RDONLY)
    boot = _read("/proc/sys/kernel/random/boot_id")
    before = _mounts()
    errors: set[int] = set()
    wrong: list[str] = []
    longest = 0.0
    last = time.monotonic()
    os.write(said, b"x")
    rounds = 0
    while not select.select([go], [], [], 0)[0]:
        rounds += 1
        try:
            values = [
                _read("/proc/sys/vm/swappiness"),
                _read("/proc/sys/net/ipv4/ip_default_ttl"),
                _read("/proc/sys/kernel/random/boot_id"),
                os.pread(held, 100, 0).decode(),
                " ".join(sorted(os.listdir("/proc/sys"))[:2]),
            ]
            if values != ["7\n", "77\n", boot, "77\n", "abi debug"] and len(wrong) < 5:
                wrong.append(repr(values))
            float(_read("/proc/uptime").split()[0])
        except OSError as error:
            errors.add(error.errno or 0)
            continue
        now = time.monotonic()
        longest = max(longest, now - last)
        last = now
        os.write(said, b"x")
    return {
        "errors": sorted(errors),
        "wrong": wrong,
        "longest": longest,
        "rounds": rounds,
        "same mounts": _mounts() == before,
    }


def test_killed_view_is_back_within_a_second_with_all_values(daemon: Interceptor) -> None:
    with contextlib.ExitStack() as stack:
        running = []
        for _ in range(2):
            child = stack.enter_context(daemon.spawn())
            go, order = stack.enter_context(pipe())
            progress, said = stack.enter_context(pipe())
            process = child.start(_read_until_told, go, said, pass_fds=[go, said])
            assert os.read(progress, 1) == b"x"
            running.append((process, order, progress))
        for _ in range(KILLS):
            old = view_of(daemon)
            kill(old[0])
            eventually(lambda old=old: view_of(daemon) not in ([], old), "a new server")  # type: ignore[misc]
            for _, _, progress in running:
                _drain(progress)
                assert select.select([progress], [], [], PATIENCE)[0], "nobody reads any more"
        for process, order, _ in running:
            os.write(order, b"go")
            found = process.wait(PATIENCE).value
            assert isinstance(found, dict)
            assert found["wrong"] == []
            assert set(found["errors"]) <= {errno.EIO}, "what was in flight fails clearly"
            assert found["same mounts"]
            assert found["longest"] < OUTAGE_S
        another = stack.enter_context(daemon.spawn())
        assert str(another.run(_read, "/proc/swaps").value).startswith("Filename")


def test_killed_view_is_back_within_a_second_on_a_busy_machine(daemon: Interceptor) -> None:
    """It comes up before whatever else wants the processors, and then takes its turn again."""
    with contextlib.ExitStack() as stack:
        child = stack.enter_context(daemon.spawn())
        go, order = stack.enter_context(pipe())
        progress, said = stack.enter_context(pipe())
        process = child.start(_read_until_told, go, said, pass_fds=[go, said])
        assert os.read(progress, 1) == b"x"
        for _ in range(4 * (os.cpu_count() or 1)):
            stack.callback(_end, subprocess.Popen(["sh", "-c", "while :; do :; done"]))
        for _ in range(3):
            old = view_of(daemon)
            kill(old[0])
            eventually(lambda old=old: view_of(daemon) not in ([], old), "a new server")  # type: ignore[misc]
            _drain(progress)
            assert select.select([progress], [], [], PATIENCE)[0], "nobody reads any more"
        niceness = os.getpriority(os.PRIO_PROCESS, family(daemon).keeper)
        eventually(lambda: os.getpriority(os.PRIO_PROCESS, view_of(daemon)[0]) == niceness, "its turn")
        os.write(order, b"go")
        found = process.wait(PATIENCE).value
        assert isinstance(found, dict)
        assert (found["wrong"], set(found["errors"]) <= {errno.EIO}) == ([], True)
        assert found["longest"] < OUTAGE_S


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def _drain(fd: int) -> None:
    while select.select([fd], [], [], 0)[0]:
        os.read(fd, 1 << 16)


def _read_when_told(go: int, said: int) -> None:
    _write("/proc/sys/kernel/panic", "10\n")
    while os.read(go, 1):
        os.write(said, _read("/proc/sys/kernel/panic").encode())


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def test_daemon_restarted_over_a_killed_view_goes_on(daemon: Interceptor) -> None:
    with daemon.spawn() as child, pipe() as (go, order), pipe() as (heard, said):
        process = child.start(_read_when_told, go, said, pass_fds=[go, said])
        os.write(order, b"x")
        assert os.read(heard, 100) == b"10\n"
        daemon.kill()
        kill(view_of(daemon)[0])
        os.write(order, b"x")
        assert os.read(heard, 100) == b"10\n", "without a daemon"
        daemon.start()
        assert child.run(_read, "/proc/sys/kernel/panic").value == "10\n"
        with daemon.spawn() as other:
            assert other.run(_read, "/proc/sys/kernel/panic").value == _read("/proc/sys/kernel/panic")
        os.close(order)
        process.wait(PATIENCE)


def test_killed_view_leaks_nothing(daemon: Interceptor) -> None:
    with daemon.spawn() as child:
        child.run(_read, "/proc/uptime")
        keeper = family(daemon).keeper

        def kill_once() -> None:
            old = view_of(daemon)
            kill(old[0])
            eventually(lambda: view_of(daemon) not in ([], old), "a new server")
            child.run(_read, "/proc/uptime")

        kill_once()
        before = descriptors(keeper)
        for _ in range(3):
            kill_once()
        eventually(lambda: descriptors(keeper) == before, "the keeper to close what it does not need")


# ---- nothing that the host needs waits for the view --------------------------------------------------------


@contextlib.contextmanager
def _view_stopped(daemon: Interceptor) -> Iterator[None]:
    (view,) = view_of(daemon)
    os.kill(view, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(view, signal.SIGCONT)


@pytest.fixture
def stopped(daemon: Interceptor) -> Iterator[GuardedChild]:
    """A container whose view is stopped: whoever touches a path of it waits."""
    with daemon.spawn() as child:
        child.run(["true"])
        with _view_stopped(daemon):
            yield child


def _mount_and_unmount() -> str:
    from interceptor.kernel import mount as km

    km.mount(b"none", b"/mnt", b"tmpfs")
    km.umount2(b"/mnt")
    results = []
    for path in (b"/proc/uptime", b"/proc/sys", b"/proc", b"/sys"):
        try:
            km.umount2(path)
        except OSError as error:
            results.append(errno.errorcode[error.errno or 0])
    return " ".join(results)


def test_neither_daemon_nor_guard_waits_for_a_stopped_view(
    daemon: Interceptor, stopped: GuardedChild
) -> None:
    """All that they do for a running container, and its end: none of it touches a path that the view serves."""
    begin = time.monotonic()
    assert stopped.run(_mount_and_unmount).value == "EINVAL EINVAL EBUSY EBUSY"
    assert len(daemon.request("ps")) == 1
    assert all(mount["present"] for mount in daemon.request("mounts", id=stopped.cid))
    daemon.kill()
    daemon.start()
    assert len(daemon.request("ps")) == 1
    daemon.poststop({"ociVersion": "1.0.2", "id": stopped.cid, "status": "stopped", "bundle": "/"})
    assert daemon.request("ps") == []
    assert time.monotonic() - begin < PATIENCE / 2


def _take_a_copy_apart() -> None:
    Truth().prepare()
    assert inside.try_mount(b"/sys", COPY, None, MS_BIND | MS_REC) == 0
    assert inside.try_umount(COPY + b"/kernel") == 0
    assert inside.try_umount(COPY) == 0


def test_what_was_made_ahead_is_used_without_a_look_into_a_stopped_view(daemon: Interceptor) -> None:
    # A masked path that the machine does not have, inside the view: does it exist by now?
    with daemon.spawn(masked_paths=["/sys/devices/virtual/nothing"]) as child:
        needs_no_question(daemon, child, _take_a_copy_apart)
        with _view_stopped(daemon):
            begin = time.monotonic()
            child.call(_take_a_copy_apart)
            assert time.monotonic() - begin < PATIENCE / 2


def test_container_made_while_the_view_is_stopped_fails_in_time(
    daemon: Interceptor, stopped: GuardedChild
) -> None:
    begin = time.monotonic()
    with pytest.raises(InterceptorError, match="the view"):
        daemon.spawn()
    assert time.monotonic() - begin < PATIENCE / 2
    assert [running["id"] for running in daemon.request("ps")] == [stopped.cid]
