"""``interceptor explain`` and ``interceptor mounts`` on real containers: what they say is what then happens."""

from __future__ import annotations

import errno
import json
import os
import select
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from interceptor.cli.place import mount_at
from interceptor.kernel import mount as km
from interceptor.kernel.flags import CLONE_NEWNS
from interceptor.kernel.namespaces import unshare
from interceptor.library import GuardedChild, Interceptor, Mount, Process
from interceptor.mounts.explain import born, outcomes
from interceptor.mounts.lineage import UNIQUE_FROM, MountClass
from interceptor.mounts.policy import Circumstances, Request
from tests.guarded import try_mount, try_umount

MS_RDONLY, MS_REMOUNT, MS_BIND, MS_MOVE, MS_REC = 1, 0x20, 0x1000, 0x2000, 0x4000
MNT_DETACH = 2


def cli(daemon: Interceptor, *arguments: str) -> Any:
    """The command's facts. Raises `AssertionError` with its words where it fails."""
    done = run_cli(daemon, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def run_cli(daemon: Interceptor, *arguments: str) -> subprocess.CompletedProcess[str]:
    config = str(daemon.directory / "config.toml")
    argv = [sys.executable, "-m", "interceptor", *arguments, "--config", config]
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture
def prepared(real_interceptor: Interceptor) -> Any:
    """A container with one mount of every class, and what is told of each."""
    with real_interceptor.spawn() as child:

        def prepare() -> None:
            for name in ("copy", "shielded", "new", "free", "busy", "target", "part"):
                os.mkdir(f"/tmp/{name}")
            for name in ("copy", "shielded", "busy"):
                assert try_mount(b"/proc", b"/tmp/" + name.encode(), None, MS_BIND | MS_REC) == 0
            assert try_mount(b"/sys/devices", b"/tmp/part", None, MS_BIND) == 0
            assert try_mount(b"proc", b"/tmp/new", b"proc") == 0
            assert try_mount(b"x", b"/tmp/free", b"tmpfs") == 0
            assert try_mount(b"x", b"/tmp/busy/1", b"tmpfs") == 0
            assert try_umount(b"/tmp/shielded/sys") == 0
            os.symlink("/tmp/copy/sys", "/tmp/link")

        child.call(prepare)
        yield real_interceptor, child


CLASSES = {
    "/proc": "original-base",
    "/proc/sys": "original-submount",
    "/sys/devices/virtual": "original-submount",
    "/usr": "immutable",
    "/tmp/copy": "copied-base",
    "/tmp/copy/sys": "copied-submount",
    "/tmp/link": "copied-submount",
    "/tmp/shielded/sys": "shield",
    "/tmp/new": "copied-base",
    "/tmp/new/uptime": "copied-submount",
    "/tmp/part": "copied-base",
    "/tmp/part/virtual": "copied-submount",
    "/tmp/free": "free",
    "/tmp/busy": "copied-base",
    "/tmp/busy/1": "free",
}


@pytest.mark.root
def test_each_class_is_told_with_its_lineage(prepared: tuple[Interceptor, GuardedChild]) -> None:
    daemon, child = prepared
    found = {path: told(daemon, child, path) for path in CLASSES}
    assert {path: facts["class"] for path, facts in found.items()} == CLASSES
    assert all(facts["is_mount_point"] for facts in found.values())
    assert found["/tmp/link"]["path"] == "/tmp/copy/sys"
    assert found["/proc"]["since"].endswith("when the container was created")
    # Before Linux 6.8 IDs of mounts are used again, and do not tell who is older.
    exactly = found["/tmp/new"]["id"] >= UNIQUE_FROM
    assert "ago" in found["/tmp/new"]["since"] and ("less" not in found["/tmp/new"]["since"]) is exactly
    base = found["/proc"]["id"]
    assert f"a copy of original-base {base} at /proc" in found["/tmp/copy/sys"]["lineage"]
    assert (
        f"welded to copied-base {found['/tmp/copy']['id']} at /tmp/copy" in found["/tmp/copy/sys"]["lineage"]
    )
    assert any("a filesystem of its own" in line for line in found["/tmp/new"]["lineage"])
    assert any("a copy of its directory /devices" in line for line in found["/tmp/part"]["lineage"])


def told(daemon: Interceptor, child: GuardedChild, path: str) -> Any:
    """The same without a process: there are many to ask about."""
    where = daemon.request("whereabouts", id=child.cid)
    mnt_id, mount_root = mount_at(child.pid, path.encode(), where)
    return {**daemon.request("lineage", id=child.cid, mount=mnt_id), "is_mount_point": mount_root}


@pytest.mark.root
@pytest.mark.parametrize("operation", ["umount", "umount -l", "move", "bind", "remount"])
def test_what_is_foretold_happens(prepared: tuple[Interceptor, GuardedChild], operation: str) -> None:
    daemon, child = prepared
    asked = 0
    # Deepest first: what goes must not take along what is still to be asked about.
    for path in sorted(CLASSES.keys() - {"/tmp/link"}, key=lambda p: -p.count("/")):
        facts = told(daemon, child, path)
        if facts["class"] != CLASSES[path]:
            continue  # it went with another
        (foretold,) = [o for o in facts["operations"] if o["operation"] == operation]
        got = child.call(attempt, operation, path.encode())
        asked += 1
        if foretold["result"] == "as the kernel decides":
            assert foretold["by"] == "kernel", path
        else:
            name = errno.errorcode[got] if got else "0"
            assert foretold["result"].split(",")[0] == name, (path, foretold, name)
    assert asked >= 10


def attempt(operation: str, path: bytes) -> int:
    """One operation, and as far as can be its reversal: the next is asked about the same tree."""
    if operation == "umount":
        return try_umount(path)
    if operation == "umount -l":
        return try_umount(path, MNT_DETACH)
    if operation == "remount":
        return try_mount(None, path, None, MS_REMOUNT | MS_BIND | MS_RDONLY | _flags(path))
    target = b"/tmp/target"
    if not os.path.isdir(path):
        target = b"/tmp/target.file"
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    result = try_mount(path, target, None, MS_MOVE if operation == "move" else MS_BIND)
    if not result:
        km.umount2(target, MNT_DETACH)
    return result


def _flags(path: bytes) -> int:
    """statvfs(3) and mount(2) have the same numbers for nosuid, nodev, noexec."""
    return os.statvfs(path).f_flag & 0xE


@pytest.mark.root
def test_a_path_that_is_no_mount_point_is_told_by_what_it_lies_on(
    prepared: tuple[Interceptor, GuardedChild],
) -> None:
    daemon, child = prepared
    facts = cli(daemon, "explain", child.cid, "/proc/sys/kernel")
    assert facts["path"] == "/proc/sys" and not facts["is_mount_point"]
    words = run_cli(daemon, "explain", child.cid, "/proc/sys/kernel").stdout
    assert "is no mount point" in words and "original-submount" in words and "EINVAL" in words


@pytest.mark.root
def test_no_path_leads_out_of_the_container(prepared: tuple[Interceptor, GuardedChild]) -> None:
    daemon, child = prepared
    child.call(os.symlink, "../../../../../../proc/sys", "/tmp/out")
    assert cli(daemon, "explain", child.cid, "/tmp/out")["path"] == "/proc/sys"
    for path in ("/nowhere", "/proc/1/root/proc", "/tmp/free\n\x1b[31m"):
        done = run_cli(daemon, "explain", child.cid, path)
        assert done.returncode == 1 and done.stderr.startswith("interceptor: "), path
    done = run_cli(daemon, "explain", child.cid, "/proc", "--pid", str(os.getpid()))
    assert done.returncode == 1 and "somebody else" in done.stderr


@pytest.mark.root
def test_a_filesystem_that_does_not_answer_holds_nobody_up(
    real_interceptor: Interceptor, tmp_path: Path
) -> None:
    with real_interceptor.spawn(mounts=[fuse_device(tmp_path)]) as child, meanwhile(child, dead_fuse):
        done = run_cli(real_interceptor, "explain", child.cid, "/mnt/x")
        assert done.returncode == 1 and "does not answer" in done.stderr
        # By statmount alone it is known all the same.
        rows = cli(real_interceptor, "mounts", child.cid)
        assert [row["class"] for row in rows if row["path"] == "/mnt"] == ["free"]


def dead_fuse() -> None:
    """A FUSE filesystem whose server never reads a request; it ends with this process."""
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
    assert try_mount(b"dead", b"/mnt", b"fuse", 0, options) == 0


def fuse_device(directory: Path) -> Mount:
    """/dev/fuse for a container's root; the host's own is not for everybody on every machine."""
    device = directory / "fuse"
    os.mknod(device, 0o666 | stat.S_IFCHR, os.stat("/dev/fuse").st_rdev)
    os.chmod(device, 0o666)
    return Mount(str(device), "/dev/fuse", "", ("bind",))


@contextmanager
def meanwhile(child: GuardedChild, function: Callable[[], None]) -> Iterator[Process]:
    """A process inside that has done ``function`` and waits."""
    told, tell = os.pipe()
    wait, end = os.pipe()

    def body() -> None:
        function()
        os.write(tell, b"x")
        os.read(wait, 1)

    try:
        with child.start(body, pass_fds=(tell, wait)) as process:
            assert select.select([told], [], [], 60)[0]
            yield process
            os.write(end, b"x")
            process.wait()
    finally:
        for number in (told, tell, wait, end):
            os.close(number)


@pytest.mark.root
def test_mounts_is_the_tree_of_a_namespace(prepared: tuple[Interceptor, GuardedChild]) -> None:
    daemon, child = prepared
    rows = cli(daemon, "mounts", child.cid)
    by_path = {row["path"]: row["class"] for row in rows if row["present"]}
    assert {p: by_path[p] for p in CLASSES if p != "/tmp/link"} == {
        p: k for p, k in CLASSES.items() if p != "/tmp/link"
    }
    assert rows[0]["path"] == "/" and rows[0]["depth"] == 0
    depth = {row["id"]: row["depth"] for row in rows}
    assert all(row["depth"] == depth[row["parent"]] + 1 for row in rows[1:] if row["present"])
    words = run_cli(daemon, "mounts", child.cid).stdout
    assert any(line.split()[:2] == ["/tmp/copy/sys", "copied-submount"] for line in words.splitlines())


@pytest.mark.root
def test_another_mount_namespace_of_the_container(prepared: tuple[Interceptor, GuardedChild]) -> None:
    daemon, child = prepared

    def elsewhere() -> None:
        unshare(CLONE_NEWNS)
        assert try_mount(b"x", b"/mnt", b"tmpfs") == 0

    with meanwhile(child, elsewhere) as process:
        rows = cli(daemon, "mounts", child.cid, "--pid", str(process.pid))
        assert {row["class"] for row in rows if row["path"] == "/proc/sys"} == {"original-submount"}
        assert {row["class"] for row in rows if row["path"] == "/mnt"} == {"free"}
        facts = cli(daemon, "explain", child.cid, "/mnt", "--pid", str(process.pid))
        assert facts["class"] == "free" and facts["is_mount_point"]


@pytest.mark.root
def test_what_the_container_has_lost_is_told(real_interceptor: Interceptor) -> None:
    with real_interceptor.spawn() as child:
        assert child.call(try_umount, b"/dev/shm") == 0
        gone = [row for row in cli(real_interceptor, "mounts", child.cid) if not row["present"]]
        assert [(row["path"], row["class"]) for row in gone] == [("/dev/shm", "immutable")]


# ---- the pure part -----------------------------------------------------------------------------------------


def test_a_mount_is_younger_than_those_with_smaller_ids() -> None:
    known = [(10, 100), (20, 200), (30, 300)]
    assert born(20, known) == (200, 200)
    assert born(25, known) == (200, 300)
    assert born(31, known) == (300, None)
    assert born(5, known) == (0, 100)
    assert born(5, []) == (0, None)


@pytest.mark.parametrize("kind", MountClass)
def test_every_operation_has_a_result_a_doer_and_a_reason(kind: MountClass) -> None:
    for circumstances in (
        Circumstances(),
        Circumstances(reaches_original=True),
        Circumstances(own_mounts=True),
        Circumstances(protect_immutable=True),
    ):
        found = outcomes(kind, lambda _: circumstances)  # noqa: B023
        assert [o.operation for o in found] == [r.value for r in Request] + ["bind"]
        assert all(o.result and o.why and o.by in ("kernel", "interceptor") for o in found)
    assert {o.operation: o.result for o in outcomes(MountClass.ORIGINAL_BASE, lambda _: Circumstances())} == {
        "umount": "EBUSY",
        "umount -l": "EBUSY",
        "move": "EINVAL",
        "move beneath": "EINVAL",
        "remount": "0, or EPERM where it would clear ro, nosuid, nodev or noexec",
        "bind": "0",
    }
