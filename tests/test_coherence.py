"""Two overlays over the same layers: what each remembers of names, and when that is dropped."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from interceptor.errors import SyscallError
from interceptor.idshift import coherence, gatekeeper
from interceptor.idshift.coherence import PAUSE, Coherence, Pair
from interceptor.idshift.gatekeeper import LOWER, Gatekeeper
from interceptor.kernel.fd import OwnedFd, is_ready
from tests.robust.support import children, eventually, gatekeepers

pytestmark = pytest.mark.root


class Loop:
    """An event loop that has no turn unless it is told to: the busiest machine that there is."""

    def __init__(self) -> None:
        self.readers: dict[int, Callable[[], object]] = {}
        self.timers: list[Callable[[], object]] = []

    def add_reader(self, fd: int, callback: Callable[[], object]) -> None:
        self.readers[fd] = callback

    def remove_reader(self, fd: int) -> bool:
        return self.readers.pop(fd, None) is not None

    def call_later(self, delay: float, callback: Callable[[], object]) -> Any:
        assert delay == PAUSE
        self.timers.append(callback)
        return self

    def cancel(self) -> None:
        """Of a timer: none is run that a test does not run itself."""

    def turn(self) -> None:
        """Calls back for all that was heard."""
        for fd in [fd for fd in self.readers if is_ready(fd)]:
            if fd in self.readers:
                self.readers[fd]()


class Overlays:
    """Both sides, in step by a loop that the test turns."""

    def __init__(self, directory: Path) -> None:
        self.manager, self.container = directory / "manager", directory / "mapped"
        self.loop = Loop()
        self.closed: list[OwnedFd] = []
        self.not_gated: list[str] = []
        self.coherence = Coherence(self.loop, self.closed.append, lambda cid, _: self.not_gated.append(cid))
        fds = [OwnedFd(os.open(path, os.O_PATH)) for path in (self.manager, self.container, directory)]
        self.coherence.add("c", Pair(*fds))


@pytest.fixture
def overlays(tmp_path: Path) -> Iterator[Overlays]:
    for name in ("below/etc", "upper", "manager", "mapped", "work1", "work2"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "below/etc/issue").write_text("old")
    for number, point in enumerate(("manager", "mapped"), 1):
        options = f"index=off,lowerdir=below,upperdir=upper,workdir=work{number}"
        subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", point], check=True, cwd=tmp_path)
    try:
        both = Overlays(tmp_path)
        yield both
        both.coherence.close()
        for group in both.closed:
            group.close()
    finally:
        # Not before a gatekeeper that was killed has ended.
        eventually(lambda: unmounted(tmp_path / "manager", tmp_path / "mapped"), "both are unmounted")


def unmounted(*paths: Path) -> bool:
    """Whether nothing is mounted there any more, having tried."""
    subprocess.run(["umount", *filter(os.path.ismount, paths)], check=False, capture_output=True)
    return not any(map(os.path.ismount, paths))


def test_without_a_turn_of_the_loop_names_are_remembered_wrongly(overlays: Overlays) -> None:
    """What the other tests rest on: a kernel that does not do this needs none of it."""
    assert not (overlays.manager / "late").exists()
    (overlays.container / "late").write_text("one")
    assert not (overlays.manager / "late").exists()
    assert (overlays.manager / "etc/issue").read_text() == "old"
    (overlays.container / "etc/issue").write_text("new")
    assert (overlays.manager / "etc/issue").read_text() == "old"


def test_after_refresh_each_side_sees_the_other_without_a_turn_of_the_loop(overlays: Overlays) -> None:
    assert not (overlays.manager / "late").exists()
    assert not (overlays.container / "given").exists()
    assert (overlays.manager / "etc/issue").read_text() == "old"
    overlays.coherence.refresh("c")
    (overlays.container / "late").write_text("one")
    (overlays.container / "etc/issue").write_text("new")
    assert (overlays.manager / "late").read_text() == "one"
    assert (overlays.manager / "etc/issue").read_text() == "new"
    (overlays.manager / "given").write_text("from the host")
    overlays.coherence.refresh("c")
    assert (overlays.container / "given").read_text() == "from the host"
    overlays.coherence.refresh("nobody")


def test_changes_are_heard_and_so_are_those_in_the_pause(overlays: Overlays) -> None:
    assert not (overlays.manager / "late").exists()
    (overlays.container / "late").write_text("one")
    overlays.loop.turn()
    assert (overlays.manager / "late").read_text() == "one"
    assert not (overlays.manager / "later").exists()
    (overlays.container / "later").write_text("two")
    for timer in overlays.loop.timers:
        timer()
    assert (overlays.manager / "later").read_text() == "two"
    (overlays.manager / "given").write_text("from the host")
    overlays.loop.turn()
    assert (overlays.container / "given").read_text() == "from the host"


def test_what_was_heard_of_the_disk_is_closed_elsewhere(overlays: Overlays) -> None:
    (overlays.container / "late").write_text("one")
    overlays.loop.turn()
    assert overlays.closed
    assert all(
        os.readlink(f"/proc/self/fd/{fd.fileno()}") == "anon_inode:[fanotify]" for fd in overlays.closed
    )


def test_a_kernel_without_another_group_is_asked_again(
    overlays: Overlays, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(*_: object) -> OwnedFd:
        raise SyscallError(errno.EMFILE, "fanotify_init")

    (overlays.container / "late").write_text("one")
    overlays.loop.turn()
    monkeypatch.setattr(coherence, "watch_filesystem", none_left)
    timers, overlays.loop.timers = overlays.loop.timers, []
    assert not (overlays.manager / "later").exists()
    (overlays.container / "later").write_text("two")
    for timer in timers:
        timer()
    assert (overlays.manager / "later").exists()
    assert len(overlays.loop.timers) == len(timers)


class Gated(Overlays):
    """With the file that Docker's driver opens."""

    def __init__(self, directory: Path) -> None:
        (directory / LOWER.decode()).write_text("l/A")
        super().__init__(directory)
        self.lower = directory / LOWER.decode()


