"""I8, little privilege: what a container gets at of our helpers, and what a guard that it has taken over gets at.

A guard that was taken over is played by whoever holds its end of the link, while the guard itself is stopped, and by a
process in its place: in its namespaces, with its identity, with the host's procfs that it holds.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import os
import re
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from interceptor._native import ffi, lib
from interceptor.errors import ProtocolError
from interceptor.guards.link import Ask, GuardLink, Ready
from interceptor.kernel import mount, namespaces, stat
from interceptor.kernel.fd import OwnedFd
from interceptor.kernel.process import pidfd_getfd, pidfd_open
from interceptor.library import GuardedChild, Interceptor
from tests import guarded as inside
from tests.conftest import open_descriptors
from tests.robust.support import PATIENCE, eventually, guard_pid, pid_is

pytestmark = pytest.mark.root

PTRACE_ATTACH, PTRACE_SEIZE = 16, 0x4206
LINK = 3
"""The guard's end of the link (native/spawn.c)."""


@pytest.fixture(scope="module")
def _own_daemon() -> Iterator[Interceptor]:
    with Interceptor(question_timeout=60.0) as running:
        yield running


@pytest.fixture
def daemon(_own_daemon: Interceptor) -> Iterator[Interceptor]:
    yield _own_daemon
    assert _own_daemon.is_running, _own_daemon.log_path.read_text()[-4000:]


@pytest.fixture
def child(daemon: Interceptor) -> Iterator[GuardedChild]:
    with daemon.spawn() as running:
        assert running.run(["umount", "/proc/sys"]).returncode == 32
        yield running


@pytest.fixture
def other(daemon: Interceptor) -> Iterator[GuardedChild]:
    with daemon.spawn() as running:
        yield running


def _helpers(daemon: Interceptor, child: GuardedChild) -> dict[str, int]:
    (known,) = [c for c in daemon.request("ps") if c["id"] == child.cid]
    return {"guard": known["guard_pid"], "envoy": known["envoy_pid"]}


def _status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, value in (line.split(":", 1) for line in lines)}


# ---- from inside the container -------------------------------------------------------------------------------


def _attack_by_number(pid: int) -> list[str]:
    """What of a process can be reached by its number."""
    libc = ctypes.CDLL(None, use_errno=True)
    reached = []
    with contextlib.suppress(OSError):
        os.kill(pid, 0)
        reached.append("kill")
    with contextlib.suppress(OSError):
        os.close(os.pidfd_open(pid))
        reached.append("pidfd_open")
    for request in (PTRACE_ATTACH, PTRACE_SEIZE):
        if libc.ptrace(request, pid, None, None) == 0:
            reached.append(f"ptrace {request}")
    for name in ("mem", "fd", "root", "ns/mnt", "status"):
        if os.path.lexists(f"/proc/{pid}/{name}"):
            reached.append(name)
    return reached


def test_helpers_are_in_no_procfs_of_the_container_and_have_no_number_there(
    daemon: Interceptor, child: GuardedChild
) -> None:
    def attack(pids: list[int]) -> tuple[list[str], list[str]]:
        assert inside.try_mount(b"x", b"/mnt", b"proc") == 0
        names = []
        for base in ("/proc", "/mnt"):
            for entry in filter(str.isdigit, os.listdir(base)):
                with contextlib.suppress(OSError), open(f"{base}/{entry}/comm") as comm:
                    names.append(comm.read().strip())
        return [n for n in names if n.startswith("interceptor")], [
            w for p in pids for w in _attack_by_number(p)
        ]

    pids = list(_helpers(daemon, child).values())
    assert child.call(attack, pids) == ([], [])


def test_a_signal_to_everybody_reaches_no_helper(daemon: Interceptor, child: GuardedChild) -> None:
    before = _helpers(daemon, child)
    child.call(lambda: inside.errno_of(os.kill, -1, signal.SIGKILL))
    assert _helpers(daemon, child) == before
    assert child.run(["umount", "/proc/sys"]).returncode == 32
    assert child.run(["cat", "/proc/uptime"]).returncode == 0


# ---- in the place of a helper --------------------------------------------------------------------------------


def _in_place(
    pid: int, procfs: int, body: Callable[..., Any], arguments: tuple[Any, ...], answer: Any
) -> None:
    user, mounts = namespaces.open_namespace(pid, "user"), namespaces.open_namespace(pid, "mnt")
    # As native/spawn.c: the user namespace, its root's identity, then the guard's own, empty mount namespace.
    namespaces.unshare(0x200)
    namespaces.setns(user, 0)
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    namespaces.setns(mounts, 0)
    answer.send(body(procfs, *arguments))


