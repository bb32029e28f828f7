"""Whole containers beside a plain one in namespaces like theirs, where procfs and sysfs are the kernel's own."""

from __future__ import annotations

import os
import select
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.containers import cgroups
from interceptor.kernel.fd import is_ready
from interceptor.library import GuardedChild, Interceptor
from interceptor.spawn.create import spawn
from tests.robust.support import PATIENCE, eventually, pipe
from tests.view_support import outcome

pytestmark = pytest.mark.root

NODES = (
    "uptime",
    "sys/net/ipv4/ip_default_ttl",
    "sys/kernel/shmmax",
    "sys/kernel/ostype",
    "sys/net",
    "sys/none",
)


@pytest.fixture(scope="module")
def daemon() -> Iterator[Interceptor]:
    with Interceptor() as running:
        yield running


@pytest.fixture
def child(daemon: Interceptor) -> Iterator[GuardedChild]:
    with daemon.spawn() as running:
        yield running


@pytest.fixture
def plain() -> Iterator[GuardedChild]:
    with spawn(None, None) as running:
        yield running


def _read_everything() -> list[str]:
    """What is said of every file but those of processes, which are others in each container."""
    there = "find /proc /sys -path '/proc/[0-9]*' -prune -o -path '/proc/*self' -prune -o -type f -print0"
    argv = ["sh", "-c", f"{there} | xargs -0 cat 2>&1 >/dev/null"]
    done = subprocess.run(argv, capture_output=True, text=True, errors="replace", check=False)
    return sorted({*done.stdout.splitlines(), *done.stderr.splitlines()})


def _about(line: str) -> str:
    """The path that cat or find complains of, in their quotes or without."""
    return line.removeprefix("cat: ").removeprefix("find: ").split(": ")[0].strip("'‘’")


def _look_at(path: str) -> object:
    """The errno, or what it lists, or that it can be read."""
    if os.path.isdir(path):
        names = outcome(os.listdir, path)
        return sorted(names) if isinstance(names, list) else names
    text = outcome(Path(path).read_bytes)
    return text if isinstance(text, str) else "read"


def _look_at_each(paths: list[str]) -> dict[str, object]:
    return {path: _look_at(path) for path in paths}


def test_nothing_fails_to_be_read_that_the_kernel_lets_be_read(
    child: GuardedChild, plain: GuardedChild
) -> None:
    real, seen = plain.run(_read_everything).value, child.run(_read_everything).value
    assert isinstance(real, list) and isinstance(seen, list)
    assert len(real) > 100, "denials are usual in a user namespace"
    # Devices of the host come and go meanwhile: what is said of them must be the same in the end.
    doubtful = sorted(map(_about, set(seen) - set(real)))

    def agree() -> bool:
        return bool(child.run(_look_at_each, doubtful).value == plain.run(_look_at_each, doubtful).value)

    eventually(agree, f"the same to be said of {doubtful}")


def _try_to_change(top: str) -> dict[str, object]:
    """Every way to change a node, or to ask whether that could be done; its errno, or what it gave."""
    found: dict[str, object] = {}
    for name in NODES:
        path = f"{top}/{name}"
        for flags in (
            os.O_RDONLY,
            os.O_WRONLY,
            os.O_RDWR,
            os.O_WRONLY | os.O_TRUNC,
            os.O_RDONLY | os.O_TRUNC,
        ):
            found[f"{name} open {flags:o}"] = outcome(lambda: os.close(os.open(path, flags)))  # noqa: B023
        found[f"{name} truncate"] = outcome(os.truncate, path, 0)
        found[f"{name} chmod"] = outcome(os.chmod, path, 0o644)
        found[f"{name} chown"] = outcome(os.chown, path, 0, 0)
        found[f"{name} utime"] = outcome(os.utime, path)
        found[f"{name} setxattr"] = outcome(os.setxattr, path, "user.x", b"1")
        found[f"{name} unlink"] = outcome(os.unlink, path)
        found[f"{name} access"] = [os.access(path, mode) for mode in (os.R_OK, os.W_OK, os.X_OK)]
    return found


