"""What a container sees in the view, with the kernel's own nodes as the oracle."""

from __future__ import annotations

import errno
import os
import select
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest

from interceptor.mounts.managed import CGROUP_PROC, VIEW_PROC
from interceptor.view import proc
from interceptor.view import sys as sysfs
from interceptor.view.nodes import Effect
from tests.view_support import MOUNTPOINT, Sandbox, ViewProcess, node, outcome, read, write

pytestmark = pytest.mark.root

ROWS = {"proc": proc.ROWS, "sys": sysfs.ROWS}


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


# The mount and who is in it


def test_mount_is_locked_down_and_recognizable(view: ViewProcess) -> None:
    (line,) = view.mounts()
    options, fstype, source, super_options = line.split()[5], *line.split(" - ")[1].split()
    assert (fstype, source) == ("fuse.interceptor", "interceptor")
    assert {"nosuid", "nodev", "noexec"} <= set(options.split(","))
    assert "allow_other" in super_options.split(",")


def test_containers_are_listed_for_the_hosts_root_only(view: ViewProcess, box: Sandbox) -> None:
    assert view.run(lambda: os.listdir(MOUNTPOINT)) == ["box"]
    assert view.run(lambda: outcome(lambda: os.listdir(MOUNTPOINT)), box) == "EACCES"
    assert view.run(lambda: sorted(os.listdir(node(""))), box) == ["proc", "sys"]
    proc = sorted(path.decode() for path in (*VIEW_PROC, *CGROUP_PROC))
    assert view.run(lambda: sorted(os.listdir(node("proc"))), box) == proc


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
    # Whoever reads it: what counts is whose view it is.
    assert view.run(lambda: read(node("proc/sys/kernel/hostname"))) == "inside\n"
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
    add = ["ip", "link", "add", "pair0", "type", "veth", "peer", "name", "pair1"]
    remove = ["ip", "link", "del", "pair0"]

    def come_and_go() -> list[object]:
        seen: list[object] = []
        for command in (add, remove):
            subprocess.run(command, check=True, capture_output=True)
            seen.append(sorted(os.listdir(node("sys/devices/virtual/net"))))
            seen.append(os.path.exists(node("sys/devices/virtual/net/pair0")))
            seen.append(os.path.exists(node("proc/sys/net/ipv4/conf/pair0/forwarding")))
        return seen

    assert view.run(come_and_go, box) == [["lo", "pair0", "pair1"], True, True, ["lo"], False, False]


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
                # The kernel lets the container's root write these although it shows them as the host root's.
                owner = [] if path == "sys/user" else [st.st_uid, st.st_gid]
                found[entry.name] = [st.st_mode, st.st_size, *owner, *kind]
        return found

    def both() -> list[object]:
        tops = [
            os.open(node(f"{base}/{path}"), os.O_RDONLY),
            os.open(path, os.O_RDONLY, dir_fd=bare.fileno()),
        ]
        return [facts(top) for top in tops]

    seen, real = view.run(both, box)
    assert len(real) > 0
    made_up = {row.path.decode() for row in ROWS[base] if row.mode is not None}
    for name in [*seen, *real]:
        if f"{path}/{name}" in made_up:  # the tables say what it is: test_view_table.py
            seen.pop(name, None)
            real.pop(name, None)
        elif f"{path}/{name}" in ("sys/kernel/hostname", "sys/kernel/domainname") and name in seen:
            del seen[name][2:4], real[name][2:4]  # they belong to the container's root
    assert seen == real


def test_dots_lead_to_the_directory_and_its_parent(view: ViewProcess, box: Sandbox) -> None:
    """Through getdents64 itself: Python's listings leave them out."""
    command = ["ls", "-a1", node("proc/sys/user")]
    listed = view.run(
        lambda: subprocess.run(command, check=True, capture_output=True, text=True).stdout.split(), box
    )
    assert listed[:2] == [".", ".."] and len(listed) == len(set(listed)) > 5


