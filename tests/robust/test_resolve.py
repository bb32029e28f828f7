"""A path as the guard resolves it for a caller is the path as the caller resolves it."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from interceptor._native import lib
from interceptor.kernel import stat
from interceptor.kernel.fd import OwnedFd
from interceptor.kernel.flags import PROC_SUPER_MAGIC
from interceptor.library import GuardedChild
from interceptor.spawn.create import spawn
from interceptor.spawn.process import Process
from tests.robust.support import pipe

pytestmark = pytest.mark.root

AT_FDCWD = -100
DIRECTORY = 40
"""A descriptor of the caller that leads to a directory."""

#: What a path is made of. Everything that follows is below /t in the container.
NAMES: tuple[bytes, ...] = (
    b"d",
    b"e",
    b"f",
    b"up",
    b"abs",
    b"rel",
    b"loop",
    b"dangling",
    b"tod",
    b"selfcwd",
    b"root",
    b"m",
    b".",
    b"..",
)
NAMES += (b"none", b"")
PREFIXES: tuple[bytes, ...] = (
    b"",
    b"/",
    b"//",
    b"/t/",
    b"/proc/self/cwd/",
    b"/proc/self/root/",
    b"/proc/thread-self/cwd/",
)
PREFIXES += (b"/proc/self/fd/40/", b"/proc/thread-self/root/t/", b"//proc/self/root/proc/self/root/t/")
PREFIXES += (
    b"/proc/self/task/../fd/40/",
    b"/proc/self/../",
    b"/proc/./sys/",
    b"/proc/mounts/",
    b"/proc/self/ns/",
)
SUFFIXES = (b"", b"/", b"//", b"/.", b"/..")


def _tree() -> None:
    """A small tree with every kind of link, a mount in it, and a place for the caller to be."""
    os.makedirs("/t/d/e")
    for path in ("/t/f", "/t/d/f", "/t/d/e/f"):
        with open(path, "w"):
            pass
    for base in ("/t", "/t/d", "/t/d/e"):
        for link, target in {
            "up": "..",
            "abs": "/t/d",
            "rel": "../t/d/../d/e",
            "loop": "loop",
            "dangling": "nowhere",
            "tod": "/proc/self/fd/40",
            "selfcwd": "/proc/self/cwd/e/",
            "root": "/proc/thread-self/root",
        }.items():
            os.symlink(target, f"{base}/{link}")
    os.makedirs("/t/m")


class Seen(NamedTuple):
    """Which object it is, or why it is none."""

    mnt_id: int = 0
    ino: int = 0
    is_procfs: bool = False
    error: str = ""


def _seen(fd: int) -> Seen:
    with OwnedFd(fd) as owned:
        found = stat.statx(owned)
        return Seen(found.mnt_id, found.ino, stat.fs_magic(owned) == PROC_SUPER_MAGIC)


def _resolves(orders: int, answers: int, chroot: bool) -> None:
    """Resolves what it is told: a byte for follow, then the path."""
    os.dup2(os.open("/t/d/e", os.O_RDONLY), DIRECTORY)
    os.chdir("/t/d")
    if chroot:
        os.chroot("/t")
    while order := os.read(orders, 8192):
        flags = os.O_PATH | (0 if order[0] else os.O_NOFOLLOW)
        try:
            seen = _seen(os.open(order[1:], flags))
        except OSError as error:
            seen = Seen(error=errno.errorcode[error.errno or 0])
        os.write(answers, repr(tuple(seen)).encode())


class Caller:
    """A process in a container that resolves paths itself, and what the guard makes of the same."""

    def __init__(self, child: GuardedChild, chroot: bool) -> None:
        self._stack = contextlib.ExitStack()
        orders, self._orders = self._stack.enter_context(pipe())
        self._answers, answers = self._stack.enter_context(pipe())
        self._process: Process = child.start(_resolves, orders, answers, chroot, pass_fds=[orders, answers])
        os.close(orders)
        os.close(answers)
        self._proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY)
        self._stack.callback(os.close, self._proc)
        self.hosts_procfs = stat.statx(self._proc).mnt_id

    def itself(self, path: bytes, follow: bool) -> Seen:
        os.write(self._orders, bytes([follow]) + path)
        return Seen(*eval(os.read(self._answers, 4096)))

    def guard(self, path: bytes, follow: bool) -> Seen:
        found = lib.ix_resolve(self._proc, self._process.pid, AT_FDCWD, path, follow)
        return _seen(found) if found >= 0 else Seen(error=errno.errorcode[-found])

    def close(self) -> None:
        self._stack.close()
        self._process.close()


@pytest.fixture(scope="module", params=[False, True], ids=["", "chroot"])
def caller(request: pytest.FixtureRequest) -> Iterator[Caller]:
    with spawn(None, None) as child:
        child.call(_tree)
        if request.param:
            # A procfs and a mount in the new root, too.
            made = child.run(
                ["sh", "-c", "mkdir /t/proc /t/t && mount -t proc x /t/proc && mount --rbind /t/d /t/t"]
            )
            assert made.returncode == 0, made.stderr
        assert child.run(["mount", "-t", "tmpfs", "x", "/t/m"]).returncode == 0
        caller = Caller(child, request.param)
        yield caller
        caller.close()


paths = st.builds(
    lambda prefix, names, suffix: prefix + b"/".join(names) + suffix,
    st.sampled_from(PREFIXES),
    st.lists(st.sampled_from(NAMES), max_size=7),
    st.sampled_from(SUFFIXES),
).filter(bool)


@settings(max_examples=1500, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=paths, follow=st.booleans())
@example(path=b".", follow=True)
@example(path=b"/..", follow=True)
@example(path=b"../../../../t/m", follow=True)
@example(path=b"/proc/self/fd/40/..", follow=True)
@example(path=b"/proc/self/fd/40", follow=False)
@example(path=b"/proc/self/fd/40/", follow=False)
@example(path=b"//proc/self/root/proc/sys", follow=False)
@example(path=b"/proc/self/..", follow=True)
@example(path=b"/proc/thread-self/../..", follow=True)
@example(path=b"abs/../../tod/..", follow=True)
@example(path=b"f/", follow=True)
@example(path=b"dangling/", follow=False)
def test_the_guard_sees_what_the_caller_sees(caller: Caller, path: bytes, follow: bool) -> None:
    itself, guard = caller.itself(path, follow), caller.guard(path, follow)
    if guard.error and itself.error:
        return  # the kernel says why
    if guard.mnt_id == caller.hosts_procfs:
        # What belongs to the caller's own process is reached through the host's procfs: the same, by another mount.
        assert itself.is_procfs
        return
    assert guard == itself
