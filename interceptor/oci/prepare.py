"""What ``create`` and ``run`` find: a private copy of the configuration, and mounts that only this container is made
from.

Everything is mounted in a mount namespace of the wrapper's own, which the stock runtime takes over by execve(2) and the
container's copy of it outlives. Whoever is killed in between, nothing stays mounted. `in_child` does it, in a child of
the daemon: that has all of this loaded, and a source that hangs keeps nobody waiting but the one who wants it.
"""

from __future__ import annotations

import gc
import json
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from interceptor.errors import ContainerError, InterceptorError
from interceptor.idshift import clone, giveback
from interceptor.idshift.choose import Found, choose, worth_trying
from interceptor.idshift.coherence import DISK, MANAGER
from interceptor.idshift.idmapped import Mapper, user_namespace
from interceptor.idshift.overlay import Layers, MountLine, mount_of, parse_layers, parse_mountinfo
from interceptor.idshift.shiftfs import mount_shifted
from interceptor.idshift.subid import Block
from interceptor.kernel import mount
from interceptor.kernel.fd import OwnedFd
from interceptor.kernel.flags import CLONE_NEWNS, MountFlag
from interceptor.kernel.namespaces import open_namespace, setns
from interceptor.kernel.process import close_all_but
from interceptor.oci import rewrite as pure
from interceptor.oci.capabilities import CAPABILITIES
from interceptor.oci.settings import Settings, read_settings

#: Beside the manager's own work directory.
WORK = "interceptor-work"


@dataclass(frozen=True)
class Wanted:
    """What a bundle asks for."""

    bundle: str
    spec: dict[str, Any]
    settings: Settings
    root: str
    """The manager's root filesystem."""
    cgroup: str | None
    """The container's cgroup v2 directory, where it has to be made for it."""


@dataclass(frozen=True)
class Job:
    """One container on its way to the runtime."""

    cid: str
    wanted: Wanted
    uids: Block | None
    """None: the manager has mapped the container itself."""
    gids: Block | None
    stage: str
    note: str
    """A file to leave for later commands."""
    listener: str
    hooks: Mapping[str, list[str]]
    wait_killable: bool
    config: Mapping[str, Any]
    runtime: str
    runtime_root: str
    clones: str
    """Where links to clones are."""


def read_wanted(bundle: str, pid: int) -> Wanted:
    """What ``bundle`` asks for, on behalf of the process ``pid``. Raises `ContainerError`."""
    try:
        spec = _read(f"{bundle}/config.json")
    except OSError as error:
        raise ContainerError(f"{bundle}/config.json: {error.strerror}") from None
    settings = read_settings(spec.get("annotations"), (spec.get("process") or {}).get("env"))
    root = os.path.realpath(os.path.join(bundle, (spec.get("root") or {}).get("path") or "rootfs"))
    return Wanted(bundle, spec, settings, root, _cgroup2(spec, pid))


def fork_child(job: Job, pid: int) -> tuple[OwnedFd, int]:
    """Starts a child that puts everything together in the mount namespace of the process ``pid``; returns a descriptor
    with what `read_answer` understands, up to its end, and the child. Raises `OSError`."""
    read, write = os.pipe2(os.O_CLOEXEC)
    with open_namespace(pid, "mnt") as namespace:
        child = os.fork()
        if child == 0:
            _in_child(job, namespace.fileno(), write)
    os.close(write)
    return OwnedFd(read), child


def read_answer(data: bytes) -> dict[str, Any]:
    """What the child said. Raises `ContainerError` with its words where it failed."""
    try:
        answer = json.loads(data)
    except ValueError:
        raise ContainerError("what prepares containers ended without a word") from None
    if "error" in answer:
        raise ContainerError(answer["error"], answer["hint"])
    found = answer["result"]
    assert isinstance(found, dict)
    return found


