"""The view for real: its server, envoys in namespaces of their own, and the kernel's nodes as the oracle."""

from __future__ import annotations

import array
import contextlib
import errno
import json
import os
import select
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from interceptor.view.protocol import CONTROL_MAX, Add, List, Message, Ping, Quit, Remove, encode_message

pytestmark = pytest.mark.root

MOUNTPOINT = "/mnt"  # in a mount namespace of the server's own
TIME_LIMIT_S = 1.0
WAIT_S = 30.0
SANDBOX_IDS = (100000, 65536)


def forked(child: Callable[[], object]) -> int:
    """A child process that runs ``child`` and ends; its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            child()
            os._exit(0)
        except BaseException as error:
            sys.stderr.write(f"child: {error!r}\n")
            sys.stderr.flush()
        finally:
            os._exit(1)
    return pid


def reap(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Sandbox:
    """What a container is to the view: namespaces, kept by a process 1, and bare filesystems of theirs."""

    def __init__(self, name: str) -> None:
        from interceptor.kernel import flags
        from interceptor.kernel.mount import fresh_mount
        from interceptor.kernel.namespaces import open_namespace, unshare

        self.name = name
        self.created_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        kinds = flags.CLONE_NEWUSER | flags.CLONE_NEWNET | flags.CLONE_NEWIPC
        kinds |= flags.CLONE_NEWUTS | flags.CLONE_NEWPID
        ready, tell = os.pipe()
        wait, self._alive = os.pipe()

        def keeper() -> None:
            os.close(self._alive)
            unshare(kinds)
            pid = forked(lambda: os.read(wait, 1))  # until killed, or whoever runs the tests is gone
            os.write(tell, b"%d\n" % pid)
            reap(pid)

        self._keeper = forked(keeper)
        os.close(tell)
        os.close(wait)
        with open(ready) as told:
            self.pid = int(told.readline())
        for kind in ("uid", "gid"):
            Path(f"/proc/{self.pid}/{kind}_map").write_text(f"0 {SANDBOX_IDS[0]} {SANDBOX_IDS[1]}\n")
        self.namespaces = [open_namespace(self.pid, kind) for kind in ("user", "net", "ipc", "uts")]
        with open_namespace(self.pid, "pid") as pid_namespace:
            self.proc = fresh_mount(b"proc", {}, pid_namespace=pid_namespace)
        self.sys = fresh_mount(b"sysfs", {}, network_namespace=self.namespaces[1])

    def start_envoy(self) -> socket.socket:
        """An envoy of this container; the server's end of its socket."""
        from interceptor._native import ffi, lib

        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        fds = ffi.new("int[]", [namespace.fileno() for namespace in self.namespaces])
        self.envoy = forked(
            lambda: lib.ix_become_envoy(fds, len(fds), theirs.fileno(), self.proc.fileno(), self.sys.fileno())
        )
        theirs.close()
        return ours

    def enter(self, uid: int = 0) -> None:
        """Become a process of this container, apart from its PID namespace; without capabilities unless root."""
        from interceptor.kernel.namespaces import setns

        for namespace in (*self.namespaces[1:], self.namespaces[0]):
            setns(namespace, 0)
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)

    def stop(self) -> None:
        os.close(self._alive)
        os.kill(self.pid, signal.SIGKILL)
        reap(self._keeper)
        for fd in (*self.namespaces, self.proc, self.sys):
            fd.close()
        if hasattr(self, "envoy"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.envoy, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                reap(self.envoy)


class ViewProcess:
    """A view's server in a mount namespace of its own, and our end of its control socket."""

    def __init__(self) -> None:
        from interceptor.kernel.flags import CLONE_NEWNS
        from interceptor.kernel.mount import mount
        from interceptor.kernel.namespaces import unshare

        def in_private_namespace() -> None:
            unshare(CLONE_NEWNS)
            mount(None, "/", None, 0x4000 | 0x40000)  # MS_REC | MS_PRIVATE

        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control.settimeout(WAIT_S)
        command = [sys.executable, "-m", "interceptor.view.server", "--mountpoint", MOUNTPOINT]
        command += ["--control-fd", str(theirs.fileno()), "--envoy-timeout", str(TIME_LIMIT_S)]
        with theirs:
            self.process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], preexec_fn=in_private_namespace
            )
        assert self.receive() == {"ready": True}

    def receive(self) -> dict[str, Any]:
        answer = json.loads(self.control.recv(CONTROL_MAX))
        assert isinstance(answer, dict)
        return answer

    def send(self, packet: bytes, fds: list[int] | None = None) -> dict[str, Any]:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.control.sendmsg([packet], rights)
        return self.receive()

    def tell(self, message: Message, fds: list[int] | None = None) -> dict[str, Any]:
        return self.send(encode_message(message), fds)

    def add(self, sandbox: Sandbox) -> None:
        with sandbox.start_envoy() as sock:
            message = Add(sandbox.name, SANDBOX_IDS[0], SANDBOX_IDS[0], sandbox.created_ns)
            assert self.tell(message, [sock.fileno()]) == {"ok": True}

    def run(self, work: Callable[[], object], sandbox: Sandbox | None = None, uid: int = 0) -> Any:
        """What ``work`` returns (as JSON) in a process of the container, or of the host, that sees the view."""
        from interceptor.kernel.flags import CLONE_NEWNS
        from interceptor.kernel.namespaces import open_namespace, setns

        read, write = os.pipe()

        def child() -> None:
            with open_namespace(self.process.pid, "mnt") as namespace:
                setns(namespace, CLONE_NEWNS)
            if sandbox is not None:
                sandbox.enter(uid)
            with open(write, "w") as result:
                json.dump(work(), result)

        pid = forked(child)
        os.close(write)
        with open(read) as result:
            said = result.read()
        assert reap(pid) == 0, said
        return json.loads(said)

    def mounts(self) -> list[str]:
        lines = Path(f"/proc/{self.process.pid}/mountinfo").read_text().splitlines()
        return [line for line in lines if f" {MOUNTPOINT} " in line]

    def fds(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def wait(self) -> int:
        return self.process.wait(WAIT_S)

    def stop(self) -> None:
        self.control.close()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def server() -> Iterator[ViewProcess]:
    view = ViewProcess()
    yield view
    view.stop()


@pytest.fixture
def sandboxes() -> Iterator[Callable[[str], Sandbox]]:
    with contextlib.ExitStack() as stack:

        def make(name: str) -> Sandbox:
            sandbox = Sandbox(name)
            stack.callback(sandbox.stop)
            return sandbox

        yield make


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    sandbox = Sandbox("box")
    yield sandbox
    sandbox.stop()


@pytest.fixture(scope="module")
def view(box: Sandbox) -> Iterator[ViewProcess]:
    """One view with one container in it, for the tests that harm neither."""
    process = ViewProcess()
    process.add(box)
    yield process
    assert process.process.poll() is None, "the server must survive everything"
    process.stop()


def node(path: str, container: str = "box") -> str:
    return f"{MOUNTPOINT}/{container}/{path}"


def outcome(work: Callable[[], object]) -> Any:
    """What it returns, or the name of the errno it fails with."""
    try:
        return work()
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def read(path: str, dir_fd: int | None = None) -> str:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK, dir_fd=dir_fd)
    try:
        return os.read(fd, 65536).decode("utf-8", "replace")
    finally:
        os.close(fd)


