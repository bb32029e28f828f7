"""The view's process: ``python -m interceptor.view.server --device-fd N --control-fd N --boot-fd N``.

It serves a FUSE connection that others hold as well. The daemon adds and removes containers over the control socket
(messages: protocol.py). The view outlives the daemon: end of file on the socket means that nobody can give orders any
more, and the server goes on until the last container's envoy has ended. The keeper starts a successor when it dies,
tells it over the boot socket which containers there are, and then to begin.

Nothing in this process ever touches a path of the view: it would be waiting for itself. It knows none: it does not
mount, and what it opens on the host goes by descriptors (host.py).
"""

from __future__ import annotations

import argparse
import array
import contextlib
import os
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence

from interceptor.errors import ProtocolError
from interceptor.view.envoy import TIME_LIMIT_S, Container, Envoy
from interceptor.view.filesystem import TABLE, View
from interceptor.view.host import KernelHost
from interceptor.view.inodes import InodeTable, Ledger
from interceptor.view.log import LEVELS, Logger, configure
from interceptor.view.nodes import Owner
from interceptor.view.protocol import (
    CONTROL_MAX,
    Add,
    Begin,
    HandOver,
    List,
    Message,
    Ping,
    Quit,
    Remove,
    Version,
    decode_message,
    encode_answer,
    number_of,
)
from interceptor.view.session import Session
from interceptor.view.values import Values
from interceptor.view.version import version

log = Logger()

_FDS_MAX = 8
FAREWELL_S = 1.0
"""How long a server that hands over waits for envoys, which takes microseconds unless one is stuck or has no processor.
All containers wait meanwhile."""


