"""Two overlays over the same layers: what each remembers of names, and when that is dropped."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from interceptor.errors import SyscallError
from interceptor.idshift import coherence
from interceptor.idshift.coherence import PAUSE, Coherence, Pair
from interceptor.idshift.gatekeeper import LOWER, Gatekeeper
from interceptor.kernel.fd import OwnedFd, is_ready
from tests.robust.support import eventually

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
        subprocess.run(["umount", tmp_path / "manager", tmp_path / "mapped"], check=True)


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
    (pid,) = _gatekeepers()
    os.kill(pid, signal.SIGKILL)
    fd = next(fd for fd, callback in gated.loop.readers.items() if "gatekeeper" in callback.__name__)
    assert is_ready(fd, 10)
    gated.loop.turn()
    for timer in gated.loop.timers:
        timer()
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
    (pid,) = _gatekeepers()
    os.kill(pid, signal.SIGSTOP)
    with subprocess.Popen(["cat", gated.lower], stdout=subprocess.DEVNULL) as reader:
        eventually(lambda: "fanotify" in Path(f"/proc/{reader.pid}/wchan").read_text(), "a reader that waits")
        os.kill(pid, signal.SIGKILL)
        assert reader.wait(10) == 0
    fd = next(fd for fd, callback in gated.loop.readers.items() if "gatekeeper" in callback.__name__)
    assert is_ready(fd, 10)
    gated.loop.turn()
    for timer in gated.loop.timers:
        timer()
    test_who_opens_the_file_of_the_layers_sees_all_that_was_done_before(gated)


def _gatekeepers() -> list[int]:
    """Children of this process that have a fanotify group with permission events (proc(5), fdinfo)."""
    found = []
    for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        for info in Path(f"/proc/{child}/fdinfo").iterdir():
            if "mask:10000 " in info.read_text():
                found.append(int(child))
    return found