def write(path: str, text: str, flags: int = 0) -> int:
    fd = os.open(path, os.O_WRONLY | flags)
    try:
        return os.write(fd, text.encode())
    finally:
        os.close(fd)


# The mount and who is in it


def test_mount_is_locked_down_and_recognizable(view: ViewProcess) -> None:
    (line,) = view.mounts()
    options, fstype, source, super_options = line.split()[5], *line.split(" - ")[1].split()
    assert (fstype, source) == ("fuse.interceptor", "interceptor")
    assert {"nosuid", "nodev", "noexec"} <= set(options.split(","))
    assert {"default_permissions", "allow_other"} <= set(super_options.split(","))


def test_containers_are_listed_for_the_hosts_root_only(view: ViewProcess, box: Sandbox) -> None:
    assert view.run(lambda: os.listdir(MOUNTPOINT)) == ["box"]
    assert view.run(lambda: outcome(lambda: os.listdir(MOUNTPOINT)), box) == "EACCES"
    assert view.run(lambda: sorted(os.listdir(node(""))), box) == ["proc", "sys"]
    assert view.run(lambda: sorted(os.listdir(node("proc"))), box) == ["swaps", "sys", "uptime"]


@pytest.mark.parametrize(
    "path",
    ["/other/proc/uptime", "/box/dev", "/box/proc/1", "/box/proc/kcore", "/box/sys/firmware", "/box/x" * 40],
)
def test_what_the_tables_do_not_have_does_not_exist(view: ViewProcess, box: Sandbox, path: str) -> None:
    assert view.run(lambda: outcome(lambda: os.stat(MOUNTPOINT + path)), box) == "ENOENT"


