"""From the manager's ``config.json`` to that of a guarded system container. Pure: specification in, specification out.

`rewrite` is idempotent, changes nothing that it was given, and knows nothing of the machine but what `Host` says.

Source: OCI runtime specification 1.0.2 to 1.2, config.md and config-linux.md.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from posixpath import basename, normpath
from typing import Any, Literal

from interceptor.errors import ContainerError
from interceptor.oci.profile import merge
from interceptor.oci.settings import Settings

Json = dict[str, Any]

#: Where a container is told from a machine by systemd-detect-virt(1); Docker's own files would do as well.
_CONTAINER_VARIABLE = "container"
_INITS = ("init", "systemd")

#: AppArmor profiles that managers give everybody, and that refuse every mount.
MANAGERS_APPARMOR = ("docker-default", "cri-containerd.apparmor.d", "containers-default", "crio-default")

#: What `privileged = "system"` leaves of a privileged container's device rules: what runtimes themselves add to it.
_NO_DEVICES = [{"allow": False, "access": "rwm"}]

_FULL = {"CAP_SYS_ADMIN", "CAP_SYS_MODULE", "CAP_SYS_RAWIO"}


@dataclass(frozen=True)
class IdRange:
    """A container's IDs ``0 … size - 1`` on the host."""

    first: int
    size: int


@dataclass(frozen=True)
class Host:
    """What of the machine and of the daemon's configuration goes into a specification."""

    uids: IdRange
    gids: IdRange
    listener: str
    """The daemon's seccomp agent socket."""
    hooks: Mapping[str, Sequence[str]]
    """Command lines for ``createRuntime`` and ``poststop``; their first word is an absolute path."""
    capabilities: Sequence[str]
    """Names of the bounding set that a system container can have here."""
    cgroup2: str | None = None
    """Host directory of the container's delegated cgroup v2, where that is mounted beside version 1."""
    wait_killable: bool = False
    honor_caps: bool = False
    privileged: Literal["refuse", "system"] = "refuse"
    apparmor: Literal["relax", "keep"] = "relax"


def asks_for_user_namespace(spec: Json) -> bool:
    """Whether the manager has taken care of a user namespace itself (userns-remap, ``hostUsers: false``)."""
    return "user" in namespaces(spec)


def namespaces(spec: Json) -> dict[str, str]:
    """The kinds of namespaces that the container gets, each with the path of one to join, or nothing."""
    found = (spec.get("linux") or {}).get("namespaces") or []
    return {str(n.get("type")): str(n.get("path") or "") for n in found}


def is_privileged(spec: Json) -> bool:
    """Whether this is what managers make of ``--privileged``: every capability and every device."""
    linux = spec.get("linux") or {}
    capabilities = ((spec.get("process") or {}).get("capabilities") or {}).get("bounding") or []
    rules = (linux.get("resources") or {}).get("devices") or []
    every = any(r.get("allow") and r.get("type") in (None, "", "a") and r.get("major") is None for r in rules)
    return set(capabilities) >= _FULL and every


def is_systemd(spec: Json, settings: Settings) -> bool:
    """Whether the first process is systemd, or another init that wants what systemd wants."""
    if settings.systemd is not None:
        return settings.systemd
    arguments = (spec.get("process") or {}).get("args") or [""]
    return basename(str(arguments[0])) in _INITS


def kept_paths(spec: Json) -> tuple[list[str], list[str]]:
    """``maskedPaths`` and ``readonlyPaths`` that go into the weld.

    ``/proc/sys`` is not among them: a system container writes its own namespaces' sysctls, and the view behind which
    they are gives it those only.
    """
    linux = spec.get("linux") or {}
    readonly = [path for path in linux.get("readonlyPaths") or [] if normpath(path) != "/proc/sys"]
    return list(linux.get("maskedPaths") or []), readonly