def in_place_of(pid: int, body: Callable[..., Any], *arguments: Any) -> Any:
    """What ``body`` returns in a process with the namespaces and the identity of a helper, and the host's procfs."""
    fork = get_context("fork")
    ours, theirs = fork.Pipe()
    procfs = os.open("/proc", os.O_PATH | os.O_DIRECTORY)
    process = fork.Process(target=_in_place, args=(pid, procfs, body, arguments, theirs))
    process.start()
    os.close(procfs)
    theirs.close()
    try:
        assert ours.poll(PATIENCE)
        return ours.recv()
    finally:
        process.join()
        ours.close()


def _reach_for_the_host(procfs: int, pids: list[int]) -> list[str]:
    reached = [f"/{entry}" for entry in os.listdir("/")]
    wanted = [("sys/kernel/hostname", os.O_WRONLY), ("sysrq-trigger", os.O_WRONLY), ("kcore", os.O_RDONLY)]
    for pid in pids:
        for name in ("root/etc", "cwd", "environ", "ns/mnt", "ns/user", "fd", "maps", "root/proc"):
            wanted.append((f"{pid}/{name}", os.O_RDONLY))
        wanted.append((f"{pid}/mem", os.O_RDWR))
    for path, flags in wanted:
        with contextlib.suppress(OSError):
            os.close(os.open(path, flags, dir_fd=procfs))
            reached.append(path)
    libc = ctypes.CDLL(None, use_errno=True)
    for pid in pids:
        with contextlib.suppress(OSError):
            os.kill(pid, 0)
            reached.append(f"kill {pid}")
        if libc.ptrace(PTRACE_SEIZE, pid, None, None) == 0:
            reached.append(f"ptrace {pid}")
        with contextlib.suppress(OSError):
            pidfd_getfd(OwnedFd(os.pidfd_open(pid)), 0).close()
            reached.append(f"pidfd_getfd {pid}")
    for name in ("/dev/null", "/etc/passwd", "/made"):
        with contextlib.suppress(OSError):
            os.close(os.open(name, os.O_RDWR | os.O_CREAT))
            reached.append(name)
    return reached


@pytest.mark.parametrize("who", ["guard", "envoy"])
def test_a_helper_reaches_nothing_of_the_host(daemon: Interceptor, child: GuardedChild, who: str) -> None:
    """Nor of the daemon, the test itself, and a process of the host's root."""
    helpers = _helpers(daemon, child)
    pids = [1, os.getpid(), daemon.pid, int(_status(helpers["guard"])["PPid"])]
    assert in_place_of(helpers[who], _reach_for_the_host, pids) == []


def _reach_for_a_helper(_procfs: int, pids: list[int]) -> list[str]:
    libc = ctypes.CDLL(None, use_errno=True)
    reached = []
    for pid in pids:
        if libc.ptrace(PTRACE_SEIZE, pid, None, None) == 0:
            reached.append(f"ptrace {pid}")
        with contextlib.suppress(OSError):
            pidfd_getfd(OwnedFd(os.pidfd_open(pid)), LINK).close()
            reached.append(f"pidfd_getfd {pid}")
    return reached


def test_helpers_cannot_be_traced_even_where_they_can_be_seen(
    daemon: Interceptor, child: GuardedChild, other: GuardedChild
) -> None:
    """By the container's root with all capabilities, in the host's PID namespace: they are not dumpable."""
    pids = [pid for c in (child, other) for pid in _helpers(daemon, c).values() if pid]
    assert in_place_of(_helpers(daemon, child)["guard"], _reach_for_a_helper, pids) == []


@pytest.mark.parametrize("who", ["guard", "envoy"])
def test_helpers_have_no_capability_on_the_host(daemon: Interceptor, child: GuardedChild, who: str) -> None:
    pid = _helpers(daemon, child)[who]
    status = _status(pid)
    # What it has, it has in the container's user namespace: there, nowhere above.
    theirs = os.stat(f"/proc/{pid}/ns/user")
    assert os.path.samestat(theirs, os.stat(f"/proc/{child.pid}/ns/user"))
    assert not os.path.samestat(theirs, os.stat("/proc/self/ns/user"))
    assert status["NoNewPrivs"] == "1"
    assert status["Groups"] == ""
    root = os.stat(f"/proc/{child.pid}/root/tmp").st_uid
    assert status["Uid"].split() == [str(root)] * 4
    assert status["Gid"].split() == [str(root)] * 4


