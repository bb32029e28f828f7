"""What the pump answers by itself: reads by descriptors that envoys hand over, and listings of a moment ago."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from interceptor.view.filesystem import TABLE
from interceptor.view.protocol import REPLY_MAX, Add, Base, Op, Remove
from tests.robust.support import eventually
from tests.view_support import SANDBOX_IDS, Sandbox, ViewProcess, forked, node, outcome, read, reap, write

pytestmark = pytest.mark.root

WANTED = "sys/net/ipv4/tcp_syncookies"
KEEP = 1


@pytest.fixture
def view() -> Iterator[ViewProcess]:
    running = ViewProcess()
    yield running
    running.stop()


@pytest.fixture
def box() -> Iterator[Sandbox]:
    sandbox = Sandbox("box")
    yield sandbox
    sandbox.stop()


class FalseEnvoy:
    """Says that every node is there, that it reads `said`, and hands over the same descriptor with each."""

    def __init__(self, handed_over: int) -> None:
        self.theirs, self._sock = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._handed_over = handed_over
        self.reads = 0
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while packet := self._sock.recv(REPLY_MAX):
            seq, op, _, length, _, flags, _ = struct.unpack_from("=IBBHIIQ", packet)
            path = packet[24 : 24 + length].decode()
            head, fds = struct.pack("=IiQ", seq, 0, 0), []
            if op == Op.GETATTR:
                kind = stat.S_IFREG | 0o644 if path == WANTED else stat.S_IFDIR | 0o555
                body = struct.pack("=IIIIQqqq", kind, 1, 0, 0, 0, 0, 0, 0)
            else:
                body = b"said\n"
                self.reads += op == Op.READ
                fds = [self._handed_over] if flags & KEEP else []
            socket.send_fds(self._sock, [head + body], fds)

    def close(self) -> None:
        self._sock.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._sock.close()
        self.theirs.close()


def what_is_read(
    view: ViewProcess, box: Sandbox, handed_over: int, until: str = ""
) -> tuple[list[str], int, int]:
    """Three reads by way of an envoy that hands this over, and how often it was asked: by the end, and for these.

    Before that others until one says ``until``: only an envoy that answers at once hands anything over.
    """
    envoy = FalseEnvoy(handed_over)
    try:
        ids = SANDBOX_IDS[0], SANDBOX_IDS[0]
        message = Add(box.name, *ids, box.created_ns, userns=box.userns, proc_mount=box.proc_mount)
        assert view.tell(message, [envoy.theirs.fileno()]) == {"ok": True}
        path = node(f"proc/{WANTED}")
        if until:
            eventually(lambda: view.run(lambda: read(path)) == until, "a descriptor to be handed over")
        before = envoy.reads
        return view.run(lambda: [read(path) for _ in range(3)]), envoy.reads, envoy.reads - before
    finally:
        envoy.close()


def test_the_node_itself_is_read_without_the_envoy_from_then_on(view: ViewProcess, box: Sandbox) -> None:
    """Otherwise the next test would test nothing."""
    with open(f"/proc/self/fd/{box.proc.fileno()}/{WANTED}") as file:
        content = Path(f"/proc/{WANTED}").read_text()
        said, asked, asked_then = what_is_read(view, box, file.fileno(), content)
        assert (said, asked_then) == ([content] * 3, 0) and asked


def another_node(box: Sandbox) -> int:
    return os.open(f"/proc/self/fd/{box.proc.fileno()}/sys/net/ipv4/tcp_sack", os.O_RDONLY)


def another_mount(_box: Sandbox) -> int:
    return os.open(f"/proc/{WANTED}", os.O_RDONLY)


def a_process(box: Sandbox) -> int:
    return os.open(f"/proc/self/fd/{box.proc.fileno()}/1/status", os.O_RDONLY)


def a_directory(box: Sandbox) -> int:
    return os.open(f"/proc/self/fd/{box.proc.fileno()}/{os.path.dirname(WANTED)}", os.O_RDONLY)


def a_pipe(_box: Sandbox) -> int:
    """Reading it would take for ever."""
    reading, writing = os.pipe()
    held.append(writing)
    return reading


held: list[int] = []


@pytest.mark.parametrize("handed_over", [another_node, another_mount, a_process, a_directory, a_pipe])
def test_nothing_else_that_an_envoy_hands_over_is_read(
    view: ViewProcess, box: Sandbox, handed_over: Callable[[Sandbox], int]
) -> None:
    before = view.fds()
    fd = handed_over(box)
    try:
        assert what_is_read(view, box, fd) == (["said\n"] * 3, 3, 3)
    finally:
        for number in (fd, *held):
            os.close(number)
        held.clear()
    assert view.tell(Remove(box.name)) == {"ok": True}
    assert view.fds() == before


def test_a_device_of_the_same_name_is_another_one(view: ViewProcess, box: Sandbox) -> None:
    """What is kept of a node ends with the node."""
    view.add(box)
    path = node("proc/sys/net/ipv4/conf/twice/tag")

    def link(verb: str, *rest: str) -> None:
        subprocess.run(["ip", "link", verb, "twice", *rest], check=True)

    def inside() -> list[object]:
        said: list[object] = []
        for _ in range(3):
            link("add", "type", "bridge")
            said.append(read(path))
            said.append(write(path, "7"))
            said.append(read(path))
            link("del")
            said.append(outcome(read, path))
        return said

    assert view.run(inside, box) == ["0\n", 1, "7\n", "ENOENT"] * 3


def test_kept_descriptors_go_with_their_container(view: ViewProcess, box: Sandbox) -> None:
    before = view.fds()
    view.add(box)
    names = os.listdir("/proc/sys/net/ipv4/conf/lo")
    view.run(lambda: [outcome(read, node(f"proc/sys/net/ipv4/conf/lo/{name}")) for name in names], box)
    # Not all of them: an envoy that is slow to answer is asked the long way for a while.
    assert view.fds() > before + 3
    assert view.tell(Remove(box.name)) == {"ok": True}
    assert view.fds() == before


# Listings


def tree(top: str) -> list[str]:
    return sorted(os.path.join(at, name) for at, below, files in os.walk(top) for name in (*below, *files))


def test_listings_are_given_out_again_as_they_were(view: ViewProcess, box: Sandbox) -> None:
    view.add(box)
    top = node("proc/sys")
    first = view.run(lambda: tree(top), box)
    assert len(first) > 500
    for _ in range(5):
        assert view.run(lambda: tree(top), box) == first


def test_what_was_listed_again_and_again_is_known_until_the_kernel_forgets_all_of_it(
    view: ViewProcess, box: Sandbox
) -> None:
    """Each listing counts as a lookup of all in it: were they counted short, nodes would be stale here."""
    view.add(box)
    top = node("proc/sys/net")
    paths = view.run(lambda: tree(top), box)

    def all_there() -> list[str]:
        return [path for path in paths if outcome(os.stat, path) == "ESTALE"]

    for _ in range(4):
        for _ in range(3):
            assert view.run(lambda: tree(top), box) == paths
        Path("/proc/sys/vm/drop_caches").write_text("2")
        assert view.run(all_there, box) == []


def test_new_devices_are_listed_at_once(view: ViewProcess, box: Sandbox) -> None:
    view.add(box)
    conf = node("proc/sys/net/ipv4/conf")

    def inside() -> list[bool]:
        said = []
        for verb in (["add", "new", "type", "bridge"], ["del", "new"]):
            os.listdir(conf)
            subprocess.run(["ip", "link", *verb], check=True)
            said.append("new" in os.listdir(conf))
        return said

    assert view.run(inside, box) == [True, False]


# Values of the container's own, which the pump knows as well


def test_what_was_written_is_what_the_pump_says(view: ViewProcess, box: Sandbox) -> None:
    view.add(box, keep=True)
    number, text = node("proc/sys/vm/swappiness"), node("proc/sys/kernel/core_pattern")

    def positions(path: str) -> list[str]:
        fd = os.open(path, os.O_RDONLY)
        try:
            return [os.pread(fd, size, at).decode() for size, at in ((100, 0), (1, 0), (100, 1), (100, 50))]
        finally:
            os.close(fd)

    def inside() -> list[object]:
        write(number, "17")
        write(text, "/bin/dump")
        return [positions(number), positions(text)]

    expected = [["17\n", "1", "", ""], ["/bin/dump\n", "/", "bin/dump\n", ""]]
    assert view.run(inside, box) == expected
    view.restart()
    assert view.run(lambda: [positions(number), positions(text)], box) == expected


def test_what_is_kept_says_the_same_to_whoever_reads_it(box: Sandbox) -> None:
    """The rows' claim, on this kernel: opened in the container's namespaces, read in them and in the host's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    top = f"/proc/self/fd/{box.proc.fileno()}"

    def inside() -> None:
        box.enter()
        socket.sethostname("another")
        for number, name in enumerate(("ip_default_ttl", "tcp_retries2", "ip_local_port_range")):
            with contextlib.suppress(OSError):
                write(
                    f"{top}/sys/net/ipv4/{name}",
                    f"{40 + number} 50000" if "range" in name else f"{40 + number}",
                )
        for path in tree(f"{top}/sys"):
            inner = os.path.relpath(path, top)
            row = TABLE.find(Base.PROC, inner.encode())
            if row is None or not row.kept or not stat.S_ISREG(os.stat(path).st_mode):
                continue
            with contextlib.suppress(OSError), open(path, "rb", buffering=0) as file:
                content = file.read(4096)
                socket.send_fds(theirs, [inner.encode() + b"\0" + content], [file.fileno()])
        theirs.send(b"end")

    pid = forked(inside)
    compared, wrong = 0, []
    while True:
        packet, fds, _, _ = socket.recv_fds(ours, 8192, 1)
        if not fds:
            break
        path, _, content = packet.partition(b"\0")
        again = os.pread(fds[0], 4096, 0)
        os.close(fds[0])
        compared += 1
        if again != content and path not in CHANGES:
            wrong.append((path, content, again))
    assert reap(pid) == 0
    ours.close()
    theirs.close()
    assert wrong == [] and compared > 300


CHANGES: tuple[bytes, ...] = (
    *(b"sys/fs/file-nr", b"sys/fs/inode-nr", b"sys/fs/inode-state", b"sys/fs/dentry-state", b"sys/fs/aio-nr"),
    *(b"sys/kernel/random/entropy_avail", b"sys/kernel/pty/nr"),
)
"""By what else the machine does."""
