"""Processes that the daemon started: none of them may be left when the container and the daemon are gone."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from pathlib import Path


def belonging_to(directory: Path) -> dict[int, str]:
    """Return, by process ID, the command lines of processes whose arguments or environment name ``directory``."""
    needle = os.fsencode(directory) + b"/"
    result: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            arguments = (entry / "cmdline").read_bytes()
            if needle in arguments or needle in (entry / "environ").read_bytes():
                result[int(entry.name)] = os.fsdecode(arguments.replace(b"\0", b" ").strip())
    return result


def end_all(directory: Path, seconds: float) -> list[str]:
    """Wait until no process belongs to ``directory``; after ``seconds`` kill what is left, and return what that was."""
    left = []
    deadline = time.monotonic() + seconds
    for pid, command in belonging_to(directory).items():
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(pid)
            try:
                poller = select.poll()
                poller.register(pidfd, select.POLLIN)
                if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
                    left.append(f"{pid}: {command}")
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            finally:
                os.close(pidfd)
    return left
