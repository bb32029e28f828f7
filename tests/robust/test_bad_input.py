"""Malformed messages, arguments that point nowhere, callers that die or hang: nobody else notices."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import mmap
import os
import random
import select
import signal
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from interceptor.errors import InterceptorError
from interceptor.kernel import mount as km
from interceptor.library import GuardedChild, Interceptor, Mount
from interceptor.spawn.create import spawn
from interceptor.spawn.process import Process
from tests import guarded as inside
from tests.robust import support
from tests.robust.support import PATIENCE, Truth, eventually, pipe, settles_at

pytestmark = pytest.mark.root

STATE = {"ociVersion": "1.0.2", "id": "x", "status": "running", "pid": 1, "bundle": "/"}
PROCESS = {"ociVersion": "1.0.2", "fds": ["seccompFd"], "pid": 1, "state": STATE}


def _good(daemon: Interceptor) -> None:
    """The daemon still does what it is for."""
    with daemon.spawn() as child:
        assert child.run(["umount", "/proc/sys"]).returncode == 32


# ---- sockets -----------------------------------------------------------------------------------------------


def _agent(daemon: Interceptor, data: bytes, fds: list[int]) -> None:
    """One connection to the agent socket, until the daemon has closed it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as agent:
        agent.connect(daemon.seccomp_socket)
        if fds:
            socket.send_fds(agent, [data], fds)
        elif data:
            agent.sendall(data)
        agent.shutdown(socket.SHUT_WR)
        assert select.select([agent], [], [], PATIENCE)[0]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b"\xff\xfe",
        b'{"ociVersion":',
        json.dumps(STATE).encode(),
        json.dumps({**PROCESS, "fds": []}).encode(),
        json.dumps({**PROCESS, "fds": ["seccompFd", "seccompFd"]}).encode(),
        json.dumps({**PROCESS, "pid": "1"}).encode(),
        json.dumps({**PROCESS, "state": {**STATE, "pid": 2**80}}).encode(),
        json.dumps({**PROCESS, "state": {**STATE, "pid": -1}}).encode(),
        json.dumps({**PROCESS, "state": {**STATE, "bundle": "\0"}}).encode(),
        json.dumps({**PROCESS, "state": {**STATE, "id": "../../x"}}).encode(),
        json.dumps(PROCESS).encode() * 2,
        b'{"a":' * 100_000,
        b"{" + b" " * (1 << 21),
    ],
    ids=range(17),
)
@pytest.mark.parametrize("fds", ["none", "no listener", "too many"])
def test_what_is_no_listener_is_refused_and_closed(real_daemon: Interceptor, data: bytes, fds: str) -> None:
    daemon = real_daemon
    before = support.holdings(daemon)
    with pipe() as (read, write):
        sent = {"none": [], "no listener": [read], "too many": [read] * 40}[fds]
        # Where the daemon has heard enough before the end.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            _agent(daemon, data or b"x" * bool(sent), sent)
        os.close(read)
        # POLLERR: nobody has the other end any more (pipe(7)).
        poller = select.poll()
        poller.register(write, 0)
        assert poller.poll(PATIENCE * 1000), "the descriptor that was sent is still open"
    settles_at(daemon, before)
    assert daemon.request("ps") == []


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"{}\n",
        b"[]\n",
        b"\xff\n",
        b'{"op": 1}\n',
        b'{"op": "no such"}\n',
        b'{"op": "create"}\n',
        b'{"op": "create", "state": 1}\n',
        b'{"op": "stats"}\n',
        b'{"op": "stats", "id": {}}\n',
        b'{"op": "mounts", "id": "\\u0000"}\n',
        json.dumps({"op": "create", "state": {**STATE, "pid": -1}}).encode() + b"\n",
        json.dumps({"op": "create", "state": {**STATE, "pid": 2**63}}).encode() + b"\n",
        json.dumps({"op": "create", "state": {**STATE, "bundle": "/\0"}}).encode() + b"\n",
        b'{"op": ' + b"[" * 100_000 + b"\n",
        b"x" * (1 << 21) + b"\n",
        b'{"op": "ps"}',
    ],
    ids=range(17),
)
def test_a_bad_request_is_refused_with_a_reason(real_daemon: Interceptor, line: bytes) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as control:
        control.settimeout(PATIENCE)
        control.connect(real_daemon.control_socket)
        try:
            control.sendall(line)
            control.shutdown(socket.SHUT_WR)
        except BrokenPipeError:
            pass  # it has heard enough, and answered
        reply = json.loads(control.makefile("rb").readline())
    assert reply["ok"] is False
    assert reply["error"]
    assert "internal error" not in reply["error"]
    assert real_daemon.request("ps") == []


