"""Container engines in the container: runc 1.1 and of today, crun, podman, buildah."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tools.conftest import FUSE, TMPFS, Toolbox

pytestmark = [pytest.mark.root, pytest.mark.slow]

#: The second one has the procfs checks of libpathrs: fsopen("proc"), openat2 with RESOLVE_NO_XDEV, statfs.
RUNTIMES = {"runc-1.1": "runc", "runc-new": "/opt/runc/usr/sbin/runc", "crun": "crun"}
LOOK = ["stat", "-f", "-c", "%t", "/proc/sys", "/proc/uptime", "/sys/kernel"]


@pytest.fixture(params=RUNTIMES)
def runtime(request: pytest.FixtureRequest, toolbox: Toolbox) -> str:
    program = RUNTIMES[request.param]
    version = toolbox.run(program, "--version").split()[2]
    if request.param != "crun":
        assert (tuple(map(int, version.split("+")[0].split("."))) >= (1, 3)) == (request.param == "runc-new")
    return program


def run(toolbox: Toolbox, runtime: str, argv: list[str], **linux: object) -> str:
    """A container of ``runtime spec``'s default configuration, on bookworm's root filesystem."""
    toolbox.sh("rm -rf /srv/bundle; mkdir -p /srv/bundle/rootfs")
    toolbox.run(runtime, "spec", "--bundle", "/srv/bundle")
    config = json.loads(toolbox.run("cat", "/srv/bundle/config.json"))
    config["process"] |= {"terminal": False, "args": argv}
    config["linux"] |= linux
    toolbox.run("tee", "/srv/bundle/config.json", stdin=json.dumps(config))
    return toolbox.sh(
        f"mount --bind /opt/bookworm /srv/bundle/rootfs; {runtime} run --bundle /srv/bundle tool",
        "unshare",
        "-m",
    )


def test_a_container_of_the_default_configuration(toolbox: Toolbox, runtime: str) -> None:
    assert run(toolbox, runtime, LOOK).split() == [FUSE, FUSE, FUSE]


def test_a_container_in_a_user_namespace_of_its_own(toolbox: Toolbox, runtime: str) -> None:
    ids = [{"containerID": 0, "hostID": 0, "size": 60000}]
    kinds = ("pid", "network", "ipc", "uts", "mount", "user")
    found = run(
        toolbox,
        runtime,
        LOOK,
        namespaces=[{"type": kind} for kind in kinds],
        uidMappings=ids,
        gidMappings=ids,
    )
    assert found.split() == [FUSE, FUSE, FUSE]


def test_masked_and_readonly_paths_are_the_inner_runtimes(toolbox: Toolbox, runtime: str) -> None:
    told = run(
        toolbox, runtime, ["sh", "-c", "! echo x > /proc/sys/kernel/domainname; wc -c < /proc/timer_list"]
    )
    assert told.split() == ["0"]


def test_sysctls_of_an_inner_container(toolbox: Toolbox, runtime: str) -> None:
    """As Docker and CRI have them set. libpathrs looks for them with RESOLVE_NO_XDEV in a procfs of its own."""
    argv = ["cat", "/proc/sys/net/ipv4/ip_unprivileged_port_start", "/proc/sys/net/ipv4/ping_group_range"]
    sysctl = {"net.ipv4.ip_unprivileged_port_start": "0", "net.ipv4.ping_group_range": "0 1000"}
    assert run(toolbox, runtime, argv, sysctl=sysctl).split() == ["0", "0", "1000"]


#: With a storage of its own, in a mount namespace of its own: engines keep mounts there.
_PODMAN = (
    "mount -t tmpfs engines /var/lib/containers; exec podman --runtime {runtime} --storage-driver=vfs "
    "--cgroup-manager=cgroupfs run --rm --network=none {options} --rootfs /opt/bookworm "
)


def podman(toolbox: Toolbox, command: str, runtime: str = "crun", options: str = "--cgroups=disabled") -> str:
    start = _PODMAN.format(runtime=runtime, options=options)
    return toolbox.sh(start + command, "unshare", "-m")


def test_podman(toolbox: Toolbox) -> None:
    assert podman(toolbox, " ".join(LOOK)).split() == [FUSE, FUSE, FUSE]


def test_podman_with_runc(toolbox: Toolbox) -> None:
    """It wants a cgroup then."""
    assert podman(toolbox, " ".join(LOOK), "runc", "--cgroups=enabled").split() == [FUSE, FUSE, FUSE]


def test_podman_privileged(toolbox: Toolbox) -> None:
    """Copies go, at any depth."""
    script = "mount -t proc p /mnt; stat -f -c %t /mnt/sys; umount -R /mnt; umount /proc/sys; stat -f -c %t /proc/sys"
    told = podman(toolbox, f"sh -euc '{script}'", options="--cgroups=disabled --privileged")
    assert told.split() == [FUSE, TMPFS]


@pytest.mark.parametrize(("isolation", "network"), [("chroot", "host"), ("oci", "none")])
def test_buildah(toolbox: Toolbox, isolation: str, network: str) -> None:
    script = (
        "mount -t tmpfs engines /var/lib/containers; export STORAGE_DRIVER=vfs; c=$(buildah from scratch)\n"
        "libraries='-v /usr:/usr:ro -v /usr/lib:/lib:ro'\n"
        'test ! -d /usr/lib64 || libraries="$libraries -v /usr/lib64:/lib64:ro"\n'
        f"buildah run --isolation={isolation} --network={network} $libraries $c "
        "/usr/bin/stat -f -c %t /proc/sys /sys/kernel; buildah rm $c >/dev/null"
    )
    assert toolbox.sh(script, "unshare", "-m").split() == [FUSE, FUSE]


@pytest.mark.parametrize("inner", ["runc", "new"])
def test_dockerd(toolbox: Toolbox, inner: str) -> None:
    """It sets a sysctl in each container that has a network of its own."""
    script = (Path(__file__).parent / "docker_run.py").read_text()
    told = toolbox.run("python3", "-", inner, *LOOK, stdin=script)
    assert told.split() == [FUSE, FUSE, FUSE]