def _kinds(pid: int) -> list[str]:
    """What the descriptors after the standard streams are, sorted."""
    found = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        if int(name) > 2:
            found.append(re.sub(r":\[\d+\]$", "", os.readlink(f"/proc/{pid}/fd/{name}")))
    return sorted(found)


def test_the_guard_s_descriptors_are_those_it_needs(daemon: Interceptor, child: GuardedChild) -> None:
    pid = _helpers(daemon, child)["guard"]
    expected = sorted(["/proc", "anon_inode:seccomp notify", "mnt", "socket"])
    eventually(lambda: _kinds(pid) == expected, f"{expected}, but {_kinds(pid)}", 5)
    # The host's procfs only to look things up in, and its home is the mount namespace that it is in.
    procfs = next(n for n in os.listdir(f"/proc/{pid}/fd") if os.readlink(f"/proc/{pid}/fd/{n}") == "/proc")
    flags = Path(f"/proc/{pid}/fdinfo/{procfs}").read_text().split("flags:")[1].split()[0]
    assert int(flags, 8) & os.O_PATH
    assert len(Path(f"/proc/{pid}/mountinfo").read_text().splitlines()) == 1
    assert os.listdir(f"/proc/{pid}/root") == []


def test_the_envoy_s_descriptors_are_those_it_needs(daemon: Interceptor, child: GuardedChild) -> None:
    pid = _helpers(daemon, child)["envoy"]
    shelf = [path for path in _kinds(pid) if "/shelf/" in path]
    assert len(shelf) == 2, "bare procfs and sysfs"
    assert sorted(set(_kinds(pid)) - set(shelf)) == ["anon_inode:[pidfd]", "ipc", "net", "socket", "uts"]
    fds = {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
    own = {os.readlink(f"/proc/{pid}/ns/{kind}") for kind in ("ipc", "net", "uts")}
    assert own <= fds, "to come back to, from where a caller is"
    assert os.listdir(f"/proc/{pid}/root") == []


# ---- a guard that was taken over -----------------------------------------------------------------------------


@dataclass
class Hostile:
    """The end of the link of a guard that is stopped."""

    pid: int
    link: socket.socket

    def send(self, data: bytes, fds: list[int]) -> bool:
        """False once the daemon has hung up."""
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self.link.sendmsg([data], ancillary)
        except OSError:
            return False
        return True

    def ask(self, fds: list[int], **fields: object) -> tuple[int, list[OwnedFd]]:
        """What the daemon answers to a question: the act, and the descriptors beside it."""
        record = {"type": lib.IX_MSG_ASK, "seq": 1 << 40, "hidepid": -1, "gid": 0xFFFFFFFF} | fields
        assert self.send(bytes(ffi.buffer(ffi.new("struct ix_ask *", record))), fds)
        # No time limit of the socket's: it would make the guard's end, which is the same, not wait.
        while select.select([self.link], [], [], PATIENCE)[0]:
            data, received, _, _ = socket.recv_fds(self.link, ffi.sizeof("struct ix_answer"), 4)
            trees = [OwnedFd(fd) for fd in received]
            answer = ffi.from_buffer("struct ix_answer *", data.ljust(ffi.sizeof("struct ix_answer"), b"\0"))
            if answer.type == lib.IX_MSG_ANSWER and answer.seq == 1 << 40:
                return int(answer.act), trees
        raise TimeoutError("the daemon does not answer")


def _all_stopped(pid: int) -> bool:
    states = [Path(f"/proc/{pid}/task/{tid}/stat").read_text() for tid in os.listdir(f"/proc/{pid}/task")]
    return all(state.rsplit(")", 1)[1].split()[0] == "T" for state in states)


@contextlib.contextmanager
def taken_over(daemon: Interceptor, child: GuardedChild) -> Iterator[Hostile]:
    """A container's guard, played by this test."""
    # Until it has its name it is a copy of the nursery, with that one's descriptors.
    eventually(lambda: pid_is(guard_pid(daemon, child.cid), "interceptor-grd"), "a guard")
    with pidfd_open(guard_pid(daemon, child.cid)) as pidfd:
        pid = guard_pid(daemon, child.cid)
        signal.pidfd_send_signal(pidfd.fileno(), signal.SIGSTOP)
        # Until then its own thread may take the answers.
        eventually(lambda: _all_stopped(pid), "a guard that is stopped")
        with socket.socket(fileno=pidfd_getfd(pidfd, LINK).take()) as link:
            yield Hostile(pid, link)
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd.fileno(), signal.SIGCONT)