@pytest.mark.parametrize("cid", ["../../escape", "a/b", "..", ".", "", "a\0b", "x" * 300])
def test_an_id_that_is_no_name_is_refused(real_daemon: Interceptor, cid: str) -> None:
    before = support.holdings(real_daemon)
    with pytest.raises(InterceptorError) as caught, real_daemon.spawn(cid="legal") as child:
        real_daemon.request("create", state={**child.state("creating"), "id": cid})
    assert "internal error" not in str(caught.value)
    settles_at(real_daemon, before)


def test_a_client_that_says_nothing_delays_nobody(daemon: Interceptor) -> None:
    silent = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(40)]
    try:
        for number, connection in enumerate(silent):
            connection.connect(daemon.seccomp_socket if number % 2 else daemon.control_socket)
            connection.send(b"{")
        _good(daemon)
    finally:
        for connection in silent:
            connection.close()


# ---- arguments ---------------------------------------------------------------------------------------------

_libc = ctypes.CDLL(None, use_errno=True)


def _raw(name: str, *arguments: object) -> int:
    """0 or errno of a call with arguments as they are."""
    return 0 if getattr(_libc, name)(*arguments) == 0 else ctypes.get_errno()


def _bad_arguments() -> dict[str, object]:
    """Results, with and without a filter compared by the test."""
    Truth().prepare()
    area = mmap.mmap(-1, 3 * mmap.PAGESIZE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(area))
    _libc.munmap(ctypes.c_void_p(base + 2 * mmap.PAGESIZE), mmap.PAGESIZE)
    end = base + 2 * mmap.PAGESIZE
    area[: 2 * mmap.PAGESIZE] = b"a" * 2 * mmap.PAGESIZE
    points = {"null": 0, "one": 1, "kernel": 2**64 - 4096, "hole": 2**63, "unmapped": end, "no NUL": base}
    points["no NUL, up to the end"] = end - 10
    good = ctypes.create_string_buffer(b"/tmp/new")
    points["a path that ends with the page"] = end - 10
    found: dict[str, object] = {}
    for what, address in points.items():
        p = ctypes.c_void_p(address)
        found[f"umount2 {what}"] = _raw("umount2", p, 0)
        found[f"umount2 nofollow {what}"] = _raw("umount2", p, 8)
        found[f"mount target {what}"] = _raw("mount", b"x", p, b"proc", ctypes.c_ulong(0), None)
        found[f"mount bind source {what}"] = _raw("mount", p, good, None, ctypes.c_ulong(0x1000), None)
        found[f"mount move source {what}"] = _raw("mount", p, good, None, ctypes.c_ulong(0x2000), None)
        found[f"mount remount target {what}"] = _raw("mount", None, p, None, ctypes.c_ulong(0x20), None)
        if address:  # without these three a mount of procfs succeeds
            found[f"mount source {what}"] = _raw("mount", p, good, b"tmpfs", ctypes.c_ulong(0), None)
            found[f"mount type {what}"] = _raw("mount", b"x", good, p, ctypes.c_ulong(0), None)
            found[f"mount data {what}"] = _raw("mount", b"x", good, b"tmpfs", ctypes.c_ulong(0), p)
        while _raw("umount2", good, 2) == 0:
            pass
    for length in (0, 1, 4094, 4095, 4096, 5000):
        path = (b"/" * length) if length < 4096 else b"a/" * (length // 2)
        found[f"umount2 of {length}"] = _raw("umount2", path, 0)
        found[f"mount at {length}"] = _raw(
            "mount", b"x", path + b"x" * (length > 0), b"tmpfs", ctypes.c_ulong(0), None
        )
    for flags in (0x10, 0x80000000, -1, 4, 6, 5):
        found[f"umount2 flags {flags:#x}"] = _raw("umount2", b"/proc/sys", flags)
    for name in (b"", b".", b"..", b"/", b"//", b"/nonexistent", b"/proc/1/fd/999", b"/dev/null", b"x" * 256):
        found[f"umount2 of {name!r}"] = _raw("umount2", name, 0)
    return found


def test_bad_arguments_get_the_kernels_errno(real_daemon: Interceptor, unguarded: GuardedChild) -> None:
    with real_daemon.spawn() as child:
        guarded, alone = child.call(_bad_arguments), unguarded.call(_bad_arguments)
        differ = {what: (guarded[what], alone[what]) for what in alone if guarded[what] != alone[what]}
        # A submount is welded for the guarded one; it is EBUSY or gone for the other.
        differ = {what: pair for what, pair in differ.items() if not what.startswith("umount2 flags")}
        assert differ == {}, "(guarded, the kernel alone)"
        assert child.run(["umount", "/proc/sys"]).returncode == 32


# ---- callers that die --------------------------------------------------------------------------------------


def _forever(progress: int) -> None:
    truth = Truth(note=lambda: os.write(progress, b"."))
    truth.prepare()
    while True:
        truth.round()


def _prepare_and_ask_twice() -> None:
    truth = Truth()
    truth.prepare()
    for _ in range(2):
        truth.new()
    assert truth.wrong == []


@pytest.mark.slow
def test_callers_that_die_at_each_step_leave_nothing(daemon: Interceptor, child: GuardedChild) -> None:
    chance = random.Random(7)
    # What is asked for twice is made ahead from then on.
    assert child.run(_prepare_and_ask_twice).returncode == 0
    with pipe() as (progress, theirs):

        def one() -> None:
            with child.start(_forever, theirs, pass_fds=[theirs]):
                assert os.read(progress, 1 + chance.randrange(12))
                end = time.perf_counter() + chance.uniform(0, 0.001)
                while time.perf_counter() < end:
                    pass

        one()
        before = support.holdings(daemon)
        for _ in range(150):
            one()
    del before["mounts in the workshop"]
    after = support.holdings(daemon)
    eventually(lambda: support.threads(support.guard_pid(daemon, child.cid)) <= 4, "no receiver that waits")
    assert {k: after[k] for k in before} == before
    # Whatever they left mounted is the container's own; the rest is as it was.
    assert child.call(inside.raw_nodes) == []
    assert child.run(["umount", "/proc/sys"]).returncode == 32


# ---- callers stuck on a filesystem of their own ------------------------------------------------------------

STUCK = 40
FUSE_INIT, FUSE_GETATTR, FUSE_OPEN, FUSE_LOOKUP, FUSE_READ = 26, 3, 14, 1, 15


def _fuse_server(ready: int, finish: int) -> None:
    """Mounts a FUSE filesystem at /mnt whose directory has attributes and whose every name is never answered, but for
    ``file``, which can be opened and mapped and never read.
    """
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
    result = inside.try_mount(b"stuck", b"/mnt", b"fuse", 0, options)
    os.write(ready, b"M" if result == 0 else b"F")
    while True:
        readable, _, _ = select.select([device, finish], [], [])
        if finish in readable:
            return
        _fuse_answer(device, os.read(device, 1 << 20))


def _fuse_answer(device: int, request: bytes) -> None:
    _, opcode, unique, node = struct.unpack_from("<IIQQ", request)
    attributes = struct.pack(
        "<QQQQQQIIIIIIIIII", node, 8192, 16, 0, 0, 0, 0, 0, 0, 0o40755, 2, 0, 0, 0, 4096, 0
    )
    of_file = struct.pack("<QQQQQQIIIIIIIIII", 2, 8192, 16, 0, 0, 0, 0, 0, 0, 0o100644, 1, 0, 0, 0, 4096, 0)
    body: bytes | None = None
    if opcode == FUSE_INIT:
        body = struct.pack(
            "<IIIIHHIIHHIIHHIIII", 7, 31, 65536, 0, 16, 16, 65536, 1, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0
        )[:64]
    elif opcode == FUSE_GETATTR:
        body = struct.pack("<QII", 3600, 0, 0) + (attributes if node == 1 else of_file)
    elif opcode == FUSE_LOOKUP and request[40:].rstrip(b"\0") == b"file":
        body = struct.pack("<QQQQII", 2, 0, 3600, 3600, 0, 0) + of_file
    elif opcode == FUSE_OPEN:
        body = struct.pack("<QII", 1, 0, 0)
    if body is not None:
        os.write(device, struct.pack("<IiQ", 16 + len(body), 0, unique) + body)


def _stuck_caller(number: int) -> int:
    """A call that waits for the server: by its path, or by its arguments' memory."""
    if number % 4 == 0:
        return inside.try_umount(b"/mnt/name/x")
    if number % 4 == 1:
        return inside.try_mount(b"/mnt/name/x", b"/tmp", None, 0x1000)
    fd = os.open("/mnt/file", os.O_RDONLY)
    with mmap.mmap(fd, 4096, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE) as area:
        # ctypes' buffers would have to be writable.
        address = _address_of(area)
        if number % 4 == 2:
            return _raw("umount2", ctypes.c_void_p(address), 0)
        return _raw("mount", b"x", ctypes.c_void_p(address), b"proc", ctypes.c_ulong(0), None)


def _address_of(area: mmap.mmap) -> int:
    class Buffer(ctypes.Structure):
        _fields_ = (
            ("buf", ctypes.c_void_p),
            ("obj", ctypes.py_object),
            ("len", ctypes.c_ssize_t),
            ("itemsize", ctypes.c_ssize_t),
            ("readonly", ctypes.c_int),
            ("ndim", ctypes.c_int),
            ("format", ctypes.c_char_p),
            ("shape", ctypes.c_void_p),
            ("strides", ctypes.c_void_p),
            ("suboffsets", ctypes.c_void_p),
            ("internal", ctypes.c_void_p),
        )

    view = Buffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(area), ctypes.byref(view), 0)
    address = int(view.buf or 0)
    ctypes.pythonapi.PyBuffer_Release(ctypes.byref(view))
    return address


