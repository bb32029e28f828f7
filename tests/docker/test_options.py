"""What ``docker run --runtime=interceptor`` makes of Docker's options."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from pathlib import Path

import pytest

from integration.containers import quickstart, rootfs
from integration.containers.daemon import program
from integration.docker.__main__ import remapped
from integration.docker.engine import IMAGE, Docker, import_image

pytestmark = [pytest.mark.root, pytest.mark.slow]


def refusal(docker: Docker, *arguments: str) -> str:
    """What a container that must not start is refused with; nothing of it may be left."""
    done = docker.try_("run", "--rm", "--network=none", "--runtime=interceptor", *arguments, IMAGE, "true")
    assert done.returncode != 0
    assert docker.daemon.ask("ps") == []
    assert not [point for point in docker.mounts() if "merged" in point]
    return done.stderr.decode()


def test_root_is_root_inside_and_nobody_outside(docker: Docker) -> None:
    script = (
        "cat /proc/self/uid_map; touch /made; stat -c %u:%g /made /etc/passwd; umount /proc/sys;"
        "mount --bind /proc /mnt && umount /mnt/sys && ls -A /mnt/sys"
    )
    name = "root-inside"
    docker.start(name, IMAGE, "sh", "-c", script)
    docker("wait", name)
    upper = Path(docker("inspect", "-f", "{{.GraphDriver.Data.UpperDir}}", name).strip())
    mapping, *rest = docker("logs", name).splitlines()
    assert mapping.split() == ["0", "1000000", "65536"]
    # The original stays, the copy goes, and a shield without entries stands there.
    assert rest == ["0:0", "0:0"]
    assert (upper / "made").stat().st_uid == 0, "what the container's root writes is the host root's on disk"
    docker("rm", name)


def test_nothing_is_ever_chowned_for_a_start(docker: Docker) -> None:
    """chown(2) changes a file's time of change, whoever it belongs to then."""
    docker.run(IMAGE, "true")
    layers = docker("inspect", "-f", "{{.GraphDriver.Data.UpperDir}}", IMAGE).split()
    before = {path: changed(Path(path)) for path in layers}
    assert sum(map(len, before.values())) > 5000
    docker.start("unchowned", IMAGE, "sleep", "60")
    upper = Path(docker("inspect", "-f", "{{.GraphDriver.Data.UpperDir}}", "unchowned").strip())
    assert {path: changed(Path(path)) for path in layers} == before
    assert {owner for owner, _ in changed(upper).values()} == {0}
    docker("rm", "-f", "unchowned")


def changed(tree: Path) -> dict[str, tuple[int, int]]:
    """Owner and time of change of each file."""
    found = {}
    for directory, below, files in os.walk(tree):
        for name in (".", *below, *files):
            status = os.lstat(os.path.join(directory, name))
            found[os.path.join(directory, name)] = (status.st_uid, status.st_ctime_ns)
    return found


def test_read_only_root_stays_read_only(docker: Docker) -> None:
    script = (
        "touch /x; mount -o remount,rw,bind /; touch /x;"
        "mount --bind / /mnt; mount -o remount,rw,bind /mnt; touch /mnt/x; ls /x"
    )
    done = docker.try_(
        "run", "--rm", "--network=none", "--runtime=interceptor", "--read-only", IMAGE, "sh", "-c", script
    )
    assert done.stderr.decode().count("Read-only file system") == 3
    assert "cannot access '/x'" in done.stderr.decode()


def test_tmpfs_and_user_and_init(docker: Docker) -> None:
    assert docker.run("--tmpfs", "/t", IMAGE, "sh", "-c", "touch /t/x; stat -c %u /t/x") == "0\n"
    script = "id -u; grep -E 'Cap(Eff|Bnd)' /proc/self/status"
    ident, effective, bounding = docker.run("--user", "1000:1000", IMAGE, "sh", "-c", script).splitlines()
    assert ident == "1000"
    assert int(effective.split()[1], 16) == 0
    assert int(bounding.split()[1], 16) & 1 << 21, "CAP_SYS_ADMIN, for sudo"
    assert docker.run("--init", IMAGE, "cat", "/proc/1/comm") == "docker-init\n"


def test_volumes_are_mapped_both_ways(docker: Docker, tmp_path: Path) -> None:
    (tmp_path / "given").write_text("given")
    os.chown(tmp_path / "given", 1000, 1000)
    script = "stat -c %u:%g /v/given; touch /v/new; chown 33:7 /v/new"
    assert docker.run("-v", f"{tmp_path}:/v", IMAGE, "sh", "-c", script) == "1000:1000\n"
    made = (tmp_path / "new").stat()
    assert (made.st_uid, made.st_gid) == (33, 7)
    assert docker.run("-v", f"{tmp_path}/given:/f", IMAGE, "stat", "-c", "%u", "/f") == "1000\n"
    assert docker.run("-v", "named:/v", IMAGE, "stat", "-c", "%u", "/v") == "0\n"
    script = "touch /v/no; mount -o remount,rw,bind /v; touch /v/no; echo $?"
    assert docker.run("-v", f"{tmp_path}:/v:ro", IMAGE, "sh", "-c", script) == "1\n"
    assert not (tmp_path / "no").exists()


