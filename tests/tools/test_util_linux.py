"""mount, umount, unshare and pivot_root of util-linux 2.41, by the new mount API, and of 2.38, by the old one."""

from __future__ import annotations

import pytest

from tests.tools.conftest import FUSE, TMPFS, Toolbox

pytestmark = [pytest.mark.root, pytest.mark.slow]

#: Debian 12's programs with its libmount and Debian 13's C library, which is the younger one.
_OLD = """\
if test ! -d /run/old; then
    mkdir /run/old
    for name in mount blkid smartcols uuid; do cp -P /opt/bookworm/usr/lib/*/lib$name.so.1* /run/old; done
fi
export LD_LIBRARY_PATH=/run/old PATH=/opt/bookworm/usr/bin:/opt/bookworm/usr/sbin:$PATH"""
RELEASES = {"2.41": "", "2.38": _OLD}


@pytest.fixture(params=RELEASES)
def release(request: pytest.FixtureRequest, toolbox: Toolbox) -> str:
    """What a script begins with to have that release's tools first."""
    version = str(request.param)
    prologue = f"{RELEASES[version]}\nmkdir -p /tmp/a /tmp/b\n"
    assert f"util-linux {version}" in toolbox.sh(prologue + "mount --version")
    return prologue


def private(toolbox: Toolbox, script: str) -> str:
    """A script in a mount namespace of its own, which ends with it."""
    return toolbox.sh(script, "unshare", "--mount")


@pytest.mark.parametrize(("kind", "managed"), [("proc", "sys"), ("sysfs", "kernel")])
def test_mount_of_a_new_one(toolbox: Toolbox, release: str, kind: str, managed: str) -> None:
    told = private(
        toolbox,
        f"{release} mount -t {kind} -o nosuid,ro x /tmp/a; stat -f -c %t /tmp/a/{managed}; findmnt -no OPTIONS /tmp/a\n"
        f"umount /tmp/a/{managed}; stat -f -c %t /tmp/a/{managed}; umount /tmp/a; ls /tmp/a",
    )
    lines = told.splitlines()
    assert lines[0] == FUSE and lines[2] == TMPFS and len(lines) == 3, told
    assert {"ro", "nosuid"} <= set(lines[1].split(","))


def test_options_of_procfs_are_taken_and_changed(toolbox: Toolbox, release: str) -> None:
    told = private(
        toolbox,
        f"{release} mount -t proc -o hidepid=2,gid=5 x /tmp/a; findmnt -no OPTIONS /tmp/a\n"
        "mount -o remount,hidepid=0 /tmp/a; findmnt -no OPTIONS /tmp/a; umount /tmp/a",
    )
    first, second = told.splitlines()
    assert "hidepid=invisible" in first and "gid=" in first
    assert "hidepid=invisible" not in second


@pytest.mark.parametrize("source", ["/proc", "/sys", "/sys/devices", "/"])
@pytest.mark.parametrize("how", ["--bind", "--rbind"])
def test_binds_and_their_recursive_end(toolbox: Toolbox, release: str, source: str, how: str) -> None:
    """``umount -R`` takes all of a copy, in one go."""
    managed = {"/proc": "sys", "/sys": "kernel", "/sys/devices": "virtual", "/": "proc/sys"}[source]
    told = private(
        toolbox,
        f"{release} mount {how} {source} /tmp/a; stat -f -c %t /tmp/a/{managed} || true\n"
        "umount -R /tmp/a; grep -c ' /tmp/a' /proc/self/mountinfo || true",
    )
    lines = told.splitlines()
    assert lines[-1] == "0"
    if (source, how) != ("/", "--bind"):
        assert lines[0] == FUSE


def test_remount_of_a_bind_read_only(toolbox: Toolbox, release: str) -> None:
    private(
        toolbox,
        f"{release} mount -t tmpfs x /tmp/a; mount --bind /tmp/a /tmp/b; mount -o remount,bind,ro /tmp/b\n"
        "touch /tmp/a/x; ! touch /tmp/b/y; umount /tmp/b /tmp/a\n"
        "mount --bind /proc /tmp/a; mount -o remount,bind,ro /tmp/a; ! echo x > /tmp/a/sys/kernel/hostname\n"
        "mount -o remount,bind,rw /tmp/a; umount /tmp/a",
    )


def test_originals_stay(toolbox: Toolbox, release: str) -> None:
    for path in ("/proc", "/proc/sys", "/sys/kernel"):
        for flags in ("", "-l", "-R"):
            done = toolbox.try_("sh", "-euc", f"{release} umount {flags} {path}")
            assert done.returncode == 32, (path, flags)
            assert "busy" in done.stderr or "not mounted" in done.stderr
    done = toolbox.try_("sh", "-euc", f"{release} mount --move /proc /tmp/a")
    assert done.returncode == 32


def test_unshare_with_a_procfs_of_its_own(toolbox: Toolbox, release: str) -> None:
    told = toolbox.sh(
        f"{release} unshare -p -f --mount-proc sh -c "
        "'ls /proc | grep -c ^[0-9]; cat /proc/1/comm; stat -f -c %t /proc/sys'"
    )
    processes, first, view = told.split()
    assert int(processes) <= 4 and first == "sh" and view == FUSE


@pytest.mark.parametrize("user", ["root", "worker"])
def test_unshare_of_the_user_namespace(toolbox: Toolbox, release: str, user: str) -> None:
    """A nested user namespace mounts its own procfs, without any right in the container's."""
    script = (
        "unshare -U -r -m -n -p -f --mount-proc sh -euc '\n"
        "stat -f -c %t /proc/sys /proc/uptime; ls /proc | grep -c ^[0-9]\n"
        "mount -t sysfs x /mnt; stat -f -c %t /mnt/kernel; ls /mnt/class/net; umount /mnt\n"
        "mount --rbind /proc /mnt; umount /mnt/sys; stat -f -c %t /mnt/sys; umount /mnt\n"
        "umount /proc/sys; stat -f -c %t /proc/sys; umount /proc; mount -t proc x /proc; stat -f -c %t /proc/sys'"
    )
    prologue = release.replace("mkdir", "mkdir 2>/dev/null") if user != "root" else release
    lines = toolbox.sh(prologue + script, user=user).split()
    assert lines == [FUSE, FUSE, lines[2], FUSE, "lo", TMPFS, TMPFS, FUSE]
    assert int(lines[2]) <= 5


def test_pivot_root(toolbox: Toolbox, release: str) -> None:
    """As a container engine does it: the old root goes, and a procfs comes."""
    told = toolbox.sh(
        "mount --rbind /opt/bookworm /opt/bookworm; cd /opt/bookworm; mkdir -p old; pivot_root . old\n"
        "mount -t proc proc /proc; umount -l /old; stat -f -c %t /proc/sys\n"
        "cut -d' ' -f2 /proc/mounts | grep -c old || true\n"
        "umount -R /proc; ls /proc; mount -t sysfs s /sys; stat -f -c %t /sys/kernel",
        *("unshare", "-m", "-p", "-f"),
    )
    assert told.split() == [FUSE, "0", FUSE]
