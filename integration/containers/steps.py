"""The steps of the quickstart: each does one thing to the container, tells what it does, and adds to the facts."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from integration.containers.daemon import Daemon
from integration.containers.facts import KINDS, Facts, Latency, Recursive, Refusal, Service
from integration.containers.kernel_calls import mount_id
from integration.containers.systemd import Booting

BOOT_SECONDS = 120.0
BOOT_SERVICES = ("e2scrub_reap.service", "systemd-logind.service")
PRIVATE_SERVICE = "interceptor-private.service"
INSIDE = Path(__file__).parent / "inside"
#: Where systemd builds the root of a service that wants a mount namespace.
MOUNT_ROOTFS = "/run/systemd/mount-rootfs"
#: The managed paths of DESIGN.md; those that this kernel does not have are never seen as mounts.
MANAGED = (
    "/proc/uptime",
    "/proc/swaps",
    "/proc/sys",
    "/sys/kernel",
    "/sys/devices/virtual",
    "/sys/module/nf_conntrack/parameters",
)
#: Nodes below them, looked at as well: they must be the view's, or absent where a copy was removed.
BELOW = ("/proc/sys/kernel/hostname", "/sys/kernel/uevent_seqnum", "/sys/devices/virtual/net/lo")
#: statfs(2) f_type, as `stat -f -c %t` prints it.
RAW_TYPES = {"9fa0": "procfs", "62656572": "sysfs"}
FUSE_TYPE = "65735546"

MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8
#: Enough calls for a 99th percentile that is not one unlucky call.
LOOPS = 1000
NEW_PROCS = 100

Say = Callable[[str], None]
Records = list[list[str]]


class Steps:
    """The container under test, the daemon that guards it, and the facts found so far."""

    def __init__(self, booting: Booting, daemon: Daemon, facts: Facts, say: Say) -> None:
        self.booting = booting
        self.daemon = daemon
        self.facts = facts
        self.say = say
        self.originals: dict[str, tuple[int, str]] = {}
        self.device_ids: dict[str, int] = {}

    def run(self) -> None:
        """Perform every step in order."""
        self.boot()
        self.record_originals()
        self.private_service()
        self.inner_proc()
        self.copies()
        self.attack_originals()
        self.measure()
        self.judge()

    def boot(self) -> None:
        """Wait until systemd has booted; the two services of the issue are part of that."""
        begin = time.monotonic()
        self.booting.ready.wait_ready(self.booting.pid, BOOT_SECONDS)
        state = self.booting.container.exec("systemctl", "is-system-running", check=False).strip()
        self.say(f"systemd has booted in {time.monotonic() - begin:.1f} s and calls itself “{state}”")
        for unit in BOOT_SERVICES:
            self.say(f"{unit}: {self._result(unit)}")

    def record_originals(self) -> None:
        """Take down, by unique mount ID, what has to be in place at the end."""
        mounts = self.daemon.ask("mounts", id=self.booting.container.id)
        for mount in mounts:
            if str(mount["class"]).startswith("original"):
                self.originals[mount["path"]] = (int(mount["id"]), mount["class"])
        for device in self.booting.devices:
            self.device_ids[device.path] = mount_id(self._outside(device.path))
        self.say(
            f"the daemon vouches for {len(self.originals)} originals: {' '.join(sorted(self.originals))}"
        )
        self._look(self._script("look", *self._managed(), *BELOW))

    def private_service(self) -> None:
        """Start a service for which systemd builds a mount namespace with its own /proc and /sys."""
        self.say(
            f"{PRIVATE_SERVICE}: PrivateNetwork=yes PrivateMounts=yes ProtectKernelTunables=yes MountAPIVFS=yes"
        )
        self.booting.container.exec("systemctl", "start", PRIVATE_SERVICE, check=False)
        result = self._result(PRIVATE_SERVICE)
        self.say(f"{PRIVATE_SERVICE}: {result}")
        if result != "success":
            for line in self.booting.console.read_text(errors="replace").splitlines()[-10:]:
                self.say(f"  {line}")

    def inner_proc(self) -> None:
        """Mount procfs in an inner PID namespace: it has to be new, and to show the view."""
        self.say("an inner PID namespace: unshare --pid --fork --mount, then mount -t proc")
        records = self._script(
            "new-proc", "/tmp/inner", str(NEW_PROCS), wrap=("unshare", "--pid", "--fork", "--mount")
        )
        self._look(records)
        types = {record[1]: record[2] for record in records if record[0] == "look"}
        first = next((record[1] for record in records if record[0] == "first-process"), "?")
        removed = any(record[0] == "removed" and record[2] == "0" for record in records)
        viewed = types.get("/tmp/inner/sys") == FUSE_TYPE and types.get("/tmp/inner/uptime") == FUSE_TYPE
        self.facts.inner_proc = viewed and removed and first == "perl"
        self.say(
            f"its process 1 is “{first}”, its /proc/sys is {'' if viewed else 'NOT '}the view; unmounted again"
        )

    def copies(self) -> None:
        """Do to the copies what systemd does, one by one and then recursively."""
        self.say(f"an unshared mount namespace: mount --rbind / {MOUNT_ROOTFS}")
        paths = self._managed()
        records = self._script(
            "copies",
            MOUNT_ROOTFS,
            *sorted(paths),
            "--",
            *BELOW,
            wrap=("unshare", "--mount", "--propagation", "slave"),
        )
        self._look(records)
        for record in records:
            if record[0] == "copy":
                self._copy(*record[1:])
            elif record[0] == "call":
                self.say(f"  umount2({record[1]}, UMOUNT_NOFOLLOW) = {_result(int(record[2]))}")
            elif record[0] == "recursive":
                walk = Recursive(record[1], int(record[2]), int(record[3]))
                self.facts.recursive.append(walk)
                self.say(
                    f"umount_recursive({walk.prefix}): {walk.calls} calls, {walk.left} mounts left {record[4]}"
                )

    def attack_originals(self) -> None:
        """Try on the originals what has just worked on the copies."""
        for flags in (0, UMOUNT_NOFOLLOW, MNT_DETACH, MNT_DETACH | UMOUNT_NOFOLLOW):
            records = self._script("deny", str(flags), *sorted(self.originals, reverse=True))
            for _, path, _, number in records:
                base = self.originals[path][1] == "original-base"
                self.facts.refusals.append(
                    Refusal(path, flags, int(number), errno.EBUSY if base else errno.EINVAL)
                )
        seen = sorted({(one.path, _result(one.errno)) for one in self.facts.refusals})
        for path, answer in seen:
            self.say(f"  umount2({path}, …) = {answer}, whatever the flags")
        self._look(self._script("look", *self._managed(), *BELOW))

    def measure(self) -> None:
        """Make enough calls of each kind, then take the daemon's own figures."""
        originals = ["/proc/sys", "/proc"]
        [[_, freed, refused]] = self._script("loop", str(LOOPS), *originals)
        self.say(
            f"timed: {freed} unmounts of a free mount, and {refused} refused lazy ones of {' and '.join(originals)}"
        )
        stats = self.daemon.ask("stats", id=self.booting.container.id)
        for kind in KINDS:
            one: dict[str, Any] = stats.get("latency_us", {}).get(kind) or {}
            self.facts.latency[kind] = Latency(one.get("p50"), one.get("p99"), int(one.get("count") or 0))
        by_unit = stats.get("umounts_by_unit")
        for name, service in self.facts.services.items():
            count = None if by_unit is None else int(by_unit.get(name, 0))
            self.facts.services[name] = Service(service.result, count)

    def judge(self) -> None:
        """Compare the mount IDs with those of the beginning."""
        self.facts.originals = len(self.originals)
        for path, (number, _) in self.originals.items():
            now = mount_id(self._outside(path))
            if now != number:
                self.facts.originals_lost.append(f"{path}: mount {number} has become {now}")
        for path, number in self.device_ids.items():
            self.facts.device = (path, mount_id(self._outside(path)) == number)

    def _copy(self, path: str, number: str, there: str, before: str, after: str) -> None:
        """Judge one unmounted copy: gone means that neither the mount nor what it showed is there."""
        gone = number == "0" and there == "gone" and after not in (FUSE_TYPE, *RAW_TYPES)
        if gone:
            self.facts.copies_removed += 1
        else:
            self.facts.copies_kept.append(f"{path}: umount2 = {_result(int(number))}, the mount is {there}")
        self.say(
            f"  umount2({MOUNT_ROOTFS}{path}) = {_result(int(number))}: {there}, type {before} → {after}"
        )

    def _result(self, unit: str) -> str:
        names = ("Result", "ActiveState", "ExecMainStartTimestampMonotonic", "Type")
        shown = self.booting.show(unit, *names)
        result = shown.get("Result", "unknown")
        if shown.get("ActiveState") == "activating":
            result = "hanging"
        elif shown.get("ExecMainStartTimestampMonotonic", "0") in ("", "0"):
            result = "not-run"
        self.facts.services[unit] = Service(result, None)
        return result

    def _script(self, *arguments: str, wrap: Sequence[str] = ()) -> Records:
        """Run inside/umounts.pl in the container, below ``wrap``, and return its records."""
        script = (INSIDE / "umounts.pl").read_text()
        text = self.booting.container.exec(*wrap, "perl", "-", *arguments, stdin=script)
        return [line.split("\t") for line in text.splitlines()]

    def _managed(self) -> list[str]:
        """Return the managed paths that this container has."""
        return [path for path in MANAGED if path in self.originals]

    def _look(self, records: Records) -> None:
        """Count the looks at managed paths, and those that met the raw filesystem."""
        for record in records:
            if record[0] == "look":
                self.facts.looked_at += record[2] != "none"
                if record[2] in RAW_TYPES:
                    self.facts.raw.append(f"{record[1]} is {RAW_TYPES[record[2]]}")

    def _outside(self, path: str) -> str:
        return f"/proc/{self.booting.pid}/root{path}"


def _result(number: int) -> str:
    return "0" if number == 0 else errno.errorcode.get(number, os.strerror(number))
