"""What ownership strategies work on a storage directory, found out by using them there (`interceptor doctor`).

Nothing is concluded from a kernel's version or from a module's being listed: a file that belongs to a mapped ID is made
on the very filesystem, mapped, looked at through the mount and written back through it, as a container would.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

from interceptor.errors import InterceptorError
from interceptor.idshift.choose import Found, choose
from interceptor.idshift.clone import try_metadata
from interceptor.idshift.idmapped import Mapper, user_namespace
from interceptor.idshift.overlay import Layers
from interceptor.idshift.shiftfs import mount_shifted
from interceptor.idshift.subid import Block
from interceptor.kernel import mount
from interceptor.kernel.flags import CLONE_NEWNS, MountFlag, UmountFlag
from interceptor.kernel.inode import reflink
from interceptor.kernel.namespaces import unshare

#: Any will do: it is mapped for the length of the probe.
_IDS = Block(1_000_000, 65536)
_OWNER = 1234


@dataclass(frozen=True)
class Probe:
    """One thing tried on one storage directory."""

    storage: str
    fstype: str
    name: str
    works: bool
    reason: str


def probe_storage(storage: str, fstype: str) -> list[Probe]:
    """Tries everything in a directory of its own below ``storage``, as root; leaves nothing."""
    return [
        Probe(storage, fstype, name, failure is None, failure or why)
        for name, why, failure in (
            ("idmapped tree", "owners are mapped both ways", _tried(storage, _tree)),
            (
                "idmapped overlay",
                "owners are mapped both ways, through its layers",
                _tried(storage, _overlay),
            ),
            ("shiftfs", "owners are mapped both ways", _tried(storage, _shiftfs)),
            ("clone by metadata", "files get their data from the layers", _tried(storage, _clone)),
            ("clone by reflink", "data is shared until it is written to", _tried(storage, _reflink)),
            ("clone by copy", "it has what a clone is made of", _tried(storage, _copy)),
        )
    ]


#: The probes that say whether a strategy works, each with how it then works.
_WAYS = {
    "idmapped": (("idmapped overlay", "it works on this filesystem"),),
    "shiftfs": (("shiftfs", "it works on this filesystem"),),
    "clone": (
        ("clone by metadata", "without copying data"),
        ("clone by reflink", "without copying data"),
        ("clone by copy", "all data is copied at each start"),
    ),
}


def strategy(probes: list[Probe], allowed: tuple[str, ...]) -> tuple[str, str]:
    """What a container whose layers are on that storage would get, and why."""
    found = {probe.name: probe for probe in probes}
    failures, how = {}, {}
    for name, ways in _WAYS.items():
        works = [why for probe, why in ways if found[probe].works]
        if works:
            how[name] = works[0]
        else:
            failures[name] = found[ways[-1][0]].reason
    first = probes[0]
    try:
        decision = choose(Found(first.storage, root=True, fstype=first.fstype, failures=failures), allowed)
    except InterceptorError as error:
        return "none", str(error)
    return decision.strategy, how[decision.strategy]


def _tried(storage: str, body: Callable[[str, str], None]) -> str | None:
    """Why ``body`` fails in a process of its own, with a scratch directory on the storage; None if it does not."""
    read, write = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        words = "ended without a word"
        try:
            words = _in_scratch(storage, body)
        finally:
            os.write(write, words.encode()[:4096])
            os._exit(0)
    os.close(write)
    with open(read, errors="replace") as told:
        words = told.read()
    os.waitpid(child, 0)
    return None if words == "ok" else words


def _in_scratch(storage: str, body: Callable[[str, str], None]) -> str:
    try:
        scratch = tempfile.mkdtemp(prefix=".interceptor-probe-", dir=storage)
    except OSError as error:
        return f"no directory can be made there: {error.strerror}"
    try:
        unshare(CLONE_NEWNS)
        mount.mount(b"none", b"/", None, MountFlag.MS_REC | MountFlag.MS_PRIVATE)
        stage = f"{scratch}/stage"
        os.mkdir(stage)
        mount.mount(b"interceptor", stage, b"tmpfs")
        try:
            body(scratch, stage)
        finally:
            mount.umount2(stage, UmountFlag.MNT_DETACH)
        return "ok"
    except (InterceptorError, OSError) as error:
        return str(error)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _tree(scratch: str, stage: str) -> None:
    os.mkdir(f"{scratch}/tree")
    _make(f"{scratch}/tree/file")
    os.mkdir(f"{stage}/at")
    with user_namespace(_IDS, _IDS) as namespace:
        with Mapper(namespace, _IDS, _IDS, stage).tree(f"{scratch}/tree") as tree:
            mount.attach(tree, mount.AT_FDCWD, f"{stage}/at")
        _judge(f"{stage}/at/file", f"{scratch}/tree/file")


def _overlay(scratch: str, stage: str) -> None:
    for name in ("lower", "layer", "layer/diff"):
        os.mkdir(f"{scratch}/{name}")
    _make(f"{scratch}/lower/file")
    os.mkdir(f"{stage}/at")
    with user_namespace(_IDS, _IDS) as namespace:
        layers = Layers((f"{scratch}/lower",), f"{scratch}/layer/diff")
        with Mapper(namespace, _IDS, _IDS, stage).overlay(layers, "work") as tree:
            mount.attach(tree, mount.AT_FDCWD, f"{stage}/at")
        # Written through the overlay, it is copied up: what is judged is the upper layer's.
        _judge(f"{stage}/at/file", f"{scratch}/layer/diff/file")


def _shiftfs(scratch: str, stage: str) -> None:
    os.mkdir(f"{scratch}/tree")
    _make(f"{scratch}/tree/file")
    os.mkdir(f"{stage}/at")
    with user_namespace(_IDS, _IDS) as namespace:
        with mount_shifted(f"{scratch}/tree", namespace, stage) as tree:
            mount.attach(tree, mount.AT_FDCWD, f"{stage}/at")
        _judge(f"{stage}/at/file", f"{scratch}/tree/file")


def _clone(scratch: str, stage: str) -> None:
    if (why_not := try_metadata(scratch, stage)) is not None:
        raise InterceptorError(why_not)


def _reflink(scratch: str, stage: str) -> None:
    with open(f"{scratch}/a", "w+b") as one, open(f"{scratch}/b", "wb") as other:
        one.write(b"x" * 4096)
        one.flush()
        if not reflink(one.fileno(), other.fileno()):
            raise InterceptorError("this filesystem copies data")


def _copy(scratch: str, stage: str) -> None:
    path = f"{scratch}/file"
    _make(path)
    os.mknod(f"{scratch}/device", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    os.setxattr(path, "trusted.interceptor.probe", b"")


def _make(path: str) -> None:
    with open(path, "w"):
        os.chown(path, _OWNER, _OWNER)


def _judge(through: str, disk: str) -> None:
    seen = os.stat(through).st_uid
    if seen != _IDS.first + _OWNER:
        raise InterceptorError(f"a file of {_OWNER} is seen as {seen} instead of {_IDS.first + _OWNER}")
    os.chown(through, _IDS.first + _OWNER + 1, -1)
    kept = os.stat(disk).st_uid
    if kept != _OWNER + 1:
        raise InterceptorError(f"a file given to {_OWNER + 1} inside belongs to {kept} on disk")