def test_exceptions_from_mapping(docker: Docker, tmp_path: Path) -> None:
    inside, skipped, device = tmp_path / "inside", tmp_path / "skipped", tmp_path / "device"
    for path in (inside, skipped):
        path.mkdir()
    # The first range is free whenever no other container is there.
    os.chown(inside, 1000000, 1000000)
    os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    binds = [f"-v={inside}:/inside", f"-v={skipped}:/skipped", f"-v={device}:/device"]
    script = "stat -c %u /inside /skipped /device"
    docker.start(
        "exceptions",
        *binds,
        "-e",
        "INTERCEPTOR_SKIP_ID_SHIFT=/skipped",
        IMAGE,
        "sh",
        "-c",
        f"{script}; sleep 60",
    )
    [cid] = [one["id"] for one in docker.daemon.ask("ps")]
    decided = {one["path"]: one for one in docker.daemon.ask("ownership", id=cid)}
    assert decided["/"]["strategy"] == decided["/etc/hosts"]["strategy"] == "idmapped"
    for point, word in (
        ("/inside", "already"),
        ("/skipped", "skip_id_shift"),
        ("/device", "no file or directory"),
    ):
        assert decided[point]["strategy"] == "none"
        assert word in decided[point]["reason"]
    explained = [program("interceptor"), "explain", "--json", f"--config={docker.daemon.config}", cid]
    for point, words in (("/", "mapped, idmapped"), ("/inside", "not mapped: it belongs"), ("/proc", "None")):
        said = subprocess.run([*explained, point], check=True, capture_output=True, text=True)
        assert str(json.loads(said.stdout)["owners"]).startswith(words)
    assert docker("exec", "exceptions", "sh", "-c", script) == "0\n65534\n65534\n"
    docker("rm", "-f", "exceptions")


def test_a_source_on_an_overlay_is_mapped_through_its_layers(docker: Docker, tmp_path: Path) -> None:
    """The root filesystem of another container, bound in: nobody:nogroup is what others show."""
    docker.start("other", IMAGE, "sleep", "60", runtime="runc")
    merged = docker("inspect", "-f", "{{.GraphDriver.Data.MergedDir}}", "other").strip()
    script = "stat -c %u /v/etc/passwd; echo x > /v/root/from-there; stat -c %u /v/root/from-there"
    assert docker.run("-v", f"{merged}:/v", IMAGE, "sh", "-c", script) == "0\n0\n"
    upper = Path(docker("inspect", "-f", "{{.GraphDriver.Data.UpperDir}}", "other").strip())
    assert (upper / "root/from-there").stat().st_uid == 0
    assert docker("exec", "other", "cat", "/root/from-there") == "x\n"
    docker("rm", "-f", "other")
    assert not list(upper.parent.glob("interceptor-work*"))


def test_a_device_belongs_to_the_container_s_root(docker: Docker) -> None:
    script = "stat -c %u:%t:%T /dev/fuse; exec 3<>/dev/fuse && echo open"
    assert docker.run("--device", "/dev/fuse", IMAGE, "sh", "-c", script) == "0:a:e5\nopen\n"


def test_capabilities_are_those_of_a_system_container(docker: Docker) -> None:
    def effective(*options: str) -> int:
        return int(docker.run(*options, IMAGE, "sed", "-n", "s/CapEff:\t//p", "/proc/self/status"), 16)

    assert effective() & 1 << 21
    kept = effective("-e", "INTERCEPTOR_HONOR_CAPS=true", "--cap-drop=NET_RAW")
    assert not kept & (1 << 21 | 1 << 13)
    assert kept & 1 << 0


def test_what_cannot_be_is_refused_by_name(docker: Docker) -> None:
    assert "privileged containers are refused" in refusal(docker, "--privileged")
    assert "needs a pid namespace of its own" in refusal(docker, "--pid=host")
    assert "INTERCEPTOR_HONER_CAPS: unknown setting" in refusal(docker, "-e", "INTERCEPTOR_HONER_CAPS=true")


def test_a_remapped_engine_keeps_its_own_mapping(docker: Docker) -> None:
    """dockerd --userns-remap: its range, its chowned layers, our guard."""
    cache = quickstart.parser().get_default("cache")
    with remapped(docker) as second:
        import_image(second, cache / rootfs.SUITE)
        script = (
            "echo $(cat /proc/self/uid_map); stat -c %u /etc/passwd; umount /proc/sys || echo stays;"
            "mount -t proc proc /mnt && umount /mnt/sys && ls -A /mnt/sys | wc -l; touch /srv/new"
        )
        second.start("remapped", IMAGE, "sleep", "infinity")
        [container] = docker.daemon.ask("ps")
        assert docker.daemon.ask("ownership", id=container["id"]) == [], "nothing is left for us to map"
        lines = second("exec", "remapped", "sh", "-c", script).splitlines()
        assert lines == ["0 2000000 65536", "0", "stays", "0"]
        second("stop", "-t", "0", "remapped")
        assert second("diff", "remapped").splitlines() == ["C /srv", "A /srv/new"]
        second("rm", "remapped")
    assert docker.daemon.ask("ps") == []


def test_host_s_network_and_ipc_can_be_shared(docker: Docker) -> None:
    done = docker("run", "--rm", "--network=host", "--runtime=interceptor", IMAGE, "ls", "/sys/class/net")
    assert set(os.listdir("/sys/class/net")) & set(done.split())
    assert docker.run("--ipc=host", IMAGE, "echo", "up") == "up\n"


def test_seccomp_profile_of_docker_goes_on_refusing(docker: Docker) -> None:
    """kexec_load is in none of our tables; unshare is, as for CAP_SYS_ADMIN in Docker's own profile."""
    script = "unshare --mount --pid --fork true && echo unshared; perl -e 'print syscall(246, 0, 0, 0, 0) < 0 ? $! : 0'"
    assert docker.run(IMAGE, "sh", "-c", script) == "unshared\nOperation not permitted"
    assert docker.run("--security-opt=seccomp=unconfined", IMAGE, "unshare", "--mount", "echo", "x") == "x\n"
