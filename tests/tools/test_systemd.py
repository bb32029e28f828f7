"""Every sandboxing property of systemd.exec(5) that mounts, by systemd-run: the service runs and has what it asked for.

Left out: RootImage=, MountImages= and ExtensionImages=, since no block device's filesystem can be mounted in any user
namespace (FS_USERNS_MOUNT of the kernel; `test_no_image_can_be_mounted` checks that this is the reason).
"""

from __future__ import annotations

import pytest

from tests.tools.conftest import Toolbox

pytestmark = [pytest.mark.root, pytest.mark.slow]

_VIEW = "test $(stat -f -c %t /proc/sys) = 65735546; test $(stat -f -c %t /sys/kernel) = 65735546; "
_READ_ONLY = "! touch {0}/x 2>/dev/null; "
_EMPTY = 'test -z "$(ls -A {0})"; '

#: Properties, and what a shell in the service finds. Every check ends the shell if it fails.
PROPERTIES = {
    "PrivateTmp=yes": _EMPTY.format("/tmp") + _EMPTY.format("/var/tmp"),
    "PrivateDevices=yes": "test ! -e /dev/fuse; test -c /dev/null; ",
    "PrivateMounts=yes": "mount -t tmpfs x /mnt; ",
    "PrivateNetwork=yes": "test $(ls /sys/class/net) = lo; ",
    "PrivateIPC=yes": "test -d /dev/mqueue; ",
    "PrivateUsers=yes": "test $(wc -l < /proc/self/uid_map) -ge 1; ",
    "PrivatePIDs=yes": "test $(ls /proc | grep -c ^[0-9]) -le 6; ",
    "ProtectSystem=yes": _READ_ONLY.format("/usr"),
    "ProtectSystem=full": _READ_ONLY.format("/usr") + _READ_ONLY.format("/etc"),
    "ProtectSystem=strict": _READ_ONLY.format("/var") + _READ_ONLY.format("/opt"),
    "ProtectHome=yes": '! ls /root 2>/dev/null; test -z "$(ls -A /home)"; ',
    "ProtectHome=read-only": _READ_ONLY.format("/root"),
    "ProtectHome=tmpfs": _EMPTY.format("/home"),
    "ProtectKernelTunables=yes": "! sh -c 'echo x > /proc/sys/kernel/hostname' 2>/dev/null; "
    "! sh -c 'echo x > /sys/kernel/uevent_helper' 2>/dev/null; ",
    "ProtectKernelModules=yes": 'test -z "$(ls -A /usr/lib/modules 2>/dev/null)"; ',
    "ProtectKernelLogs=yes": 'test -z "$(cat /proc/kmsg 2>&1 | grep -v denied)"; ',
    "ProtectControlGroups=yes": "! mkdir /sys/fs/cgroup/x 2>/dev/null; ",
    "ProtectHostname=yes": "test $(readlink /proc/self/ns/uts) != $(readlink /proc/1/ns/uts); "
    "! hostname x 2>/dev/null; ",
    "ProtectClock=yes": "true; ",
    "ProtectProc=invisible": "findmnt -no OPTIONS /proc | grep -q hidepid=invisible; ",
    "ProtectProc=noaccess": "findmnt -no OPTIONS /proc | grep -q hidepid=noaccess; ",
    "ProtectProc=ptraceable": "findmnt -no OPTIONS /proc | grep -q hidepid=ptraceable; ",
    "ProcSubset=pid": "findmnt -no OPTIONS /proc | grep -q subset=pid; test ! -e /proc/meminfo; ",
    "ReadOnlyPaths=/opt": _READ_ONLY.format("/opt"),
    "ReadOnlyPaths=/proc/sys": "! sh -c 'echo x > /proc/sys/kernel/hostname' 2>/dev/null; ",
    "ReadOnlyPaths=/sys": "! sh -c 'echo x > /sys/kernel/uevent_helper' 2>/dev/null; ",
    "ReadWritePaths=/opt ProtectSystem=strict": "touch /opt/x; rm /opt/x; " + _READ_ONLY.format("/var"),
    "NoExecPaths=/opt": "findmnt -no OPTIONS /opt | grep -q noexec; ",
    "ExecPaths=/usr NoExecPaths=/": "findmnt -no OPTIONS / | grep -q noexec; ",
    "BindPaths=/usr/lib:/mnt": "test -e /mnt/systemd; ",
    "BindPaths=/proc:/mnt": "test $(stat -f -c %t /mnt/sys) = 65735546; ",
    "BindReadOnlyPaths=/sys:/mnt": "test $(stat -f -c %t /mnt/kernel) = 65735546; "
    + _READ_ONLY.format("/mnt"),
    "TemporaryFileSystem=/opt": _EMPTY.format("/opt"),
    "MountAPIVFS=yes": "true; ",
    "DynamicUser=yes": "test $(id -u) -gt 60000; ",
    "StateDirectory=tool ProtectSystem=strict": "touch /var/lib/tool/x; ",
    "LogNamespace=tool": "true; ",
    "MountFlags=slave": "true; ",
}

