"""A container's life under Docker: exec, logs, stop, restart, cp, diff, commit, export, health checks."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.containers.bundle import NOTIFY_INSIDE
from integration.containers.notify import NotifySocket
from integration.docker.engine import IMAGE, Docker
from interceptor.kernel.fd import is_ready
from tests.robust.support import eventually, gatekeepers

pytestmark = [pytest.mark.root, pytest.mark.slow]


@pytest.fixture
def container(docker: Docker) -> Iterator[str]:
    """A container that idles; and nothing of it left afterwards."""
    docker.start("life", IMAGE, "sleep", "infinity")
    yield "life"
    docker("rm", "-f", "life")
    nothing_runs(docker)


def inside(docker: Docker, script: str) -> str:
    return docker("exec", "life", "sh", "-c", script)


def extracted(docker: Docker, path: str) -> bytes:
    """A file by ``docker cp``."""
    done = docker.try_("cp", f"life:{path}", "-")
    assert done.returncode == 0, f"docker cp {path}: {done.stderr.decode()}"
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        file = archive.extractfile(archive.getmembers()[0])
        assert file is not None
        return file.read()


def test_exec_has_the_capabilities_and_the_guard_of_the_first_process(docker: Docker, container: str) -> None:
    script = (
        "grep -E 'CapEff|Seccomp:' /proc/self/status; mount -t proc p /mnt && umount /mnt/sys; ls -A /mnt/sys"
    )
    capabilities, seccomp = inside(docker, script).splitlines()
    assert int(capabilities.split()[1], 16) & 1 << 21
    assert seccomp.split()[1] == "2"


def test_cp_goes_both_ways_and_sees_what_the_other_side_changed(
    docker: Docker, container: str, tmp_path: Path
) -> None:
    """Names that one side looked for before the other made them are what overlays remember wrongly."""
    assert docker.try_("cp", "life:/root/late", "-").returncode != 0
    inside(docker, "cat /root/given; echo one > /root/late; echo changed > /etc/issue; true")
    assert extracted(docker, "/root/late") == b"one\n"
    assert extracted(docker, "/etc/issue") == b"changed\n"
    inside(docker, "echo two > /root/late; echo again > /etc/issue; rm /etc/issue.net")
    assert extracted(docker, "/root/late") == b"two\n"
    assert extracted(docker, "/etc/issue") == b"again\n"
    (tmp_path / "given").write_text("from the host")
    docker("cp", str(tmp_path / "given"), "life:/root/given")
    assert inside(docker, "cat /root/given; stat -c ' %u:%g' /root/given") == "from the host 0:0\n"
    docker("cp", str(tmp_path / "given"), "life:/etc/issue")
    assert inside(docker, "cat /etc/issue") == "from the host"


def by_itself(docker: Docker, script: str) -> str:
    """What a process of the container's own does: no runtime is asked to start it."""
    pid = docker("inspect", "-f", "{{.State.Pid}}", "life").strip()
    argv = ["nsenter", f"--target={pid}", "--user", "--mount", "--setuid=0", "--setgid=0", "sh", "-c", script]
    return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=60).stdout


def test_cp_is_exact_however_long_the_daemon_has_no_turn(
    docker: Docker, container: str, tmp_path: Path
) -> None:
    (tmp_path / "given").write_text("from the host")
    daemon = docker.daemon.processes[-1].pid
    assert docker.try_("cp", "life:/root/late", "-").returncode != 0
    assert by_itself(docker, "cat /root/given || echo none") == "none\n"
    os.kill(daemon, signal.SIGSTOP)
    try:
        by_itself(docker, "echo one > /root/late; echo changed > /etc/issue")
        assert extracted(docker, "/root/late") == b"one\n"
        assert extracted(docker, "/etc/issue") == b"changed\n"
        docker("cp", str(tmp_path / "given"), "life:/root/given")
        assert by_itself(docker, "cat /root/given; stat -c ' %u:%g' /root/given") == "from the host 0:0\n"
    finally:
        os.kill(daemon, signal.SIGCONT)


def test_cp_is_not_held_for_ever_by_a_gatekeeper_that_is_stopped(docker: Docker, container: str) -> None:
    daemon = docker.daemon.processes[-1].pid
    (pid,) = gatekeepers(daemon)
    os.kill(pid, signal.SIGSTOP)
    assert extracted(docker, "/etc/hostname")
    eventually(lambda: gatekeepers(daemon) not in ([], [pid]), "another gatekeeper")
    assert docker.try_("cp", "life:/root/late", "-").returncode != 0
    by_itself(docker, "echo one > /root/late")
    assert extracted(docker, "/root/late") == b"one\n"


def test_a_user_made_inside_can_be_used_by_exec(docker: Docker, container: str) -> None:
    assert docker("exec", "-u", "daemon", "life", "id", "-un") == "daemon\n"
    inside(docker, "useradd joe")
    assert docker("exec", "-u", "joe", "life", "id", "-un") == "joe\n"


