"""A daemon of another version than the view that it finds has it replaced, and no container notices."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

import interceptor
from interceptor.library import Interceptor
from tests.robust.support import PATIENCE, eventually, pipe, view_of
from tests.robust.test_view_dies import OUTAGE_S, _read, _read_until_told

pytestmark = pytest.mark.root

RENEWED = "the view is of another version; replacing it"


class Installation:
    """A copy of the package, for a daemon of its own that is upgraded in place."""

    def __init__(self, directory: Path) -> None:
        source = Path(interceptor.__file__).parent
        self.package = directory / "interceptor"
        shutil.copytree(source, self.package, ignore=shutil.ignore_patterns("__pycache__"))
        self._source = source

    def change(self, name: str, *changes: tuple[str, str]) -> None:
        """Replaces texts in a file, each of which is there once."""
        path = self.package / name
        text = path.read_text()
        for old, new in changes:
            assert text.count(old) == 1, (name, old)
            text = text.replace(old, new)
        path.write_text(text)

    def upgrade(self) -> None:
        """What is installed now is this checkout, a newer one than whatever ran so far."""
        for name in ("view/protocol.py", "view/server.py"):
            shutil.copy(self._source / name, self.package / name)
        self.change("view/wire.py", ("ROOT_ID = 1\n", "ROOT_ID = 1\n# newer\n"))

    def make_old(self) -> None:
        """As views were that did not know of versions, nor of cgroups."""
        self.change(
            "view/protocol.py",
            ("Begin | Ping | Version | HandOver | Quit\n", "Begin | Ping | Quit\n"),
            ("    cgroups: Cgroups | None = None\n", ""),
        )
        self.change("view/server.py", ("message.cgroups", "None"))


@pytest.fixture
def installed(tmp_path: Path) -> Installation:
    return Installation(tmp_path)


@pytest.fixture
def daemon(installed: Installation) -> Iterator[Interceptor]:
    """Not started yet."""
    found = Interceptor(environment={"PYTHONPATH": str(installed.package.parent)})
    with contextlib.ExitStack() as stack:
        stack.callback(found.close)
        yield found


def renewals(daemon: Interceptor) -> int:
    return daemon.log_path.read_text().count(RENEWED)


def is_another(daemon: Interceptor, old: list[int]) -> Callable[[], bool]:
    return lambda: view_of(daemon) not in ([], old)


def test_nothing_is_lost_when_the_view_is_upgraded(daemon: Interceptor, installed: Installation) -> None:
    """Not one read fails, as a kill would have it, and values, mounts and open files are the same."""
    daemon.start()
    with daemon.spawn() as child, pipe() as (go, order), pipe() as (progress, said):
        process = child.start(_read_until_told, go, said, pass_fds=[go, said])
        assert os.read(progress, 1) == b"x"
        old = view_of(daemon)
        installed.upgrade()
        daemon.restart()
        eventually(is_another(daemon, old), "a new view")
        with daemon.spawn() as another:
            assert str(another.run(_read, "/proc/swaps").value).startswith("Filename")
        os.write(order, b"go")
        found = process.wait(PATIENCE).value
        assert isinstance(found, dict)
        assert (found["wrong"], found["errors"], found["same mounts"]) == ([], [], True)
        assert found["longest"] < OUTAGE_S
        new = view_of(daemon)
        daemon.restart()
        with daemon.spawn():
            assert view_of(daemon) == new, "the same version stays"
        assert renewals(daemon) == 1


def test_a_view_that_knows_nothing_of_versions_is_replaced(
    daemon: Interceptor, installed: Installation
) -> None:
    """It would refuse the new daemon's order to serve a container."""
    installed.make_old()
    daemon.start()
    with daemon.spawn() as child:
        child.run(_write_panic)
        old = view_of(daemon)
        installed.upgrade()
        daemon.config = msgspec.structs.replace(daemon.config, cgroup_aware=True)
        daemon.restart()
        with daemon.spawn() as another:
            assert is_another(daemon, old)()
            covers = str(another.run(_read, "/proc/self/mountinfo").value)
            assert " /proc/meminfo " in covers
            assert str(another.run(_read, "/proc/meminfo").value).startswith("MemTotal:")
        assert child.run(_read, "/proc/sys/kernel/panic").value == "10\n"
        assert " /proc/meminfo " not in str(child.run(_read, "/proc/self/mountinfo").value)


def _write_panic() -> None:
    with open("/proc/sys/kernel/panic", "w") as file:
        file.write("10\n")


def test_a_view_that_is_stopped_meanwhile_is_replaced_when_it_answers(
    daemon: Interceptor, installed: Installation
) -> None:
    daemon.start()
    with daemon.spawn() as child:
        old = view_of(daemon)
        installed.upgrade()
        os.kill(old[0], signal.SIGSTOP)
        try:
            daemon.restart()
            assert len(daemon.request("ps")) == 1, "nothing waits for it"
            assert renewals(daemon) == 0
        finally:
            os.kill(old[0], signal.SIGCONT)
        eventually(is_another(daemon, old), "a new view")
        assert child.run(_read, "/proc/swaps").value == _read("/proc/swaps").splitlines()[0] + "\n"


def test_a_keeper_that_starts_the_old_one_again_is_not_asked_for_ever(
    daemon: Interceptor, installed: Installation
) -> None:
    """As where the new version is installed elsewhere."""
    daemon.start()
    with daemon.spawn():
        # The view says what it finds at its start; the daemon is told of something else.
        daemon._environment["PYTHONPATH"] = str(installed.package.parent / "elsewhere")
        elsewhere = Installation(installed.package.parent / "elsewhere")
        elsewhere.upgrade()
        old = view_of(daemon)
        daemon.restart()
        eventually(is_another(daemon, old), "another view")
        text = "the view stays of another version: new containers may fail"
        eventually(lambda: text in daemon.log_path.read_text(), "word of it")
        assert renewals(daemon) == 1
        with daemon.spawn() as another:
            assert re.match(r"\d+\.\d\d", str(another.run(_read, "/proc/uptime").value))