#: These take something managed away, or give another root: what is to be seen there is said for each.
HIDING = {
    "InaccessiblePaths=/etc/passwd": 'test -z "$(cat /etc/passwd 2>/dev/null)"; ',
    "InaccessiblePaths=/proc/sys": "! ls /proc/sys/kernel 2>/dev/null; test $(stat -f -c %t /proc/sys) = 1021994; ",
    "InaccessiblePaths=/sys/kernel": "test $(stat -f -c %t /sys/kernel) = 1021994; ",
    "TemporaryFileSystem=/proc/sys": _EMPTY.format("/proc/sys"),
    "TemporaryFileSystem=/sys": _EMPTY.format("/sys"),
    "RootDirectory=/opt/bookworm": "grep -q bookworm /etc/os-release; ",
    "RootDirectory=/opt/bookworm MountAPIVFS=yes": _VIEW,
    "RootDirectory=/opt/bookworm MountAPIVFS=yes PrivateDevices=yes ProtectKernelTunables=yes": _VIEW,
    "RootDirectory=/opt/bookworm PrivateNetwork=yes MountAPIVFS=yes": _VIEW
    + "test $(ls /sys/class/net) = lo; ",
}


def service(toolbox: Toolbox, properties: str, script: str) -> str:
    arguments = [word for one in properties.split() for word in ("--property", one)]
    return toolbox.run(
        *("systemd-run", "--wait", "--pipe", "--quiet", "--property", "TimeoutStartSec=20"),
        *(*arguments, "sh", "-ec", script),
    )


@pytest.mark.parametrize("properties", [*PROPERTIES, *HIDING])
def test_a_service_with(toolbox: Toolbox, properties: str) -> None:
    script = _VIEW + PROPERTIES[properties] if properties in PROPERTIES else HIDING[properties]
    service(toolbox, properties, script)


def test_all_of_them_together(toolbox: Toolbox) -> None:
    """As hardened units have it."""
    together = (
        "PrivateTmp=yes PrivateDevices=yes PrivateNetwork=yes ProtectSystem=strict ProtectHome=yes "
        "ProtectProc=invisible "
        "ProtectKernelTunables=yes ProtectKernelModules=yes ProtectKernelLogs=yes ProtectControlGroups=yes "
        "ProtectHostname=yes ProcSubset=pid PrivateMounts=yes PrivateIPC=yes PrivateUsers=yes DynamicUser=yes"
    )
    assert service(toolbox, together, _VIEW + "echo up") == "up\n"


def test_no_image_can_be_mounted(toolbox: Toolbox) -> None:
    for kind in ("ext4", "squashfs", "erofs", "vfat", "xfs", "btrfs"):
        done = toolbox.try_("mount", "-t", kind, "/dev/null", "/mnt")
        assert done.returncode == 32
    done = toolbox.try_("unshare", "-m", "mount", "-i", "-t", "ext4", "/dev/vda", "/mnt")
    assert done.returncode == 32