def test_diff_and_export_and_commit_show_just_the_changes(docker: Docker, container: str) -> None:
    inside(docker, "echo new > /srv/new; rm /etc/issue.net; chown 33:33 /srv/new")
    lines = set(docker("diff", "life").splitlines())
    assert lines == {"C /srv", "A /srv/new", "C /etc", "D /etc/issue.net"}
    exported = docker.try_("export", "life")
    assert exported.returncode == 0, exported.stderr.decode()
    with tarfile.open(fileobj=io.BytesIO(exported.stdout)) as archive:
        member = archive.getmember("srv/new")
        assert (member.uid, member.gid) == (33, 33)
        assert "etc/issue.net" not in archive.getnames()
        assert archive.getmember("etc/passwd").uid == 0
    docker("commit", "life", "interceptor-test/committed")
    grown = int(docker("inspect", "-f", "{{.Size}}", "interceptor-test/committed"))
    assert grown - int(docker("inspect", "-f", "{{.Size}}", IMAGE)) < 4096
    for runtime in ("runc", "interceptor"):
        argv = ["run", "--rm", "--network=none", f"--runtime={runtime}", "interceptor-test/committed"]
        assert (
            docker(*argv, "sh", "-c", "stat -c %u /srv/new; ls /etc/issue.net || echo gone") == "33\ngone\n"
        )
    docker("rmi", "interceptor-test/committed")


def test_stop_restart_logs_pause_top(docker: Docker, container: str) -> None:
    inside(docker, "echo kept > /srv/kept; echo said > /proc/1/fd/1")
    assert docker("logs", "life") == "said\n"
    docker("restart", "-t", "0", "life")
    assert inside(docker, "cat /srv/kept; stat -c %u /srv/kept") == "kept\n0\n"
    docker("pause", "life")
    docker("unpause", "life")
    assert "sleep" in docker("top", "life")
    docker("stop", "-t", "0", "life")
    assert docker.daemon.ask("ps") == []
    docker("start", "life")
    assert len(docker.daemon.ask("ps")) == 1


def test_a_health_check_runs(docker: Docker) -> None:
    events = ["events", "--filter=container=healthy", "--filter=event=health_status", "--format={{.Action}}"]
    with subprocess.Popen(
        ["docker", "-H", f"unix://{docker.socket}", *events], stdout=subprocess.PIPE, text=True
    ) as told:
        docker.start(
            "healthy",
            "--health-cmd=umount /proc/sys; test $? = 32",
            "--health-interval=1s",
            IMAGE,
            "sleep",
            "60",
        )
        assert told.stdout is not None
        assert told.stdout.readline() == "health_status: healthy\n"
        told.terminate()
    docker("rm", "-f", "healthy")


def test_systemd_boots_and_stops_when_asked(docker: Docker, tmp_path: Path) -> None:
    with NotifySocket(tmp_path / "notify") as ready:
        says = ["-v", f"{ready.path}:{NOTIFY_INSIDE}", "-e", f"NOTIFY_SOCKET={NOTIFY_INSIDE}"]
        docker.start("machine", *says, IMAGE, "/sbin/init")
        assert ready.wait_ready(int(docker("inspect", "-f", "{{.State.Pid}}", "machine")), 60)
    for unit in ("systemd-logind", "dbus", "systemd-journald"):
        assert docker("exec", "machine", "systemctl", "is-active", unit) == "active\n"
    docker("exec", "machine", "systemctl", "stop", "systemd-logind")
    # Docker's SIGTERM alone would have systemd start itself anew, and Docker kill it when the time is up.
    docker("stop", "-t", "30", "machine")
    assert docker("inspect", "-f", "{{.State.ExitCode}}", "machine") != "137\n"
    nothing_runs(docker)
    # And once more, stopped from inside.
    with NotifySocket(tmp_path / "notify") as ready:
        docker("start", "machine")
        assert ready.wait_ready(int(docker("inspect", "-f", "{{.State.Pid}}", "machine")), 60)
    guards = [os.pidfd_open(int(one["guard_pid"])) for one in docker.daemon.ask("ps")]
    docker("exec", "machine", "systemctl", "poweroff")
    docker("wait", "machine")
    for guard in guards:
        assert is_ready(guard, 30)
        os.close(guard)
    nothing_runs(docker)
    docker("rm", "machine")


def nothing_runs(docker: Docker) -> None:
    """No container is known, no range reserved, nothing mounted, as soon as the shim has come to that."""

    def left() -> list[object]:
        reserved = json.loads((docker.daemon.directory / "state/reservations.json").read_text())
        mounted = [point for point in docker.mounts() if "merged" in point or "stage" in point]
        return [*docker.daemon.ask("ps"), *reserved, *mounted]

    eventually(lambda: left() == [], "nothing is left")


def test_two_containers_never_share_an_id(docker: Docker) -> None:
    names = ["first", "second"]
    for name in names:
        docker.start(name, IMAGE, "sleep", "infinity")
    firsts = {docker("exec", name, "cat", "/proc/self/uid_map").split()[1] for name in names}
    assert len(firsts) == 2
    docker("rm", "-f", *names)