def _crowd(said: int) -> list[int]:
    """All stuck callers as threads of the shared listener: forked from one process, under one filter."""
    pids = []
    for number in range(STUCK):
        if (pid := os.fork()) == 0:
            os.write(said, b".")
            try:
                os._exit(min(_stuck_caller(number), 255))
            except OSError as error:
                # The server was gone before the file could be opened.
                os._exit(error.errno or 255)
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def _timed(call: Callable[[], object]) -> float:
    start = time.monotonic()
    call()
    return time.monotonic() - start


def _fuse_device(directory: Path) -> Mount:
    """/dev/fuse for a container's root; the host's own is not for everybody on every machine."""
    device = directory / "fuse"
    os.mknod(device, 0o666 | stat.S_IFCHR, os.stat("/dev/fuse").st_rdev)
    os.chmod(device, 0o666)
    return Mount(str(device), "/dev/fuse", "", ("bind",))


@pytest.fixture
def with_fuse(daemon: Interceptor, tmp_path: Path) -> GuardedChild:
    return daemon.spawn(mounts=[_fuse_device(tmp_path)])


def _start_server(child: GuardedChild, ready: int, finish: int, heard: int) -> Process:
    server = child.start(_fuse_server, ready, finish, pass_fds=[ready, finish])
    assert select.select([heard], [], [], PATIENCE)[0]
    assert os.read(heard, 1) == b"M", "no FUSE mount in the container"
    return server


