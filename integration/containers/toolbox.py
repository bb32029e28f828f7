"""A guarded systemd container with today's mount tools in it, kept running for those who start this as a program.

``python -m integration.containers.toolbox`` boots it, prints one line of JSON (`Box`), and takes everything away when
its standard input ends. It runs in a mount namespace of its own; the container is entered with ``runc exec``.

The root filesystem is trixie's (systemd 257, util-linux 2.41, runc 1.1, crun, bubblewrap, podman, buildah, dockerd,
mkosi-sandbox), with bookworm's (util-linux 2.38) at ``/opt/bookworm`` and the newest runc of Debian's testing suite at
``/opt/runc``: that line has the procfs checks of libpathrs.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from integration.containers import rootfs, session
from integration.containers.daemon import serving
from integration.containers.systemd import FIRST_ID, started

CACHE = Path("/var/cache/interceptor")
BOOT_SECONDS = 120.0
_LONG = 86400.0
PACKAGES = (
    *("libpam-systemd", "systemd-container", "uidmap", "iproute2", "strace"),
    *("bubblewrap", "runc", "crun", "podman", "buildah", "docker.io", "mkosi", "fuse-overlayfs"),
)
_TESTING = "forky"
_KEYS = "/usr/share/keyrings/debian-archive-keyring.gpg"


#: The container's own /dev/fuse is not for it, and no overlay lies on an overlay.
_DOCKERD = {"storage-driver": "vfs", "runtimes": {"new": {"path": "/opt/runc/usr/sbin/runc"}}}


@dataclass(frozen=True)
class Box:
    """The container that runs, as the host sees it."""

    id: str
    state: str
    """For ``runc --root``."""
    pid: int
    config: str
    """The daemon's, for ``interceptor --config``."""
    log: str


def recipe() -> rootfs.Recipe:
    """What the root filesystem is made of."""
    return rootfs.Recipe("trixie-tools-1", rootfs.SUITE, rootfs.PACKAGES, _extras)


def _extras(tree: Path, scratch: Path) -> None:
    """Add the tools, bookworm's, a newer runc, and a user who has subordinate IDs."""
    log = CACHE / "debootstrap.log"
    # Some of these need a whole system to be configured in, which debootstrap's own order does not give them.
    inside = ["unshare", "--mount", "--pid", "--fork", f"--mount-proc={tree}/proc", "chroot", str(tree)]
    install = ["apt-get", "install", "--yes", "--quiet", "--no-install-recommends", *PACKAGES]
    with open(scratch / "apt.log", "wb") as output:
        subprocess.run(
            [*inside, "env", "DEBIAN_FRONTEND=noninteractive", *install],
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    rootfs.debootstrap(tree / "opt/bookworm", "bookworm", ("util-linux", "mount"), log)
    package = _download(scratch, _mirror(tree), "runc")
    subprocess.run(["dpkg-deb", "--extract", str(package), str(tree / "opt/runc")], check=True)
    subprocess.run(["chroot", str(tree), "useradd", "--create-home", "--uid=1000", "worker"], check=True)
    for name in ("subuid", "subgid"):
        (tree / "etc" / name).write_text("worker:2000:50000\n")
    (tree / "etc/docker").mkdir(exist_ok=True)
    (tree / "etc/docker/daemon.json").write_text(json.dumps(_DOCKERD))


def _mirror(tree: Path) -> str:
    """Where debootstrap found the tree's packages."""
    words = (tree / "etc/apt/sources.list").read_text().split()
    return words[words.index(rootfs.SUITE) - 1]


def _download(scratch: Path, mirror: str, package: str) -> Path:
    """Fetch one package of the testing suite, with the host's own apt but lists of its own."""
    for name in ("lists/partial", "cache/archives/partial"):
        (scratch / name).mkdir(parents=True)
    (scratch / "sources.list").write_text(f"deb [signed-by={_KEYS}] {mirror} {_TESTING} main\n")
    places = {
        "Dir::Etc::sourcelist": scratch / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "Dir::State::lists": scratch / "lists",
        "Dir::Cache": scratch / "cache",
        "Dir::State::status": "/dev/null",
        "APT::Sandbox::User": "root",
    }
    options = [f"--option={key}={value}" for key, value in places.items()]
    for words in (["update"], ["download", package]):
        subprocess.run(["apt-get", "-q", *options, *words], cwd=scratch, check=True, capture_output=True)
    (found,) = scratch.glob(f"{package}_*.deb")
    return found


def main() -> int:
    """Boot the container, say where it is, and keep it until standard input ends."""
    lower = rootfs.ensure_of(recipe(), CACHE, FIRST_ID)
    with session.work_directory() as directory, serving(directory / "interceptor") as daemon:
        name = f"toolbox-{os.getpid()}"
        with started(session.guarded_plan(name, lower, directory, daemon)) as booting:
            booting.ready.wait_ready(booting.pid, BOOT_SECONDS)
            state = str(booting.container.root)
            box = Box(name, state, booting.pid, str(daemon.config), str(daemon.log))
            print(json.dumps(dataclasses.asdict(box)), flush=True)
            # Its systemd, and what is run with its environment, goes on to send there: unread, they would wait.
            while booting.ready.wait_ready(booting.pid, _LONG, wake=sys.stdin.fileno()):
                pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