def rewrite(spec: Json, settings: Settings, host: Host) -> Json:
    """The specification of a guarded system container. Raises `ContainerError` for what cannot be one."""
    new = copy.deepcopy(spec)
    linux = new.setdefault("linux", {})
    _require_possible(new)
    if is_privileged(new):
        _tame(new, host)
    _user_namespace(linux, host)
    _mounts(new, settings, host)
    honor_caps = host.honor_caps if settings.honor_caps is None else settings.honor_caps
    process = new.setdefault("process", {})
    new["process"] = rewrite_process(process, honor_caps, host.capabilities, host.apparmor)
    if is_systemd(new, settings):
        _set_variable(new["process"], _CONTAINER_VARIABLE, "oci")
    # Taken over by the daemon: see `kept_paths`.
    linux["maskedPaths"], linux["readonlyPaths"] = [], []
    linux["seccomp"] = merge(
        linux.get("seccomp"), host.listener, system=not honor_caps, wait_killable=host.wait_killable
    )
    _sysctl(linux, host)
    _propagation(new)
    _hooks(new, host)
    return new


def rewrite_process(process: Json, honor_caps: bool, capabilities: Sequence[str], apparmor: str) -> Json:
    """``process`` of a specification, or of an exec. Root gets the capabilities of a system container, in its own user
    namespace; anybody else keeps the manager's, with the bounding set widened, so that ``sudo`` works."""
    new = copy.deepcopy(process)
    if not honor_caps:
        sets = dict(new.get("capabilities") or {})
        sets["bounding"] = list(capabilities)
        if not (new.get("user") or {}).get("uid"):
            sets |= {"effective": list(capabilities), "permitted": list(capabilities)}
            sets |= {name: [] for name in ("inheritable", "ambient") if name in sets}
        new["capabilities"] = sets
    if apparmor == "relax" and str(new.get("apparmorProfile") or "").startswith(MANAGERS_APPARMOR):
        new["apparmorProfile"] = "unconfined"
    return new


def _require_possible(spec: Json) -> None:
    found = namespaces(spec)
    for kind, why in (
        ("pid", "its procfs could not be mounted"),
        ("mount", "the host's own mounts would be welded"),
    ):
        if kind not in found or found[kind]:
            whose = "another container's" if found.get(kind) else "the host's"
            raise ContainerError(
                f"a system container needs a {kind} namespace of its own, and this one shares {whose}: {why}",
                "leave out --pid, hostPID and the like, or use the plain runtime for it",
            )


def _tame(spec: Json, host: Host) -> None:
    if host.privileged == "refuse":
        raise ContainerError(
            "privileged containers are refused: every device and the host's own capabilities leave nothing to guard",
            'a system container needs no --privileged; or set privileged = "system" to make one of it',
        )
    linux = spec["linux"]
    linux["devices"] = []
    linux.setdefault("resources", {})["devices"] = copy.deepcopy(_NO_DEVICES)
    # What managers mount for it alone.
    spec["mounts"] = [m for m in spec.get("mounts") or [] if m.get("destination") != "/dev/kmsg"]


def _user_namespace(linux: Json, host: Host) -> None:
    found = [dict(n) for n in linux.get("namespaces") or []]
    kinds = {n.get("type") for n in found}
    if "user" not in kinds:
        found.append({"type": "user"})
        for table, ids in (("uidMappings", host.uids), ("gidMappings", host.gids)):
            linux[table] = [{"containerID": 0, "hostID": ids.first, "size": ids.size}]
    if "cgroup" not in kinds:
        found.append({"type": "cgroup"})
    linux["namespaces"] = found


# ---- mounts ------------------------------------------------------------------------------------------------


def _mounts(spec: Json, settings: Settings, host: Host) -> None:
    mounts = [_writable(m) for m in spec.get("mounts") or []]
    found = namespaces(spec)
    mounts = [_sys(m, found.get("network") == "") for m in mounts]
    if found.get("ipc") != "":
        # The queues of another IPC namespace cannot be mounted from this user namespace.
        mounts = [m for m in mounts if m.get("type") != "mqueue"]
    if host.cgroup2 is not None:
        mounts = _cgroup2(mounts, host.cgroup2)
    taken = {normpath(str(m.get("destination"))) for m in mounts}
    devices = {d.get("path") for d in spec["linux"].get("devices") or []}
    if "/dev" in taken and "/dev/kmsg" not in taken | devices:
        # The host's log is not the container's; a program that insists on the node gets one that says nothing.
        mounts.append(_mount("bind", "/dev/null", "/dev/kmsg", ["bind", "rw"]))
    if is_systemd(spec, settings):
        mounts = _for_systemd(mounts, taken)
    spec["mounts"] = mounts


