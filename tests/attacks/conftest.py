"""One container a test, with guards of each kind; afterwards nothing that must hold may have been lost."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import pytest

from interceptor.errors import SyscallError
from interceptor.kernel import stat
from interceptor.kernel.fd import OwnedFd
from interceptor.library import GuardedChild, Interceptor, Mount
from tests import guarded as inside
from tests.attacks import audit
from tests.attacks.contexts import CONTEXTS, Where, apart, jail, settle

P = ParamSpec("P")
T = TypeVar("T")

HERE = Path(__file__).parent
MASKED = ("/proc/kcore", "/sys/firmware")
READONLY = ("/proc/bus", "/proc/irq")

Daemons = Callable[[str], Interceptor]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of these make namespaces and mounts."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.root)


@pytest.fixture(scope="session")
def daemons() -> Iterator[Daemons]:
    """A daemon for each kind of guard, from the first time it is asked for."""
    with ExitStack() as stack:
        running: dict[str, Interceptor] = {}

        def get(mode: str) -> Interceptor:
            if mode not in running:
                daemon = Interceptor(guard_mode=mode, environment={"INTERCEPTOR_TESTING": "1"})
                running[mode] = stack.enter_context(daemon)
            return running[mode]

        yield get


@pytest.fixture(scope="session")
def tools(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with the C programs of this one, which need no library where they run."""
    directory = tmp_path_factory.mktemp("tools")
    directory.chmod(0o755)
    for source in HERE.glob("*.c"):
        argv = ["gcc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-pthread"]
        subprocess.run([*argv, "-o", str(directory / source.stem), str(source)], check=True)
    return str(directory)


@dataclass
class Box:
    """A container that is attacked."""

    mode: str
    child: GuardedChild
    daemon: Interceptor
    namespace: int
    before: dict[int, stat.MountStat]

    @property
    def decides(self) -> bool:
        """Whether the guard is the real one, so that DESIGN.md's table holds to the errno."""
        return self.mode == "real"

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """In a new process inside."""
        return self.child.call(function, *args, **kwargs)

    def attack(self, context: str, attack: Callable[[Where], T], seconds: float = 60.0) -> T:
        """``attack`` from a context, by a process of its own; then its mount namespace is looked through."""

        def stage() -> T:
            where = settle(context)

            def act() -> T:
                if context == "chroot":
                    jail()
                return attack(where)

            result = apart(act)
            assert audit.uncovered(audit.table()) == []
            assert inside.raw_nodes() == []
            return result

        return self.child.run(stage, timeout=seconds).value  # type: ignore[return-value]

    def recorded(self) -> list[dict[str, Any]]:
        """The baseline, and what of it is there."""
        found: list[dict[str, Any]] = self.daemon.request("mounts", id=self.child.cid)
        return found

    def lost(self) -> list[str]:
        """Paths of original bases and submounts that are gone."""
        return [m["path"] for m in self.recorded() if m["class"].startswith("original") and not m["present"]]

    def check(self) -> None:
        """I1, and as much of I2 as this guard owes."""
        assert self.daemon.is_running
        assert audit.uncovered(audit.table(self.namespace)) == []
        self._check_flags()
        lost = self.lost()
        if self.decides:
            assert not lost
            return
        # A base may be lost, with all that is on it. Nothing may be taken from one that stays.
        assert not [path for path in lost if path.count("/") > 1 and "/" + path.split("/")[1] not in lost]

    def _check_flags(self) -> None:
        for mnt_id, was in self.before.items():
            try:
                now = stat.statmount(mnt_id, self.namespace)
            except SyscallError:
                continue
            weakened = was.attributes & audit.LOCKABLE & ~now.attributes
            assert not weakened, f"{was.point!r} lost flags {weakened:#x}"


@pytest.fixture(params=inside.MODES)
def mode(request: pytest.FixtureRequest) -> str:
    """Which guard answers."""
    value: str = request.param
    return value


@pytest.fixture(params=CONTEXTS)
def context(request: pytest.FixtureRequest) -> str:
    """Where the attacker stands."""
    value: str = request.param
    return value


@pytest.fixture
def box(mode: str, daemons: Daemons, tools: str) -> Iterator[Box]:
    """A container with masked and read-only paths, and the programs in a read-only bind at /tools."""
    daemon = daemons(mode)
    bind = Mount(tools, "/tools", "", ("bind", "ro", "nosuid", "nodev"))
    with daemon.spawn(masked_paths=MASKED, readonly_paths=READONLY, mounts=[bind]) as child:
        with OwnedFd(os.open(f"/proc/{child.pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)) as namespace:
            number = stat.mount_namespace_id(namespace)
        box = Box(mode, child, daemon, number, {m.mnt_id: m for m in audit.table(number)})
        assert not box.lost()
        yield box
        box.check()
