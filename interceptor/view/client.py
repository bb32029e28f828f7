"""The daemon's end of the view's control socket."""

from __future__ import annotations

import socket

from interceptor.errors import InterceptorError
from interceptor.kernel.fd import OwnedFd
from interceptor.packets import receive_packet, send_packet


class ViewClient:
    """Orders to the view's process, answered in turn."""

    def __init__(self, fd: OwnedFd) -> None:
        self._sock = socket.socket(fileno=fd.take())
        self._synchronise()

    def _synchronise(self) -> None:
        """Reads what a predecessor, killed while it waited, did not: no answer but that to `list` names containers."""
        try:
            send_packet(self._sock, {"op": "list"})
            reply: object = None
            while not isinstance(reply, dict) or "containers" not in reply:
                reply, _ = receive_packet(self._sock)
                if reply is None:
                    raise InterceptorError("the view is gone", "restart the service")
        except (OSError, ValueError) as error:
            raise InterceptorError(f"the view does not answer: {error}", "restart the service") from error

    def _order(self, message: dict[str, object], fds: list[int] | None = None) -> None:
        # A timeout would make the socket, which others hold too, non-blocking: SO_RCVTIMEO is this call's own affair.
        try:
            send_packet(self._sock, message, fds)
            reply, _ = receive_packet(self._sock)
        except (OSError, ValueError) as error:
            raise InterceptorError(f"the view does not answer: {error}", "restart the service") from error
        if not isinstance(reply, dict) or not reply.get("ok"):
            reason = reply.get("error") if isinstance(reply, dict) else "it is gone"
            raise InterceptorError(f"the view could not {message['op']}: {reason}")

    def add(self, cid: str, uid: int, gid: int, created_ns: int, envoy: int) -> None:
        """A subtree for a container; ``envoy`` is the socket of its envoy."""
        message = {"op": "add", "id": cid, "uid": uid, "gid": gid, "created_ns": created_ns}
        self._order(message, [envoy])

    def remove(self, cid: str) -> None:
        """The container is gone."""
        self._order({"op": "remove", "id": cid})
