"""The envoy's loop (native/envoy.c) alone, built with AddressSanitizer and UBSan, on directories of ours."""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from interceptor.view.protocol import (
    DATA_MAX,
    REPLY_MAX,
    Base,
    Entry,
    Op,
    Reply,
    decode_attr,
    decode_entries,
    decode_reply,
    encode_request,
)

ROOT = Path(__file__).resolve().parent.parent
PACKET_MAX = 24 + 4095 + DATA_MAX


def compile_envoy(target: Path, *flags: str) -> Path:
    sources = [ROOT / "native" / "envoy.c", ROOT / "tests" / "native" / "envoy_main.c"]
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wshadow", "-Wvla"]
    command = [
        "cc",
        "-std=gnu11",
        *warnings,
        *flags,
        f"-I{ROOT / 'native'}",
        f"-o{target}",
        *map(str, sources),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return target


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    flags = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    return compile_envoy(tmp_path_factory.mktemp("envoy") / "envoy", *flags)


class Envoy:
    """A running envoy with `proc` and `sys` as its two bases."""

    def __init__(self, program: Path, proc: Path, sys: Path) -> None:
        self.sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(30)
        bases = [os.open(base, os.O_PATH | os.O_DIRECTORY) for base in (proc, sys)]
        with theirs:
            fds = [theirs.fileno(), *bases]
            # Any packet may come: one that names the machine must not name this one.
            apart = ["unshare", "--uts"] if os.geteuid() == 0 else []
            self.process = subprocess.Popen(
                [*apart, program, *map(str, fds)], pass_fds=fds, stderr=subprocess.PIPE, cwd="/"
            )
        for fd in bases:
            os.close(fd)
        self._seq = 0

    def __call__(
        self,
        op: Op,
        path: bytes,
        *,
        base: Base = Base.PROC,
        offset: int = 0,
        size: int = 0,
        data: bytes = b"",
    ) -> Reply:
        self._seq += 1
        self.sock.send(encode_request(self._seq, op, base, path, offset=offset, size=size, data=data))
        reply = decode_reply(self.sock.recv(REPLY_MAX + 1))
        assert reply.seq == self._seq
        return reply

    def list(self, path: bytes, base: Base = Base.PROC) -> list[Entry]:
        entries: list[Entry] = []
        cookie = 0
        while True:
            reply = self(Op.LIST, path, base=base, offset=cookie)
            assert reply.error == 0
            entries += decode_entries(reply.data)
            if not reply.value:
                return entries
            cookie = reply.value

    def end(self) -> tuple[int, bytes]:
        """Hang up; exit status and what a sanitizer had to say."""
        self.sock.close()
        _, said = self.process.communicate(timeout=30)
        return self.process.returncode, said


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    base = tmp_path / "base"
    (base / "dir" / "inner").mkdir(parents=True)
    (base / "file").write_bytes(b"0123456789")
    (base / "dir" / "file").write_bytes(b"inner\n")
    (base / "link").symlink_to("dir/file")
    (base / "dirlink").symlink_to("dir")
    (base / "out").symlink_to("../secret")
    (tmp_path / "secret").write_bytes(b"secret")
    os.mkfifo(base / "fifo")
    with socket.socket(socket.AF_UNIX) as sock:
        os.chdir(base)
        sock.bind("socket")
        os.chdir("/")
    return base


@pytest.fixture
def envoy(sanitized: Path, tree: Path) -> Iterator[Envoy]:
    running = Envoy(sanitized, tree, Path("/proc"))
    yield running
    assert running.end() == (0, b"")


def test_reads_what_is_there_from_any_offset(envoy: Envoy) -> None:
    assert envoy(Op.READ, b"file", size=100).data == b"0123456789"
    assert envoy(Op.READ, b"file", offset=4, size=3).data == b"456"
    assert envoy(Op.READ, b"file", offset=10, size=3).data == b""
    assert envoy(Op.READ, b"dir/file", size=100).data == b"inner\n"


def test_reads_at_most_one_packet(envoy: Envoy, tree: Path) -> None:
    (tree / "large").write_bytes(b"x" * (DATA_MAX + 1))
    assert envoy(Op.READ, b"large", size=2**32 - 1).data == b"x" * DATA_MAX


def test_writes_in_place_without_truncating(envoy: Envoy, tree: Path) -> None:
    assert envoy(Op.WRITE, b"file", data=b"ab").value == 2
    assert envoy(Op.WRITE, b"file", offset=8, data=b"yz!").value == 3
    assert (tree / "file").read_bytes() == b"ab234567yz!"


def test_writes_a_full_packet(envoy: Envoy, tree: Path) -> None:
    assert envoy(Op.WRITE, b"file", data=b"x" * DATA_MAX).value == DATA_MAX
    assert (tree / "file").stat().st_size == DATA_MAX


def test_opening_tells_and_changes_nothing(envoy: Envoy, tree: Path) -> None:
    for access in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR):
        assert envoy(Op.OPEN, b"file", size=access).error == 0
        assert envoy(Op.OPEN, b"absent", size=access).error == errno.ENOENT
        assert envoy(Op.OPEN, b"dir", size=access).error == errno.EISDIR
        assert envoy(Op.OPEN, b"link", size=access).error == errno.ELOOP
    assert envoy(Op.OPEN, b"file", size=os.O_WRONLY | os.O_TRUNC).error == errno.EINVAL
    assert envoy(Op.OPEN, b"absent", size=os.O_WRONLY | os.O_CREAT).error == errno.EINVAL
    assert (tree / "file").read_bytes() == b"0123456789" and not (tree / "absent").exists()


