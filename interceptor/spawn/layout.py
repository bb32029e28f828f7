"""What a child's filesystem looks like: its mounts in order, as data, and the bundle that tells the daemon of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_

from interceptor.errors import InterceptorError
from interceptor.kernel.flags import (
    CLONE_NEWCGROUP,
    CLONE_NEWIPC,
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWUSER,
    CLONE_NEWUTS,
    MountAttr,
    MountFlag,
)

#: Where the child makes its root filesystem before it pivots, in its own mount namespace: every host has the directory,
#: and whoever can search it need not be able to search anything else of the host.
STAGE = "/tmp"
ROOTFS = "/tmp/rootfs"

#: Namespaces of every child but the user namespace, by their OCI names (config-linux.md, "Namespaces").
NAMESPACES: Mapping[str, int] = {
    "mount": CLONE_NEWNS,
    "pid": CLONE_NEWPID,
    "network": CLONE_NEWNET,
    "ipc": CLONE_NEWIPC,
    "uts": CLONE_NEWUTS,
    "cgroup": CLONE_NEWCGROUP,
}


def namespace_flags(user_namespace: bool) -> int:
    """For unshare(2) and setns(2)."""
    return sum(NAMESPACES.values()) | (CLONE_NEWUSER if user_namespace else 0)


#: Options of mount(8) that are flags; every other one is the filesystem's own. None: says what is so anyway.
FLAGS: Mapping[str, MountFlag | None] = {
    "defaults": None,
    "rw": None,
    "suid": None,
    "dev": None,
    "exec": None,
    "ro": MountFlag.MS_RDONLY,
    "nosuid": MountFlag.MS_NOSUID,
    "nodev": MountFlag.MS_NODEV,
    "noexec": MountFlag.MS_NOEXEC,
    "nosymfollow": MountFlag.MS_NOSYMFOLLOW,
    "noatime": MountFlag.MS_NOATIME,
    "nodiratime": MountFlag.MS_NODIRATIME,
    "relatime": MountFlag.MS_RELATIME,
    "strictatime": MountFlag.MS_STRICTATIME,
    "bind": MountFlag.MS_BIND,
    "rbind": MountFlag.MS_BIND | MountFlag.MS_REC,
}

PROPAGATION: Mapping[str, MountFlag] = {
    "private": MountFlag.MS_PRIVATE,
    "slave": MountFlag.MS_SLAVE,
    "shared": MountFlag.MS_SHARED,
    "unbindable": MountFlag.MS_UNBINDABLE,
    "rprivate": MountFlag.MS_PRIVATE | MountFlag.MS_REC,
    "rslave": MountFlag.MS_SLAVE | MountFlag.MS_REC,
    "rshared": MountFlag.MS_SHARED | MountFlag.MS_REC,
    "runbindable": MountFlag.MS_UNBINDABLE | MountFlag.MS_REC,
}

#: Flags that a mount has of its own, for mount_setattr(2): the others belong to the superblock.
ATTRIBUTES: Mapping[MountFlag, MountAttr] = {
    MountFlag.MS_RDONLY: MountAttr.MOUNT_ATTR_RDONLY,
    MountFlag.MS_NOSUID: MountAttr.MOUNT_ATTR_NOSUID,
    MountFlag.MS_NODEV: MountAttr.MOUNT_ATTR_NODEV,
    MountFlag.MS_NOEXEC: MountAttr.MOUNT_ATTR_NOEXEC,
    MountFlag.MS_NOSYMFOLLOW: MountAttr.MOUNT_ATTR_NOSYMFOLLOW,
    MountFlag.MS_NODIRATIME: MountAttr.MOUNT_ATTR_NODIRATIME,
    MountFlag.MS_NOATIME: MountAttr.MOUNT_ATTR_NOATIME,
}

DEVICES = ("null", "zero", "full", "random", "urandom", "tty")

LINKS: Mapping[str, str] = {
    "/dev/ptmx": "pts/ptmx",
    "/dev/fd": "/proc/self/fd",
    "/dev/stdin": "/proc/self/fd/0",
    "/dev/stdout": "/proc/self/fd/1",
    "/dev/stderr": "/proc/self/fd/2",
}


@dataclass(frozen=True)
class Mount:
    """One mount of a child, as in ``mounts`` of an OCI bundle (config.md, "Mounts").

    ``options`` are those of mount(8); ``bind`` or ``rbind`` make it a bind of the host's ``source``. The destination is
    resolved inside the child's root and made if it does not exist.
    """

    source: str
    destination: str
    type: str = ""
    options: Sequence[str] = ()

    @property
    def flags(self) -> MountFlag:
        """The options that are flags of mount(2)."""
        return reduce(or_, (FLAGS.get(option) or MountFlag(0) for option in self.options), MountFlag(0))

    @property
    def propagation(self) -> Sequence[MountFlag]:
        """The options that are changes of propagation, each of which takes a call of its own."""
        return [PROPAGATION[option] for option in self.options if option in PROPAGATION]

    @property
    def data(self) -> str:
        """The options that are the filesystem's."""
        return ",".join(o for o in self.options if o not in FLAGS and o not in PROPAGATION)

    @property
    def is_bind(self) -> bool:
        return bool(self.flags & MountFlag.MS_BIND)

    def checked(self) -> Mount:
        """Itself. Raises `InterceptorError` where it cannot be meant."""
        if not os.path.isabs(self.destination):
            raise InterceptorError(f"mount destination {self.destination!r}: not an absolute path")
        if not self.is_bind and not self.type:
            raise InterceptorError(f"mount at {self.destination}: neither a type nor the option bind")
        if self.is_bind and self.data:
            raise InterceptorError(f"mount at {self.destination}: a bind has no option {self.data!r}")
        return self