def _mount(kind: str, source: str, destination: str, options: Sequence[str]) -> Json:
    return {"type": kind, "source": source, "destination": destination, "options": list(options)}


def _writable(mount: Json) -> Json:
    """A system container manages its own sysfs nodes and cgroups. What is not its own the kernel refuses."""
    if mount.get("type") not in ("sysfs", "cgroup"):
        return mount
    options = [option for option in mount.get("options") or [] if option not in ("ro", "rw")]
    return {**mount, "options": [*options, "rw"]}


def _sys(mount: Json, own_network: bool) -> Json:
    """A new sysfs can be mounted only for a network namespace of the container's own user namespace."""
    if mount.get("type") != "sysfs" or own_network:
        return mount
    options = ["rbind", "nosuid", "noexec", "nodev", "ro"]
    return _mount("bind", "/sys", str(mount.get("destination")), options)


def _cgroup2(mounts: Sequence[Json], directory: str) -> list[Json]:
    new = _mount("bind", directory, "/sys/fs/cgroup", ["bind", "rw", "nosuid", "noexec", "nodev"])
    return [new if m.get("destination") == "/sys/fs/cgroup" else m for m in mounts]


def _for_systemd(mounts: Sequence[Json], taken: set[str]) -> list[Json]:
    """``/run`` and ``/run/lock`` as tmpfs, before whatever the manager mounts below them."""
    added = []
    if "/run" not in taken:
        added.append(_mount("tmpfs", "tmpfs", "/run", ["nosuid", "nodev", "mode=755"]))
    if "/run/lock" not in taken:
        added.append(_mount("tmpfs", "tmpfs", "/run/lock", ["nosuid", "noexec", "nodev", "mode=1777"]))
    own = [i for i, m in enumerate(mounts) if normpath(str(m.get("destination"))) == "/run"]
    below = [i for i, m in enumerate(mounts) if str(m.get("destination")).startswith("/run/")]
    place = own[0] + 1 if own else min(below, default=len(mounts))
    return [*mounts[:place], *added, *mounts[place:]]


def _propagation(spec: Json) -> None:
    """Mounts of a container in a user namespace of its own never propagate to the host (mount_namespaces(7),
    "Restrictions on mount namespaces"): what managers want shared can be a slave at most."""
    slave = {"shared": "slave", "rshared": "rslave"}
    linux = spec["linux"]
    if linux.get("rootfsPropagation") in slave:
        linux["rootfsPropagation"] = slave[linux["rootfsPropagation"]]
    for mount in spec["mounts"]:
        if "options" in mount:
            mount["options"] = [slave.get(option, option) for option in mount["options"] or []]


# ---- the rest ----------------------------------------------------------------------------------------------


def _set_variable(process: Json, name: str, value: str) -> None:
    environment = list(process.get("env") or [])
    if not any(entry.startswith(f"{name}=") for entry in environment):
        process["env"] = [*environment, f"{name}={value}"]


def _sysctl(linux: Json, host: Host) -> None:
    """A range of groups beyond the mapped ones, as Docker gives, is EINVAL in a user namespace."""
    table = linux.get("sysctl")
    name = "net.ipv4.ping_group_range"
    if not table or name not in table or len(str(table[name]).split()) != 2:
        return
    first, last = str(table[name]).split()
    if first.isdecimal() and last.isdecimal() and int(first) < host.gids.size <= int(last):
        linux["sysctl"] = {**table, name: f"{first} {host.gids.size - 1}"}


def _hooks(spec: Json, host: Host) -> None:
    hooks = dict(spec.get("hooks") or {})
    for name, argv in host.hooks.items():
        entry = {"path": argv[0], "args": list(argv)}
        # Last: after what else changes the container's mounts.
        hooks[name] = [*(hook for hook in hooks.get(name) or [] if hook != entry), entry]
    spec["hooks"] = hooks
