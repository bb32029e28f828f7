"""Containers with clones, by ``interceptor-runc`` on bundles: when changes go back, and that no death loses any."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.containers import daemon as daemons
from integration.containers import quickstart, rootfs
from integration.containers.daemon import program
from interceptor.idshift import clone
from interceptor.idshift.subid import Block
from tests.test_runtime import Runtime

pytestmark = [pytest.mark.root, pytest.mark.slow]

#: What the containers of these tests run, and what that is linked with.
PROGRAMS = ("dash", "cat", "chmod", "chown", "cp", "ln", "mkdir", "mv", "rm", "sleep", "stat", "touch", "id")
LIBRARIES = ("libc.so*", "libselinux.so*", "libpcre2-8.so*", "libacl.so*", "libattr.so*", "ld-linux*")


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    """A daemon that has nothing but clones."""
    rootfs.ensure(quickstart.parser().get_default("cache"), 100000)
    directory = Path(tempfile.mkdtemp(prefix="interceptor-cloned-", dir="/run"))
    directory.chmod(0o755)
    (directory / "subuid").write_text("interceptor:1000000:655360\n")
    keys = {
        "subuid": f"{directory}/subuid",
        "subgid": f"{directory}/subuid",
        "ownership_strategies": ["clone"],
    }
    try:
        with daemons.serving(directory / "daemon", keys) as daemon:
            yield Runtime(directory, daemon)
    finally:
        shutil.rmtree(directory)


@pytest.fixture
def tree() -> Iterator[Path]:
    """A small root filesystem of the host's root, on a disk."""
    place = Path(tempfile.mkdtemp(prefix="interceptor-cloned-", dir="/var/tmp"))
    root = place / "root"
    source = quickstart.parser().get_default("cache") / rootfs.SUITE
    for name in ("usr/bin", "usr/lib64", "etc", "proc", "sys", "dev", "tmp"):
        (root / name).mkdir(parents=True)
    for name in ("bin", "lib", "lib64"):
        (root / name).symlink_to(f"usr/{name}")
    (root / "usr/bin/sh").symlink_to("dash")
    for name in PROGRAMS:
        shutil.copy2(source / "usr/bin" / name, root / "usr/bin" / name)
    for pattern in LIBRARIES:
        for file in (source / "usr/lib").rglob(pattern):
            to = root / file.relative_to(source)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, to, follow_symlinks=False)
    for file in (source / "usr/lib64").iterdir():
        shutil.copy2(file, root / "usr/lib64" / file.name, follow_symlinks=False)
    (root / "etc/old").write_text("old")
    yield root
    # What is left of clones is still being removed by somebody else, which rm(1) does not mind.
    subprocess.run(["rm", "--recursive", "--force", str(place)], check=True)


def start(runtime: Runtime, tree: Path, cid: str) -> str:
    """A container that sleeps; returns its bundle."""
    bundle = runtime.bundle("sleep", "infinity", root={"path": str(tree), "readonly": False})
    done = runtime("run", "--detach", "--bundle", bundle, cid)
    assert done.returncode == 0, done.stderr
    return bundle


def work(runtime: Runtime, cid: str, script: str) -> str:
    """The output of a script in a container."""
    done = runtime("exec", cid, "sh", "-euc", script)
    assert done.returncode == 0, done.stderr
    return done.stdout


def sync(runtime: Runtime, *arguments: str) -> list[dict[str, object]]:
    """``interceptor sync``."""
    argv = [program("interceptor"), "sync", "--config", str(runtime.daemon.config), "--json", *arguments]
    done = subprocess.run(argv, capture_output=True, check=True)
    rows = json.loads(done.stdout)
    assert isinstance(rows, list)
    return rows


def indexed(runtime: Runtime) -> list[str]:
    """The clones that the state directory knows."""
    place = runtime.directory / "daemon/state/clones"
    return sorted(os.listdir(place)) if place.exists() else []


EDIT = "id -u; echo new > /etc/new; chown 33:7 /etc/new; chmod 4755 /etc/new; rm /etc/old"


def edited(tree: Path) -> bool:
    """Whether the manager's tree has what `EDIT` does."""
    if not (tree / "etc/new").exists():
        assert (tree / "etc/old").read_text() == "old"
        return False
    status = (tree / "etc/new").stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (33, 7, 0o4755)
    assert (tree / "etc/new").read_text() == "new\n"
    assert not (tree / "etc/old").exists()
    return True


def test_changes_go_back_at_a_pause_and_at_the_end(runtime: Runtime, tree: Path) -> None:
    start(runtime, tree, "paused")
    assert work(runtime, "paused", "stat -c %u /etc/old /usr/bin/dash").split() == ["0", "0"]
    [row] = runtime.daemon.ask("ownership", id="paused")[:1]
    assert row["strategy"] == "clone"
    assert "without copying data" in row["reason"]
    assert work(runtime, "paused", EDIT) == "0\n"
    assert not edited(tree)
    assert runtime("pause", "paused").returncode == 0
    assert edited(tree)
    assert runtime("resume", "paused").returncode == 0
    work(runtime, "paused", "mv /etc/new /etc/newer; cp /usr/bin/cat /etc/cat; mkdir -p /etc/d/e")
    assert runtime("kill", "paused", "KILL").returncode == 0
    runtime_ended(runtime, "paused")
    assert runtime("delete", "paused").returncode == 0
    assert (tree / "etc/newer").read_text() == "new\n"
    assert not (tree / "etc/new").exists()
    assert (tree / "etc/cat").read_bytes() == (tree / "usr/bin/cat").read_bytes()
    assert (tree / "etc/d/e").is_dir()
    assert indexed(runtime) == []
    assert runtime.reserved() == []


