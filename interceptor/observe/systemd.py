"""What the service manager is told: sd_notify(3). The protocol is one datagram, so the standard library does."""

from __future__ import annotations

import os
import socket


def notify(*assignments: str) -> bool:
    """Send ``NAME=value`` assignments; False where no service manager listens ($NOTIFY_SOCKET)."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as manager:
        try:
            manager.connect(address)
            manager.send("\n".join(assignments).encode())
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