def test_callers_stuck_on_their_own_filesystem_delay_nobody(
    daemon: Interceptor, child: GuardedChild, with_fuse: GuardedChild
) -> None:
    def work() -> list[str]:
        truth = Truth()
        truth.prepare()
        truth.round()
        return truth.wrong

    with with_fuse, pipe() as (heard, ready), pipe() as (finish, order), pipe() as (begun, said):
        server = _start_server(with_fuse, ready, finish, heard)
        guard = support.guard_pid(daemon, with_fuse.cid)
        crowd = with_fuse.start(_crowd, said, pass_fds=[said])
        for _ in range(STUCK):
            assert os.read(begun, 1)
        eventually(lambda: support.threads(guard) > 10, "callers that are stuck")
        for other in (with_fuse, child):
            # Another process of the same container, another container.
            assert _timed(lambda other=other: other.run(work)) < 5  # type: ignore[misc]
            assert other.run(work).value == []
        with daemon.spawn() as new:
            assert new.run(work).value == []
        os.write(order, b"x")
        assert server.wait(PATIENCE).returncode == 0
        results = crowd.wait(PATIENCE).value
        assert isinstance(results, list)
        # What the kernel says where a server is gone.
        assert set(results) <= {errno.ENOTCONN, errno.EFAULT, errno.ECONNABORTED}, results
        eventually(lambda: support.threads(guard) < 10, "receivers that are free again")


