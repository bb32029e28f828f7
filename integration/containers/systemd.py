"""A Debian container that runs systemd, from its overlay to the end of its boot, as a context manager."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from integration.containers import bundle as oci
from integration.containers import cgroups
from integration.containers.notify import NotifySocket
from integration.containers.runtime import Container

#: First host ID of the container's user namespace.
FIRST_ID = 100000
#: Units that no unprivileged container can have (debugfs, tracefs, configfs, modules), or that only cost time here.
MASKED_UNITS = (
    "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount",
    "sys-kernel-config.mount",
    "systemd-modules-load.service",
    "systemd-journal-catalog-update.service",
    "ldconfig.service",
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "e2scrub_all.timer",
    "dpkg-db-backup.timer",
)
#: Tried in this order as the host's character device to bind in; the first is why people do it at all.
DEVICE_CANDIDATES = ("/dev/dri/renderD128", "/dev/fuse", "/dev/kvm", "/dev/rtc0", "/dev/kmsg")


@dataclass(frozen=True)
class Plan:
    """What differs between the guarded container and that of ``--show-the-bug``."""

    name: str
    lower: Path
    directory: Path
    listener: Path
    create_runtime: Sequence[Sequence[str]] = ()
    poststop: Sequence[Sequence[str]] = ()
    units: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Booting:
    """A container that was started. ``ready`` says when its systemd has finished to boot."""

    container: Container
    pid: int
    ready: NotifySocket
    devices: Sequence[oci.Device]
    console: Path

    def show(self, unit: str, *properties: str) -> dict[str, str]:
        """Return properties of a unit as ``systemctl show`` prints them."""
        text = self.container.exec("systemctl", "show", f"--property={','.join(properties)}", unit)
        return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)


@contextlib.contextmanager
def started(plan: Plan) -> Iterator[Booting]:
    """Start the container of ``plan`` and take everything away at the end: processes, mounts, cgroups, files.

    The caller has to be in a mount namespace of its own (`kernel_calls.unshare_mounts`).
    """
    plan.directory.mkdir(parents=True)
    container = Container(plan.name, plan.directory, plan.directory / "state")
    with contextlib.ExitStack() as stack:
        cgroup = stack.enter_context(cgroups.delegated(plan.name, FIRST_ID))
        rootfs = stack.enter_context(overlay(plan.lower, plan.directory / "fs", plan))
        ready = stack.enter_context(NotifySocket(plan.directory / "notify"))
        stack.callback(container.delete)
        devices = host_devices()
        bundle = oci.Bundle(
            rootfs=str(rootfs),
            hostname=plan.name,
            first_id=FIRST_ID,
            cgroups_path=f"/{plan.name}",
            cgroup=str(cgroup),
            machine=os.uname().machine,
            bounding_set=bounding_set(),
            listener=str(plan.listener),
            listener_metadata=plan.name,
            notify=str(ready.path),
            devices=devices,
            create_runtime=plan.create_runtime,
            poststop=plan.poststop,
        )
        console = plan.directory / "console.log"
        pid = container.run(oci.config(bundle), console)
        yield Booting(container, pid, ready, devices, console)


@contextlib.contextmanager
def overlay(lower: Path, directory: Path, plan: Plan) -> Iterator[Path]:
    """Mount an overlay over ``lower`` with its upper layer in memory, with the container's own files in place."""
    # `runc exec` changes to the rootfs's path first, also when it runs where these mounts are not seen (`--keep`).
    (directory / "merged").mkdir(parents=True)
    _mount("tmpfs", "quickstart", directory, "mode=755")
    try:
        upper, work, merged = (directory / name for name in ("upper", "work", "merged"))
        for path in (upper, work, merged):
            path.mkdir()
        os.chown(upper, FIRST_ID, FIRST_ID)
        _customise(upper, plan)
        _mount("overlay", "quickstart", merged, f"lowerdir={lower},upperdir={upper},workdir={work}")
        try:
            yield merged
        finally:
            subprocess.run(["umount", "--recursive", "--lazy", str(merged)], check=False)
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=False)


def host_devices() -> list[oci.Device]:
    """Return the first usable character device of the host among `DEVICE_CANDIDATES`."""
    for path in DEVICE_CANDIDATES:
        with contextlib.suppress(OSError):
            status = os.stat(path)
            if stat.S_ISCHR(status.st_mode):
                return [oci.Device(path, os.major(status.st_rdev), os.minor(status.st_rdev))]
    return []


def bounding_set() -> int:
    """Return this process's capability bounding set (proc_pid_status(5), CapBnd)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapBnd:"):
            return int(line.split()[1], 16)
    raise RuntimeError("/proc/self/status has no CapBnd")


def _customise(upper: Path, plan: Plan) -> None:
    """Put a host name, masked units and the plan's own units into the upper layer, owned by the container's root."""
    system = upper / "etc/systemd/system"
    system.mkdir(parents=True)
    (upper / "etc/hostname").write_text(f"{plan.name}\n")
    for unit in MASKED_UNITS:
        (system / unit).symlink_to("/dev/null")
    for unit, text in (plan.units or {}).items():
        (system / unit).write_text(text)
    for directory, names, files in os.walk(upper):
        for name in names + files:
            os.lchown(os.path.join(directory, name), FIRST_ID, FIRST_ID)


def _mount(kind: str, source: str, target: Path, options: str) -> None:
    subprocess.run(["mount", "-t", kind, "-o", options, source, str(target)], check=True)
