"""The view's process: ``python -m interceptor.view.server --mountpoint DIR --control-fd N``.

It mounts the view at DIR, in the mount namespace it was started in, and serves it. The daemon adds and removes
containers over the socket N (messages: protocol.py). The view outlives the daemon: end of file on the socket means that
nobody can give orders any more, and the server goes on until the last container's envoy has ended.

Nothing in this process ever touches a path below DIR: it would be waiting for itself.
"""

from __future__ import annotations

import argparse
import array
import contextlib
import os
import resource
import signal
import socket
import sys
from collections.abc import Sequence

import pyfuse3
import structlog
import trio

from interceptor.errors import ProtocolError
from interceptor.view.envoy import TIME_LIMIT_S, Container, Envoy, OverflowIds
from interceptor.view.filesystem import KernelHost, View
from interceptor.view.nodes import Owner
from interceptor.view.protocol import (
    CONTROL_MAX,
    READY,
    Add,
    List,
    Message,
    Ping,
    Quit,
    Remove,
    decode_message,
    encode_answer,
)

log = structlog.get_logger(__name__)

MOUNT_OPTIONS = frozenset(
    {
        "fsname=interceptor",
        "subtype=interceptor",
        "allow_other",
        "default_permissions",
        "nosuid",
        "nodev",
        "noexec",
    }
)
_FDS_MAX = 8
_IDLE_TASKS = 8
_TASKS_MAX = 4096
"""Operations in progress: a few containers whose envoys are all stuck (envoy.PENDING_MAX) do not use them up."""


class Server:
    """Serves the control socket beside a mounted `View`."""

    def __init__(
        self, view: View, control: socket.socket, overflow: OverflowIds, time_limit_s: float
    ) -> None:
        """Takes over the SOCK_SEQPACKET socket."""
        control.setblocking(False)
        self._view = view
        self._control = trio.socket.from_stdlib_socket(control)
        self._overflow = overflow
        self._time_limit_s = time_limit_s
        self._orphaned = False

    async def run(self) -> None:
        """Serve until told to quit, unmounted, or left without anybody to serve."""
        try:
            async with trio.open_nursery() as self._nursery:
                self._nursery.start_soon(self._listen)
                self._nursery.start_soon(self._await_signal)
                await pyfuse3.main(min_tasks=_IDLE_TASKS, max_tasks=_TASKS_MAX)
                self._nursery.cancel_scope.cancel()
        finally:
            self._control.close()

    def quit(self) -> None:
        """End `run` as soon as operations in progress have their answers."""
        for container in self._view.containers.values():
            container.envoy.close()
        pyfuse3.terminate()

    async def _await_signal(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            async for _ in signals:
                self.quit()

    async def _listen(self) -> None:
        try:
            await self._control.send(READY)
            while True:
                packet, fds = await self._receive()
                if not packet:
                    break
                answer = self._answer(packet, fds)
                await self._control.send(answer)
        except OSError as error:
            log.warning("control_failed", error=str(error))
        # Whoever could give orders is gone for good: a keeper holds the other end across restarts of the daemon.
        self._orphaned = True
        self._end_if_useless()

    async def _receive(self) -> tuple[bytes, list[int]]:
        """A packet and the descriptors beside it; an empty packet at end of file."""
        space = socket.CMSG_SPACE(_FDS_MAX * array.array("i").itemsize)
        packet, ancillary, flags, _ = await self._control.recvmsg(CONTROL_MAX, space, socket.MSG_CMSG_CLOEXEC)
        fds = array.array("i")
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            # Incomplete JSON is refused by what comes next, and so is a number of descriptors that nothing takes.
            log.warning("control_message_truncated", length=len(packet), descriptors=len(fds))
            packet = b"truncated"
        return packet, list(fds)

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
                return encode_answer(str(error))

    def _execute(self, message: Message) -> bytes:
        match message:
            case Remove(id=id):
                container = self._view.containers.pop(id, None)
                if container is None:
                    return encode_answer(f"no container {id}")
                container.envoy.close()
            case List():
                served = self._view.containers.items()
                return encode_answer(containers={id: container.envoy.alive for id, container in served})
            case Quit():
                self.quit()
            case Ping() | Add():
                pass
        return encode_answer()

    def _add(self, message: Add, sock: socket.socket) -> bytes:
        known = self._view.containers.get(message.id)
        if known is not None and known.envoy.alive:
            sock.close()
            return encode_answer(f"container {message.id} is served already")
        envoy = Envoy(sock, message.id, time_limit_s=self._time_limit_s)
        owner = Owner(message.id, message.uid, message.gid, message.created_ns)
        if known is not None:
            known.owner, known.envoy = owner, envoy
        else:
            self._view.containers[message.id] = Container(owner, envoy, self._overflow)
        self._nursery.start_soon(envoy.run, self._end_if_useless)
        return encode_answer()

    def _end_if_useless(self) -> None:
        if self._orphaned and not any(c.envoy.alive for c in self._view.containers.values()):
            self.quit()


def _envoy_socket(fd: int) -> socket.socket:
    """The socket behind a descriptor, which it then owns. `ProtocolError` or `OSError` if that is not an envoy's."""
    sock = socket.socket(fileno=fd)
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_SEQPACKET:
        sock.detach()
        raise ProtocolError("the descriptor is not a SOCK_SEQPACKET unix socket")
    return sock


def read_overflow_ids() -> OverflowIds:
    """What unmapped ids look like on this host."""

    def read(name: str) -> int:
        with open(f"/proc/sys/kernel/{name}", "rb") as file:
            return int(file.read())

    return OverflowIds(read("overflowuid"), read("overflowgid"))


def configure_log(level: str) -> None:
    """Log to standard error, one line an event."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.KeyValueRenderer(key_order=["timestamp", "level", "event"]),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Mount, serve, unmount. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m interceptor.view.server", description="Serve the view.")
    parser.add_argument("--mountpoint", required=True, help="an existing directory")
    parser.add_argument("--control-fd", required=True, type=int, help="a SOCK_SEQPACKET unix socket")
    parser.add_argument("--envoy-timeout", type=float, default=TIME_LIMIT_S, metavar="SECONDS")
    parser.add_argument("--log-level", default="warning", choices=["debug", "info", "warning", "error"])
    options = parser.parse_args(arguments)

    configure_log(options.log_level)
    control = socket.socket(fileno=options.control_fd)
    control.set_inheritable(False)
    # A terminal's Ctrl-C and hang-up are for the daemon.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    view = View(KernelHost())
    mountpoint = os.path.abspath(options.mountpoint)
    os.chdir("/")
    pyfuse3.init(view, mountpoint, set(MOUNT_OPTIONS))
    try:
        trio.run(Server(view, control, read_overflow_ids(), options.envoy_timeout).run)
    finally:
        pyfuse3.close(unmount=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
