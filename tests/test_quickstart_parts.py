"""The parts of the quickstart that need no container: judgement, the cached root filesystem, waiting, its options."""

from __future__ import annotations

import os
import signal
import socket
import stat
import struct
import subprocess
from pathlib import Path

import pytest

from integration.containers import cgroups, facts, naive_agent, processes, rootfs
from integration.containers.kernel_calls import mount_id
from integration.containers.notify import NotifySocket, NotReady
from integration.containers.quickstart import parser

QUICKSTART = Path(__file__).parent.parent / "integration/quickstart"


def good_facts() -> facts.Facts:
    return facts.Facts(
        services={"e2scrub_reap.service": facts.Service("success", 12)},
        device=("/dev/fuse", True),
        inner_proc=True,
        copies_removed=5,
        recursive=[facts.Recursive("/copy/sys", 4, 0)],
        refusals=[facts.Refusal("/proc/sys", 0, 22, 22)],
        originals=7,
        looked_at=20,
        left_processes=[],
        latency={kind: facts.Latency(5.0, 9.0, 100) for kind in facts.KINDS},
    )


def bad_lines(found: facts.Facts) -> list[str]:
    return [line.what for line in facts.lines(found) if not line.good]


def test_table_is_good_only_when_every_fact_is() -> None:
    assert bad_lines(good_facts()) == []
    assert len(bad_lines(facts.Facts())) == len(facts.lines(facts.Facts()))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"services": {"a.service": facts.Service("hanging", 3)}}, "a.service"),
        ({"services": {"a.service": facts.Service("success", facts.STORM + 1)}}, "a.service"),
        ({"device": ("/dev/fuse", False)}, "host device /dev/fuse"),
        ({"copies_kept": ["/proc/sys"]}, "copies removed"),
        ({"recursive": [facts.Recursive("/copy/sys", 2000, 3)]}, "umount_recursive /copy/sys"),
        ({"refusals": [facts.Refusal("/proc/sys", 2, 0, 22)]}, "unmounts of originals"),
        ({"originals_lost": ["/proc/sys"]}, "originals still in place, by mount ID"),
        ({"raw": ["/proc/sys is procfs"]}, "raw nodes seen"),
        ({"left_processes": ["7: interceptor serve"]}, "processes left when container and daemon are gone"),
        ({"bug": {"calls_per_second": 0.0}}, "the bug: faked umounts a second"),
    ],
)
def test_each_bad_fact_makes_its_own_line_bad(change: dict[str, object], what: str) -> None:
    found = good_facts()
    for name, value in change.items():
        setattr(found, name, value)
    assert bad_lines(found) == [what]


def test_json_has_the_documented_keys() -> None:
    found = good_facts()
    found.services["systemd-logind.service"] = facts.Service("success", None)
    assert facts.as_json(found) == {
        "services": {
            "e2scrub_reap.service": {"result": "success", "umounts": 12},
            "systemd-logind.service": {"result": "success", "umounts": None},
        },
        "copies_removed": 5,
        "originals_intact": True,
        "raw_seen": 0,
        "latency_us": {kind: {"p50": 5.0, "p99": 9.0} for kind in ("continued", "denied", "handled")},
    }


def test_capability_of_a_file_is_bound_to_the_container_s_root() -> None:
    plain = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)  # cap_net_raw+ep, revision 2
    assert rootfs.namespaced_capability(plain, 100000) == (
        struct.pack("<IIIII", 0x03000001, 1 << 13, 0, 0, 0) + struct.pack("<I", 100000)
    )
    with pytest.raises(ValueError, match="revision"):
        rootfs.namespaced_capability(rootfs.namespaced_capability(plain, 100000), 100000)