def test_never_creates(envoy: Envoy, tree: Path) -> None:
    assert envoy(Op.WRITE, b"new", data=b"x").error == errno.ENOENT
    assert not (tree / "new").exists()


def test_attributes_are_those_of_lstat(envoy: Envoy, tree: Path) -> None:
    for name in (b"file", b"dir", b"link", b"out", b"dir/inner", b""):
        attr = decode_attr(envoy(Op.GETATTR, name).data)
        real = os.lstat(os.fsencode(tree) + b"/" + name)
        assert attr == (
            real.st_mode,
            real.st_nlink,
            real.st_uid,
            real.st_gid,
            real.st_size,
            real.st_atime_ns,
            real.st_mtime_ns,
            real.st_ctime_ns,
        )


def test_link_is_text_and_nothing_else_is_a_link(envoy: Envoy) -> None:
    assert envoy(Op.READLINK, b"out").data == b"../secret"
    assert envoy(Op.READLINK, b"file").error == errno.EINVAL
    assert envoy(Op.READLINK, b"dir").error == errno.EINVAL


@pytest.mark.parametrize("op", [Op.READ, Op.WRITE, Op.LIST, Op.GETATTR, Op.READLINK])
@pytest.mark.parametrize(
    "path",
    [
        b"..",
        b"../secret",
        b"dir/../../secret",
        b"/etc/hostname",
        b"/",
        b"dir//../../secret",
        b"dir/inner/../../..",
    ],
)
def test_no_path_leads_out_of_its_base(envoy: Envoy, op: Op, path: bytes) -> None:
    reply = envoy(op, path, size=10, data=b"x" if op is Op.WRITE else b"")
    assert (reply.error, reply.data) == (errno.EXDEV, b"")


@pytest.mark.parametrize("op", [Op.READ, Op.WRITE])
@pytest.mark.parametrize("path", [b"link", b"out", b"dirlink/file", b"dirlink/../file"])
def test_no_symbolic_link_is_followed(envoy: Envoy, op: Op, path: bytes, tree: Path) -> None:
    assert envoy(op, path, size=10, data=b"x" if op is Op.WRITE else b"").error == errno.ELOOP
    assert (tree.parent / "secret").read_bytes() == b"secret"


def test_no_link_is_followed_to_list(envoy: Envoy) -> None:
    assert envoy(Op.LIST, b"dirlink").error in (errno.ELOOP, errno.ENOTDIR)
    assert envoy(Op.GETATTR, b"dirlink/inner").error == errno.ELOOP


@pytest.mark.parametrize("path", [b"self/status", b"%d/root/etc" % os.getpid(), b"%d/cwd" % os.getpid()])
def test_no_magic_link_is_followed(envoy: Envoy, path: bytes) -> None:
    assert envoy(Op.READ, path, base=Base.SYS, size=10).error == errno.ELOOP
    assert envoy(Op.LIST, path, base=Base.SYS).error in (errno.ELOOP, errno.ENOTDIR)


def test_no_mount_is_crossed(sanitized: Path, tree: Path) -> None:
    envoy = Envoy(sanitized, Path("/"), tree)
    assert envoy(Op.READ, b"proc/uptime", size=10).error == errno.EXDEV
    assert envoy(Op.GETATTR, b"proc/uptime").error == errno.EXDEV
    assert envoy.end() == (0, b"")