def test_statfs_says_the_longest_name(view: ViewProcess, box: Sandbox) -> None:
    assert view.run(lambda: os.statvfs(node("proc/sys")).f_namemax, box) == 255


# Made-up nodes


def test_uptime_counts_from_the_containers_creation(view: ViewProcess, box: Sandbox) -> None:
    before = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    texts = view.run(lambda: [read(node("proc/uptime")) for _ in range(3)], box)
    after = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    ups = [float(text.split()[0]) for text in texts]
    idles = [float(text.split()[1]) for text in texts]
    assert (before - box.created_ns) / 1e9 - 0.01 <= ups[0] <= ups[-1] <= (after - box.created_ns) / 1e9
    assert ups == sorted(ups) and idles == sorted(idles)
    assert all(text.endswith("\n") and text.count(" ") == 1 for text in texts)


def test_swaps_is_the_header_alone(view: ViewProcess, box: Sandbox) -> None:
    assert (
        view.run(lambda: read(node("proc/swaps")), box)
        == "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
    )


def test_made_up_nodes_can_be_read_in_pieces(view: ViewProcess, box: Sandbox) -> None:
    def pieces() -> str:
        with open(node("proc/swaps"), "rb", buffering=0) as file:
            text = b"".join(iter(lambda: file.read(7), b""))
            assert os.pread(file.fileno(), 4, 4) == text[4:8]
            return text.decode()

    assert view.run(pieces, box).endswith("Priority\n")


def test_made_up_nodes_belong_to_nobody_and_take_nothing(view: ViewProcess, box: Sandbox) -> None:
    st_mode, uid = view.run(
        lambda: [os.stat(node("proc/uptime")).st_mode, os.stat(node("proc/uptime")).st_uid], box
    )
    assert (st_mode, uid) == (stat.S_IFREG | 0o444, 65534)
    assert view.run(lambda: outcome(lambda: write(node("proc/uptime"), "1")), box) == "EACCES"
    # The host's root may open it for writing; procfs then says EIO.
    assert view.run(lambda: outcome(lambda: write(node("proc/uptime"), "1"))) == "EIO"


# Nodes that are the container's own


def test_hostname_is_that_of_the_containers_uts_namespace(view: ViewProcess, box: Sandbox) -> None:
    host = socket.gethostname()
    view.run(lambda: socket.sethostname("inside"), box)
    assert view.run(lambda: read(node("proc/sys/kernel/hostname")), box) == "inside\n"
    assert view.run(lambda: write(node("proc/sys/kernel/hostname"), "renamed\n", os.O_TRUNC), box) == 8
    assert view.run(socket.gethostname, box) == "renamed"
    # Whoever reads it: what counts is whose view it is.
    assert view.run(lambda: read(node("proc/sys/kernel/hostname"))) == "renamed\n"
    assert socket.gethostname() == host