def _hold_a_context(said: int) -> int:
    """A procfs context on which a call waits for the server; fsmount by another thread waits for that call."""
    context = km.fsopen(b"proc")

    def configure() -> None:
        # Linux 6.17: the path is opened with the context locked. Older ones refuse the key, and nothing waits.
        with contextlib.suppress(OSError):
            km.fsconfig(context, 1, b"pidns", b"/mnt/name/x")

    thread = threading.Thread(target=configure, daemon=True)
    thread.start()
    thread.join(0.2)
    os.write(said, b".")
    return inside.errno_of(km.fsmount, context)


def test_a_context_that_is_in_use_delays_no_other_container(
    daemon: Interceptor, child: GuardedChild, with_fuse: GuardedChild
) -> None:
    with with_fuse, pipe() as (heard, ready), pipe() as (finish, order), pipe() as (begun, said):
        server = _start_server(with_fuse, ready, finish, heard)
        callers = [with_fuse.start(_hold_a_context, said, pass_fds=[said]) for _ in range(3)]
        for _ in callers:
            assert os.read(begun, 1)
        assert _timed(lambda: child.run(["mount", "-t", "proc", "x", "/mnt"])) < 5
        os.write(order, b"x")
        assert server.wait(PATIENCE).returncode == 0
        for caller in callers:
            caller.close()


def _lazily_unmounted(child: GuardedChild) -> bool:
    """Whether the filesystem at /mnt goes, whose server answers nothing, in five seconds."""
    with pipe() as (heard, ready), pipe() as (finish, order):
        server = _start_server(child, ready, finish, heard)
        try:
            with child.start(inside.try_umount, b"/mnt", 2) as caller:
                return caller.wait(5).value == 0
        except TimeoutError:
            return False
        finally:
            os.write(order, b"x")
            server.close()


def test_a_filesystem_whose_server_hangs_can_be_unmounted(with_fuse: GuardedChild) -> None:
    """What people do when a server hangs: the kernel asks it nothing then."""
    with with_fuse:
        assert _lazily_unmounted(with_fuse)


def test_the_kernel_alone_unmounts_it(tmp_path: Path) -> None:
    with spawn(None, None, mounts=[_fuse_device(tmp_path)]) as child:
        assert _lazily_unmounted(child)


def test_stopped_callers_delay_nobody(daemon: Interceptor, child: GuardedChild) -> None:
    """A caller stopped in the midst of its call, as by a debugger or a freezer."""
    with pipe() as (progress, theirs):
        processes = [child.start(_forever, theirs, pass_fds=[theirs]) for _ in range(5)]
        for process in processes:
            os.read(progress, 1)
            process.send_signal(signal.SIGSTOP)
        assert child.run(["umount", "/proc/sys"], timeout=5).returncode == 32
        for process in processes:
            process.close()