@pytest.fixture
def gated(overlays: Overlays, tmp_path: Path) -> Iterator[Gated]:
    overlays.coherence.close()
    both = Gated(tmp_path)
    yield both
    both.coherence.close()
    for group in both.closed:
        group.close()


def test_who_opens_the_file_of_the_layers_sees_all_that_was_done_before(gated: Gated) -> None:
    for number in range(20):
        late, given = f"late{number}", f"given{number}"
        assert not (gated.manager / late).exists()
        (gated.container / late).write_text("one")
        gated.lower.read_text()
        assert (gated.manager / late).read_text() == "one"
        assert not (gated.container / given).exists()
        (gated.manager / given).write_text("from the host")
        gated.lower.read_text()
        assert (gated.container / given).read_text() == "from the host"


def test_it_is_told_where_nobody_waits(gated: Gated, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise SyscallError(errno.EINVAL, "fanotify_mark")

    monkeypatch.setattr(Gatekeeper, "add", refused)
    fds = [OwnedFd(os.open(path, os.O_PATH)) for path in (gated.manager, gated.container, gated.lower.parent)]
    gated.coherence.add("d", Pair(*fds))
    assert gated.not_gated == ["d"]
    # Then the manager is heard.
    assert not (gated.container / "given").exists()
    (gated.manager / "given").write_text("from the host")
    gated.loop.turn()
    assert (gated.container / "given").exists()


def test_a_manager_is_heard_where_there_can_be_no_other_gatekeeper(
    gated: Gated, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise SyscallError(errno.EINVAL, "fanotify_mark")

    monkeypatch.setattr(Gatekeeper, "add", refused)
    replace(gated, kill=True)
    assert gated.not_gated == ["c"]
    assert not (gated.container / "given").exists()
    (gated.manager / "given").write_text("from the host")
    gated.loop.turn()
    assert (gated.container / "given").exists()


def test_nobody_waits_after_the_container_has_ended(gated: Gated) -> None:
    gated.coherence.remove("c")
    assert not (gated.manager / "late").exists()
    (gated.container / "late").write_text("one")
    gated.lower.read_text()
    assert not (gated.manager / "late").exists()


def test_who_waits_is_let_through_when_the_gatekeeper_is_killed_and_there_is_another_soon(
    gated: Gated,
) -> None:
    (pid,) = gatekeepers(os.getpid())
    os.kill(pid, signal.SIGSTOP)
    with subprocess.Popen(["cat", gated.lower], stdout=subprocess.DEVNULL) as reader:
        eventually(lambda: "fanotify" in Path(f"/proc/{reader.pid}/wchan").read_text(), "a reader that waits")
        os.kill(pid, signal.SIGKILL)
        assert reader.wait(10) == 0
    replace(gated)
    test_who_opens_the_file_of_the_layers_sees_all_that_was_done_before(gated)


def test_who_waits_is_let_through_when_the_gatekeeper_is_stopped_and_there_is_another_soon(
    gated: Gated, impatient: pytest.MonkeyPatch
) -> None:
    replace(gated, kill=True)
    (pid,) = gatekeepers(os.getpid())
    os.kill(pid, signal.SIGSTOP)
    subprocess.run(["cat", gated.lower], stdout=subprocess.DEVNULL, check=True, timeout=60)
    impatient.undo()
    replace(gated)
    test_who_opens_the_file_of_the_layers_sees_all_that_was_done_before(gated)


def test_who_waits_is_let_through_when_the_gatekeeper_is_stuck_with_him(
    gated: Gated, impatient: pytest.MonkeyPatch
) -> None:
    here, forget = os.getpid(), coherence.forget

    def stuck(root: OwnedFd) -> None:
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGSTOP)
        forget(root)

    impatient.setattr(coherence, "forget", stuck)
    replace(gated, kill=True)
    subprocess.run(["cat", gated.lower], stdout=subprocess.DEVNULL, check=True, timeout=60)
    impatient.undo()
    replace(gated)
    test_who_opens_the_file_of_the_layers_sees_all_that_was_done_before(gated)


def test_a_killed_warden_has_a_successor(gated: Gated, impatient: pytest.MonkeyPatch) -> None:
    replace(gated, kill=True)
    (pid,) = gatekeepers(os.getpid())
    (first,) = children(pid)
    os.kill(first, signal.SIGKILL)
    eventually(lambda: children(pid) not in ([], [first]), "another warden")
    os.kill(pid, signal.SIGSTOP)
    subprocess.run(["cat", gated.lower], stdout=subprocess.DEVNULL, check=True, timeout=60)


def test_no_warden_outlives_its_gatekeeper_and_none_disturbs_one_that_works(
    gated: Gated, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gatekeeper, "PATIENCE", 5.0)
    replace(gated, kill=True)
    (pid,) = gatekeepers(os.getpid())
    (warden,) = children(pid)
    # Events all the time, for longer than its patience.
    end = time.monotonic() + 1.2 * gatekeeper.PATIENCE
    while time.monotonic() < end:
        gated.lower.read_text()
    assert gatekeepers(os.getpid()) == [pid]
    with OwnedFd(os.pidfd_open(warden)) as pidfd:
        gated.coherence.close()
        assert is_ready(pidfd, 60)


def test_a_gatekeeper_that_does_not_answer_the_daemon_is_replaced(
    gated: Gated, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gatekeeper, "_TIMEOUT", 2.0)
    replace(gated, kill=True)
    (pid,) = gatekeepers(os.getpid())
    os.kill(pid, signal.SIGSTOP)
    fds = [OwnedFd(os.open(path, os.O_PATH)) for path in (gated.manager, gated.container, gated.lower.parent)]
    gated.coherence.add("d", Pair(*fds))
    assert gated.not_gated == ["d"]
    monkeypatch.undo()
    replace(gated)
    test_who_opens_the_file_of_the_layers_sees_all_that_was_done_before(gated)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Gatekeepers that are started until this is undone have wardens who wait half a second only."""
    monkeypatch.setattr(gatekeeper, "PATIENCE", 0.5)
    return monkeypatch


def replace(gated: Gated, kill: bool = False) -> None:
    """Has another gatekeeper started in place of the one that has ended, or is to be killed."""
    if kill:
        (pid,) = gatekeepers(os.getpid())
        os.kill(pid, signal.SIGKILL)
    fd = next(fd for fd, callback in gated.loop.readers.items() if "gatekeeper" in callback.__name__)
    assert is_ready(fd, 60)
    gated.loop.turn()
    timers, gated.loop.timers = gated.loop.timers, []
    for timer in timers:
        timer()