def test_network_sysctl_is_written_in_the_containers_namespace_only(view: ViewProcess, box: Sandbox) -> None:
    path = "sys/net/ipv4/ip_default_ttl"
    host = read(f"/proc/{path}")
    wanted = "17\n" if host != "17\n" else "18\n"
    assert view.run(lambda: write(node(f"proc/{path}"), wanted, os.O_TRUNC), box) == 3
    assert view.run(lambda: read(path, box.proc.fileno()), box) == wanted
    assert view.run(lambda: read(node(f"proc/{path}")), box) == wanted
    assert read(f"/proc/{path}") == host


def test_ipc_sysctl_is_written_in_the_containers_namespace_only(view: ViewProcess, box: Sandbox) -> None:
    host = read("/proc/sys/kernel/msgmnb")
    wanted = "4242\n" if host != "4242\n" else "4243\n"
    assert view.run(lambda: write(node("proc/sys/kernel/msgmnb"), wanted), box) == 5
    assert view.run(lambda: read(node("proc/sys/kernel/msgmnb")), box) == wanted
    assert read("/proc/sys/kernel/msgmnb") == host


def test_network_devices_are_the_containers(view: ViewProcess, box: Sandbox) -> None:
    assert view.run(lambda: os.listdir(node("sys/devices/virtual/net")), box) == ["lo"]
    add = ["ip", "link", "add", "dum0", "type", "dummy"]
    remove = ["ip", "link", "del", "dum0"]

    def come_and_go() -> list[object]:
        seen: list[object] = []
        for command in (add, remove):
            subprocess.run(command, check=True, capture_output=True)
            seen.append(sorted(os.listdir(node("sys/devices/virtual/net"))))
            seen.append(os.path.exists(node("sys/devices/virtual/net/dum0")))
            seen.append(os.path.exists(node("proc/sys/net/ipv4/conf/dum0/forwarding")))
        return seen

    assert view.run(come_and_go, box) == [["dum0", "lo"], True, True, ["lo"], False, False]


def test_links_are_text(view: ViewProcess, box: Sandbox) -> None:
    link = "devices/virtual/net/lo/subsystem"
    both = view.run(
        lambda: [os.readlink(node(f"sys/{link}")), os.readlink(link, dir_fd=box.sys.fileno())], box
    )
    assert both[0] == both[1] == "../../../../class/net"


# Fidelity: the same question to the view and to a bare procfs or sysfs, by the same process


DIRECTORIES = [
    ("proc", "sys"),
    ("proc", "sys/kernel"),
    ("proc", "sys/fs"),
    ("proc", "sys/user"),
    ("proc", "sys/net"),
    ("proc", "sys/net/ipv4"),
    ("proc", "sys/net/ipv4/conf/lo"),
    ("sys", "kernel"),
    ("sys", "kernel/mm"),
    ("sys", "devices/virtual"),
    ("sys", "devices/virtual/net/lo"),
    ("sys", "devices/virtual/tty"),
]


@pytest.mark.parametrize(("base", "path"), DIRECTORIES)
def test_directory_looks_as_the_real_one(view: ViewProcess, box: Sandbox, base: str, path: str) -> None:
    bare = box.proc if base == "proc" else box.sys

    def facts(top: int) -> dict[str, object]:
        found: dict[str, object] = {}
        with os.scandir(top) as entries:
            for entry in entries:
                st = os.stat(entry.name, dir_fd=top, follow_symlinks=False)
                kind = [entry.is_dir(follow_symlinks=False), entry.is_symlink()]
                found[entry.name] = [st.st_mode, st.st_uid, st.st_gid, st.st_size, *kind]
        return found

    def both() -> list[object]:
        tops = [
            os.open(node(f"{base}/{path}"), os.O_RDONLY),
            os.open(path, os.O_RDONLY, dir_fd=bare.fileno()),
        ]
        return [facts(top) for top in tops]

    seen, real = view.run(both, box)
    assert len(real) > 0
    assert seen == real


def test_dots_lead_to_the_directory_and_its_parent(view: ViewProcess, box: Sandbox) -> None:
    """Through getdents64 itself: Python's listings leave them out."""
    command = ["ls", "-a1", node("proc/sys/user")]
    listed = view.run(
        lambda: subprocess.run(command, check=True, capture_output=True, text=True).stdout.split(), box
    )
    assert listed[:2] == [".", ".."] and len(listed) == len(set(listed)) > 5


