"""Other people's agents on the same work: any command that serves the socket of an OCI seccomp agent."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from interceptor.errors import InterceptorError
from interceptor.kernel.fd import OwnedFd
from interceptor.spawn.container import State

#: Seconds until its socket must be there.
START_SECONDS = 15.0

PYTHON = (
    f"{shlex.quote(sys.executable)} {shlex.quote(str(Path(__file__).with_name('listener.py')))} {{socket}}"
)


class Peer:
    """Hands listeners over to an agent; what a runtime's hooks would say, nobody hears."""

    def __init__(self, path: str) -> None:
        self._path = path

    def create(self, state: State) -> None:
        """No hook."""

    def hand_over(self, process_state: State, listener: OwnedFd) -> None:
        """As runc does it."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as agent:
            agent.connect(self._path)
            socket.send_fds(agent, [json.dumps(process_state).encode()], [listener.fileno()])

    def poststop(self, state: State) -> None:
        """No hook."""


@contextlib.contextmanager
def running(command: str) -> Iterator[Peer]:
    """The agent that ``command`` starts; ``{socket}`` in it is the path of the socket that it shall serve.

    Raises `InterceptorError` where it does not.
    """
    directory = Path(tempfile.mkdtemp(prefix="storm-peer-"))
    path = str(directory / "agent.sock")
    argv = [word.replace("{socket}", path) for word in shlex.split(command)]
    process = subprocess.Popen(argv, start_new_session=True)
    try:
        _wait_for(path, process)
        yield Peer(path)
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(directory)


def _wait_for(path: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not Path(path).is_socket():
        if process.poll() is not None or time.monotonic() > deadline:
            raise InterceptorError(
                f"no agent at {path}", "the command of --peer must serve the socket {socket}"
            )
        time.sleep(0.01)  # sleep: a stranger's command says in no other way that it is ready