@contextlib.contextmanager
def _namespaces(pid: int, *names: str) -> Iterator[list[int]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(namespaces.open_namespace(pid, name)).fileno() for name in names]


def _still_works(child: GuardedChild) -> None:
    assert child.run(["umount", "/proc/sys"], timeout=PATIENCE).returncode == 32
    assert child.run(["mount", "-t", "proc", "x", "/mnt"], timeout=PATIENCE).returncode == 0
    assert child.run(["umount", "/mnt/sys"], timeout=PATIENCE).returncode == 0
    assert child.run(["umount", "/mnt"], timeout=PATIENCE).returncode == 0
    assert child.call(inside.raw_nodes) == []


def test_the_script_is_as_good_as_a_guard(daemon: Interceptor, child: GuardedChild) -> None:
    """What is refused below would be answered if it were the container's own."""
    with taken_over(daemon, child) as guard, _namespaces(child.pid, "mnt", "pid", "net") as fds:
        for kind, magic in ((1, "proc"), (2, "sysfs")):
            act, (tree,) = guard.ask(fds, op=lib.IX_OP_NEW, kind=kind)
            assert act == lib.IX_ACT_ATTACH
            assert inside.filesystem(b".", tree.fileno()) == magic
            assert inside.raw_below(b".", tree.fileno()) == []
        act, (context,) = guard.ask(fds[1:], op=lib.IX_OP_FSOPEN, kind=1)
        assert act == lib.IX_ACT_GIVE
        context.close()
    _still_works(child)


@pytest.mark.parametrize("whose", ["host", "guard", "other"])
@pytest.mark.parametrize("kind", [1, 2])
def test_a_guard_gets_nothing_of_namespaces_that_are_not_its_container_s(
    daemon: Interceptor, child: GuardedChild, other: GuardedChild, whose: str, kind: int
) -> None:
    """Its own are the host's: with a procfs or sysfs of those the container would see the host's processes, devices."""
    with taken_over(daemon, child) as guard:
        owner = {"host": os.getpid(), "guard": guard.pid, "other": other.pid}[whose]
        with (
            _namespaces(child.pid, "mnt", "pid", "net") as own,
            _namespaces(owner, "mnt", "pid", "net") as foreign,
        ):
            for fds in ([own[0], *foreign[1:]], foreign):
                assert guard.ask(fds, op=lib.IX_OP_NEW, kind=kind) == (lib.IX_ACT_CONTINUE, [])
            assert guard.ask(foreign[1:], op=lib.IX_OP_FSOPEN, kind=kind) == (lib.IX_ACT_CONTINUE, [])
    _still_works(child)


@pytest.mark.parametrize("op", ["UMOUNT", "DETACH", "MOVE", "REMOUNT", "OPEN_TREE", "FSMOUNT"])
def test_mounts_of_another_container_are_not_answered_for(
    daemon: Interceptor, child: GuardedChild, other: GuardedChild, op: str
) -> None:
    before = other.call(inside.originals)
    with taken_over(daemon, child) as guard, _namespaces(other.pid, "mnt") as (theirs,):
        for path in ("proc", "proc/sys", "sys", "sys/devices"):
            with OwnedFd(os.open(f"/proc/{other.pid}/root/{path}", os.O_PATH)) as target:
                mnt_id = stat.statx(target).mnt_id
                question = {"op": getattr(lib, f"IX_OP_{op}"), "mnt_id": mnt_id}
                assert guard.ask([theirs, target.fileno()], **question) == (lib.IX_ACT_CONTINUE, [])
    assert other.call(inside.originals) == before
    _still_works(other)


def test_a_context_that_the_daemon_did_not_open_is_not_touched(
    daemon: Interceptor, child: GuardedChild
) -> None:
    """The daemon has more rights over it than whoever opened it."""
    with taken_over(daemon, child) as guard, _namespaces(child.pid, "mnt") as (own,):
        for fstype in (b"proc", b"tmpfs"):
            with mount.fsopen(fstype) as context:
                mount.fsconfig(context, 6)
                answer = guard.ask([own, context.fileno()], op=lib.IX_OP_FSMOUNT)
                assert answer == (lib.IX_ACT_CONTINUE, [])
    _still_works(child)