def walk_outcomes(top: int, uid: int) -> dict[str, object]:
    """For every file below: the errno of opening, reading and opening for writing, or the kind of success."""
    found: dict[str, object] = {}
    for directory, _, files, dir_fd in os.fwalk(".", dir_fd=top):
        for name in files:
            if stat.S_ISLNK(os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_mode):
                continue
            text = outcome(lambda name=name, dir_fd=dir_fd: read(name, dir_fd))  # type: ignore[misc]
            opened = outcome(
                lambda name=name, dir_fd=dir_fd: os.close(os.open(name, os.O_WRONLY, dir_fd=dir_fd))
            )  # type: ignore[misc]
            found[f"{directory}/{name}"] = [text if str(text) in errno.errorcode.values() else "read", opened]
    return found


@pytest.mark.parametrize("uid", [0, 1000])
@pytest.mark.parametrize(
    ("base", "path"), [("proc", "sys"), ("sys", "kernel/mm"), ("sys", "devices/virtual/net")]
)
def test_every_file_opens_and_reads_as_the_real_one(
    view: ViewProcess, box: Sandbox, base: str, path: str, uid: int
) -> None:
    bare = box.proc if base == "proc" else box.sys

    def both() -> list[object]:
        tops = [
            os.open(node(f"{base}/{path}"), os.O_RDONLY),
            os.open(path, os.O_RDONLY, dir_fd=bare.fileno()),
        ]
        return [walk_outcomes(top, uid) for top in tops]

    seen, real = view.run(both, box, uid)
    assert len(real) > 10
    assert {k: (seen.get(k), real[k]) for k in real if seen.get(k) != real[k]} == {}
    assert seen.keys() == real.keys()


def test_errors_are_those_of_the_kernel(view: ViewProcess, box: Sandbox) -> None:
    bad = {
        "proc/sys/net/ipv4/ip_default_ttl": "nonsense",
        "proc/sys/net/ipv4/ip_local_port_range": "9 5",
        "proc/sys/net/core/somaxconn": "-1",
        "proc/sys/kernel/panic": "1",
        "proc/sys/net/ipv4/tcp_congestion_control": "no_such",
        "sys/kernel/mm/transparent_hugepage/enabled": "never",
        "sys/devices/virtual/net/lo/mtu": "x",
        "proc/sys/kernel": "1",
        "proc/sys/kernel/absent": "1",
    }

    def both() -> list[list[object]]:
        results = []
        for path, text in bad.items():
            base, _, rest = path.partition("/")
            bare = f"/proc/self/fd/{(box.proc if base == 'proc' else box.sys).fileno()}/{rest}"
            results.append(
                [
                    path,
                    outcome(lambda p=path, t=text: write(node(p), t)),
                    outcome(lambda p=bare, t=text: write(p, t)),
                ]
            )  # type: ignore[misc]
        return results

    results = view.run(both, box)
    assert [(path, seen) for path, seen, _ in results] == [(path, real) for path, _, real in results]
    assert results[0][1] == "EINVAL"