def _read_only() -> list[dict[str, object]]:
    """On a procfs that came read-only, on one made so, by a bind of that, and by its user's rights."""
    from interceptor.kernel import mount as km
    from interceptor.kernel.flags import MountFlag as M

    km.mount(b"none", b"/mnt", b"tmpfs")
    for name in ("new", "made", "bound"):
        os.mkdir(f"/mnt/{name}")
    km.mount(b"proc", b"/mnt/new", b"proc", M.MS_RDONLY)
    km.mount(b"proc", b"/mnt/made", b"proc")
    km.mount(None, b"/mnt/made", None, M.MS_REMOUNT | M.MS_BIND | M.MS_RDONLY)
    km.mount(b"/mnt/made", b"/mnt/bound", None, M.MS_BIND | M.MS_REC)
    return [_try_to_change(f"/mnt/{name}") for name in ("new", "made", "bound")]


def _is_order_of_fuse(ours: object, kernels: object) -> bool:
    """Who may not write hears first that all of it is read-only: FUSE looks at the mount before it asks us."""
    return (ours, kernels) == ("EROFS", "EACCES")


def test_read_only_composites_refuse_as_the_kernel_does(child: GuardedChild, plain: GuardedChild) -> None:
    seen, real = child.run(_read_only).value, plain.run(_read_only).value
    assert isinstance(seen, list) and isinstance(real, list)
    assert real[0]["sys/net/ipv4/ip_default_ttl open 1"] == "EROFS"
    for ours, kernels in zip(seen, real, strict=True):
        others = {what: (ours[what], said) for what, said in kernels.items() if ours[what] != said}
        assert {what: pair for what, pair in others.items() if not _is_order_of_fuse(*pair)} == {}


def _read_on(go: int, said: int) -> list[str]:
    """Until `go` is closed: says by a byte that it has read once more."""
    wrong = []
    os.set_blocking(go, False)
    while outcome(os.read, go, 1) == "EAGAIN":
        for path in ("/proc/uptime", "/proc/sys/net/ipv4/ip_default_ttl", "/proc/sys/kernel/hostname"):
            text = outcome(lambda path=path: Path(path).read_text())
            if not str(text).endswith("\n"):
                wrong.append(f"{path}: {text}")
        os.write(said, b"x")
    return wrong


def _all_of(pid: int) -> list[int]:
    """A process and its descendants."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(below for child in children for below in _all_of(int(child)))]


@pytest.fixture
def freezer() -> Iterator[Path]:
    cgroup = cgroups.find() / f"interceptor-frozen-{os.getpid()}"
    cgroup.mkdir()
    yield cgroup
    (cgroup / "cgroup.freeze").write_text("0")
    eventually(lambda: "populated 0" in (cgroup / "cgroup.events").read_text(), "the cgroup to be empty")
    cgroup.rmdir()


def test_a_frozen_container_holds_up_nobody(daemon: Interceptor, freezer: Path) -> None:
    """Frozen by its cgroup as `docker pause` does, wherever it is in reading; nothing of ours is in that cgroup."""
    with daemon.spawn() as other, daemon.spawn() as frozen, pipe() as (go, order), pipe() as (heard, said):
        reading = frozen.start(_read_on, go, said, pass_fds=[go, said])
        assert is_ready(heard, PATIENCE) and os.read(heard, 1) == b"x"
        for pid in _all_of(frozen.pid):
            (freezer / "cgroup.procs").write_text(str(pid))
        for _ in range(3):
            (freezer / "cgroup.freeze").write_text("1")
            eventually(
                lambda: "frozen 1" in (freezer / "cgroup.events").read_text(), "all of it to be frozen"
            )
            begin = time.monotonic()
            assert other.run(_read_a_lot).value == []
            assert {running["id"] for running in daemon.request("ps")} >= {frozen.cid, other.cid}
            with daemon.spawn() as third:
                assert third.run(_read_a_lot).value == []
            assert time.monotonic() - begin < 2 * PATIENCE
            if select.select([heard], [], [], 0)[0]:
                os.read(heard, 1 << 20)  # what it had said before
            (freezer / "cgroup.freeze").write_text("0")
            for _ in range(100):
                assert is_ready(heard, PATIENCE) and os.read(heard, 1) == b"x", "it goes on where it was"
        os.close(order)
        assert reading.wait(PATIENCE).value == []


def _read_a_lot() -> list[str]:
    paths = ["/proc/uptime", "/proc/sys/net/ipv4/ip_default_ttl", "/proc/sys/kernel/hostname"] * 100
    return [path for path in paths if not Path(path).read_text().endswith("\n")]