def test_interrupted_construction_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), rootfs._under_construction(tmp_path / "tree") as scratch:
        (scratch / "half").write_text("done")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_finished_construction_replaces_what_was_incomplete(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/old").touch()
    with rootfs._under_construction(tmp_path / "tree") as scratch:
        (scratch / "new").touch()
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == [
        "tree",
        "tree/new",
    ]
    assert stat.S_IMODE((tmp_path / "tree").stat().st_mode) == 0o755


@pytest.mark.root
def test_shifted_ids_keep_setuid_capabilities_and_hard_links(tmp_path: Path) -> None:
    program, link = tmp_path / "program", tmp_path / "link"
    program.touch()
    os.link(program, link)
    os.chown(program, 7, 8)
    program.chmod(0o6755)
    capable = tmp_path / "capable"
    capable.touch(0o755)
    plain = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)
    os.setxattr(capable, "security.capability", plain)
    (tmp_path / "dangling").symlink_to("/nowhere")

    rootfs.shift_ids(tmp_path, 100000)

    for name in (program, link):
        status = name.stat()
        assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (100007, 100008, 0o6755)
    assert (tmp_path / "dangling").lstat().st_uid == 100000
    assert os.getxattr(capable, "security.capability") == rootfs.namespaced_capability(plain, 100000)


def test_ready_is_heard_among_other_states(tmp_path: Path) -> None:
    with (
        NotifySocket(tmp_path / "notify") as ready,
        subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child,
    ):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            for text in (
                b"STATUS=READY=1 soon",
                b"X_SYSTEMD_UNIT_ACTIVE=basic.target",
                b"READY=1\nSTATUS=Ready.",
            ):
                sender.sendto(text, str(tmp_path / "notify"))
        assert ready.wait_ready(child.pid, 30)
        with pytest.raises(NotReady, match="was not ready"):
            ready.wait_ready(child.pid, 0)
    assert not (tmp_path / "notify").exists()


def test_death_and_wake_end_the_wait_for_readiness(tmp_path: Path) -> None:
    with (
        NotifySocket(tmp_path / "notify") as ready,
        subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child,
    ):
        wake = os.eventfd(1, os.EFD_CLOEXEC)
        assert not ready.wait_ready(child.pid, 30, wake=wake)
        os.close(wake)
        assert child.stdin is not None
        child.stdin.close()
        with pytest.raises(NotReady, match="ended before"):
            ready.wait_ready(child.pid, 30)


def test_processes_are_found_by_their_environment_and_ended(tmp_path: Path) -> None:
    environment = {**os.environ, "NOTIFY_SOCKET": f"{tmp_path}/notify"}
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, env=environment) as child:
        assert processes.end_all(tmp_path / "other", 0) == []
        assert processes.end_all(tmp_path, 0) == [f"{child.pid}: cat"]
        assert child.wait() == -signal.SIGKILL
    assert processes.end_all(tmp_path, 30) == []


@pytest.mark.parametrize(
    ("cgroup", "unit"),
    [
        ("/system.slice/e2scrub_reap.service", "e2scrub_reap.service"),
        ("/init.scope", "init.scope"),
        ("/outer.service/system.slice/inner.service/payload", "inner.service"),
        ("/", "/"),
    ],
)
def test_unit_is_the_innermost_of_a_cgroup(cgroup: str, unit: str) -> None:
    assert naive_agent.unit_of_cgroup(cgroup) == unit


def test_cgroup2_is_found_alone_and_beside_version_1(tmp_path: Path) -> None:
    with pytest.raises(cgroups.NoCgroup2, match="mount -t cgroup2"):
        cgroups.find(tmp_path)
    (tmp_path / "unified").mkdir()
    (tmp_path / "unified/cgroup.controllers").touch()
    assert cgroups.find(tmp_path) == tmp_path / "unified"
    (tmp_path / "cgroup.controllers").touch()
    assert cgroups.find(tmp_path) == tmp_path


def test_mount_id_tells_mounts_apart_and_not_paths() -> None:
    assert mount_id("/proc") == mount_id("/proc/version")
    assert mount_id("/proc") != mount_id("/dev")


def test_help_needs_neither_root_nor_an_installed_project() -> None:
    done = subprocess.run([str(QUICKSTART), "--help"], capture_output=True, text=True, check=True)
    for option in ("--json", "--keep", "--show-the-bug", "--no-install", "--cache"):
        assert option in done.stdout


def test_unknown_option_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parser().parse_args(["--shwo-the-bug"])
    assert stopped.value.code == 2
    assert "--shwo-the-bug" in capsys.readouterr().err
