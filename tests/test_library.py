"""The library: children without a runtime, with and without a daemon, and that nothing of them stays."""

from __future__ import annotations

import errno
import os
import select
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import interceptor.library
from interceptor.errors import ContainerError, InterceptorError, SyscallError
from interceptor.kernel.flags import UmountFlag
from interceptor.library import GuardedChild, Interceptor, Mount
from interceptor.spawn.create import FIRST_ID, spawn
from tests import guarded as inside

pytestmark = pytest.mark.root

NAMESPACES = ("user", "mnt", "pid", "net", "ipc", "uts", "cgroup")


@pytest.fixture(scope="module")
def daemons(interceptors: inside.Interceptors) -> None:
    """All of them, before anything is counted."""
    for mode in inside.MODES:
        interceptors(mode)


@pytest.fixture(autouse=True)
def nothing_is_left(daemons: None, real_interceptor: Interceptor, leak_check: None) -> Iterator[None]:
    """Beside descriptors and mounts: no child of this process, no container in the daemon."""
    before = _children()
    yield
    assert _children() == before
    assert real_interceptor.request("ps") == []


def _children() -> set[str]:
    return {
        pid
        for task in os.listdir("/proc/self/task")
        for pid in Path(f"/proc/self/task/{task}/children").read_text().split()
    }


