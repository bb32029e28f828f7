"""Packets of one JSON object and descriptors over SOCK_SEQPACKET: how our own processes talk to each other."""

from __future__ import annotations

import array
import json
import os
import socket
from typing import Any

PACKET_MAX = 1 << 17
FDS_MAX = 64


def send_packet(sock: socket.socket, message: object, fds: list[int] | None = None) -> None:
    """One packet. Raises `OSError`."""
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([json.dumps(message).encode()], ancillary, socket.MSG_NOSIGNAL)


def receive_packet(sock: socket.socket) -> tuple[Any, list[int]]:
    """One packet and its descriptors (CLOEXEC); ``(None, [])`` at end of file. Raises `OSError`, `ValueError`."""
    space = socket.CMSG_SPACE(FDS_MAX * 4)
    data, ancillary, flags, _ = sock.recvmsg(PACKET_MAX, space, socket.MSG_CMSG_CLOEXEC)
    fds: list[int] = []
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.extend(memoryview(payload).cast("i"))
    if not data and not fds:
        return None, []
    try:
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise ValueError("packet was cut short")
        return json.loads(data), fds
    except ValueError:
        for fd in fds:
            os.close(fd)
        raise