def _in_child(job: Job, namespace: int, write: int) -> None:
    """Never returns."""
    answer: dict[str, Any] = {"error": "internal error", "hint": "report it"}
    try:
        # Of what the daemon holds nothing is to be held here, should this hang: listeners, pidfds, overlays.
        close_all_but((0, 1, 2, namespace, write))
        # A collection looks at all that the daemon has, and at what has been seen of a tree, again and again.
        gc.disable()
        setns(namespace, CLONE_NEWNS)
        # Before the answer, blanks say that there is work.
        answer = {"result": build(job, lambda: os.write(write, b" "))}
    except (InterceptorError, OSError) as error:
        answer = {"error": str(error), "hint": getattr(error, "hint", None)}
    finally:
        os.write(write, json.dumps(answer).encode())
        os._exit(0)


def _read(path: str) -> dict[str, Any]:
    try:
        with open(path) as file:
            spec = json.load(file)
    except ValueError as error:
        raise ContainerError(f"{path}: {error}") from None
    if not isinstance(spec, dict):
        raise ContainerError(f"{path}: not an object")
    return spec


def _cgroup2(spec: dict[str, Any], pid: int) -> str | None:
    """The container's cgroup v2 where the runtime will see that beside version 1 ("hybrid"), whose other hierarchies a
    container cannot be given. Runtimes with the cgroupfs driver use the same path in all of them."""
    path = (spec.get("linux") or {}).get("cgroupsPath") or ""
    unified = "/sys/fs/cgroup/unified"
    if not path.startswith("/") or not os.path.exists(f"/proc/{pid}/root{unified}/cgroup.controllers"):
        return None
    return unified + os.path.normpath(path)


def build(job: Job, alive: Callable[[], object]) -> dict[str, Any]:
    """Rewrites, maps, mounts, calling ``alive`` where that takes long; returns where the root filesystem is, what was
    decided, and what is to be cleaned up. Raises `InterceptorError`, `OSError`."""
    wanted = job.wanted
    uids, gids = _ids(job)
    host = pure.Host(
        uids=pure.IdRange(*uids),
        gids=pure.IdRange(*gids),
        listener=job.listener,
        hooks=job.hooks,
        capabilities=_bounding_set(),
        cgroup2=wanted.cgroup,
        wait_killable=job.wait_killable,
        honor_caps=job.config["honor_caps"],
        privileged=job.config["privileged"],
        apparmor=job.config["apparmor"],
    )
    new = pure.rewrite(wanted.spec, wanted.settings, host)
    if wanted.cgroup is not None:
        _delegate(wanted.cgroup, uids.first, gids.first)
    _private_mounts(job.stage)
    mapped: dict[str, Any] = {"decisions": [], "scratch": [], "clone": None}
    if job.uids is not None:
        mapped = _map(job, new, uids, gids, alive)
    else:
        new.setdefault("root", {})["path"] = wanted.root
    _leave_note(job, host, mapped["clone"])
    place = f"{job.stage}/config.json"
    with open(place, "w") as file:
        json.dump(new, file)
    # The manager's own file stays as it is: this one lies on top in this mount namespace alone.
    mount.mount(place, f"{wanted.bundle}/config.json", None, MountFlag.MS_BIND)
    owner = int((new["process"].get("user") or {}).get("uid") or 0)
    return {"root": new["root"]["path"], "stdio_owner": uids.first + owner, **mapped}


def _ids(job: Job) -> tuple[Block, Block]:
    if job.uids is not None and job.gids is not None:
        return job.uids, job.gids
    # Ranges of the manager's choice: only the first IDs matter here.
    linux = job.wanted.spec.get("linux") or {}
    found = []
    for table in ("uidMappings", "gidMappings"):
        rows = [row for row in linux.get(table) or [] if row.get("containerID") == 0]
        if not rows:
            raise ContainerError(f"the user namespace of the configuration maps no root: {table}")
        found.append(Block(int(rows[0]["hostID"]), int(rows[0]["size"])))
    return found[0], found[1]