def test_nothing_can_be_made_removed_or_changed(view: ViewProcess, box: Sandbox) -> None:
    attempts: dict[str, Callable[[str], object]] = {
        "create": lambda top: os.open(f"{top}/new", os.O_CREAT | os.O_WRONLY),
        "mkdir": lambda top: os.mkdir(f"{top}/new"),
        "rmdir": lambda top: os.rmdir(f"{top}/kernel"),
        "unlink": lambda top: os.unlink(f"{top}/kernel/hostname"),
        "rename": lambda top: os.rename(f"{top}/kernel/hostname", f"{top}/kernel/x"),
        "symlink": lambda top: os.symlink("x", f"{top}/new"),
        "mknod": lambda top: os.mknod(f"{top}/new", stat.S_IFIFO),
        "link": lambda top: os.link(f"{top}/kernel/hostname", f"{top}/new"),
        "chmod": lambda top: os.chmod(f"{top}/kernel/hostname", 0o777),
        "chown": lambda top: os.chown(f"{top}/net/ipv4/ip_forward", 5, 5),
        "chmod own": lambda top: os.chmod(f"{top}/net/ipv4/ip_forward", 0o666),
        "truncate": lambda top: os.truncate(f"{top}/net/ipv4/ip_forward", 0),
        "truncate other": lambda top: os.truncate(f"{top}/kernel/panic", 0),
        "setxattr": lambda top: os.setxattr(f"{top}/net/ipv4/ip_forward", "user.x", b"1"),
        "fsync": lambda top: os.fsync(os.open(f"{top}/kernel/hostname", os.O_RDONLY)),
        "mkdir host": lambda top: os.mkdir(f"{top}/kernel/new"),
    }
    bare = f"/proc/self/fd/{box.proc.fileno()}/sys"

    def both() -> dict[str, list[object]]:
        return {
            name: [outcome(lambda a=attempt: a(node("proc/sys"))), outcome(lambda a=attempt: a(bare))]  # type: ignore[misc]
            for name, attempt in attempts.items()
        }

    def differing(results: dict[str, list[object]]) -> dict[str, list[object]]:
        return {name: pair for name, pair in results.items() if pair[0] != pair[1]}

    for sandbox, uid in ((box, 0), (box, 1000)):
        assert differing(view.run(both, sandbox, uid)) == {}


def test_only_the_containers_root_may_write(view: ViewProcess, box: Sandbox) -> None:
    path = node("proc/sys/net/ipv4/ip_forward")
    assert view.run(lambda: outcome(lambda: write(path, "1")), box, uid=1000) == "EACCES"
    assert view.run(lambda: outcome(lambda: write(node("proc/sys/kernel/panic"), "1")), box) == "EACCES"
    assert view.run(lambda: outcome(lambda: read(path)), box, uid=1000) in ("0\n", "1\n")


@pytest.mark.parametrize("flags", [0, os.O_TRUNC, os.O_APPEND, os.O_CREAT | os.O_TRUNC])
def test_shells_ways_of_writing_take_effect(view: ViewProcess, box: Sandbox, flags: int) -> None:
    path = node("proc/sys/net/ipv4/ip_default_ttl")

    def twice() -> list[str]:
        seen = []
        for value in ("33\n", "44\n"):
            write(path, value, flags)
            seen.append(read(path))
        return seen

    assert view.run(twice, box) == ["33\n", "44\n"]


def test_offsets_work_as_sysctl_has_them(view: ViewProcess, box: Sandbox) -> None:
    bare = f"/proc/self/fd/{box.proc.fileno()}/sys/kernel/hostname"

    def script(path: str) -> list[object]:
        fd = os.open(path, os.O_RDWR)
        steps = [
            os.write(fd, b"offsets\n"),
            outcome(lambda: os.write(fd, b"again\n")),
            os.lseek(fd, 0, os.SEEK_SET),
            os.read(fd, 3).decode(),
            os.read(fd, 100).decode(),
            os.read(fd, 100).decode(),
            os.pread(fd, 4, 2).decode(),
            outcome(lambda: os.pwrite(fd, b"x", 3)),
            os.lseek(fd, 0, os.SEEK_CUR),
        ]
        os.close(fd)
        return steps

    seen, real = view.run(lambda: [script(node("proc/sys/kernel/hostname")), script(bare)], box)
    assert seen == real


def test_a_name_too_long_is_refused(view: ViewProcess, box: Sandbox) -> None:
    assert view.run(lambda: outcome(lambda: os.stat(node("proc/sys/" + "x" * 255))), box) == "ENOENT"
    assert view.run(lambda: outcome(lambda: os.stat(node("proc/sys/" + "x" * 256))), box) == "ENAMETOOLONG"


# Many at once, and things that break