def runtime_ended(runtime: Runtime, cid: str) -> None:
    """Waits for a container's first process."""
    state = json.loads(runtime("state", cid).stdout)
    if state["pid"]:
        try:
            fd = os.pidfd_open(state["pid"])
        except ProcessLookupError:
            return
        import select

        assert select.select([fd], [], [], 10)[0]
        os.close(fd)


def test_sync_gives_back_what_a_running_container_changed(runtime: Runtime, tree: Path) -> None:
    start(runtime, tree, "running")
    work(runtime, "running", EDIT)
    [row] = sync(runtime, "running")
    assert row["was"] == "running"
    assert edited(tree)
    assert json.loads(runtime("state", "running").stdout)["status"] == "running"
    assert work(runtime, "running", "cat /etc/new") == "new\n"
    [row] = sync(runtime, "--all")
    assert row["changes"] == 0
    assert runtime("delete", "--force", "running").returncode == 0
    assert sync(runtime, "--all") == []


def test_without_a_daemon_nothing_is_lost(runtime: Runtime, tree: Path) -> None:
    start(runtime, tree, "alone")
    work(runtime, "alone", EDIT)
    runtime.daemon.processes[-1].kill()
    runtime.daemon.processes[-1].wait()
    try:
        assert runtime("pause", "alone").returncode == 0
        assert edited(tree)
        assert runtime("resume", "alone").returncode == 0
        assert runtime("delete", "--force", "alone").returncode == 0
        assert not os.path.exists(clone.place_of(str(tree), None))
    finally:
        daemons.start(runtime.daemon)
    assert indexed(runtime) == []


def test_after_a_reboot_the_daemon_gives_back_what_was_left(runtime: Runtime, tree: Path) -> None:
    """The container ended with the machine: no wrapper, no hook, no daemon saw it, and what is in /run is gone."""
    start(runtime, tree, "rebooted")
    work(runtime, "rebooted", EDIT)
    runtime.daemon.processes[-1].kill()
    runtime.daemon.processes[-1].wait()
    stock = ["runc", "--root", str(runtime.directory / "runc")]
    subprocess.run([*stock, "delete", "--force", "rebooted"], check=True, capture_output=True)
    shutil.rmtree(runtime.directory / "daemon/run/wrapped", ignore_errors=True)
    assert not edited(tree)
    daemons.start(runtime.daemon)
    assert edited(tree)
    assert indexed(runtime) == []
    assert runtime.reserved() == []


def test_what_nobody_gave_back_is_given_back_before_the_tree_is_cloned_again(
    runtime: Runtime, tree: Path
) -> None:
    start(runtime, tree, "first")
    work(runtime, "first", EDIT)
    # As if it had been killed before it came to that: the clone stays, and nobody knows of it.
    place = clone.place_of(str(tree), None)
    os.rename(place, f"{place}-kept")
    assert runtime("delete", "--force", "first").returncode == 0
    os.rename(f"{place}-kept", place)
    assert not edited(tree)
    start(runtime, tree, "second")
    assert edited(tree)
    assert work(runtime, "second", "cat /etc/new; stat -c %u /etc/new") == "new\n33\n"
    assert runtime("delete", "--force", "second").returncode == 0


def test_a_foreground_run_gives_back_by_the_daemon(runtime: Runtime, tree: Path) -> None:
    bundle = runtime.bundle("sh", "-euc", EDIT, root={"path": str(tree), "readonly": False})
    done = runtime("run", "--bundle", bundle, "foreground")
    assert done.returncode == 0, done.stderr
    # It waits for whoever is at it.
    sync(runtime, "--all")
    assert edited(tree)


def test_a_strategy_that_is_forbidden_cannot_be_asked_for(runtime: Runtime, tree: Path) -> None:
    bundle = runtime.bundle(
        "true", root={"path": str(tree)}, annotations={"io.interceptor.ownership": "idmapped"}
    )
    done = runtime("run", "--bundle", bundle, "forbidden")
    assert done.returncode == 1
    assert "idmapped: forbidden by ownership_strategies" in done.stderr
    assert "clone: the container asks for idmapped" in done.stderr
    assert indexed(runtime) == []


def test_a_late_finish_leaves_the_next_clone_of_the_same_tree_alone(tmp_path: Path) -> None:
    """It was ordered for the clone that was there, and gets its turn when another one is."""
    from interceptor.idshift import giveback

    tree = tmp_path / "tree"
    tree.mkdir()
    place = clone.place_of(str(tree), None)
    record = clone.Record(
        cid="late",
        uids=Block(1_000_000, 65536),
        gids=Block(1_000_000, 65536),
        runtime="runc",
        runtime_root="/nowhere",
        manager=os.fsencode(tree),
        target=os.fsencode(tree),
        overlay=False,
        lower=(),
        options=(),
        metadata=False,
        index=os.fsencode(tmp_path / "clones/late"),
    )
    clone.create(place, record, lambda: None)
    with giveback.claim(place) as late:
        giveback.finish(place)
        clone.create(place, record, lambda: None)
        with pytest.raises(FileNotFoundError):
            giveback._finish(place, late, lambda _: None)
    assert os.path.isdir(place)
    assert os.readlink(tmp_path / "clones/late") == place
