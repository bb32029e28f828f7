"""The bundle of the quickstart's container: an OCI ``config.json`` as plain data, without side effects.

Sources: OCI runtime specification 1.0.2, config.md and config-linux.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from interceptor.oci.capabilities import CAPABILITIES
from interceptor.oci.seccomp import oci_fragment

#: A JSON object as it goes into config.json.
Json = dict[str, Any]


@dataclass(frozen=True)
class Device:
    """A character device of the host, bound in under its own path."""

    path: str
    major: int
    minor: int


@dataclass(frozen=True)
class Bundle:
    """What varies from one container to the next.

    ``cgroup`` is the host directory of the delegated cgroup v2 that becomes ``/sys/fs/cgroup``. ``cgroups_path`` has to
    name the same cgroup, so that the runtime puts the first process there before it makes the cgroup namespace.
    ``hooks`` are command lines for ``createRuntime`` and ``poststop``, in order; their first word is an absolute path.
    ``notify`` is the host path of a datagram socket to which the container's systemd says that it has booted.
    """

    rootfs: str
    hostname: str
    first_id: int
    cgroups_path: str
    cgroup: str
    machine: str
    bounding_set: int
    listener: str | None = None
    listener_metadata: str = ""
    notify: str | None = None
    devices: Sequence[Device] = ()
    create_runtime: Sequence[Sequence[str]] = ()
    poststop: Sequence[Sequence[str]] = ()
    argv: Sequence[str] = ("/usr/lib/systemd/systemd", "--log-target=console", "--log-level=info")
    environment: Mapping[str, str] = field(default_factory=dict)


NAMESPACES = ("pid", "network", "ipc", "uts", "mount", "user", "cgroup")
ID_COUNT = 65536
#: Where the container's systemd finds the socket of `Bundle.notify` (the place that systemd-nspawn uses as well).
NOTIFY_INSIDE = "/run/host/notify"


def config(bundle: Bundle) -> Json:
    """Return the ``config.json`` of a system container: systemd as root of its own user namespace."""
    ids = [{"containerID": 0, "hostID": bundle.first_id, "size": ID_COUNT}]
    linux: Json = {
        "namespaces": [{"type": kind} for kind in NAMESPACES],
        "uidMappings": ids,
        "gidMappings": ids,
        "cgroupsPath": bundle.cgroups_path,
        "resources": {"devices": _device_rules(bundle.devices)},
        # Empty, not absent: runc's own defaults for these live in `runc spec`, but other runtimes differ.
        "maskedPaths": [],
        "readonlyPaths": [],
        "rootfsPropagation": "private",
    }
    if bundle.listener is not None:
        linux["seccomp"] = oci_fragment(bundle.listener, bundle.listener_metadata, bundle.machine)
    result: Json = {
        "ociVersion": "1.0.2",
        "hostname": bundle.hostname,
        "root": {"path": bundle.rootfs, "readonly": False},
        "process": process(bundle),
        "mounts": mounts(bundle),
        "linux": linux,
    }
    hooks = {
        name: [{"path": argv[0], "args": list(argv)} for argv in commands]
        for name, commands in (("createRuntime", bundle.create_runtime), ("poststop", bundle.poststop))
        if commands
    }
    if hooks:
        result["hooks"] = hooks
    return result


def process(bundle: Bundle) -> Json:
    """Return ``process``: no rlimits, because raising one needs CAP_SYS_RESOURCE, which not every host root has."""
    names = capabilities(bundle.bounding_set)
    environment: dict[str, str] = {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin",
        # What systemd calls "oci" is a container of a kind that it does not know; the value only has to be there.
        "container": "oci",
        "TERM": "dumb",
        **bundle.environment,
    }
    if bundle.notify is not None:
        environment["NOTIFY_SOCKET"] = NOTIFY_INSIDE
    return {
        "terminal": False,
        "user": {"uid": 0, "gid": 0},
        "cwd": "/",
        "args": list(bundle.argv),
        "env": [f"{name}={value}" for name, value in environment.items()],
        "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), names),
        "noNewPrivileges": False,
    }


def capabilities(bounding_set: int) -> list[str]:
    """Return the names of the capabilities in a mask such as CapBnd of proc_pid_status(5)."""
    return [name for number, name in enumerate(CAPABILITIES) if bounding_set >> number & 1]


def mounts(bundle: Bundle) -> list[Json]:
    """Return ``mounts``, in the order in which they are made."""
    strict = ["nosuid", "noexec", "nodev"]
    result: list[Json] = [
        _mount("proc", "proc", "/proc", strict),
        _mount("tmpfs", "tmpfs", "/dev", ["nosuid", "strictatime", "mode=755", "size=65536k"]),
        _mount(
            "devpts",
            "devpts",
            "/dev/pts",
            ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        ),
        _mount("tmpfs", "shm", "/dev/shm", [*strict, "mode=1777", "size=65536k"]),
        _mount("mqueue", "mqueue", "/dev/mqueue", strict),
        _mount("sysfs", "sysfs", "/sys", strict),
    ]
    result += [
        _mount("bind", bundle.cgroup, "/sys/fs/cgroup", ["bind", "rw", *strict]),
        _mount("tmpfs", "tmpfs", "/run", ["nosuid", "nodev", "mode=755"]),
        _mount("tmpfs", "tmpfs", "/run/lock", [*strict, "mode=1777"]),
        _mount("tmpfs", "tmpfs", "/tmp", ["nosuid", "nodev", "mode=1777"]),
    ]
    if bundle.notify is not None:
        result.append(_mount("bind", bundle.notify, NOTIFY_INSIDE, ["bind", "rw"]))
    result += [_mount("bind", device.path, device.path, ["bind", "rw"]) for device in bundle.devices]
    return result


def _device_rules(devices: Sequence[Device]) -> list[Json]:
    """Return cgroup device rules: nothing but the usual nodes (which runc adds itself) and those bound in."""
    return [
        {"allow": False, "access": "rwm"},
        {"allow": True, "type": "c", "access": "m"},
        {"allow": True, "type": "b", "access": "m"},
        *(
            {"allow": True, "type": "c", "major": device.major, "minor": device.minor, "access": "rw"}
            for device in devices
        ),
    ]


def _mount(kind: str, source: str, destination: str, options: Sequence[str]) -> Json:
    return {"type": kind, "source": source, "destination": destination, "options": list(options)}
