"""The library: containers without an OCI runtime, guarded by a daemon of their own. As root::

    import os
    from interceptor import Interceptor

    with Interceptor() as guard:
        with guard.spawn(masked_paths=["/proc/kcore"], network="loopback") as child:
            print(child.run(["umount", "/proc/sys"]).stderr)  # an original stays
            print(child.run(["mount", "--bind", "/proc", "/mnt"]).returncode)  # with all that hides what is below
            print(child.run(["umount", "/mnt/sys"]).returncode)  # a copy goes
            print(child.call(os.getuid), child.pid, child.cid)  # functions run inside, too
        with guard.spawn(["sh", "-c", "umount /tmp; exit 3"]) as child:
            print(child.wait(timeout=10), child.stderr)

`Interceptor` runs ``interceptor serve`` on private sockets and state; nothing of another daemon on the machine is
touched. A child gets namespaces, mounts, welds and filter as from a runtime with our hook and agent, so what is tried
on one holds for containers of runc. Its first process is a small init; `spawn` without a command leaves it idle for
`GuardedChild.run`. Everything ends with its ``with`` block, and with this process.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Unpack

import prctl

from interceptor.client import request
from interceptor.config import Config
from interceptor.errors import ContainerError, InterceptorError
from interceptor.kernel.fd import OwnedFd
from interceptor.kernel.process import pidfd_open
from interceptor.spawn import create
from interceptor.spawn.container import GuardedChild, State
from interceptor.spawn.create import SpawnOptions
from interceptor.spawn.layout import Mount
from interceptor.spawn.network import Veth
from interceptor.spawn.process import Command, Completed, Process

__all__ = ["Completed", "GuardedChild", "Interceptor", "Mount", "Process", "Veth"]

#: Seconds that a daemon may take: to say that it is ready, to end, to answer.
START_SECONDS = 30.0
STOP_SECONDS = 15.0
REQUEST_SECONDS = 30.0

_LOG_TAIL = 20


class Interceptor:
    """A daemon on private sockets, and the containers made with it. A context manager.

    ``directory`` (default: a new private one, removed at the end) gets its configuration, sockets, state and log; a
    socket's path has 107 bytes at most. ``environment`` is added to the daemon's; ``settings`` are keys of the
    configuration (`interceptor.config.Config`), such as ``log_level`` or ``guard_mode``.
    """

    def __init__(
        self,
        *,
        directory: str | os.PathLike[str] | None = None,
        environment: Mapping[str, str] | None = None,
        **settings: object,
    ) -> None:
        self._is_ours = directory is None
        self.directory = Path(tempfile.mkdtemp(prefix="interceptor-") if directory is None else directory)
        self.config = Config(
            **{
                "runtime_dir": str(self.directory / "run"),
                "state_dir": str(self.directory / "state"),
                "log_format": "json",
                **settings,
            }  # type: ignore[arg-type]
        )
        self._environment = dict(environment or {})
        self._notify = _NotifySocket()
        self._process: subprocess.Popen[bytes] | None = None
        self._children: list[GuardedChild] = []
        #: One for each start: readable once the daemon and all that it left behind have ended.
        self._lifelines: list[OwnedFd] = []

    # ---- the daemon ----

    @property
    def control_socket(self) -> str:
        return self.config.control_socket

    @property
    def seccomp_socket(self) -> str:
        return self.config.seccomp_socket

    @property
    def log_path(self) -> Path:
        """The daemon's log: JSON lines, from all its starts."""
        return self.directory / "daemon.log"

    @property
    def pid(self) -> int:
        """The daemon's process ID. Raises `InterceptorError` while none runs."""
        if self._process is None:
            raise InterceptorError("the daemon does not run", "start() it")
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the daemon and wait until it is ready; it takes over what a killed predecessor has left.

        Raises `InterceptorError` with the end of its log where it does not come up.
        """
        if self._process is not None:
            raise InterceptorError("the daemon runs already")
        self.directory.mkdir(mode=0o700, exist_ok=True)
        path = self.directory / "config.toml"
        path.write_text(_toml(self.config))
        with open(self.log_path, "ab") as log:
            lifeline, theirs = os.pipe()
            self._lifelines.append(OwnedFd(lifeline))
            with OwnedFd(theirs):
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "interceptor", "serve", "--config", str(path)],
                    stdin=subprocess.DEVNULL,
                    # It has nothing to say there, but all that it starts inherits it: that tells of their end.
                    stdout=theirs,
                    stderr=log,
                    cwd="/",
                    env={**os.environ, **self._environment, "NOTIFY_SOCKET": self._notify.address},
                    start_new_session=True,
                    # Nothing is left behind where this process is killed.
                    preexec_fn=lambda: prctl.set_pdeathsig(signal.SIGTERM),
                )
            with contextlib.ExitStack() as undo:
                undo.callback(self.kill)
                if not self._notify.wait_ready(self._process.pid, START_SECONDS):
                    raise InterceptorError(
                        f"the daemon is not ready after {START_SECONDS:g} s{self._log_end()}"
                    )
                if self._process.poll() is not None:
                    status = self._process.returncode
                    raise InterceptorError(f"the daemon ended with status {status}{self._log_end()}")
                undo.pop_all()

    def terminate(self) -> int:
        """SIGTERM; wait; return its exit status. Containers stay, under their guards. Raises `InterceptorError`."""
        process = self._process
        if process is None:
            raise InterceptorError("the daemon does not run")
        process.terminate()
        try:
            status = process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            raise InterceptorError(
                f"the daemon ignored SIGTERM for {STOP_SECONDS:g} s{self._log_end()}"
            ) from None
        self._process = None
        return status

    def kill(self) -> None:
        """SIGKILL, for tests of faults; `start` brings a successor."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def restart(self) -> None:
        """`terminate` and `start`."""
        self.terminate()
        self.start()

    def request(self, op: str, **fields: object) -> Any:
        """One request to the control socket; its result. Raises `InterceptorError` where the daemon refuses."""
        return request(self.control_socket, {"op": op, **fields}, REQUEST_SECONDS)

    def close(self) -> None:
        """End all children and the daemon, and wait until everything that it had started has ended."""
        with contextlib.ExitStack() as stack:
            if self._is_ours:
                stack.callback(shutil.rmtree, self.directory, ignore_errors=True)
            stack.callback(self._notify.close)
            stack.callback(self._drop_lifelines)
            stack.callback(self._close_daemon)
            for child in self._children:
                stack.callback(child.close)
        self._children.clear()

    def _close_daemon(self) -> None:
        if not self._lifelines:
            return
        if not self.is_running:
            # Its keeper may be alive, and only a daemon can end that.
            self.kill()
            self.start()
        if status := self.terminate():
            raise InterceptorError(f"the daemon ended with status {status}{self._log_end()}")
        if not all(_hung_up(lifeline, STOP_SECONDS) for lifeline in self._lifelines):
            raise InterceptorError(f"something that the daemon started still runs{self._log_end()}")

    def _drop_lifelines(self) -> None:
        while self._lifelines:
            self._lifelines.pop().close()

    def __enter__(self) -> Interceptor:
        try:
            self.start()
        except BaseException:
            self._notify.close()
            self._drop_lifelines()
            if self._is_ours:
                shutil.rmtree(self.directory, ignore_errors=True)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _log_end(self) -> str:
        lines = self.log_path.read_text(errors="replace").splitlines()[-_LOG_TAIL:]
        return ":\n" + "\n".join(lines) if lines else "; its log is empty"

    # ---- containers ----

    def spawn(
        self, command: Command | None = None, *arguments: object, **options: Unpack[SpawnOptions]
    ) -> GuardedChild:
        """A container with ``command`` (a program's words, or a function with its arguments) as its main process.

        Without a command its first process idles until `GuardedChild.close`. `SpawnOptions` has all parameters. Raises
        `ContainerError` with what the child or the daemon says; nothing is left behind then.
        """
        child = create.spawn(self, command, *arguments, **options)
        self._children = [c for c in self._children if not c.is_closed]
        self._children.append(child)
        return child

    def create(self, state: State) -> None:
        """What a runtime's createRuntime hook does: have the mounts of a container in creation welded.

        Raises `ContainerError` with the daemon's reason.
        """
        try:
            self.request("create", state=state)
        except InterceptorError as error:
            raise ContainerError(f"{error}{self._log_end()}", error.hint) from error

    def hand_over(self, process_state: State, listener: OwnedFd) -> None:
        """What a runtime does with the listener of a container's process. Raises `OSError` where no daemon listens."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as agent:
            agent.connect(self.seccomp_socket)
            socket.send_fds(agent, [json.dumps(process_state).encode()], [listener.fileno()])

    def poststop(self, state: State) -> None:
        """What a runtime's poststop hook does. Nothing while the daemon is dead: its successor sees the end itself."""
        if self.is_running:
            self.request("poststop", state=state)