def open_for_writing(path: str, dir_fd: int) -> None:
    os.close(os.open(path, os.O_WRONLY, dir_fd=dir_fd))


def walk_outcomes(top: int) -> dict[str, object]:
    """For every file below: the errno of opening, reading and opening for writing, or the kind of success."""
    found: dict[str, object] = {}
    for directory, _, files, dir_fd in os.fwalk(".", dir_fd=top):
        for name in files:
            if stat.S_ISLNK(os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_mode):
                continue
            text = outcome(read, name, dir_fd)
            opened = outcome(open_for_writing, name, dir_fd)
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
        return [walk_outcomes(top) for top in tops]

    seen, real = view.run(both, box, uid)
    assert len(real) > 10
    own = {row.path.decode() for row in ROWS[base] if row.mode is not None or row.effect is not Effect.REAL}
    for name in [*seen, *real]:
        if f"{path}{name[1:]}" in own:  # the tables say who may: test_view_table.py
            seen.pop(name, None)
            real.pop(name, None)
    if path.startswith("kernel") and uid == 0:
        # Nobody but the machine's own root may: to the container's root that is EPERM, not EACCES.
        assert {result[1] for result in seen.values()} == {"EPERM"}
        assert {result[1] for result in real.values()} == {"EACCES"}
        seen, real = ({name: result[0] for name, result in found.items()} for found in (seen, real))
    assert {k: (seen.get(k), real[k]) for k in real if seen.get(k) != real[k]} == {}
    assert seen.keys() == real.keys()


def test_errors_are_those_of_the_kernel(view: ViewProcess, box: Sandbox) -> None:
    bad = {
        "proc/sys/net/ipv4/ip_default_ttl": "nonsense",
        "proc/sys/net/ipv4/ip_local_port_range": "9 5",
        "proc/sys/net/core/somaxconn": "-1",
        "proc/sys/kernel/ns_last_pid": "1",
        "proc/sys/net/ipv4/tcp_congestion_control": "no_such",
        "sys/devices/virtual/net/lo/mtu": "x",
        "proc/sys/kernel": "1",
        "proc/sys/kernel/absent": "1",
    }

    def both() -> list[list[object]]:
        results = []
        for path, text in bad.items():
            base, _, rest = path.partition("/")
            bare = f"/proc/self/fd/{(box.proc if base == 'proc' else box.sys).fileno()}/{rest}"
            results.append([path, outcome(write, node(path), text), outcome(write, bare, text)])
        return results

    results = view.run(both, box)
    assert [(path, seen) for path, seen, _ in results] == [(path, real) for path, _, real in results]
    assert results[0][1] == "EINVAL"


def test_nothing_can_be_removed_or_changed(view: ViewProcess, box: Sandbox) -> None:
    attempts: dict[str, Callable[[str], object]] = {
        "rmdir": lambda top: os.rmdir(f"{top}/kernel"),
        "unlink": lambda top: os.unlink(f"{top}/kernel/hostname"),
        "unlink own": lambda top: os.unlink(f"{top}/net/ipv4/ip_forward"),
        "rename over": lambda top: os.rename(f"{top}/kernel/hostname", f"{top}/kernel/domainname"),
        "chmod": lambda top: os.chmod(f"{top}/kernel/hostname", 0o777),
        "chmod own": lambda top: os.chmod(f"{top}/net/ipv4/ip_forward", 0o666),
        "chown own": lambda top: os.chown(f"{top}/net/ipv4/ip_forward", 5, 5),
        "truncate": lambda top: os.truncate(f"{top}/kernel/version", 0),
        "truncate own": lambda top: os.truncate(f"{top}/net/ipv4/ip_forward", 0),
        "setxattr": lambda top: os.setxattr(f"{top}/net/ipv4/ip_forward", "user.x", b"1"),
        "fsync": lambda top: os.fsync(os.open(f"{top}/kernel/hostname", os.O_RDONLY)),
    }
    bare = f"/proc/self/fd/{box.proc.fileno()}/sys"

    def both() -> dict[str, list[object]]:
        return {
            name: [outcome(attempt, node("proc/sys")), outcome(attempt, bare)]
            for name, attempt in attempts.items()
        }

    for uid in (0, 1000):
        results = view.run(both, box, uid)
        assert {name: pair for name, pair in results.items() if pair[0] != pair[1]} == {}