class Server:
    """One thread that waits for the kernel, for envoys and for orders, and never for one of them alone."""

    def __init__(self, host: KernelHost, device: int, state: str | None, time_limit_s: float) -> None:
        """``state`` is a directory for what a successor needs; without it nothing is kept."""
        self._host = host
        self._overflow = host.overflow_ids()
        self._state = state
        self._time_limit_s = time_limit_s
        ledger = Ledger(os.path.join(state, "inodes")) if state is not None else None
        self._view = View(host, TABLE, InodeTable(ledger))
        self._session = Session(device, host, self._view, self.stop)
        self._poll = select.epoll()
        self._ready: dict[int, Callable[[int], None]] = {}
        self._asked: set[Envoy] = set()
        """Envoys that may owe an answer: the others, a thousand perhaps, are not looked at in each turn."""
        self._running = True
        self._orphaned = False
        self._begun = False
        self._serves = False
        """Whether requests are taken from the kernel: after `Begin`, until `HandOver`."""
        self._version = version()
        self._leaves_at: float | None = None

    def run(self, control: socket.socket, boot: socket.socket) -> None:
        """Serve until told to quit, unmounted, or left without anybody to serve. Takes over both sockets."""
        wake, signalled = socket.socketpair()
        for sock in (control, boot, wake, signalled):
            sock.setblocking(False)
        signal.set_wakeup_fd(signalled.fileno())
        signal.signal(signal.SIGTERM, lambda *_: self.stop())
        self._watch(wake.fileno(), lambda _events: None)
        self._watch(boot.fileno(), lambda _events: self._boot(boot))
        self._control = control
        while self._running:
            self._turn()

    def _turn(self) -> None:
        limit = -1.0
        now = time.monotonic()
        for envoy in list(self._asked):
            left = envoy.expire(now)
            if left is None:
                self._asked.discard(envoy)
            else:
                limit = left if limit < 0 else min(limit, left)
        if self._leaves_at is not None:
            if not self._session.is_busy or now >= self._leaves_at:
                self.stop()
                return
            limit = self._leaves_at - now if limit < 0 else min(limit, self._leaves_at - now)
        if self._serves:
            self._session.receive(self._poll.fileno(), limit)
            limit = 0.0
        for fd, events in self._poll.poll(limit):
            ready = self._ready.get(fd)
            if ready is not None:  # else closed by what was ready before it
                ready(events)

    def stop(self) -> None:
        """End `run` after what it is doing."""
        self._running = False

    def _hand_over(self) -> None:
        """Take nothing more, neither from the kernel nor of orders: a successor finds it there."""
        self._leaves_at = time.monotonic() + FAREWELL_S
        self._serves = False
        self._unwatch(self._control.fileno())

    def _watch(self, fd: int, ready: Callable[[int], None]) -> None:
        self._ready[fd] = ready
        self._poll.register(fd, select.EPOLLIN)

    def _unwatch(self, fd: int) -> None:
        if self._ready.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def _begin(self) -> bytes:
        """From here on the kernel is served. What a predecessor told it holds."""
        if not self._begun:
            self._begun = True
            inherited = self._view.inodes.inherit(self._view.containers, TABLE)
            if inherited:
                log.warning("taken_over", containers=len(self._view.containers), inodes=inherited)
                self._session.take_over()
            self._serves = True
            self._watch(self._control.fileno(), lambda _events: self._take_order())
        return encode_answer()

    # Orders

    def _boot(self, sock: socket.socket) -> None:
        """The keeper's orders, before everybody else's; it hangs up when it has said all."""
        if not self._order(sock):
            self._unwatch(sock.fileno())
            sock.close()
            if not self._begun:
                self.stop()

    def _take_order(self) -> None:
        self._order(self._control)

    def _order(self, sock: socket.socket) -> bool:
        """Take one order and answer it; False at end of file.

        The order is taken from the socket only after it was answered: a successor finds what we were killed over.
        """
        try:
            packet, fds = _receive(sock)
            if packet:
                answer = self._answer(packet, fds)
                with contextlib.suppress(BlockingIOError):  # nobody has read the last ones
                    sock.send(answer)
                _, again = _receive(sock, peek=False)
                for fd in again:
                    os.close(fd)
                return True
        except (BlockingIOError, InterruptedError):
            return True
        except OSError as error:
            log.warning("control_failed", error=str(error))
        if sock is self._control:
            # Whoever could give orders is gone for good: a keeper holds the other end across restarts of the daemon.
            self._unwatch(sock.fileno())
            self._orphaned = True
            self._end_if_useless()
        return False

    def _answer(self, packet: bytes, fds: list[int]) -> bytes:
        """Do what a message says. Descriptors that it does not take are closed."""
        with contextlib.ExitStack() as unused:
            for fd in fds:
                unused.callback(os.close, fd)
            try:
                message = decode_message(packet)
                if len(fds) != isinstance(message, Add):
                    raise ProtocolError(f"{len(fds)} descriptors with {type(message).__name__}")
                if not isinstance(message, Add):
                    return self._execute(message)
                sock = _envoy_socket(fds[0])
                unused.pop_all()
                return self._add(message, sock)
            except (ProtocolError, OSError) as error:
                log.warning("control_message_refused", error=str(error))
                return encode_answer(str(error), n=number_of(packet))

    def _execute(self, message: Message) -> bytes:
        match message:
            case Remove(id=id):
                container = self._view.containers.pop(id, None)
                if container is None:
                    return encode_answer(f"no container {id}", n=message.n)
                container.envoy.close()
                container.values.drop()
                self._view.drop(container)
            case List():
                served = self._view.containers.items()
                alive = {id: container.envoy.alive for id, container in served}
                return encode_answer(containers=alive, n=message.n)
            case Begin():
                return self._begin()
            case Version():
                return encode_answer(version=self._version, n=message.n)
            case HandOver():
                self._hand_over()
            case Quit():
                self.stop()
            case Ping() | Add():
                pass
        return encode_answer(n=message.n)

    def _add(self, message: Add, sock: socket.socket) -> bytes:
        owner = Owner(
            *(message.id, message.uid, message.gid, message.created_ns),
            *(message.groups, message.userns, message.namespaces, message.cgroups),
        )
        known = self._view.containers.get(message.id)
        if known is not None:
            known.envoy.notice_end()
        if known is not None and known.envoy.alive:
            sock.close()
            if known.owner == owner:  # asked again, by somebody whose predecessor did not hear the answer
                return encode_answer(n=message.n)
            return encode_answer(f"container {message.id} is served already", n=message.n)
        fd = sock.fileno()

        def wants_to_send(wants: bool) -> None:
            self._poll.modify(fd, select.EPOLLIN | (select.EPOLLOUT if wants else 0))

        pump = self._session.pump
        number = pump.add_envoy(fd, message.proc_mount, (*message.namespaces, message.userns))

        def ended() -> None:
            pump.envoy_gone(number)
            self._unwatch(fd)
            self._end_if_useless()

        def owes(answers: int) -> None:
            pump.envoy_owes(number, answers)
            self._asked.add(envoy)

        envoy = Envoy(
            sock,
            message.id,
            time_limit_s=self._time_limit_s,
            wants_to_send=wants_to_send,
            ended=ended,
            owes=owes,
        )
        envoy.number = number
        if known is not None:
            known.owner, known.envoy = owner, envoy
        else:
            path = None if self._state is None else os.path.join(self._state, f"values-{message.id}")
            values = Values(self._host, path)
            self._view.containers[message.id] = Container(owner, envoy, self._overflow, values)

        def ready(events: int) -> None:
            if events & select.EPOLLOUT:
                envoy.send_more()
            if events & ~select.EPOLLOUT:
                envoy.receive()

        self._watch(fd, ready)
        return encode_answer(n=message.n)

    def _end_if_useless(self) -> None:
        if self._orphaned and not any(c.envoy.alive for c in self._view.containers.values()):
            self.stop()


