"""Ground for the tests of the view: containers as it knows them, and its server, with nothing else around."""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from interceptor.view.protocol import CONTROL_MAX, Add, Begin, Message, encode_message

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
        from interceptor.kernel.stat import statx

        self.name = name
        self.created_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        kinds = flags.CLONE_NEWUSER | flags.CLONE_NEWNET | flags.CLONE_NEWIPC
        kinds |= flags.CLONE_NEWUTS | flags.CLONE_NEWPID
        ready, tell = os.pipe()
        wait, self._alive = os.pipe()

        def keeper() -> None:
            for fd in map(int, os.listdir("/proc/self/fd")):
                if fd > 2 and fd not in (wait, tell):
                    with contextlib.suppress(OSError):
                        os.close(fd)  # other sandboxes and servers are none of its business
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
        self.userns = os.stat(f"/proc/{self.pid}/ns/user").st_ino
        net, ipc, uts = (os.fstat(fd.fileno()).st_ino for fd in self.namespaces[1:])
        self.numbers = net, ipc, uts
        self.proc_mount = statx(self.proc).mnt_id
        self.sys = fresh_mount(b"sysfs", {}, network_namespace=self.namespaces[1])

    def start_envoy(self) -> socket.socket:
        """An envoy of this container; the server's end of its socket."""
        from interceptor._native import ffi, lib

        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        fds = ffi.new("int[]", [namespace.fileno() for namespace in self.namespaces])
        self.envoy = forked(
            lambda: lib.ix_become_envoy(
                fds, len(fds), theirs.fileno(), self.proc.fileno(), self.sys.fileno(), -1
            )
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
        for identity in (0, uid):  # first the container's root: leaving that is what drops capabilities
            os.setresuid(identity, identity, identity)

    def stop(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.close(self._alive)
        reap(self._keeper)
        for fd in (*self.namespaces, self.proc, self.sys):
            fd.close()
        if hasattr(self, "envoy"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.envoy, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                reap(self.envoy)


def told(work: Callable[[], object]) -> Any:
    """What ``work`` returns, as JSON, in a process of its own."""
    read, write = os.pipe()

    def child() -> None:
        os.close(read)
        with open(write, "w") as result:
            json.dump(work(), result)

    pid = forked(child)
    os.close(write)
    with open(read) as result:
        said = result.read()
    assert reap(pid) == 0, said
    return json.loads(said)


class ViewProcess:
    """A view in a mount namespace of its own, its server, and our end of its control socket."""

    def __init__(self, *options: str) -> None:
        self.device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        self._directory = tempfile.TemporaryDirectory(prefix="view-")
        self.state = self._directory.name
        self._options = options
        read, write = os.pipe()
        wait, self._alive = os.pipe()
        self._holder = forked(lambda: self._hold(wait, write))
        os.close(write)
        os.close(wait)
        assert os.read(read, 1) == b"x", "the view is not mounted"
        os.close(read)
        self.namespace = os.open(f"/proc/{self._holder}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        self.control, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control.settimeout(WAIT_S)
        self._added: list[tuple[Add, socket.socket]] = []
        self._start()

    def _hold(self, wait: int, mounted: int) -> None:
        """Keeps the mount namespace."""
        from interceptor.guards.viewing import VIEW_FLAGS, view_options
        from interceptor.kernel.flags import CLONE_NEWNS
        from interceptor.kernel.mount import mount
        from interceptor.kernel.namespaces import unshare

        unshare(CLONE_NEWNS)
        mount(None, "/", None, 0x4000 | 0x40000)  # MS_REC | MS_PRIVATE
        mount(b"interceptor", MOUNTPOINT, b"fuse.interceptor", VIEW_FLAGS, view_options(self.device))
        os.write(mounted, b"x")
        for fd in map(int, os.listdir("/proc/self/fd")):
            if fd > 2 and fd != wait:
                with contextlib.suppress(OSError):
                    os.close(fd)  # the connection is not ours to keep
        os.read(wait, 1)

    def _start(self) -> None:
        boot, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        boot.settimeout(WAIT_S)
        fds = [self.device, self._theirs.fileno(), theirs.fileno()]
        command = [sys.executable, "-m", "interceptor.view.server", "--device-fd", str(fds[0])]
        command += ["--control-fd", str(fds[1]), "--boot-fd", str(fds[2]), "--state", self.state]
        command += ["--envoy-timeout", str(TIME_LIMIT_S), *self._options]
        with boot, theirs:
            self.process = subprocess.Popen(command, pass_fds=fds)
            for message, sock in self._added:
                _send(boot, encode_message(message), [sock.fileno()])
                assert json.loads(boot.recv(CONTROL_MAX)) == {"ok": True}
            _send(boot, encode_message(Begin()), None)
            assert json.loads(boot.recv(CONTROL_MAX)) == {"ok": True}

    def restart(self) -> None:
        """Kills the server and starts a successor, as the keeper does."""
        self.process.kill()
        self.process.wait()
        self._start()

    def successor(self) -> None:
        """Starts one after the server has ended by itself."""
        self._start()

    def unread_by(self, sandbox: Sandbox) -> int:
        """Bytes of requests that an envoy (of one that was added to keep it) has not read yet."""
        (sock,) = [sock for message, sock in self._added if message.id == sandbox.name]
        return int.from_bytes(fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)), sys.byteorder)

    def receive(self) -> dict[str, Any]:
        answer = json.loads(self.control.recv(CONTROL_MAX))
        assert isinstance(answer, dict)
        return answer

    def send(self, packet: bytes, fds: list[int] | None = None) -> dict[str, Any]:
        _send(self.control, packet, fds)
        return self.receive()

    def tell(self, message: Message, fds: list[int] | None = None) -> dict[str, Any]:
        return self.send(encode_message(message), fds)

    def add(self, sandbox: Sandbox, *, keep: bool = False) -> None:
        """``keep``: the envoy's socket survives the server."""
        sock = sandbox.start_envoy()
        message = Add(
            sandbox.name,
            SANDBOX_IDS[0],
            SANDBOX_IDS[0],
            sandbox.created_ns,
            userns=sandbox.userns,
            namespaces=sandbox.numbers,
            proc_mount=sandbox.proc_mount,
        )
        assert self.tell(message, [sock.fileno()]) == {"ok": True}
        if keep:
            self._added.append((message, sock))
        else:
            sock.close()

    def run(self, work: Callable[[], object], sandbox: Sandbox | None = None, uid: int = 0) -> Any:
        """What ``work`` returns (as JSON) in a process of the container, or of the host, that sees the view."""
        from interceptor.kernel.flags import CLONE_NEWNS
        from interceptor.kernel.namespaces import setns

        def child() -> object:
            setns(self.namespace, CLONE_NEWNS)
            if sandbox is not None:
                sandbox.enter(uid)
            return work()

        return told(child)

    def enter_namespace(self) -> None:
        """Where the view is mounted; for a child."""
        from interceptor.kernel.flags import CLONE_NEWNS
        from interceptor.kernel.namespaces import setns

        setns(self.namespace, CLONE_NEWNS)

    def mounts(self) -> list[str]:
        lines = Path(f"/proc/{self._holder}/mountinfo").read_text().splitlines()
        return [line for line in lines if f" {MOUNTPOINT} " in line]

    def fds(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def wait(self) -> int:
        return self.process.wait(WAIT_S)

    def stop(self) -> None:
        self.control.close()
        self._theirs.close()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.device)  # the last of it: whoever still waits fails
        for _, sock in self._added:
            sock.close()
        os.close(self.namespace)
        os.close(self._alive)
        reap(self._holder)
        self._directory.cleanup()


def _send(sock: socket.socket, packet: bytes, fds: list[int] | None) -> None:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([packet], rights)


def node(path: str, container: str = "box") -> str:
    return f"{MOUNTPOINT}/{container}/{path}"


def outcome(work: Callable[..., object], *arguments: object) -> Any:
    """What it returns, or the name of the errno it fails with."""
    try:
        return work(*arguments)
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
