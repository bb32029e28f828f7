"""The keeper: a small, idle process that forks the native ones and keeps what must outlive the daemon.

It lives in the workshop, a private mount namespace on the host's side. It holds a duplicate of every descriptor that a
daemon would need to go on where its predecessor stopped, so that restarting the daemon, or killing it, is noticed by no
container. It decides nothing and looks into nothing; it takes orders from root alone.

Protocol: SOCK_SEQPACKET at ``RUNTIME_DIR/keeper.sock``, one JSON object a packet, descriptors by SCM_RIGHTS.
Run as ``python -m interceptor.guards.spawner RUNTIME_DIR READY_FD LOG_LEVEL HOST_WRITES``. Nothing is imported here
but what it needs, because every guard starts as a copy of a copy of this process.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import selectors
import signal
import socket
import stat
import struct
import sys
from typing import Any

from interceptor._native import ffi, lib
from interceptor.guards.viewing import Adds, ViewKeeping
from interceptor.packets import receive_packet, send_packet

CLONE_NEWNS = 0x20000
MS_REC = 0x4000
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MS_SHARED = 1 << 20


def _must(result: int, what: str) -> None:
    if result < 0:
        raise OSError(-result, f"{what}: {os.strerror(-result)}")


def _mount(source: bytes, target: str, fstype: bytes | None, flags: int, data: bytes | None = None) -> None:
    kind = ffi.NULL if fstype is None else fstype
    options = ffi.NULL if data is None else data
    _must(lib.ix_mount(source, target.encode(), kind, flags, options), f"mount on {target}")


class Workshop:
    """The mount namespace where composites are made: the welder's staging place, shields, the view's mount point."""

    def __init__(self, runtime_dir: str) -> None:
        self.root = os.path.join(runtime_dir, "workshop")
        os.makedirs(self.root, 0o700, exist_ok=True)
        _must(lib.ix_unshare(CLONE_NEWNS), "unshare(CLONE_NEWNS)")
        # Slave: what the host unmounts goes here too, so nothing of it is kept busy; nothing of ours goes out.
        _mount(b"none", "/", None, MS_REC | MS_SLAVE)
        _mount(b"interceptor", self.root, b"tmpfs", 2 | 4 | 8, b"mode=0700")
        for name in ("weld", "view", "shield", "bench", "shelf", "state"):
            os.mkdir(os.path.join(self.root, name), 0o755)
        self._make_shields()
        weld = os.path.join(self.root, "weld")
        _mount(b"interceptor-weld", weld, b"tmpfs", 2 | 4 | 8, b"mode=0700")
        _mount(b"none", weld, None, MS_SHARED)

    def _make_shields(self) -> None:
        """Inert, read-only things to stand where something else must not be seen. Their names show in mountinfo."""
        shield = os.path.join(self.root, "shield")
        _mount(b"interceptor-shield", shield, b"tmpfs", 2 | 8, b"mode=0755,size=16k,nr_inodes=16")
        for name in ("shield", "masked"):
            os.mkdir(os.path.join(shield, name), 0o555)
        with open(os.path.join(shield, "shield-file"), "w") as file:
            os.fchmod(file.fileno(), 0o444)
        # What runtimes put over a masked file: it reads as empty and swallows writes.
        os.mknod(os.path.join(shield, "masked-file"), 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        os.chmod(os.path.join(shield, "masked-file"), 0o666)
        _mount(b"none", shield, None, 1 | 2 | 8 | 32 | 4096)


def _fork(body: Any) -> tuple[int, int]:
    """Forks; the child runs ``body``, which must not return. Its ID and a pidfd, which is there before it starts: of a
    child that has ended nothing is left here, as SIGCHLD is ignored."""
    read, write = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        try:
            os.close(write)
            os.read(read, 1)
            os.close(read)
            body()
        finally:
            os._exit(70)
    os.close(read)
    try:
        return pid, os.pidfd_open(pid)
    finally:
        os.close(write)


def _start_welder() -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def body() -> None:
        keep = os.dup2(theirs.fileno(), 3)
        lib.ix_close_range(4, 0xFFFFFFFF)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        lib.ix_welder(keep)
        os._exit(0)

    _, pidfd = _fork(body)
    os.close(pidfd)
    theirs.close()
    (error,) = struct.unpack("i", ours.recv(4))
    if error:
        raise OSError(error, f"the welder cannot leave for a user namespace of its own: {os.strerror(error)}")
    return ours


class Nursery:
    """A native process that guards and envoys are forked from (native/nursery.c).

    Forked from this one they would be left with a copy of every page that Python writes to here.
    """

    def __init__(self, proc: int) -> None:
        self._proc = proc
        self._sock = self._start()

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

        def body() -> None:
            # Out of the way of both places first.
            sock, proc = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (theirs.fileno(), self._proc))
            lib.ix_close_range(3, 9)
            os.dup2(sock, 3, inheritable=False)
            os.dup2(proc, 4, inheritable=False)
            lib.ix_close_range(5, 0xFFFFFFFF)
            lib.ix_nursery(3, 4)
            os._exit(0)

        _, pidfd = _fork(body)
        os.close(pidfd)
        theirs.close()
        return ours

    def fork(self, kind: int, fds: list[int], config: Any = None) -> tuple[int, int]:
        """The PID of a new child and its pidfd. `OSError`."""
        birth = ffi.new("struct ix_birth *", {"kind": kind, "config": config or {}})
        try:
            return self._order(bytes(ffi.buffer(birth)), fds)
        except ConnectionError:
            # Somebody has killed it. What it was asked for has not been done, or is gone with its answer: a guard or an
            # envoy whose socket nobody has the other end of ends by itself.
            self._sock.close()
            self._sock = self._start()
            return self._order(bytes(ffi.buffer(birth)), fds)

    def _order(self, birth: bytes, fds: list[int]) -> tuple[int, int]:
        socket.send_fds(self._sock, [birth], fds)
        said, received, _flags, _address = socket.recv_fds(self._sock, 4, 1)
        if not said:
            raise ConnectionResetError("the nursery is gone")
        (pid,) = struct.unpack("i", said)
        if pid < 0 or not received:
            raise OSError(-pid, f"fork: {os.strerror(-pid)}")
        os.set_inheritable(received[0], False)
        return pid, received[0]


class Keeper:
    """Orders come one at a time from the daemon; a new daemon takes over by connecting."""

    def __init__(self, runtime_dir: str, log_level: str, host_writes: bool) -> None:
        #: Records as JSON text: as objects they would take ten times the memory, for every container.
        self.store: dict[str, tuple[str, list[int]]] = {}
        self.path = os.path.join(runtime_dir, "keeper.sock")
        self.workshop = Workshop(runtime_dir)
        self.welder = _start_welder()
        self.selector = selectors.DefaultSelector()
        self.view = ViewKeeping(
            self.workshop.root, log_level, host_writes, self.selector, self._containers_of_the_view
        )
        self.view.start_first()
        self.proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self.nursery = Nursery(self.proc)
        self.namespace = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if os.path.lexists(self.path):
            os.unlink(self.path)
        self.listener.bind(self.path)
        os.chmod(self.path, 0o600)
        self.listener.listen(4)
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.clients: set[socket.socket] = set()
        self.running = True

    def serve(self) -> None:
        while self.running:
            for key, _ in self.selector.select():
                if key.fileobj is self.listener:
                    self._accept()
                elif callable(key.data):
                    key.data()
                elif isinstance(key.fileobj, socket.socket):
                    self._order(key.fileobj)
                else:
                    self._container_ended(str(key.data))
        os.unlink(self.path)

    def _containers_of_the_view(self) -> Adds:
        return [
            (json.loads(record), fds) for key, (record, fds) in self.store.items() if key.startswith("v/")
        ]

    def _accept(self) -> None:
        client, _ = self.listener.accept()
        credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        if struct.unpack("3i", credentials)[1] != 0:
            client.close()
            return
        self.selector.register(client, selectors.EVENT_READ)
        self._watch_containers(False)
        self.clients.add(client)

    def _client_left(self, client: socket.socket) -> None:
        """Without a daemon somebody must let go of containers that end; and with none left there is nothing to keep."""
        self.selector.unregister(client)
        self.clients.discard(client)
        client.close()
        if not self.clients and self.running:
            self._watch_containers(True)
            self._end_if_idle()

    def _watch_containers(self, watch: bool) -> None:
        for key, (_record, fds) in self.store.items():
            if key.startswith("c/") and (fds[0] in self.selector.get_map()) != watch:
                if watch:
                    self.selector.register(fds[0], selectors.EVENT_READ, key)
                else:
                    self.selector.unregister(fds[0])

    def _container_ended(self, key: str) -> None:
        """A container's first process ended while no daemon was there: its guard and its envoy end too."""
        text, fds = self.store[key]
        record = json.loads(text)
        self.selector.unregister(fds[0])
        # The registry's order: the guard's descriptor is the last, the envoy's before link and guard.
        ends = [fds[-1]] if record["guard"] else []
        if record["envoy"]:
            ends.append(fds[-3] if record["guard"] else fds[-1])
        for pidfd in ends:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        self._close(key)
        # Its listeners, its overlays, which would stay mounted, the view's socket to its envoy, what that is made of.
        gone = ("o/" + key[2:], "v/" + key[2:], "e/" + key[2:])
        for other in [k for k in self.store if k in gone or k.startswith("l/" + key[2:] + "/")]:
            self._close(other)
        self._end_if_idle()

    def _end_if_idle(self) -> None:
        if not any(key.startswith("c/") for key in self.store):
            self.order_quit(None, [])

    def _order(self, client: socket.socket) -> None:
        fds: list[int] = []
        try:
            message, fds = receive_packet(client)
            if message is None:
                self._client_left(client)
                return
            try:
                reply, reply_fds = getattr(self, f"order_{message['op']}", self._unknown)(message, fds)
            except Exception as error:  # one bad order must not end what keeps every container guarded
                reply, reply_fds = {"error": f"{type(error).__name__}: {error}"}, []
            send_packet(client, {"ok": "error" not in reply, **reply}, reply_fds)
        except (OSError, ValueError):
            # A daemon that was killed: its connection is reset, or its half of an order is all there is.
            self._client_left(client)
        finally:
            for fd in fds:
                os.close(fd)

    def _unknown(self, _message: Any, _fds: list[int]) -> tuple[dict[str, Any], list[int]]:
        return {"error": "it is of another version; restart the service when no container runs"}, []

    def order_hello(self, _message: Any, _fds: list[int]) -> tuple[dict[str, Any], list[int]]:
        """What a daemon starts with: the workshop's namespace, the welder's and the view's sockets."""
        fds = [self.namespace, self.welder.fileno(), self.view.control.fileno()]
        return {"root": self.workshop.root, "keys": list(self.store)}, fds

    def order_store(self, message: Any, fds: list[int]) -> tuple[dict[str, Any], list[int]]:
        """Keeps descriptors and a record under a key, in the place of what was there."""
        self._close(str(message["key"]))
        self.store[str(message["key"])] = (json.dumps(message.get("record")), list(fds))
        fds.clear()
        return {}, []

    def order_fetch(self, message: Any, _fds: list[int]) -> tuple[dict[str, Any], list[int]]:
        """Duplicates of what is kept under a key."""
        record, fds = self.store[str(message["key"])]
        return {"record": json.loads(record)}, fds

    def order_forget(self, message: Any, _fds: list[int]) -> tuple[dict[str, Any], list[int]]:
        """Closes what is kept under a key, or, where it ends in a slash, under every key that starts with it."""
        wanted = str(message["key"])
        for key in [k for k in self.store if k == wanted or (wanted.endswith("/") and k.startswith(wanted))]:
            self._close(key)
        return {}, []

    def order_guard(self, message: Any, fds: list[int]) -> tuple[dict[str, Any], list[int]]:
        """Forks a guard. Descriptors: user namespace, link, journal."""
        userns, link, journal = fds
        return self._child(
            self.nursery.fork(lib.IX_BIRTH_GUARD, [userns, link, journal], message["config"]), fds
        )

    def order_envoy(self, _message: Any, fds: list[int]) -> tuple[dict[str, Any], list[int]]:
        """Forks an envoy. Descriptors: socket, bare procfs and sysfs, pidfd, user namespace, then others to join."""
        return self._child(self.nursery.fork(lib.IX_BIRTH_ENVOY, fds), fds)

    def order_cloner(self, _message: Any, fds: list[int]) -> tuple[dict[str, Any], list[int]]:
        """Forks somebody who clones mounts at paths of the view, which may take long. Descriptor: a socket."""
        return self._child(self.nursery.fork(lib.IX_BIRTH_CLONER, fds), fds)

    def _child(self, child: tuple[int, int], fds: list[int]) -> tuple[dict[str, Any], list[int]]:
        pid, pidfd = child
        fds.append(pidfd)  # closed with the others once the reply, which carries it, is sent
        return {"pid": pid}, [pidfd]

    def order_quit(self, _message: Any, _fds: list[int]) -> tuple[dict[str, Any], list[int]]:
        """Ends the view, the welder and the keeper. Only sensible when no container is left."""
        self.view.end()
        self.welder.close()
        self.running = False
        return {}, []

    def _close(self, key: str) -> None:
        for fd in self.store.pop(key, ("", []))[1]:
            os.close(fd)


def main(argv: list[str]) -> int:
    """The keeper's process, until it is told to quit or keeps nothing any more."""
    runtime_dir, ready_fd, log_level, host_writes = argv[1], int(argv[2]), argv[3], argv[4] == "1"
    # Nobody waits for guards and envoys: the daemon watches them by pidfd.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    os.set_inheritable(ready_fd, False)
    try:
        keeper = Keeper(runtime_dir, log_level, host_writes)
    except Exception as error:
        os.write(ready_fd, f"{error}".encode())
        return 1
    os.write(ready_fd, b"ready")
    os.close(ready_fd)
    keeper.serve()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
