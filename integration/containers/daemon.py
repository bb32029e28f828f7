"""The installed daemon, run on private sockets and state, and asked over its control socket."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from integration.containers.notify import NotifySocket, NotReady

READY_SECONDS = 30.0
STOP_SECONDS = 15.0
LOG_LINES = 40


class DaemonError(Exception):
    """The daemon is not installed, did not start, or refused a request."""


@dataclass(frozen=True)
class Daemon:
    """A running ``interceptor serve``; ``directory`` holds its configuration, sockets, state and log."""

    directory: Path
    config: Path
    log: Path
    command: str
    hook: str
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    """The daemon and its successors, the last one running."""

    @property
    def listener(self) -> Path:
        """The OCI seccomp agent socket, for ``linux.seccomp.listenerPath``."""
        return self.directory / "run/seccomp.sock"

    @property
    def control(self) -> Path:
        """The control socket."""
        return self.directory / "run/control.sock"

    def hook_command(self, phase: str) -> list[str]:
        """Return the hook's command line for ``createRuntime`` or ``poststop``."""
        return [self.hook, "--socket", str(self.control), phase]

    def log_tail(self) -> str:
        """Return the end of the log, for an error message: the directory is removed afterwards."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-LOG_LINES:])

    def ask(self, op: str, **fields: object) -> Any:
        """Send one request and return its result; raises `DaemonError` with the daemon's own words."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(STOP_SECONDS)
            connection.connect(str(self.control))
            connection.sendall(json.dumps({"op": op, **fields}).encode() + b"\n")
            with connection.makefile("rb") as answer:
                line = answer.readline()
        reply = json.loads(line) if line else {"ok": False, "error": "the connection was closed"}
        if not reply.get("ok"):
            raise DaemonError(f"{op}: {reply.get('error', reply)} {reply.get('hint', '')}".rstrip())
        return reply.get("result")


@contextlib.contextmanager
def serving(directory: Path, options: Mapping[str, object] | None = None) -> Iterator[Daemon]:
    """Start the daemon of this Python's environment below ``directory`` and stop it at the end; ``options`` are more
    keys of its configuration, or others than these here.
    """
    directory.mkdir(parents=True)
    daemon = Daemon(
        directory,
        directory / "config.toml",
        directory / "daemon.log",
        program("interceptor"),
        program("interceptor-hook"),
    )
    keys: dict[str, object] = {
        "runtime_dir": f"{directory}/run",
        "state_dir": f"{directory}/state",
        "log_format": "json",
        "log_level": "info",
        # The umounts of each unit of the container, for the table.
        "account_units": True,
        **(options or {}),
    }
    # What JSON writes for strings, numbers, truth and lists is TOML as well.
    daemon.config.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items()))
    try:
        start(daemon)
        yield daemon
    finally:
        stop(daemon.processes[-1])


def start(daemon: Daemon) -> None:
    """Start the daemon, or a successor of one that has ended; return when it is ready."""
    with NotifySocket(daemon.directory / "notify") as ready, open(daemon.log, "ab") as log:
        process = subprocess.Popen(
            # The daemon must not outlive a quickstart that was killed.
            ["setpriv", "--pdeathsig", "TERM", daemon.command, "serve", "--config", str(daemon.config)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "NOTIFY_SOCKET": str(ready.path)},
            cwd="/",
            start_new_session=True,
        )
        daemon.processes.append(process)
        try:
            ready.wait_ready(process.pid, READY_SECONDS)
        except NotReady as error:
            raise DaemonError(f"{daemon.command} serve: {error}\n{daemon.log_tail()}") from error


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the process to end, and make it end when it does not."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def program(name: str) -> str:
    """Return the command ``name`` of this Python's environment, else the one on the search path."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise DaemonError(
            f"the command {name} is not installed beside {sys.executable}; run without --no-install"
        )
    return found
