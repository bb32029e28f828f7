"""The plain Python listener: an OCI seccomp agent in thirty lines, without resolution of any path.

``python integration/storm/listener.py SOCKET``. It refuses umount2("/proc/sys") and lets the kernel run all else. It
needs nothing but the standard library, and is also an example of what ``--peer`` takes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
import sys
import threading

_RECV, _SEND, _SET_FLAGS = 0xC0502100, 0xC0182101, 0x40082104
_CONTINUE, _SYNC_WAKE_UP = 1, 1
_NOTIFICATION, _REPLY = struct.Struct("=QIIiIQ6Q"), struct.Struct("=QqiI")
_UMOUNT2 = {"x86_64": 166, "aarch64": 39}[os.uname().machine]
_DENIED = b"/proc/sys\0"


def serve(listener: int) -> None:
    """Until the listener's last caller is gone."""
    with contextlib.suppress(OSError):  # before 6.6
        fcntl.ioctl(listener, _SET_FLAGS, _SYNC_WAKE_UP)
    while True:
        buffer = bytearray(_NOTIFICATION.size)
        try:
            fcntl.ioctl(listener, _RECV, buffer)
        except OSError:
            return
        ident, pid, _, number, _, _, *arguments = _NOTIFICATION.unpack(buffer)
        error, flags = 0, _CONTINUE
        if number == _UMOUNT2 and _text_at(pid, arguments[0]) == _DENIED:
            error, flags = -errno.EINVAL, 0
        try:
            fcntl.ioctl(listener, _SEND, _REPLY.pack(ident, 0, error, flags))
        except FileNotFoundError:
            continue  # the caller is gone


def _text_at(pid: int, address: int) -> bytes:
    try:
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            memory.seek(address)
            return memory.read(len(_DENIED))
    except OSError:
        return b""


def main(path: str) -> None:
    """Serves each listener that comes to the socket at ``path`` in a thread."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(path)
        server.listen()
        while True:
            connection, _ = server.accept()
            with connection:
                _, fds, _, _ = socket.recv_fds(connection, 65536, 4)
            for fd in fds:
                threading.Thread(target=serve, args=(fd,), daemon=True).start()


if __name__ == "__main__":
    main(sys.argv[1])