class _NotifySocket:
    """Where the daemon says that it is ready, and later that it stops (sd_notify(3)). An abstract address: no file."""

    def __init__(self) -> None:
        self.address = f"@interceptor-{secrets.token_hex(8)}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(f"\0{self.address[1:]}")

    def wait_ready(self, pid: int, timeout: float) -> bool:
        """Until process ``pid`` is ready or has ended; False after ``timeout`` seconds."""
        with pidfd_open(pid) as pidfd:
            poller = select.poll()
            poller.register(self._socket, select.POLLIN)
            poller.register(pidfd.fileno(), select.POLLIN)
            while ready := {fd for fd, _ in poller.poll(timeout * 1000)}:
                if self._socket.fileno() not in ready:
                    return True
                if b"READY=1" in self._socket.recv(4096).splitlines():
                    return True
        return False

    def close(self) -> None:
        self._socket.close()


def _hung_up(pipe: OwnedFd, timeout: float) -> bool:
    """Whether the last writer of ``pipe`` goes within ``timeout`` seconds."""
    poller = select.poll()
    poller.register(pipe.fileno(), 0)
    return bool(poller.poll(timeout * 1000))


def _toml(config: Config) -> str:
    """JSON's strings, numbers and booleans are TOML's."""
    return "".join(f"{key} = {json.dumps(getattr(config, key))}\n" for key in config.__struct_fields__)
