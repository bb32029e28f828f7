"""Docker, Podman and containerd on private directories: what their pages of README.md take for granted."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from integration.containers import cgroups
from integration.docker.engine import IMAGE
from integration.pages.shell import Manager, Place, import_tree, started

# ---- Docker ------------------------------------------------------------------------------------------------


def _docker_host(place: Place) -> Mapping[str, str]:
    return {"DOCKER_HOST": f"unix://{place.directory}/docker.sock"}


@contextlib.contextmanager
def _docker(place: Place) -> Iterator[None]:
    parent = f"/{place.directory.name}"
    argv = [
        *("dockerd", "--iptables=false", "--bridge=none", f"--host=unix://{place.directory}/docker.sock"),
        *(f"--data-root={place.data}", f"--exec-root={place.directory}/exec"),
        *(f"--pidfile={place.directory}/docker.pid", f"--cgroup-parent={parent}"),
    ]
    try:
        with started(argv, place.directory / "dockerd"):
            import_tree(place.tree, ["docker", "import", "-", IMAGE], _docker_host(place))
            yield
    finally:
        _remove_cgroups(parent)


def _remove_cgroups(parent: str) -> None:
    for hierarchy in Path("/sys/fs/cgroup").glob("*"):
        cgroups.remove(hierarchy / parent.strip("/"))


# ---- Podman ------------------------------------------------------------------------------------------------


def _limit(kind: int) -> str:
    """What may be set without CAP_SYS_RESOURCE, which a machine may lack; Podman lowers its own to 32768."""
    _, hard = resource.getrlimit(kind)
    limit = hard if 0 < hard < 1 << 14 else 1 << 14
    return f"{limit}:{limit}"


@contextlib.contextmanager
def _podman(place: Place) -> Iterator[None]:
    """There is nothing to start: it is configured to take nothing of the machine's, and no more than it has."""
    ulimits = [f"nofile={_limit(resource.RLIMIT_NOFILE)}", f"nproc={_limit(resource.RLIMIT_NPROC)}"]
    directory = place.directory
    files = {
        "containers.conf": f"""
            [containers]
            netns = "none"
            default_ulimits = {json.dumps(ulimits)}
            [engine]
            cgroup_manager = "cgroupfs"
            events_logger = "file"
            lock_type = "file"
            tmp_dir = "{directory}/podman"
            """,
        "storage.conf": f"""
            [storage]
            driver = "overlay"
            graphroot = "{place.data}/storage"
            runroot = "{directory}/storage"
            """,
        "policy.json": '{"default": [{"type": "insecureAcceptAnything"}]}',
    }
    for name, text in files.items():
        Path("/etc/containers", name).write_text(text)
    import_tree(place.tree, ["podman", "import", "-", IMAGE], {})
    try:
        yield
    finally:
        subprocess.run(["podman", "rm", "--all", "--force"], check=True, capture_output=True)
        # Of cgroupfs, which has no setting for it; others may have theirs there.
        with contextlib.suppress(OSError):
            for hierarchy in Path("/sys/fs/cgroup").glob("*"):
                os.rmdir(hierarchy / "libpod_parent")


# ---- containerd --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _containerd(place: Place) -> Iterator[None]:
    config = place.directory / "containerd.toml"
    # The socket is the usual one, in a directory that is private.
    config.write_text(f"""
        version = 2
        root = "{place.data}/containerd"
        state = "{place.directory}/containerd"
        disabled_plugins = ["io.containerd.grpc.v1.cri"]
        """)
    with started(["containerd", "--config", str(config)], place.directory / "containerd"):
        _import_into_containerd(place)
        try:
            yield
        finally:
            # A shim that is left would go on without its containerd.
            subprocess.run(["ctr", "task", "rm", "--force", "web1"], check=False, capture_output=True)


def _import_into_containerd(place: Place) -> None:
    """As an archive of Docker's (image specification 1.2), which has one layer with everything in it."""
    image = place.data / "image"
    image.mkdir()
    subprocess.run(
        ["tar", "--create", "--numeric-owner", f"--file={image}/layer.tar", f"--directory={place.tree}", "."],
        check=True,
    )
    with open(image / "layer.tar", "rb") as layer:
        diff = hashlib.file_digest(layer, "sha256").hexdigest()
    machine = {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine]
    config = {
        "architecture": machine,
        "os": "linux",
        "config": {"Cmd": ["/bin/bash"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{diff}"]},
    }
    (image / "config.json").write_text(json.dumps(config))
    manifest = {"Config": "config.json", "RepoTags": [IMAGE], "Layers": ["layer.tar"]}
    (image / "manifest.json").write_text(json.dumps([manifest]))
    import_tree(image, ["ctr", "image", "import", "-"], {})
    shutil.rmtree(image)


MANAGERS = {
    "docker": Manager(
        "docker",
        ["/etc/docker"],
        _docker,
        restarted=True,
        environment=_docker_host,
        clean=[["docker", "rm", "-f", "web1"]],
    ),
    "podman": Manager("podman", ["/etc/containers"], _podman),
    "containerd": Manager("containerd", ["/run/containerd"], _containerd, image=f"docker.io/{IMAGE}"),
}