def _bounding_set() -> list[str]:
    with open("/proc/self/status") as file:
        mask = next(int(line.split()[1], 16) for line in file if line.startswith("CapBnd:"))
    return [name for number, name in enumerate(CAPABILITIES) if mask >> number & 1]


def _delegate(cgroup: str, uid: int, gid: int) -> None:
    """cgroups(7), "Cgroup delegation"."""
    os.makedirs(cgroup, exist_ok=True)
    for name in ("", "cgroup.procs", "cgroup.subtree_control", "cgroup.threads"):
        os.chown(os.path.join(cgroup, name), uid, gid)


def _private_mounts(stage: str) -> None:
    # What the host mounts and unmounts goes on to arrive here; nothing goes out.
    mount.mount(b"none", b"/", None, MountFlag.MS_REC | MountFlag.MS_SLAVE)
    # Searchable: the container's root has to find its root filesystem here.
    mount.mount(b"interceptor", stage, b"tmpfs", MountFlag.MS_NOSUID | MountFlag.MS_NODEV, b"mode=0755")
    for name in ("rootfs", "layers", "binds"):
        os.mkdir(f"{stage}/{name}", 0o755)


def _leave_note(job: Job, host: pure.Host, cloned: str | None) -> None:
    settings = job.wanted.settings
    honor = host.honor_caps if settings.honor_caps is None else settings.honor_caps
    note = {
        "first_uid": host.uids.first,
        "systemd": pure.is_systemd(job.wanted.spec, settings),
        "honor_caps": honor,
        "capabilities": list(host.capabilities),
        "apparmor": host.apparmor,
        "clone": cloned,
    }
    os.makedirs(os.path.dirname(job.note), 0o700, exist_ok=True)
    with open(job.note, "w") as file:
        json.dump(note, file)


# ---- ownership ---------------------------------------------------------------------------------------------


def _map(
    job: Job, new: dict[str, Any], uids: Block, gids: Block, alive: Callable[[], object]
) -> dict[str, Any]:
    """Maps the root filesystem and the binds; returns what was decided for each, and what is to be cleaned up."""
    stage = job.stage
    with user_namespace(uids, gids) as namespace:
        mapping = _Mapping(job, Mapper(namespace, uids, gids, f"{stage}/layers"), namespace, alive)
        decisions = [{"path": "/", **mapping.root(new)}]
        for number, entry in enumerate(new["mounts"]):
            options = entry.get("options") or []
            if {"bind", "rbind"} & set(options) or entry.get("type") == "bind":
                decision = mapping.bind(entry, f"{stage}/binds/{number}")
                decisions.append({"path": entry["destination"], **decision})
        _devices(new, f"{stage}/devices", uids, gids)
    return {"decisions": decisions, "scratch": mapping.scratch, "clone": mapping.cloned}


def _devices(new: dict[str, Any], place: str, uids: Block, gids: Block) -> None:
    """Device nodes of the configuration as nodes of our own, owned inside: runtimes would bind the host's, which belong
    to nobody there, and devtmpfs cannot be mapped. What may be opened is still the device cgroup's affair."""
    devices = new["linux"].get("devices") or []
    if not devices:
        return
    os.mkdir(place, 0o755)
    mount.mount(b"interceptor", place, b"tmpfs", MountFlag.MS_NOSUID | MountFlag.MS_NOEXEC, b"mode=0755")
    kinds = {"c": stat.S_IFCHR, "u": stat.S_IFCHR, "b": stat.S_IFBLK}
    left = []
    for number, device in enumerate(devices):
        if device.get("type") not in kinds:
            left.append(device)
            continue
        node = f"{place}/{number}"
        mode = int(device.get("fileMode") or 0o666) & 0o777
        os.mknod(node, kinds[device["type"]] | mode, os.makedev(int(device["major"]), int(device["minor"])))
        os.chmod(node, mode)
        owner, group = int(device.get("uid") or 0), int(device.get("gid") or 0)
        os.chown(node, uids.first + min(owner, uids.size - 1), gids.first + min(group, gids.size - 1))
        new["mounts"].append(
            {"type": "bind", "source": node, "destination": device["path"], "options": ["bind", "rw"]}
        )
    new["linux"]["devices"] = left


