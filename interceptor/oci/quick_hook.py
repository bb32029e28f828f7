"""The hook of containers that `interceptor-runc` makes: ``python -I -S quick_hook.py SOCKET create|poststop``.

The same as `interceptor.oci.hook`, for which a runtime waits at every start and end of a container: run by its path,
with nothing imported that takes time. A runtime's state is JSON already, and a request is what is put around it.
"""

from __future__ import annotations

import _socket
import sys

_TIMEOUT = 30.0
_STATE_MAX = 1 << 20


def main(socket: str, op: str) -> int:
    """Exit status: 0 done, 1 failed, with what the daemon said. A container can be deleted while no daemon is there:
    the next one finds out by itself."""
    # Between tokens of JSON a newline is as good as a blank; within a string there is none.
    state = sys.stdin.buffer.read(_STATE_MAX).strip().replace(b"\n", b" ")
    try:
        reply = _ask(socket, b'{"op": "%s", "state": %s}\n' % (op.encode(), state))
    except (FileNotFoundError, ConnectionRefusedError):
        if op == "poststop":
            return 0
        reply = b"no daemon listens there (start it: systemctl start interceptor, or: interceptor serve)"
    except OSError as error:
        reply = str(error).encode()
    if reply.startswith(b'{"ok":true'):
        return 0
    print(f"interceptor {op}: {socket}: {reply.decode(errors='replace').strip()}", file=sys.stderr)
    return 1


def _ask(path: str, line: bytes) -> bytes:
    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    try:
        connection.settimeout(_TIMEOUT)
        connection.connect(path)
        while line:
            line = line[connection.send(line) :]
        reply = b""
        while not reply.endswith(b"\n"):
            chunk = connection.recv(1 << 16)
            if not chunk:
                return b"the connection ended before the reply; look at the daemon's log"
            reply += chunk
        return reply
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
