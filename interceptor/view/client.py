"""The daemon's end of the view's control socket."""

from __future__ import annotations

import itertools
import select
import socket
import time
from collections.abc import Callable
from typing import Any

from interceptor.errors import InterceptorError
from interceptor.kernel.fd import OwnedFd, is_ready
from interceptor.packets import receive_packet, send_packet

TIMEOUT_S = 5.0
"""How long an answer may take; the view may be started anew meanwhile, and then finds the order."""


class ViewClient:
    """Orders to the view's process, answered in turn.

    Orders are numbered, and what answers another number is passed over: a predecessor, or a server that was killed
    between its answer and taking the order off the socket, may have left it there.
    """

    def __init__(self, fd: OwnedFd) -> None:
        self._sock = socket.socket(fileno=fd.take())
        self._numbers = itertools.count(time.monotonic_ns())
        self.unasked: Callable[[dict[str, Any]], None] = lambda _reply: None
        """Gets answers that nobody waits for."""

    def fileno(self) -> int:
        """The socket's descriptor: readable when there is an answer that nobody waits for."""
        return self._sock.fileno()

    def _order(self, message: dict[str, Any], fds: list[int] | None = None) -> None:
        try:
            reply = self._answer(self._send(message, fds))
        except (OSError, ValueError) as error:
            raise InterceptorError(f"the view does not answer: {error}", "restart the service") from error
        if not reply.get("ok"):
            raise InterceptorError(f"the view could not {message['op']}: {reply.get('error')}")

    def _send(self, message: dict[str, Any], fds: list[int] | None = None) -> int:
        """Sends an order without waiting for room or answer; its number."""
        self.take_unasked()
        if not is_ready(self._sock, 0, select.POLLOUT):
            raise InterceptorError("the view takes no orders", "see the log of the view")
        number = next(self._numbers)
        send_packet(self._sock, message | {"n": number}, fds)
        return number

    def take_unasked(self, patience_s: float = 0) -> None:
        """Passes on what is there already, or what comes first in so many seconds."""
        while is_ready(self._sock, patience_s):
            patience_s = 0
            reply, _ = receive_packet(self._sock)
            if reply is None:
                raise InterceptorError("the view is gone", "restart the service")
            if isinstance(reply, dict):
                self.unasked(reply)

    def _answer(self, number: int) -> dict[str, Any]:
        # Not by a timeout of the socket, which others hold too and which it would make non-blocking.
        end = time.monotonic() + TIMEOUT_S
        while is_ready(self._sock, end - time.monotonic()):
            reply, _ = receive_packet(self._sock)
            if reply is None:
                raise InterceptorError("the view is gone", "restart the service")
            if isinstance(reply, dict) and reply.get("n") == number:
                return reply
            if isinstance(reply, dict):
                self.unasked(reply)
        raise InterceptorError(f"the view gave no answer in {TIMEOUT_S:g} s", "see the log of the view")

    def add(self, message: dict[str, Any], envoy: int) -> None:
        """A subtree for a container, by the order `add_order` made; ``envoy`` is the socket of its envoy."""
        self._order(message, [envoy])

    def remove(self, cid: str) -> None:
        """The container is gone. Nobody waits for the answer: an end must not depend on the view."""
        self.tell("remove", id=cid)

    def tell(self, op: str, **fields: str) -> int:
        """An order whose answer goes to `unasked`; its number. Raises `InterceptorError`."""
        try:
            return self._send({"op": op, **fields})
        except (OSError, ValueError) as error:
            raise InterceptorError(f"the view does not answer: {error}", "restart the service") from error


def add_order(
    cid: str,
    *,
    uid: int,
    gid: int,
    created_ns: int,
    groups: int,
    userns: int,
    namespaces: list[int],
    proc_mount: int,
    cgroups: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The order to serve a container (`interceptor.view.protocol.Add`)."""
    return {
        # Only where they are shown: an older view does not know of them.
        **({"cgroups": cgroups} if cgroups is not None else {}),
        "op": "add",
        "id": cid,
        "uid": uid,
        "gid": gid,
        "created_ns": created_ns,
        "groups": groups,
        "userns": userns,
        "namespaces": namespaces,
        "proc_mount": proc_mount,
    }
