"""What the service manager is told, and what it keeps for us: sd_notify(3) and the file descriptor store.

Written on the standard library: the protocol is one datagram, and no binding with wheels can store descriptors.
"""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Sequence

#: SD_LISTEN_FDS_START.
_FIRST_FD = 3


def notify(*assignments: str, fds: Sequence[int] = ()) -> bool:
    """Send ``NAME=value`` assignments, with ``fds`` along; False where no service manager listens ($NOTIFY_SOCKET)."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as manager:
        try:
            manager.connect(address)
            manager.sendmsg(["\n".join(assignments).encode()], ancillary)
        except OSError:
            # A manager that does not listen any more is no reason to fail: what we say is for its comfort.
            return False
    return True


def ready(status: str) -> bool:
    """Start-up is done. ``status`` is the line that ``systemctl status`` shows."""
    return notify("READY=1", f"STATUS={status}")


def stopping() -> bool:
    """Shut-down has begun."""
    return notify("STOPPING=1")


def store_fds(name: str, fds: Sequence[int]) -> bool:
    """Have the manager keep duplicates of ``fds`` under ``name`` for the next start of the service.

    ``FDPOLL=0``: a listener whose last task died polls as hung up, and must go by `remove_fds`, not by itself.
    """
    return notify("FDSTORE=1", f"FDNAME={name}", "FDPOLL=0", fds=fds)


def remove_fds(name: str) -> bool:
    """Have the manager close what it keeps under ``name``."""
    return notify("FDSTOREREMOVE=1", f"FDNAME={name}")


def stored_fds() -> dict[str, list[int]]:
    """Descriptors that the manager passed at start, by name; the caller owns them. Empties its environment of them."""
    pid = os.environ.pop("LISTEN_PID", "")
    count = os.environ.pop("LISTEN_FDS", "")
    names = os.environ.pop("LISTEN_FDNAMES", "")
    if pid != str(os.getpid()) or not count.isdigit():
        return {}
    stored: dict[str, list[int]] = {}
    padded = names.split(":") + ["unknown"] * int(count)
    for fd, name in zip(range(_FIRST_FD, _FIRST_FD + int(count)), padded, strict=False):
        os.set_inheritable(fd, False)
        stored.setdefault(name, []).append(fd)
    return stored