def _status(name: str) -> str:
    for line in Path("/proc/thread-self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return line.split(":")[1].strip()
    raise AssertionError(name)


# ---- the documentation -------------------------------------------------------------------------------------


def test_the_documented_lines_run(capsys: pytest.CaptureFixture[str]) -> None:
    text = interceptor.library.__doc__ or ""
    lines = text.split("::\n", 1)[1].split("\n`Interceptor`", 1)[0]
    assert len([line for line in lines.splitlines() if line.strip()]) == 10
    exec(textwrap.dedent(lines), {})
    printed = capsys.readouterr().out.splitlines()
    assert "not mounted" in printed[0]  # umount(8)'s words for EINVAL
    assert printed[1:3] == ["0", "0"]
    assert printed[3].startswith("0 ")
    assert printed[4] == "3 b''"


# ---- programs and functions --------------------------------------------------------------------------------


def test_a_program_is_run_and_its_end_and_output_are_told(real_interceptor: Interceptor) -> None:
    with real_interceptor.spawn(["sh", "-c", "cat; echo err >&2; exit 7"], stdin=b"in\n") as child:
        assert child.wait() == 7
        assert (child.stdout, child.stderr) == (b"in\n", b"err\n")
    # Also once it is closed.
    assert child.stdout == b"in\n"


def test_much_output_blocks_nobody(real_guarded: GuardedChild) -> None:
    assert len(real_guarded.run(["head", "-c", "5000000", "/dev/zero"]).stdout) == 5_000_000


def test_death_by_a_signal_is_told(real_guarded: GuardedChild, real_interceptor: Interceptor) -> None:
    assert real_guarded.run(["sh", "-c", "kill -9 $$"]).returncode == -9
    with real_interceptor.spawn(["sh", "-c", "kill -15 $$"]) as child:
        assert child.wait() == -15


def test_a_program_that_does_not_exist_is_an_error(real_guarded: GuardedChild) -> None:
    with pytest.raises(FileNotFoundError):
        real_guarded.run(["/no/such/program"])


def test_environment_and_directory_are_those_given(real_guarded: GuardedChild) -> None:
    done = real_guarded.run(
        ["/bin/sh", "-c", "echo $A $HOME; pwd"], environment={"A": "1"}, directory="/usr/bin"
    )
    assert done.stdout == b"1\n/usr/bin\n"
    assert real_guarded.run(["sh", "-c", "echo $HOME $container"]).stdout == b"/root interceptor\n"


def test_a_function_returns_its_value_and_prints(real_guarded: GuardedChild) -> None:
    def function(a: int, b: int) -> dict[str, int]:
        print("printed")
        print("error", file=sys.stderr)
        return {"sum": a + b, "pid": os.getpid()}

    done = real_guarded.run(function, 1, 2)
    assert isinstance(done.value, dict)
    assert done.value["sum"] == 3
    assert 1 < done.value["pid"] < 100
    assert (done.returncode, done.stdout, done.stderr) == (0, b"printed\n", b"error\n")
    assert real_guarded.call(function, 3, b=4)["sum"] == 7


def test_a_function_s_exception_is_raised_with_where_it_came_from(real_guarded: GuardedChild) -> None:
    def fails() -> None:
        os.stat("/nowhere")

    with pytest.raises(FileNotFoundError) as caught:
        real_guarded.call(fails)
    assert "in the container:" in caught.value.__notes__[0]
    assert "in fails" in caught.value.__notes__[0]


def test_a_value_that_cannot_be_pickled_is_an_error(real_guarded: GuardedChild) -> None:
    with pytest.raises(RuntimeError, match="cannot be pickled"):
        real_guarded.call(lambda: threading.Lock())


@pytest.mark.parametrize(("end", "status"), [(os.abort, "-6"), (lambda: os._exit(3), "3")])
def test_a_call_that_does_not_return_is_an_error(
    real_guarded: GuardedChild, end: Callable[[], object], status: str
) -> None:
    with pytest.raises(ContainerError, match=f"ended with status {status} "):
        real_guarded.call(end)


def test_sys_exit_in_a_function_is_its_exit_status(real_guarded: GuardedChild) -> None:
    assert real_guarded.run(sys.exit, 5).returncode == 5


def test_arguments_beside_a_program_are_refused(real_guarded: GuardedChild) -> None:
    with pytest.raises(TypeError, match="functions"):
        real_guarded.run(["true"], "x")


def test_a_function_can_be_the_main_process(real_interceptor: Interceptor) -> None:
    with real_interceptor.spawn(os.getpid) as child:
        done = child.main.wait()
    assert done.value == 2


def test_descriptors_are_passed_only_on_request(real_guarded: GuardedChild) -> None:
    def numbers() -> list[str]:
        return sorted(set(os.listdir("/proc/self/fd")))

    read, write = os.pipe()
    try:
        without = real_guarded.call(numbers)
        done = real_guarded.run(os.write, write, b"through", pass_fds=[write])
        assert (done.value, os.read(read, 100)) == (7, b"through")
        argv = ["bash", "-c", f"echo program >&{write}"]
        assert real_guarded.run(argv, pass_fds=[write]).returncode == 0
        assert os.read(read, 100) == b"program\n"
    finally:
        os.close(read)
        os.close(write)
    # Standard input, output, error, the outcome, and the listing itself.
    assert len(without) == 5


def test_processes_run_side_by_side(real_guarded: GuardedChild) -> None:
    read, write = os.pipe()
    try:
        with real_guarded.start(os.read, read, 1, pass_fds=[read]) as waiting:
            assert real_guarded.run(["true"]).returncode == 0
            assert waiting.returncode is None
            os.write(write, b"x")
            assert waiting.wait().value == b"x"
    finally:
        os.close(read)
        os.close(write)


def test_a_timeout_kills(real_guarded: GuardedChild) -> None:
    with pytest.raises(TimeoutError, match="still runs"):
        real_guarded.run(["sleep", "1000"], timeout=0.1)
    assert b"sleep" not in real_guarded.run(["ps", "-A"]).stdout


def test_a_process_can_be_signalled(real_guarded: GuardedChild) -> None:
    with real_guarded.start(["sleep", "1000"]) as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait().returncode == -signal.SIGTERM


# ---- what a child is ---------------------------------------------------------------------------------------


def test_every_namespace_is_its_own_and_run_joins_them_all(real_guarded: GuardedChild) -> None:
    def all_of_them() -> dict[str, str]:
        return {name: os.readlink(f"/proc/self/ns/{name}") for name in NAMESPACES}

    mine = all_of_them()
    first = {name: os.readlink(f"/proc/{real_guarded.pid}/ns/{name}") for name in NAMESPACES}
    assert not set(first.values()) & set(mine.values())
    assert real_guarded.call(all_of_them) == first


def test_root_inside_is_nobody_of_the_host(real_guarded: GuardedChild) -> None:
    assert real_guarded.call(os.getresuid) == (0, 0, 0)
    assert real_guarded.call(os.getgroups) == []
    assert os.stat(f"/proc/{real_guarded.pid}/root/tmp").st_uid == FIRST_ID
    assert Path(f"/proc/{real_guarded.pid}/uid_map").read_text().split() == ["0", str(FIRST_ID), "65536"]


def test_ids_hostname_and_container_id_are_those_given(real_interceptor: Interceptor) -> None:
    with real_interceptor.spawn(first_id=200000, id_count=1000, hostname="box", cid="my-id") as child:
        assert Path(f"/proc/{child.pid}/uid_map").read_text().split() == ["0", "200000", "1000"]
        assert child.run(["hostname"]).stdout == b"box\n"
        assert child.cid == "my-id"
        assert [c["id"] for c in real_interceptor.request("ps")] == ["my-id"]


@pytest.mark.parametrize("how", ["main", "run"])
def test_every_process_is_under_the_filter_from_the_start(real_interceptor: Interceptor, how: str) -> None:
    def seen() -> tuple[int, str, str, int]:
        return (
            inside.seccomp_mode(),
            _status("Seccomp_filters"),
            _status("NoNewPrivs"),
            inside.try_umount(b"/proc/sys"),
        )

    if how == "main":
        with real_interceptor.spawn(seen) as child:
            value = child.main.wait().value
    else:
        with real_interceptor.spawn() as child:
            value = child.call(seen)
    assert value == (2, "1", "1", errno.EINVAL)
    # It was answered, not only refused by the weld.
    log = real_interceptor.log_path.read_text()
    assert any(child.cid in line and '"op": "umount"' in line for line in log.splitlines())


def test_without_an_agent_there_is_neither_filter_nor_weld(unguarded: GuardedChild) -> None:
    assert unguarded.call(inside.seccomp_mode) == 0
    raw = unguarded.call(inside.raw_nodes)
    assert {b"/proc/uptime", b"/proc/sys", b"/proc/sys/kernel/hostname", b"/sys/kernel"} <= set(raw)


def test_nothing_raw_is_seen_whatever_guards_answer(guarded: GuardedChild) -> None:
    assert guarded.call(inside.raw_nodes) == []
    before = guarded.call(inside.originals)
    assert {b"/proc", b"/proc/sys", b"/proc/uptime", b"/sys", b"/sys/kernel"} <= before.keys()
    for path in (b"/proc/sys", b"/proc/uptime", b"/sys/kernel"):
        # What it is told is the guard's; what happens is not.
        guarded.call(inside.try_umount, path)
    assert guarded.call(inside.originals) == before


def test_the_oracle_finds_what_is_raw_wherever_it_is_bound(unguarded: GuardedChild) -> None:
    def bind(source: bytes, target: bytes) -> list[bytes]:
        os.mkdir(target)
        assert inside.try_mount(source, target, None, 0x1000) == 0
        return inside.raw_nodes()

    assert b"/mnt/a" in unguarded.call(bind, b"/proc/sys/kernel", b"/mnt/a")
    assert b"/mnt/b/devices/virtual" in unguarded.call(bind, b"/sys", b"/mnt/b")
    assert b"/mnt/c/virtual" in unguarded.call(bind, b"/sys/devices", b"/mnt/c")


def test_i386_umount_reaches_the_kernel(real_guarded: GuardedChild) -> None:
    if os.uname().machine != "x86_64":
        pytest.skip("int 0x80 is of x86")
    assert real_guarded.call(inside.i386_umount, b"/nowhere") == errno.ENOENT
    assert real_guarded.call(inside.i386_umount, b"/proc/sys") == errno.EINVAL
    assert real_guarded.call(inside.try_umount, b"/tmp") == 0


def test_new_privileges_are_allowed_on_request(real_guarded: GuardedChild) -> None:
    assert real_guarded.run(_status, "NoNewPrivs", no_new_privs=False).value == "0"


def test_dropped_capabilities_are_gone_for_ever(real_guarded: GuardedChild) -> None:
    cap_sys_admin = 1 << 21
    argv = ["sh", "-c", "grep ^Cap /proc/self/status"]
    for command in (argv, lambda: print(Path("/proc/self/status").read_text())):
        done = real_guarded.run(command, drop_capabilities=["sys_admin", "mknod"])
        sets = {
            name: int(value, 16)
            for name, value in (line.split(":") for line in done.stdout.decode().splitlines() if ":" in line)
            if name.startswith("Cap")
        }
        assert sets.keys() == {"CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"}
        assert not any(mask & cap_sys_admin for mask in sets.values())
        assert sets["CapEff"] & 1  # the others are still there


def test_a_listener_without_killable_wait_works_too(real_interceptor: Interceptor) -> None:
    with real_interceptor.spawn(wait_killable=False) as child:
        assert child.call(inside.try_umount, b"/proc/sys") == errno.EINVAL


# ---- its filesystem ----------------------------------------------------------------------------------------


def test_mounts_are_made_as_asked(real_interceptor: Interceptor, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("content")
    tmp_path.chmod(0o755)
    mounts = [
        Mount(str(tmp_path), "/srv/new/place", options=["bind", "ro", "nosuid", "nodev", "noexec"]),
        Mount(str(tmp_path / "file"), "/srv/file", options=["bind"]),
        Mount("scratch", "/srv/tmpfs", "tmpfs", ["size=1m", "noexec"]),
    ]
    with real_interceptor.spawn(mounts=mounts) as child:
        lines = child.run(["cat", "/proc/self/mountinfo"]).stdout.decode().splitlines()
        found = {line.split()[4]: line for line in lines}
        assert "ro,nosuid,nodev,noexec" in found["/srv/new/place"]
        assert "size=1024k" in found["/srv/tmpfs"]
        assert child.run(["cat", "/srv/new/place/file", "/srv/file"]).stdout == b"contentcontent"
        # Welded: what was read-only stays so.
        assert child.run(["mount", "-o", "remount,bind,rw", "/srv/new/place"]).returncode != 0
        assert child.run(["touch", "/srv/new/place/x"]).returncode != 0


def test_propagation_is_as_asked() -> None:
    mounts = [Mount("a", "/srv/a", "tmpfs", ["shared"]), Mount("b", "/srv/b", "tmpfs", ["unbindable"])]
    with spawn(None, ["cat", "/proc/self/mountinfo"], mounts=mounts) as child:
        assert child.wait() == 0
        found = {line.split()[4]: line for line in child.stdout.decode().splitlines()}
    assert " shared:" in found["/srv/a"]
    assert " unbindable " in found["/srv/b"]


@pytest.mark.parametrize(
    ("mount", "message"),
    [
        (Mount("x", "relative", "tmpfs"), "not an absolute path"),
        (Mount("x", "/mnt"), "neither a type nor"),
        (Mount("/etc", "/mnt", options=["bind", "uid=0"]), "no option 'uid=0'"),
    ],
)
def test_a_mount_that_cannot_be_meant_is_refused(
    real_interceptor: Interceptor, mount: Mount, message: str
) -> None:
    with pytest.raises(InterceptorError, match=message):
        real_interceptor.spawn(mounts=[mount])


def test_a_mount_that_the_kernel_refuses_is_told_as_the_call(real_interceptor: Interceptor) -> None:
    with pytest.raises(ContainerError, match=r'mount\("x", .*"ext4".*E[A-Z]+'):
        real_interceptor.spawn(mounts=[Mount("x", "/mnt", "ext4")])
    with pytest.raises(SyscallError, match=r"open_tree.*ENOENT"):
        real_interceptor.spawn(mounts=[Mount("/nowhere", "/mnt", options=["bind"])])


def test_a_root_filesystem_of_the_host_is_used_and_links_stay_inside(
    real_interceptor: Interceptor, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    # As an image would have it. Seen from the host, and from the child before it pivots, both lead out.
    (root / "out").symlink_to("/etc")
    (root / "var").symlink_to("../../../../../../run")
    for name in ("bin", "sbin", "lib", "lib64"):
        if os.path.islink(f"/{name}"):
            (root / name).symlink_to(os.readlink(f"/{name}"))
    for path in [root, *root.iterdir()]:
        os.chown(path, FIRST_ID, FIRST_ID, follow_symlinks=False)
    mounts = [
        Mount("/usr", "/usr", options=["rbind", "ro"]),
        Mount("here", "/out/here", "tmpfs"),
        Mount("there", "/var/there", "tmpfs"),
    ]
    with real_interceptor.spawn(rootfs=str(root), mounts=mounts) as child:
        lines = child.run(["cat", "/proc/self/mountinfo"]).stdout.decode().splitlines()
        points = {line.split()[4] for line in lines}
        assert {"/etc/here", "/run/there", "/usr", "/proc/sys"} <= points
        assert child.run(["touch", "/made"]).returncode == 0
    assert (root / "made").stat().st_uid == FIRST_ID
    assert not os.path.exists("/etc/here")


def test_masked_and_read_only_paths_are(real_interceptor: Interceptor) -> None:
    with real_interceptor.spawn(
        masked_paths=["/proc/interrupts", "/proc/fs"], readonly_paths=["/proc/bus", "/proc/irq"]
    ) as child:
        assert child.run(["cat", "/proc/interrupts"]).stdout == b""
        assert child.run(["ls", "-A", "/proc/fs"]).stdout == b""
        lines = child.run(["cat", "/proc/self/mountinfo"]).stdout.decode().splitlines()
        options_of = {line.split()[4]: line.split()[5] for line in lines}
        assert options_of["/proc/irq"].startswith("ro")
        assert child.call(inside.try_umount, b"/proc/interrupts") == errno.EINVAL
        assert child.call(inside.try_umount, b"/proc/irq") == errno.EINVAL


# ---- its network -------------------------------------------------------------------------------------------


def test_a_container_that_the_daemon_refuses_is_no_container(real_interceptor: Interceptor) -> None:
    with real_interceptor.spawn(cid="twice"):
        with pytest.raises(ContainerError, match="twice is registered already"):
            real_interceptor.spawn(["sleep", "1000"], cid="twice")
        assert len(real_interceptor.request("ps")) == 1
    with pytest.raises(ContainerError):
        real_interceptor.spawn(user_namespace=False)


def test_closing_ends_every_process_and_may_be_repeated(real_interceptor: Interceptor) -> None:
    child = real_interceptor.spawn(["sleep", "1000"])
    running = child.start(["sleep", "1000"])
    pidfds = [os.dup(child.pidfd), os.dup(running.pidfd.fileno())]
    bundle = child.bundle
    assert (bundle / "config.json").exists()
    child.close()
    child.close()
    try:
        for pidfd in pidfds:
            assert select.select([pidfd], [], [], 0)[0]
    finally:
        for pidfd in pidfds:
            os.close(pidfd)
    assert running.returncode == -signal.SIGKILL
    assert not bundle.exists()
    with pytest.raises((ContainerError, ValueError)):
        child.run(["true"])


def test_the_container_ends_with_its_main_process(real_interceptor: Interceptor) -> None:
    with real_interceptor.spawn(["true"]) as child:
        assert child.wait() == 0
        with pytest.raises((ContainerError, OSError)):
            child.run(["true"])


def test_orphans_inside_are_reaped(real_guarded: GuardedChild) -> None:
    # The shell ends before its child, whose parent is then process 1; the pipe ends when that child has.
    assert real_guarded.run(["sh", "-c", "(sleep 0.05; echo late) & exit 0"]).returncode == 0
    listing = real_guarded.run(
        ["sh", "-c", "while pgrep -x sleep >/dev/null; do :; done; ps -A -o stat,comm"]
    )
    assert b"Z" not in listing.stdout.split(b"\n", 1)[1]


_ORPHAN = """
import os, signal
from interceptor.spawn.create import spawn
child = spawn(None, ["sleep", "1000"])
extra = child.start(["sleep", "1000"])
print(child.pid, extra.pid, flush=True)
signal.pause()
"""


def test_containers_die_with_their_parent(tmp_path: Path) -> None:
    # The bundle's directory is all that stays: nobody is left to remove it.
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", _ORPHAN], stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        pidfds = [os.pidfd_open(pid) for pid in pids]
        parent.kill()
    try:
        for pidfd in pidfds:
            assert select.select([pidfd], [], [], 30)[0], "still running"
    finally:
        for pidfd in pidfds:
            os.close(pidfd)


def test_a_child_survives_the_thread_that_made_it(real_interceptor: Interceptor) -> None:
    made: list[GuardedChild] = []
    thread = threading.Thread(target=lambda: made.append(real_interceptor.spawn()))
    thread.start()
    thread.join()
    with made[0] as child:
        assert child.run(["echo", "here"]).stdout == b"here\n"


# ---- the daemon --------------------------------------------------------------------------------------------


def test_daemons_run_side_by_side_and_take_no_notice(real_interceptor: Interceptor) -> None:
    with Interceptor() as other, other.spawn(cid="same") as one, real_interceptor.spawn(cid="same") as two:
        assert other.pid != real_interceptor.pid
        for child in (one, two):
            assert child.call(inside.try_umount, b"/sys/kernel") == errno.EINVAL


def test_nothing_of_a_daemon_stays() -> None:
    with Interceptor() as daemon, daemon.spawn():
        directory = daemon.directory
        assert directory.stat().st_mode & 0o777 == 0o700
    assert not directory.exists()
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                line = Path(f"/proc/{entry}/cmdline").read_bytes()
            except OSError:
                continue
            assert os.fsencode(directory) not in line


@pytest.mark.parametrize("end", ["kill", "terminate"])
def test_children_outlive_the_daemon_and_its_successor_knows_them(end: str) -> None:
    with Interceptor() as daemon, daemon.spawn() as child:
        getattr(daemon, end)()
        assert not daemon.is_running
        with pytest.raises(ContainerError, match="no daemon listens"):
            daemon.spawn()
        daemon.start()
        assert [c["id"] for c in daemon.request("ps")] == [child.cid]
        assert child.call(inside.try_umount, b"/proc/sys") == errno.EINVAL
        with daemon.spawn() as second:
            assert second.call(inside.raw_nodes) == []


def test_closing_after_the_daemon_was_killed_leaves_nothing() -> None:
    with Interceptor() as daemon:
        daemon.spawn(["sleep", "1000"])
        daemon.kill()
    assert not daemon.directory.exists()


def test_a_daemon_that_cannot_start_says_why_and_leaves_nothing() -> None:
    with (
        pytest.raises(InterceptorError, match=r"guard_mode.*for tests only"),
        Interceptor(guard_mode="random"),
    ):
        pass


def test_a_directory_given_is_kept(tmp_path: Path) -> None:
    with Interceptor(directory=tmp_path / "d", question_timeout=2.5) as daemon:
        assert "question_timeout = 2.5" in (tmp_path / "d/config.toml").read_text()
        daemon.restart()
    assert '"event": "ready"' in (tmp_path / "d/daemon.log").read_text()


def test_spawn_without_a_daemon_needs_none() -> None:
    with spawn(None, ["true"]) as child:
        assert child.wait() == 0


def test_immutables_are_not_unmounted_where_that_is_configured(tmp_path: Path) -> None:
    """README: protect_immutable_unmounts. The container's own mounts stay its own affair."""

    def body() -> list[int]:
        os.mkdir("/tmp/own")
        results = []
        for _ in range(2):  # the second time from the cache
            results += [inside.try_umount(b"/given", flags) for flags in (0, UmountFlag.MNT_DETACH)]
            results.append(inside.try_mount(b"own", b"/tmp/own", b"tmpfs"))
            results.append(inside.try_umount(b"/tmp/own"))
        return results

    given = [Mount("tmpfs", "/given", "tmpfs"), Mount(str(tmp_path), "/bound", "", ("bind",))]
    with Interceptor(protect_immutable_unmounts=True) as daemon, daemon.spawn(mounts=given) as child:
        assert child.call(body) == [errno.EPERM, errno.EPERM, 0, 0] * 2
        assert child.call(inside.try_umount, b"/bound") == errno.EPERM
    with Interceptor() as daemon, daemon.spawn(mounts=given) as child:
        assert child.call(inside.try_umount, b"/given") == 0