def test_a_guard_that_asks_without_end_delays_no_other(
    daemon: Interceptor, child: GuardedChild, other: GuardedChild
) -> None:
    stop = threading.Event()

    def flood(guard: Hostile, fds: list[int]) -> None:
        record = {"type": lib.IX_MSG_ASK, "op": lib.IX_OP_NEW, "kind": 1, "hidepid": -1, "gid": 0xFFFFFFFF}
        data = bytes(ffi.buffer(ffi.new("struct ix_ask *", record)))
        while not stop.is_set() and guard.send(data, fds):
            pass

    with taken_over(daemon, child) as guard, _namespaces(child.pid, "mnt", "pid", "net") as fds:
        # A guard that reads no answers, too.
        thread = threading.Thread(target=flood, args=(guard, fds))
        thread.start()
        try:
            start = time.monotonic()
            _still_works(other)
            assert time.monotonic() - start < 10
        finally:
            stop.set()
            thread.join()


# ---- records without sense -----------------------------------------------------------------------------------

_WORD = st.one_of(st.integers(0, 9), st.sampled_from([64, 65, 2**31 - 1, 2**31, 2**32 - 1]))
_LONG = st.one_of(st.integers(0, 9), st.sampled_from([2**31, 2**63, 2**64 - 1]), st.integers(0, 2**64 - 1))
_OPS = st.sampled_from([n for name, n in vars(lib).items() if name.startswith("IX_OP_")] or list(range(1, 9)))


@st.composite
def _asks(draw: st.DrawFn) -> bytes:
    record = ffi.new("struct ix_ask *")
    record.type = draw(st.one_of(st.just(lib.IX_MSG_ASK), _WORD))
    record.op = draw(st.one_of(_OPS, _WORD))
    for name in ("seq", "mnt_id", "flags"):
        setattr(record, name, draw(_LONG))
    for name in ("kind", "subset_pid", "gid", "sb_flags"):
        setattr(record, name, draw(_WORD))
    record.tid = draw(st.integers(-(2**31), 2**31 - 1))
    record.hidepid = draw(st.one_of(st.integers(-2, 6), st.integers(-(2**31), 2**31 - 1)))
    source = draw(st.binary(max_size=64))
    ffi.memmove(record.source, source, len(source))
    return bytes(ffi.buffer(record))


RECORDS = st.one_of(st.binary(max_size=300), _asks(), _asks())
FDS = st.lists(st.integers(0, 7), max_size=6)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(RECORDS, FDS)
@example(b"", [])
@example(bytes(ffi.sizeof("struct ix_ask") + 1), [0])
def test_what_is_decoded_is_whole_and_nothing_leaks(data: bytes, fds: list[int]) -> None:
    before = open_descriptors()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs, OwnedFd(os.open("/dev/null", os.O_RDONLY)) as null:
        link = GuardLink(ours)
        socket.send_fds(theirs, [data], [null.fileno()] * len(fds))
        try:
            message = link.receive()
        except ProtocolError:
            message = None
        if isinstance(message, Ask):
            assert len(message.fds) == (3 if message.op == lib.IX_OP_NEW else 2)
            assert message.source.isascii()
            assert message.hidepid is None or 0 <= message.hidepid <= 4
            for fd in message.fds:
                fd.close()
        else:
            assert message is None or isinstance(message, Ready)
        link.close()
    assert not open_descriptors() - before


@pytest.mark.slow
def test_no_record_of_a_guard_harms_another_container(daemon: Interceptor, other: GuardedChild) -> None:
    """Nor the daemon: at most the guard is replaced, and after twenty of them its own container is given up."""
    originals = other.call(inside.originals)

    @settings(
        max_examples=1000 if os.environ.get("INTERCEPTOR_LONG") == "1" else 40,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(st.tuples(RECORDS, FDS), min_size=1, max_size=6))
    def send(messages: list[tuple[bytes, list[int]]]) -> None:
        with daemon.spawn() as child, contextlib.ExitStack() as stack:
            pool = [
                *stack.enter_context(_namespaces(child.pid, "mnt", "pid", "net")),
                *stack.enter_context(_namespaces(other.pid, "mnt", "pid")),
                *stack.enter_context(_namespaces(os.getpid(), "net")),
                *(stack.enter_context(OwnedFd(end)).fileno() for end in os.pipe()),
            ]
            guard = stack.enter_context(taken_over(daemon, child))
            for data, fds in messages:
                if data:  # an empty packet reads as the end of the link
                    guard.send(data, [pool[i] for i in fds])
            # Whoever is asked next is asked after all of that.
            assert {c["id"] for c in daemon.request("ps")} >= {child.cid, other.cid}

    send()
    assert other.call(inside.originals) == originals
    _still_works(other)
    log = daemon.log_path.read_text()
    assert "internal error" not in log
    assert "Traceback" not in log
