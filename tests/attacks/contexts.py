"""Where an attacker stands: as it was started, in a chroot, on a pivoted root, in namespaces of its own."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from interceptor.kernel import mount as km
from interceptor.kernel import stat
from interceptor.kernel.flags import AT_FDCWD, CLONE_NEWNS, CLONE_NEWUSER
from interceptor.kernel.namespaces import unshare
from tests.guarded import mount_id_at

P = ParamSpec("P")
T = TypeVar("T")

#: ``pivot`` is in the container's first mount namespace, ``pivot-unshared`` in one of the attacker's own.
CONTEXTS = ("plain", "chroot", "pivot", "pivot-unshared", "unshare", "nested")

WORK = b"run/spot"
_OLD = b"/run/old"


@dataclass(frozen=True)
class Where:
    """How the attacker writes paths."""

    context: str
    root: bytes = b"/"
    """Before every path: ``/``, the place of the old root, or nothing: relative to a directory outside the chroot."""

    def path(self, name: bytes) -> bytes:
        """A path as seen from the container's first root, without its first slash."""
        return self.root + name

    def work(self, name: bytes) -> bytes:
        """An empty directory on a mount of the container's, made if it is not there."""
        path = self.path(WORK + b"/" + name)
        os.makedirs(path, exist_ok=True)
        return path

    @property
    def knows_originals(self) -> bool:
        """Whether what stands at the originals' paths is an original, for which DESIGN.md's table has an errno.

        On a root that was pivoted in another namespace nothing has its position any more.
        """
        return self.context != "pivot-unshared"


def apart(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What ``function`` returns in a forked process, which keeps what it does to itself. Raises what it raises."""
    read, write = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        outcome: tuple[bool, Any]
        try:
            outcome = True, function(*args, **kwargs)
        except BaseException:
            outcome = False, traceback.format_exc()
        with open(write, "wb") as file:
            pickle.dump(outcome, file)
        os._exit(0)
    os.close(write)
    with open(read, "rb") as file:
        data = file.read()
    _, status = os.waitpid(pid, 0)
    if not data:
        raise AssertionError(f"the attacker ended with {signal.Signals(os.WTERMSIG(status)).name}")
    good, value = pickle.loads(data)
    if not good:
        raise AssertionError(value)
    return value  # type: ignore[no-any-return]


def settle(context: str) -> Where:
    """Brings this process there, with nothing that is trapped, so that it is so whatever a guard answers."""
    if context in ("unshare", "pivot-unshared"):
        unshare(CLONE_NEWNS)
    elif context == "nested":
        unshare(CLONE_NEWUSER | CLONE_NEWNS)
        become_root()
    if context.startswith("pivot"):
        _pivot()
        return Where(context, _OLD + b"/")
    return Where(context, b"" if context == "chroot" else b"/")


def become_root() -> None:
    """The root of a user namespace that was just made, with that one ID."""
    for name, text in (("setgroups", "deny"), ("uid_map", "0 0 1"), ("gid_map", "0 0 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def _pivot() -> None:
    place = b"/run/pivoted"
    os.makedirs(place, exist_ok=True)
    rbind(b"/", place)
    os.makedirs(place + _OLD, exist_ok=True)
    km.pivot_root(place, place + _OLD)
    os.chdir("/")


def jail() -> None:
    """A root that has nothing, while the working directory stays outside. For a process that needs no way back."""
    os.makedirs("/run/jail", exist_ok=True)
    os.chdir("/")
    os.chroot("/run/jail")


def insist(call: Callable[[], object], came_about: Callable[[], bool]) -> None:
    """Makes a trapped call until it has had its effect: a guard that decides at random may refuse, or lie."""
    for _ in range(200):
        with contextlib.suppress(OSError):
            call()
        if came_about():
            return
    raise AssertionError("200 tries, and no effect")


def rbind(source: bytes, target: bytes) -> None:
    """mount --rbind, whatever the guard answers."""
    with km.clone_mount(AT_FDCWD, source, recursive=True) as tree:
        wanted = stat.statx(tree).mnt_id
        insist(lambda: km.attach(tree, AT_FDCWD, target), lambda: mount_id_at(target) == wanted)


def tmpfs(target: bytes) -> None:
    """mount -t tmpfs, whatever the guard answers."""
    before = mount_id_at(target)
    insist(lambda: km.mount(b"tmpfs", target, b"tmpfs"), lambda: mount_id_at(target) != before)


def propagation(path: bytes, kind: int, *, recursive: bool = False) -> None:
    """mount --make-…, which is not trapped either."""
    with km.open_tree(AT_FDCWD, path, 0) as at:
        km.mount_setattr(at, propagation=kind, recursive=recursive)