def test_nothing_can_be_made(view: ViewProcess, box: Sandbox) -> None:
    """Below /proc/sys the kernel itself says ENOENT, for names that do not exist cannot even be looked up there."""
    attempts: list[Callable[[str], object]] = [
        lambda top: os.open(f"{top}/new", os.O_CREAT | os.O_WRONLY),
        lambda top: os.mkdir(f"{top}/new"),
        lambda top: os.symlink("x", f"{top}/new"),
        lambda top: os.mknod(f"{top}/new", stat.S_IFIFO),
        lambda top: os.link(f"{top}/{os.listdir(top)[0]}", f"{top}/new"),
        lambda top: os.rename(f"{top}/{os.listdir(top)[0]}", f"{top}/new"),
    ]
    tops = [
        node(path)
        for path in ("", "proc", "proc/sys", "proc/sys/net/ipv4", "sys/kernel", "sys/devices/virtual/net/lo")
    ]

    def attempt_all() -> list[object]:
        return [outcome(attempt, top) for top in tops for attempt in attempts]

    for sandbox in (box, None):
        assert set(view.run(attempt_all, sandbox)) <= {"EACCES", "EPERM", "ENOENT"}
    assert view.run(lambda: [name for top in tops for name in os.listdir(top) if name == "new"]) == []


def test_only_the_containers_root_may_write(view: ViewProcess, box: Sandbox) -> None:
    path = node("proc/sys/net/ipv4/ip_forward")
    assert view.run(lambda: outcome(lambda: write(path, "1")), box, uid=1000) == "EACCES"
    assert view.run(lambda: outcome(lambda: write(node("proc/sys/kernel/acct"), "1")), box) == "EACCES"
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


def polled(fd: int) -> list[int]:
    """What poll(2) says at once."""
    poller = select.poll()
    poller.register(fd, select.POLLIN | select.POLLOUT | select.POLLPRI)
    return [events for _, events in poller.poll(0)]


def test_offsets_work_as_sysctl_has_them(view: ViewProcess, box: Sandbox) -> None:
    path = "sys/net/ipv4/ip_local_port_range"
    bare = f"/proc/self/fd/{box.proc.fileno()}/{path}"

    def script(path: str) -> list[object]:
        fd = os.open(path, os.O_RDWR)
        steps = [
            os.write(fd, b"20000 30000\n"),
            outcome(lambda: os.write(fd, b"20001 30001\n")),
            os.lseek(fd, 0, os.SEEK_SET),
            os.read(fd, 3).decode(),
            os.read(fd, 100).decode(),
            os.read(fd, 100).decode(),
            os.pread(fd, 4, 2).decode(),
            outcome(lambda: os.pwrite(fd, b"x", 3)),
            os.lseek(fd, 0, os.SEEK_CUR),
            polled(fd),
        ]
        os.close(fd)
        return steps

    seen, real = view.run(lambda: [script(node(f"proc/{path}")), script(bare)], box)
    assert seen == real


def test_a_name_too_long_is_refused(view: ViewProcess, box: Sandbox) -> None:
    assert view.run(lambda: outcome(lambda: os.stat(node("proc/sys/" + "x" * 255))), box) == "ENOENT"
    assert view.run(lambda: outcome(lambda: os.stat(node("proc/sys/" + "x" * 256))), box) == "ENAMETOOLONG"