@pytest.mark.parametrize("name", [b"fifo", b"socket"])
def test_what_is_no_file_is_refused_without_waiting(envoy: Envoy, name: bytes) -> None:
    assert envoy(Op.GETATTR, name).error == errno.EACCES
    assert envoy(Op.READ, name, size=1).error in (errno.EACCES, errno.ENXIO)
    assert envoy(Op.WRITE, name, data=b"x").error in (errno.EACCES, errno.ENXIO)
    assert name not in [entry.name for entry in envoy.list(b"")]


def test_directory_is_not_read_and_file_is_not_listed(envoy: Envoy) -> None:
    assert envoy(Op.READ, b"dir", size=1).error == errno.EISDIR
    assert envoy(Op.WRITE, b"dir", data=b"x").error == errno.EISDIR
    assert envoy(Op.LIST, b"file").error == errno.ENOTDIR


def test_errno_of_the_kernel_is_passed_on(envoy: Envoy) -> None:
    assert envoy(Op.READ, b"absent", size=1).error == errno.ENOENT
    assert envoy(Op.READ, b"file/x", size=1).error == errno.ENOTDIR
    assert envoy(Op.READ, b"x" * 256, size=1).error == errno.ENAMETOOLONG
    assert envoy(Op.READ, b"file", offset=2**63, size=1).error == errno.EINVAL
    comm = b"%d/task/%d/comm" % (envoy.process.pid, envoy.process.pid)
    assert envoy(Op.READ, comm, base=Base.SYS, size=100).data == b"envoy\n"


def test_listing_gives_each_name_once_over_many_pages(envoy: Envoy, tree: Path) -> None:
    names = {b"%d" % n for n in range(2000)} | {b"%d" % n + b"x" * 250 for n in range(300)}
    many = tree / "many"
    many.mkdir()
    for name in names:
        (many / os.fsdecode(name)).touch()
    listed = envoy.list(b"many")
    assert len(listed) == len(names) and {entry.name for entry in listed} == names
    assert all(stat.S_ISREG(entry.attr.mode) for entry in listed)


def test_listing_of_the_kernels_own_directories_is_complete(sanitized: Path) -> None:
    envoy = Envoy(sanitized, Path("/proc/sys"), Path("/sys/kernel"))
    for base, path in ((Base.PROC, b""), (Base.PROC, b"kernel"), (Base.PROC, b"net/ipv4"), (Base.SYS, b"")):
        top = Path("/proc/sys" if base is Base.PROC else "/sys/kernel") / os.fsdecode(path)
        assert {os.fsdecode(entry.name) for entry in envoy.list(path, base)} == set(os.listdir(top))
    assert envoy.end() == (0, b"")


def test_packet_too_long_is_refused_and_the_next_is_served(envoy: Envoy) -> None:
    envoy.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    envoy.sock.send(struct.pack("=IBBHIIQ", 77, Op.WRITE, 0, 4, 0, 0, 0) + b"file" + bytes(PACKET_MAX))
    reply = decode_reply(envoy.sock.recv(REPLY_MAX))
    assert (reply.seq, reply.error) == (77, errno.EMSGSIZE)
    assert envoy(Op.READ, b"file", size=2).data == b"01"


def test_packet_without_a_header_ends_the_envoy(sanitized: Path, tree: Path) -> None:
    envoy = Envoy(sanitized, tree, tree)
    envoy.sock.send(b"short")
    assert envoy.sock.recv(REPLY_MAX) == b""
    assert envoy.end() == (1, b"")


headers = st.builds(
    lambda *fields: struct.pack("=IBBHIIQ", *fields),
    st.just(1),
    st.integers(0, 7) | st.integers(0, 255),
    st.integers(0, 2) | st.integers(0, 255),
    st.integers(0, 40) | st.integers(0, 2**16 - 1),
    st.integers(0, 2**32 - 1),
    st.just(0) | st.integers(0, 2**32 - 1),
    st.just(0) | st.integers(0, 2**64 - 1),
)
bodies = st.sampled_from([b"file", b"dir", b"dir/file", b"..", b""]) | st.binary(max_size=5000)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(headers, bodies)
def test_any_packet_gets_one_reply_and_harms_nothing(envoy: Envoy, header: bytes, body: bytes) -> None:
    envoy.sock.send(header + body)
    reply = decode_reply(envoy.sock.recv(REPLY_MAX + 1))
    assert reply.seq == 1
    assert not reply.error or not reply.data
