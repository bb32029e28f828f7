"""bubblewrap, mkosi-sandbox and systemd-nspawn."""

from __future__ import annotations

import pytest

from tests.tools.conftest import FUSE, Toolbox

pytestmark = [pytest.mark.root, pytest.mark.slow]

_LOOK = "stat -f -c %t /proc/sys /proc/uptime; cat /proc/1/comm; ls /dev | tr '\\n' ' '"


@pytest.mark.parametrize("user", ["root", "worker"])
def test_bubblewrap(toolbox: Toolbox, user: str) -> None:
    argv = [
        "bwrap",
        "--ro-bind",
        "/",
        "/",
        "--proc",
        "/proc",
        "--dev",
        "/dev",
        "--unshare-all",
        "--die-with-parent",
    ]
    lines = toolbox.run(*argv, "sh", "-euc", _LOOK, user=user).splitlines()
    assert lines[:3] == [FUSE, FUSE, "bwrap"]
    assert "null" in lines[3].split() and "fuse" not in lines[3].split()


def test_bubblewrap_with_the_containers_own_proc(toolbox: Toolbox) -> None:
    argv = [
        "bwrap",
        "--ro-bind",
        "/usr",
        "/usr",
        "--symlink",
        "usr/bin",
        "/bin",
        "--symlink",
        "usr/lib64",
        "/lib64",
    ]
    argv += ["--bind", "/proc", "/proc", "--bind", "/sys", "/sys", "--tmpfs", "/tmp"]
    lines = toolbox.run(*argv, "stat", "-f", "-c", "%t", "/proc/sys", "/sys/kernel").splitlines()
    assert lines == [FUSE, FUSE]


@pytest.mark.parametrize("user", ["root", "worker"])
def test_mkosi_sandbox(toolbox: Toolbox, user: str) -> None:
    argv = ["mkosi-sandbox", "--proc", "/proc", "--dev", "/dev", "--bind", "/usr", "/usr", "--tmpfs", "/tmp"]
    argv += [
        "--symlink",
        "usr/bin",
        "/bin",
        "--symlink",
        "usr/lib",
        "/lib",
        "--symlink",
        "usr/lib64",
        "/lib64",
    ]
    argv += ["--become-root", "--unshare-ipc", "--unshare-net"]
    lines = toolbox.run(*argv, "sh", "-euc", "stat -f -c %t /proc/sys /proc/uptime; id -u", user=user).split()
    assert lines == [FUSE, FUSE, "0"]


#: nspawn binds a directory of /run and makes that read-only, giving up its nosuid and nodev. Those of a /run that the
#: container was created with are welded, so it is given a tmpfs of the container's own there.
_NSPAWN = "mkdir -p /run/systemd/nspawn; mount -t tmpfs nspawn /run/systemd/nspawn; "


@pytest.mark.parametrize(
    "options", ["", "--private-network", "--volatile=yes", "--read-only --volatile=overlay"]
)
def test_nspawn(toolbox: Toolbox, options: str) -> None:
    argv = f"systemd-nspawn -q -D /opt/bookworm --pipe --register=no --keep-unit {options}"
    script = "stat -f -c %t /proc/sys; cat /proc/1/comm; grep -c ' /proc/sys ' /proc/self/mountinfo"
    lines = toolbox.sh(f'{_NSPAWN}{argv} sh -euc "{script}"', "unshare", "-m").split()
    assert lines[0] == FUSE
    assert lines[1] == "sh" and int(lines[2]) >= 1


def test_nspawn_says_what_it_misses(toolbox: Toolbox) -> None:
    """The limit above, kept honest: the day that this works the remedy in the README can go."""
    argv = "systemd-nspawn -q -D /opt/bookworm --pipe --register=no --keep-unit true"
    done = toolbox.try_("unshare", "-m", "sh", "-euc", argv)
    assert done.returncode == 1 and "/run/host/incoming" in done.stderr