_STRICT = ("nosuid", "noexec", "nodev")


def base_mounts() -> list[Mount]:
    """procfs, sysfs and what every container has besides, in the order in which they are made."""
    mounts = [
        Mount("proc", "/proc", "proc", _STRICT),
        Mount("sysfs", "/sys", "sysfs", _STRICT),
        Mount("tmpfs", "/dev", "tmpfs", ("nosuid", "strictatime", "mode=755", "size=64m")),
        Mount(
            "devpts", "/dev/pts", "devpts", ("nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620")
        ),
        Mount("shm", "/dev/shm", "tmpfs", (*_STRICT, "mode=1777")),
        Mount("mqueue", "/dev/mqueue", "mqueue", _STRICT),
    ]
    mounts += [Mount(f"/dev/{name}", f"/dev/{name}", "", ("bind",)) for name in DEVICES]
    mounts += [
        Mount("tmpfs", "/run", "tmpfs", ("nosuid", "nodev", "mode=755")),
        Mount("tmpfs", "/tmp", "tmpfs", ("nosuid", "nodev", "mode=1777")),
    ]
    return mounts


@dataclass(frozen=True)
class Skeleton:
    """A root filesystem without an image: an empty tmpfs with the host's programs, read-only."""

    directories: Sequence[str]
    links: Mapping[str, str]
    files: Mapping[str, bytes]
    mounts: Sequence[Mount]


def skeleton(hostname: str) -> Skeleton:
    """What is in a child's root where no ``rootfs`` is given. Reads the host's files."""
    links = {}
    binds = ["/usr", "/etc/alternatives"]
    for name in ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"):
        if os.path.islink(name):
            links[name] = os.readlink(name)
        elif os.path.isdir(name):
            binds.append(name)
    files = {
        "/etc/passwd": b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/usr/sbin/nologin\n",
        "/etc/group": b"root:x:0:\ntty:x:5:\nnogroup:x:65534:\n",
        "/etc/hostname": f"{hostname}\n".encode(),
        "/etc/hosts": f"127.0.0.1 localhost\n::1 localhost\n127.0.1.1 {hostname}\n".encode(),
        # The dynamic linker finds /usr/local/lib by it.
        "/etc/ld.so.cache": _read("/etc/ld.so.cache"),
    }
    return Skeleton(
        directories=("/etc", "/root", "/mnt", "/opt", "/srv", "/home", "/var", "/var/tmp", "/var/lib"),
        links=links,
        files=files,
        mounts=[
            Mount(path, path, "", ("rbind", "ro", "nosuid", "nodev")) for path in binds if os.path.isdir(path)
        ],
    )


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""


def bundle(
    *,
    hostname: str,
    mounts: Iterable[Mount],
    first_id: int | None,
    id_count: int,
    masked_paths: Sequence[str],
    readonly_paths: Sequence[str],
) -> dict[str, object]:
    """``config.json`` of the bundle that describes the child to the daemon. ``first_id`` None: no user namespace."""
    linux: dict[str, object] = {
        "namespaces": [
            {"type": name} for name in (*NAMESPACES, *(("user",) if first_id is not None else ()))
        ],
        "maskedPaths": list(masked_paths),
        "readonlyPaths": list(readonly_paths),
    }
    if first_id is not None:
        linux["uidMappings"] = [{"containerID": 0, "hostID": first_id, "size": id_count}]
        linux["gidMappings"] = linux["uidMappings"]
    return {
        "ociVersion": "1.0.2",
        "hostname": hostname,
        "root": {"path": ROOTFS, "readonly": False},
        "mounts": [
            {
                "source": m.source,
                "destination": m.destination,
                "type": m.type or "bind",
                "options": list(m.options),
            }
            for m in mounts
        ],
        "linux": linux,
    }