def test_many_readers_each_get_their_containers_value(
    server: ViewProcess, sandboxes: Callable[[str], Sandbox]
) -> None:
    boxes = [sandboxes(f"box{n}") for n in range(2)]
    for sandbox in boxes:
        server.add(sandbox)
        server.run(lambda sandbox=sandbox: socket.sethostname(sandbox.name), sandbox)

    def readers() -> list[str]:
        wrong: list[str] = []

        def reader(name: str) -> None:
            for _ in range(50):
                text = outcome(lambda: read(node("proc/sys/kernel/hostname", name)))
                if text != f"{name}\n":
                    wrong.append(f"{name}: {text}")

        threads = [
            threading.Thread(target=reader, args=(sandbox.name,)) for sandbox in boxes for _ in range(12)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return wrong

    assert server.run(readers) == []


def timed(work: Callable[[], object]) -> tuple[Any, float]:
    begin = time.monotonic()
    result = outcome(work)
    return result, time.monotonic() - begin


def test_dead_envoy_is_eio_at_once_and_nobody_elses_trouble(
    server: ViewProcess, sandboxes: Callable[[str], Sandbox]
) -> None:
    dies, lives = sandboxes("dies"), sandboxes("lives")
    server.add(dies)
    server.add(lives)
    path = node("proc/sys/kernel/hostname", "dies")
    before = server.run(lambda: read(path))
    os.kill(dies.envoy, signal.SIGKILL)
    reap(dies.envoy)
    result, took = server.run(lambda: timed(lambda: read(path)))
    assert result == "EIO" and took < TIME_LIMIT_S
    assert server.run(lambda: outcome(lambda: read(node("proc/sys/kernel/hostname", "lives")))) == before
    assert server.run(lambda: read(node("proc/uptime", "dies"))).endswith("\n")
    assert server.tell(List())["containers"] == {"dies": False, "lives": True}
    server.add(dies)
    assert server.run(lambda: read(path)) == before


def test_stuck_envoy_is_eio_in_time_and_delays_nobody_else(
    server: ViewProcess, sandboxes: Callable[[str], Sandbox]
) -> None:
    stuck, free = sandboxes("stuck"), sandboxes("free")
    server.add(stuck)
    server.add(free)
    os.kill(stuck.envoy, signal.SIGSTOP)
    os.waitpid(stuck.envoy, os.WUNTRACED)

    def crowd() -> list[Any]:
        """Many wait for the stuck one while the other is read again and again."""
        results: list[Any] = []
        path = node("proc/sys/kernel/hostname", "stuck")
        threads = [
            threading.Thread(target=lambda: results.append(timed(lambda: read(path)))) for _ in range(64)
        ]
        for thread in threads:
            thread.start()
        others = [timed(lambda: read(node("proc/sys/kernel/hostname", "free"))) for _ in range(20)]
        waiting = sum(thread.is_alive() for thread in threads)
        for thread in threads:
            thread.join()
        return [results, others, waiting]

    results, others, waiting = server.run(crowd)
    assert {result for result, _ in results} == {"EIO"}
    assert max(took for _, took in results) < TIME_LIMIT_S + 5
    assert all(result.endswith("\n") for result, _ in others)
    assert waiting == 64, "the others were read while all of them waited"
    os.kill(stuck.envoy, signal.SIGCONT)
    assert server.run(lambda: read(node("proc/sys/kernel/hostname", "stuck"))).endswith("\n")


def test_envoy_that_talks_nonsense_is_dropped(
    server: ViewProcess, sandboxes: Callable[[str], Sandbox]
) -> None:
    sandbox = sandboxes("liar")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        ours.settimeout(WAIT_S)
        with theirs:
            message = Add("liar", SANDBOX_IDS[0], SANDBOX_IDS[0], sandbox.created_ns)
            assert server.tell(message, [theirs.fileno()]) == {"ok": True}
        ours.send(b"nonsense")
        assert ours.recv(1) == b"", "the server hangs up"
    assert server.tell(List())["containers"] == {"liar": False}
    assert server.run(lambda: outcome(lambda: os.listdir(node("proc/sys", "liar")))) == "EIO"


# The control socket


def test_orders_that_make_no_sense_are_refused_and_leak_nothing(server: ViewProcess) -> None:
    add = encode_message(Add("a", 1, 1, 1))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs, open("/dev/null") as null:
        server.tell(Ping())
        before = server.fds()
        assert server.send(add)["ok"] is False
        assert server.send(add, [null.fileno()])["ok"] is False
        assert server.send(add, [theirs.fileno()])["ok"] is False
        assert server.send(add, [null.fileno()] * 2)["ok"] is False
        assert server.send(add, [null.fileno()] * 20)["ok"] is False
        assert server.send(encode_message(Ping()), [null.fileno()])["ok"] is False
        assert server.send(b"{" + b" " * (CONTROL_MAX * 2) + b"}")["ok"] is False
        assert server.send(b"nonsense")["ok"] is False
        assert server.tell(Remove("a"))["ok"] is False
        assert server.tell(Ping()) == {"ok": True}
        assert server.fds() == before


def test_container_comes_once_and_goes_without_a_trace(
    server: ViewProcess, sandboxes: Callable[[str], Sandbox]
) -> None:
    sandbox = sandboxes("once")
    assert server.tell(List())["containers"] == {}
    before = server.fds()
    server.add(sandbox)
    first = sandbox.envoy
    with sandbox.start_envoy() as sock:
        answer = server.tell(Add("once", 1, 1, 1), [sock.fileno()])
    assert answer == {"ok": False, "error": "container once is served already"}
    assert reap(sandbox.envoy) == 0, "the second envoy is hung up on"
    assert server.run(lambda: os.listdir(MOUNTPOINT)) == ["once"]
    assert server.tell(Remove("once")) == {"ok": True}
    assert reap(first) == 0, "an envoy ends with its socket"
    assert server.run(lambda: outcome(lambda: os.stat(node("proc/uptime", "once")))) == "ENOENT"
    assert server.fds() == before


def test_open_file_of_a_container_that_went_is_eio(
    server: ViewProcess, sandboxes: Callable[[str], Sandbox]
) -> None:
    sandbox = sandboxes("gone")
    server.add(sandbox)
    go, went = os.pipe(), os.pipe()

    def hold() -> Any:
        with open(node("proc/sys/kernel/hostname", "gone"), "rb", buffering=0) as file:
            os.write(went[1], b"x")
            os.read(go[0], 1)
            return outcome(lambda: file.read(10))

    results: list[Any] = []
    holder = threading.Thread(target=lambda: results.append(server.run(hold)))
    holder.start()
    assert select.select([went[0]], [], [], WAIT_S)[0]
    assert server.tell(Remove("gone")) == {"ok": True}
    os.write(go[1], b"x")
    holder.join()
    assert results == ["EIO"]
    for fd in (*go, *went):
        os.close(fd)


def test_quit_unmounts_and_ends(server: ViewProcess, sandboxes: Callable[[str], Sandbox]) -> None:
    sandbox = sandboxes("c")
    server.add(sandbox)
    assert server.tell(Quit()) == {"ok": True}
    assert server.wait() == 0
    assert reap(sandbox.envoy) == 0


def test_sigterm_ends_and_sigint_does_not(server: ViewProcess) -> None:
    server.process.send_signal(signal.SIGINT)
    server.process.send_signal(signal.SIGHUP)
    assert server.tell(Ping()) == {"ok": True}
    server.process.send_signal(signal.SIGTERM)
    assert server.wait() == 0


def test_end_of_control_without_containers_ends_the_server(server: ViewProcess) -> None:
    server.control.close()
    assert server.wait() == 0


def test_view_outlives_its_daemon_until_the_last_container_is_gone(
    server: ViewProcess, sandboxes: Callable[[str], Sandbox]
) -> None:
    sandbox = sandboxes("c")
    server.add(sandbox)
    server.control.close()
    assert server.run(lambda: read(node("proc/sys/kernel/hostname", "c")), sandbox).endswith("\n")
    assert server.run(lambda: read(node("proc/swaps", "c")), sandbox).startswith("Filename")
    os.kill(sandbox.envoy, signal.SIGKILL)
    reap(sandbox.envoy)
    assert server.wait() == 0
