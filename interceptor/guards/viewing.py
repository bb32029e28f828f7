"""The keeper's part in the view: it mounts it, keeps the connection, starts the server and, if that dies, another.

The connection to the kernel lives as long as any duplicate of its descriptor is open, and the keeper has one. A killed
server is therefore an outage of a fraction of a second: mounts, composites, welds and open files stay what they are,
requests wait meanwhile, and no container's mount is touched. What a successor must know is the containers with their
envoys' sockets, which the keeper has as well, and what the server wrote down for it (``view/inodes.py``,
``view/values.py``).
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from interceptor._native import lib
from interceptor.packets import receive_packet, send_packet

VIEW_FLAGS = 2 | 4 | 8
"""MS_NOSUID, MS_NODEV, MS_NOEXEC."""
HURRY = -15
"""Niceness of a server until it serves: all containers wait for it."""
DEATHS_MAX, DEATHS_WITHIN_S = 20, 10.0
"""So many deaths in so many seconds, and the connection is given up: what waits fails, instead of waiting for ever."""

OPEN_TREE_CLONE = 1
AT_SYMLINK_NOFOLLOW = 0x100
AT_FDCWD = -100

Adds = Iterable[tuple[Any, list[int]]]


def view_options(device: int) -> bytes:
    """The data of the view's mount(2). Without default_permissions: it judges rights by rules FUSE does not know."""
    return b"fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other" % device


class ViewKeeping:
    """The view's connection and whoever serves it."""

    def __init__(
        self,
        root: str,
        log_level: str,
        host_writes: bool,
        selector: selectors.BaseSelector,
        containers: Callable[[], Adds],
    ) -> None:
        """Mounts the view at ``root``/view, in this mount namespace. `OSError`.

        ``containers`` says what a successor is told: orders to add, each with an envoy's socket.
        """
        self._containers = containers
        place = os.path.join(root, "view")
        self._options = [
            "--mountpoint",
            place,
            "--state",
            os.path.join(root, "state"),
            "--log-level",
            log_level,
        ]
        if not host_writes:
            self._options.append("--no-host-writes")
        self._selector = selector
        self._deaths: list[float] = []
        self._ending = False
        self.pid = 0
        self.device = os.open("/dev/fuse", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        result = lib.ix_mount(
            b"interceptor", place.encode(), b"fuse.interceptor", VIEW_FLAGS, view_options(self.device)
        )
        if result < 0:
            raise OSError(-result, f"mount on {place}: {os.strerror(-result)}")
        self.control, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def start(self, adds: Adds) -> socket.socket:
        """Starts a server that knows these containers; our end of its boot socket."""
        boot, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        given = [os.dup(fd) for fd in (self.device, self._theirs.fileno(), theirs.fileno())]
        argv = [sys.executable, "-m", "interceptor.view.server"]
        for name, fd in zip(("--device-fd", "--control-fd", "--boot-fd"), given, strict=True):
            os.set_inheritable(fd, True)
            argv += [name, str(fd)]
        argv += self._options
        try:
            self.pid = os.posix_spawn(
                sys.executable, argv, os.environ, setsigdef=[signal.SIGCHLD], setsid=True
            )
        finally:
            for fd in given:
                os.close(fd)
            theirs.close()
        _set_niceness(self.pid, HURRY)
        pidfd = os.pidfd_open(self.pid)
        self._selector.register(pidfd, selectors.EVENT_READ, lambda: self._died(pidfd))
        with contextlib.suppress(OSError):  # it died: its pidfd says so
            for message, fds in adds:
                send_packet(boot, message, fds)
            send_packet(boot, {"op": "begin"})
        return boot

    def start_first(self) -> None:
        """Starts the first server and waits until it serves. `OSError` if it does not."""
        with self.start(()) as boot:
            message, _ = receive_packet(boot)
        _set_niceness(self.pid, os.getpriority(os.PRIO_PROCESS, 0))
        if not isinstance(message, dict) or not message.get("ok"):
            raise OSError(f"the view did not start: {message!r}")

    def _died(self, pidfd: int) -> None:
        self._selector.unregister(pidfd)
        os.close(pidfd)
        if self._ending:
            return
        while True:
            now = time.monotonic()
            self._deaths = [then for then in self._deaths if now - then < DEATHS_WITHIN_S] + [now]
            if len(self._deaths) > DEATHS_MAX:
                print("view_given_up", file=sys.stderr, flush=True)
                self.end()
                return
            try:
                adds = list(self._containers())
                boot = self.start(adds)
            except OSError:
                continue  # dead already, or no process to be had
            serves = iter([*(False for _ in adds), True])
            drain = partial(self._drain, boot, self.pid, serves)
            self._selector.register(boot, selectors.EVENT_READ, drain)
            return

    def _drain(self, boot: socket.socket, pid: int, serves: Iterator[bool]) -> None:
        """Answers of a successor to its first orders: there is nobody who could do anything about them.

        ``serves`` says of each whether it is the one to the order to begin.
        """
        try:
            message, _ = receive_packet(boot)
        except (OSError, ValueError):
            message = None
        if message is None:
            self._selector.unregister(boot)
            boot.close()
            return
        if next(serves, False):
            _set_niceness(pid, os.getpriority(os.PRIO_PROCESS, 0))
        if not message.get("ok"):
            print(f"view_successor_refused error={message.get('error')!s}", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Have the server end, and do not start another; the connection ends with it."""
        self._ending = True
        with contextlib.suppress(OSError):
            send_packet(self.control, {"op": "quit"})
        if self.device >= 0:
            os.close(self.device)
            self.device = -1
        self._theirs.close()


def _set_niceness(pid: int, niceness: int) -> None:
    """Of a process, and of its session among others where the scheduler goes by sessions (autogroup in sched(7))."""
    with contextlib.suppress(OSError):  # ended already, or without CAP_SYS_NICE: then it takes its turn
        os.setpriority(os.PRIO_PROCESS, pid, niceness)
    with contextlib.suppress(OSError), open(f"/proc/{pid}/autogroup", "w") as file:
        file.write(f"{niceness}")
