"""The daemon's side of the keeper: starting it, giving it orders, getting back what a predecessor left."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from interceptor.config import Config
from interceptor.errors import InterceptorError
from interceptor.kernel.fd import OwnedFd, is_ready
from interceptor.packets import receive_packet, send_packet

VIEW_TIMEOUT_S = 5.0
"""How long the view may take to show its parts to whoever clones them."""


@dataclass
class Forked:
    """A native process and the descriptor that tells of its end."""

    pid: int
    pidfd: OwnedFd


class Keeper:
    """A connection to the keeper. Orders are answered in turn; each takes well under a millisecond."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        reply, fds = self._order({"op": "hello"}, [])
        self.workshop_root: str = reply["root"]
        self.keys: list[str] = reply["keys"]
        self.namespace, self.welder, self.view = (OwnedFd(fd) for fd in fds)

    def _order(self, message: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], list[int]]:
        try:
            send_packet(self._sock, message, fds)
            reply, received = receive_packet(self._sock)
        except (OSError, ValueError) as error:
            raise InterceptorError(f"the keeper does not answer: {error}", "restart the service") from error
        if reply is None:
            raise InterceptorError("the keeper is gone", "restart the service")
        if not reply["ok"]:
            raise InterceptorError(f"the keeper could not {message['op']}: {reply['error']}")
        return reply, received

    def store(self, key: str, record: object, fds: list[int]) -> None:
        """Keeps duplicates of ``fds`` and a JSON record under ``key``."""
        self._order({"op": "store", "key": key, "record": record}, fds)

    def fetch(self, key: str) -> tuple[Any, list[OwnedFd]]:
        """What is kept under ``key``."""
        reply, fds = self._order({"op": "fetch", "key": key}, [])
        return reply["record"], [OwnedFd(fd) for fd in fds]

    def forget(self, key: str) -> None:
        """Closes what is kept under ``key``, or, where it ends in a slash, under every key that starts with it."""
        self._order({"op": "forget", "key": key}, [])

    def fork_guard(self, config: dict[str, int], userns: int, link: int, journal: int) -> Forked:
        """A new guard in the user namespace given."""
        reply, fds = self._order({"op": "guard", "config": config}, [userns, link, journal])
        return Forked(int(reply["pid"]), OwnedFd(fds[0]))

    def fork_envoy(self, sock: int, proc: int, sys_: int, pidfd: int, namespaces: list[int]) -> Forked:
        """A new envoy, which ends with a process; the first of ``namespaces`` is the user namespace."""
        reply, fds = self._order({"op": "envoy"}, [sock, proc, sys_, pidfd, *namespaces])
        return Forked(int(reply["pid"]), OwnedFd(fds[0]))

    def view_parts(self, paths: list[str]) -> dict[str, OwnedFd]:
        """Clones of the mounts at paths of the view, by path; those that do not exist are left out.

        Somebody else walks the view for us, and is killed if that takes longer than `VIEW_TIMEOUT_S`: nothing that a
        container needs may wait for something that serves containers. Raises `InterceptorError`.
        """
        places = [os.path.join(self.workshop_root, "view", path) for path in paths]
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            ours.send(b"".join(os.fsencode(place) + b"\0" for place in places))
            _, fds = self._order({"op": "cloner"}, [theirs.fileno()])
            theirs.close()
            with OwnedFd(fds[0]) as child:
                try:
                    return _receive_parts(ours, paths)
                finally:
                    with contextlib.suppress(ProcessLookupError):
                        signal.pidfd_send_signal(child.fileno(), signal.SIGKILL)

    def quit(self) -> None:
        """Ends keeper, welder and view."""
        self._order({"op": "quit"}, [])


def _receive_parts(sock: socket.socket, paths: list[str]) -> dict[str, OwnedFd]:
    if not is_ready(sock, VIEW_TIMEOUT_S):
        raise InterceptorError("the view does not answer", "see the log of the view")
    try:
        said, received, _flags, _address = socket.recv_fds(
            sock, 4 * len(paths), len(paths), socket.MSG_CMSG_CLOEXEC
        )
    except ConnectionError:
        said, received = b"", []
    clones = [OwnedFd(fd) for fd in received]
    errors = memoryview(said).cast("i").tolist()
    wrong = next((e for e in zip(paths, errors, strict=False) if e[1] not in (0, errno.ENOENT)), None)
    if len(errors) != len(paths) or wrong or errors.count(0) != len(clones):
        for clone in clones:
            clone.close()
        if wrong:
            raise InterceptorError(f"view: {wrong[0]}: {os.strerror(wrong[1])}")
        raise InterceptorError("the view could not be walked: whoever did it is gone")
    there = (path for path, error in zip(paths, errors, strict=True) if not error)
    return dict(zip(there, clones, strict=True))


def connect(config: Config) -> tuple[Keeper, bool]:
    """The keeper of a predecessor, or a new one (then True). Raises `InterceptorError`."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.connect(config.keeper_socket)
        return Keeper(sock), False
    except (FileNotFoundError, ConnectionRefusedError):
        sock.close()
    _start(config)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.connect(config.keeper_socket)
    return Keeper(sock), True


def _start(config: Config) -> None:
    ready, theirs = os.pipe()
    with OwnedFd(ready):
        argv = [
            sys.executable,
            "-m",
            "interceptor.guards.spawner",
            config.runtime_dir,
            str(theirs),
            config.log_level,
            str(int(config.host_writes)),
        ]
        # A session of its own: a terminal's Ctrl-C and the daemon's death do not reach it.
        subprocess.Popen(argv, pass_fds=[theirs], start_new_session=True, stdin=subprocess.DEVNULL)
        os.close(theirs)
        said = os.read(ready, 4096)
    if said != b"ready":
        reason = said.decode("utf-8", "replace") or "it died; see its output above"
        raise InterceptorError(f"the keeper did not start: {reason}", "run `interceptor doctor`")