def _receive(sock: socket.socket, *, peek: bool = True) -> tuple[bytes, list[int]]:
    """A packet and the descriptors beside it; an empty packet at end of file."""
    space = socket.CMSG_SPACE(_FDS_MAX * array.array("i").itemsize)
    how = socket.MSG_CMSG_CLOEXEC | (socket.MSG_PEEK if peek else 0)
    packet, ancillary, flags, _ = sock.recvmsg(CONTROL_MAX, space, how)
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    if peek and flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        # Incomplete JSON is refused by what comes next, and so is a number of descriptors that nothing takes.
        log.warning("control_message_truncated", length=len(packet), descriptors=len(fds))
        packet = b"truncated"
    return packet, list(fds)


def _envoy_socket(fd: int) -> socket.socket:
    """The socket behind a descriptor, which it then owns. `ProtocolError` or `OSError` if that is not an envoy's."""
    sock = socket.socket(fileno=fd)
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_SEQPACKET:
        sock.detach()
        raise ProtocolError("the descriptor is not a SOCK_SEQPACKET unix socket")
    return sock


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m interceptor.view.server", description="Serve the view.")
    parser.add_argument("--device-fd", required=True, type=int, help="a mounted connection to /dev/fuse")
    parser.add_argument("--control-fd", required=True, type=int, help="a SOCK_SEQPACKET unix socket")
    parser.add_argument("--boot-fd", required=True, type=int, help="another, for the first orders")
    parser.add_argument(
        "--mountpoint", metavar="DIR", help="not used: says whose it is in a list of processes"
    )
    parser.add_argument("--state", metavar="DIR", help="where to keep what a successor needs")
    parser.add_argument("--no-host-writes", action="store_true", help="never raise a value of the host")
    parser.add_argument("--envoy-timeout", type=float, default=TIME_LIMIT_S, metavar="SECONDS")
    parser.add_argument("--log-level", default="warning", choices=list(LEVELS))
    options = parser.parse_args(arguments)

    configure(options.log_level)
    control, boot = (socket.socket(fileno=fd) for fd in (options.control_fd, options.boot_fd))
    for fd in (options.device_fd, options.control_fd, options.boot_fd):
        os.set_inheritable(fd, False)
    # A terminal's Ctrl-C and hang-up are for the daemon.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    host = KernelHost(writes=not options.no_host_writes)
    Server(host, options.device_fd, options.state, options.envoy_timeout).run(control, boot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
