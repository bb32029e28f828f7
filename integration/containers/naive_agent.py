"""An interceptor as it must not be: it answers "success" to umounts that it never makes.

It is the bug of this project's first day, small enough to read: judge an unmount by how the path ends, take the copy at
``/run/systemd/mount-rootfs/sys/devices/virtual`` for the original at ``/sys/devices/virtual``, and say 0 so that nobody
complains. systemd starts its walk again after every success, and the success never takes effect.

The wire is the OCI seccomp agent's (config-linux.md, "The Container Process State") and seccomp_unotify(2).
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import os
import select
import socket
import struct
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

#: What the naive agent takes for its own mounts, wherever they are.
COVERED = ("/proc/sys", "/sys/kernel", "/sys/devices/virtual")

_UMOUNT2 = {"x86_64": 166, "aarch64": 39}.get(os.uname().machine, 166)
_NOTIF = struct.Struct("=QIIiIQ6Q")  # linux/seccomp.h, struct seccomp_notif
_RESPONSE = struct.Struct("=QqiI")  # struct seccomp_notif_resp
_NOTIF_RECV = 0xC0002100 | _NOTIF.size << 16
_NOTIF_SEND = 0xC0002101 | _RESPONSE.size << 16
_CONTINUE = 1
_PATH_MAX = 4096


@dataclass
class Counts:
    """What the agent answered so far; ``faked`` is by the systemd unit of the caller."""

    continued: int = 0
    faked: collections.Counter[str] = field(default_factory=collections.Counter)


class NaiveAgent:
    """The agent on a socket of its own, in a thread, as a context manager.

    ``storm`` is an eventfd that becomes readable once ``threshold`` successes were faked.
    """

    def __init__(self, path: Path, threshold: int) -> None:
        self.path = path
        self.counts = Counts()
        self.storm = os.eventfd(0, os.EFD_CLOEXEC)
        self._threshold = threshold
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._units: dict[int, str] = {}
        self._listeners: set[int] = set()
        self._epoll = select.epoll()
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="naive agent", daemon=True)

    def __enter__(self) -> NaiveAgent:
        self._server.bind(str(self.path))
        self._server.listen()
        self._epoll.register(self._server, select.EPOLLIN)
        self._epoll.register(self._stop, select.EPOLLIN)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        for listener in self._listeners:
            os.close(listener)
        self._epoll.close()
        self._server.close()
        self.path.unlink(missing_ok=True)
        os.close(self._stop)
        os.close(self.storm)

    def _run(self) -> None:
        while True:
            for descriptor, events in self._epoll.poll():
                if descriptor == self._stop:
                    return
                if descriptor == self._server.fileno():
                    self._accept()
                elif events & select.EPOLLHUP:  # the last process under this filter is gone
                    self._listeners.remove(descriptor)
                    os.close(descriptor)
                else:
                    self._answer(descriptor)

    def _accept(self) -> None:
        connection, _ = self._server.accept()
        with connection:
            _, descriptors, _, _ = socket.recv_fds(connection, 65536, 4)
        for listener in descriptors:
            os.set_inheritable(listener, False)
            self._listeners.add(listener)
            self._epoll.register(listener, select.EPOLLIN)

    def _answer(self, listener: int) -> None:
        buffer = bytearray(_NOTIF.size)
        try:
            fcntl.ioctl(listener, _NOTIF_RECV, buffer)
        except FileNotFoundError:  # ENOENT: the caller was killed in the meantime
            return
        number, tid, _, call, _, _, path_address, *_ = _NOTIF.unpack(buffer)
        faked = call == _UMOUNT2 and _read_path(tid, path_address).endswith(COVERED)
        response = bytearray(_RESPONSE.pack(number, 0, 0, 0 if faked else _CONTINUE))
        with contextlib.suppress(FileNotFoundError):  # ENOENT: a signal took the caller out of its call
            fcntl.ioctl(listener, _NOTIF_SEND, response)
        self._count(tid, faked)

    def _count(self, tid: int, faked: bool) -> None:
        if not faked:
            self.counts.continued += 1
            return
        self.counts.faked[self._unit(tid)] += 1
        if self.counts.faked.total() == self._threshold:
            os.eventfd_write(self.storm, 1)

    def _unit(self, tid: int) -> str:
        """Return the systemd unit of a thread, once for each thread: reading its cgroup costs more than the answer."""
        if tid not in self._units:
            try:
                lines = Path(f"/proc/{tid}/cgroup").read_text().splitlines()
            except OSError:
                return "(gone)"
            unified = next((line[3:] for line in lines if line.startswith("0::")), "/")
            self._units[tid] = unit_of_cgroup(unified)
        return self._units[tid]


def unit_of_cgroup(path: str) -> str:
    """Return the last component that names a unit of systemd, such as ``e2scrub_reap.service``.

    >>> unit_of_cgroup("/system.slice/e2scrub_reap.service")
    'e2scrub_reap.service'
    """
    units = [part for part in path.split("/") if part.endswith((".service", ".scope", ".slice"))]
    return units[-1] if units else path


def _read_path(tid: int, address: int) -> str:
    """Return the caller's NUL-terminated path, or an empty string when its memory cannot be read."""
    try:
        with open(f"/proc/{tid}/mem", "rb", buffering=0) as memory:
            # Not across the end of the page: what follows may be unmapped.
            data = os.pread(memory.fileno(), _PATH_MAX - address % _PATH_MAX, address)
    except OSError:
        return ""
    return os.fsdecode(data.partition(b"\0")[0])