class _Mapping:
    """Tries, decides, attaches."""

    def __init__(self, job: Job, mapper: Mapper, namespace: OwnedFd, alive: Callable[[], object]) -> None:
        with open("/proc/self/mountinfo", errors="surrogateescape") as file:
            self._mounts = parse_mountinfo(file.read())
        self._job = job
        self._mapper = mapper
        self._namespace = namespace
        self._alive = alive
        self._allowed = job.config["ownership_strategies"]
        self._ownership = job.wanted.settings.ownership
        self._overlays: dict[int, str] = {}
        self._tries = 0
        self.scratch: list[str] = []
        self.cloned: str | None = None
        """The directory of the root filesystem's clone."""
        self._how = ""

    def root(self, new: dict[str, Any]) -> dict[str, str]:
        """Puts the root filesystem at the stage's ``rootfs`` and has ``new`` name that."""
        job = self._job
        place = f"{job.stage}/rootfs"
        self._finish_leftover(job.wanted.root)
        found, tree = self._try(self._find(job.wanted.root, "/", root=True), WORK, recursive=True)
        decision = choose(found, self._allowed, self._ownership)
        if tree is None:
            mount.mount(job.wanted.root, place, None, MountFlag.MS_BIND | MountFlag.MS_REC)
        else:
            with tree:
                mount.attach(tree, mount.AT_FDCWD, place)
        new.setdefault("root", {})["path"] = place
        return {"strategy": decision.strategy, "reason": f"{decision.reason}{self._how}"}

    def bind(self, entry: dict[str, Any], place: str) -> dict[str, str]:
        """Puts a mapped clone of a bind's source at ``place``, if that can be, and has ``entry`` name that."""
        source = os.path.realpath(os.path.join(self._job.wanted.bundle, entry.get("source") or ""))
        recursive = "rbind" in (entry.get("options") or [])
        work = f"{WORK}-{self._job.cid}"
        found, tree = self._try(self._find(source, entry["destination"]), work, recursive)
        decision = choose(found, self._allowed)
        if tree is not None:
            with tree:
                if stat.S_ISDIR(os.fstat(tree.fileno()).st_mode):
                    os.mkdir(place, 0o755)
                else:
                    with open(place, "w"):
                        pass
                mount.attach(tree, mount.AT_FDCWD, place)
            entry["source"] = place
        return {"strategy": decision.strategy, "reason": decision.reason}

    def _find(self, path: str, destination: str, root: bool = False) -> Found:
        status = os.stat(path)
        skip = self._job.wanted.settings.skip_id_shift
        plain = stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode)
        return Found(
            path=path,
            root=root,
            fstype=mount_of(path, self._mounts).fstype,
            skip="*" in skip or os.path.normpath(destination) in skip,
            special=not plain,
            owned_inside=self._mapper.owned_inside(status),
        )

    def _try(self, found: Found, work: str, recursive: bool) -> tuple[Found, OwnedFd | None]:
        """The tree with mapped owners, and in what is known why it is none, or not of a better kind."""
        for strategy in worth_trying(found, self._allowed, self._ownership):
            try:
                if strategy == "idmapped":
                    return found, self._idmapped(found, work, recursive)
                if strategy == "shiftfs":
                    return found, mount_shifted(found.path, self._namespace, self._empty())
                return found, self._clone(found)
            except (InterceptorError, OSError) as error:
                found = replace(found, failures={**found.failures, strategy: str(error)})
        return found, None

    def _empty(self) -> str:
        """A new directory of the stage."""
        self._tries += 1
        place = f"{self._job.stage}/layers/t{self._tries}"
        os.mkdir(place, 0o755)
        return place

    def _idmapped(self, found: Found, work: str, recursive: bool) -> OwnedFd:
        line = mount_of(found.path, self._mounts)
        if line.fstype != "overlay":
            return self._mapper.tree(found.path, recursive)
        return self._from_overlay(found, line, work)

    def _layers(self, path: str) -> Layers | None:
        """The layers of a root filesystem that is an overlay."""
        line = mount_of(path, self._mounts)
        whole = line.fstype == "overlay" and path == line.point
        return parse_layers(line, os.path.lexists) if whole else None

    def _finish_leftover(self, root: str) -> None:
        """A clone of the same tree that nobody could give back yet: its changes are older than this container."""
        try:
            directory = clone.place_of(root, self._layers(root))
        except ContainerError:
            return
        if os.path.isdir(directory):
            giveback.finish(directory, lambda _: self._alive())

    def _clone(self, found: Found) -> OwnedFd:
        job, layers = self._job, self._layers(found.path)
        assert job.uids is not None and job.gids is not None
        directory = clone.place_of(found.path, layers)
        why_not = clone.try_metadata(os.path.dirname(directory), self._empty())
        target = found.path if layers is None or layers.upper is None else os.path.realpath(layers.upper)
        lower = [os.path.realpath(path) for path in (layers.lower if layers is not None else ())]
        options = layers.options if layers is not None else ()
        record = clone.Record(
            cid=job.cid,
            uids=job.uids,
            gids=job.gids,
            runtime=job.runtime,
            runtime_root=job.runtime_root,
            manager=os.fsencode(found.path),
            target=os.fsencode(target),
            overlay=layers is not None,
            lower=tuple(map(os.fsencode, lower)),
            options=tuple((os.fsencode(k), None if v is None else os.fsencode(v)) for k, v in options),
            metadata=why_not is None,
            index=os.fsencode(f"{job.clones}/{job.cid}"),
        )
        clone.create(directory, record, self._alive)
        tree = clone.mount_clone(directory, record, "work", self._empty())
        self.cloned = directory
        self._how = ", without copying data"
        if why_not is not None:
            self._how = f", with all data shared by reflink or copied: {why_not}"
        if layers is not None:
            self._leave_for_coherence(found.path, layers)
        return tree

    def _leave_for_coherence(self, path: str, layers: Layers) -> None:
        if layers.upper is not None:
            self._leave(path, MANAGER)
            self._leave(os.path.dirname(os.path.realpath(layers.upper)), DISK)

    def _leave(self, path: str, name: str) -> None:
        """For the daemon: see `interceptor.idshift.coherence`."""
        place = f"{self._job.stage}/{name}"
        os.mkdir(place, 0o700)
        with mount.clone_mount(mount.AT_FDCWD, path) as tree:
            mount.attach(tree, mount.AT_FDCWD, place)

    def _from_overlay(self, found: Found, line: MountLine, work: str) -> OwnedFd:
        layers = parse_layers(line, os.path.lexists)
        if found.root and found.path == line.point:
            tree = self._mapper.overlay(layers, work)
            self._leave_for_coherence(found.path, layers)
            return tree
        place = self._overlays.get(line.mnt_id)
        if place is None:
            place = f"{self._job.stage}/layers/m{line.mnt_id}"
            os.mkdir(place, 0o755)
            with self._mapper.overlay(layers, work) as tree:
                mount.attach(tree, mount.AT_FDCWD, place)
            self._overlays[line.mnt_id] = place
            if layers.upper is not None:
                self.scratch.append(os.path.join(os.path.dirname(os.path.realpath(layers.upper)), work))
        inside = os.path.relpath(found.path, line.point)
        return mount.clone_mount(mount.AT_FDCWD, os.path.normpath(f"{place}{line.root}/{inside}"))
