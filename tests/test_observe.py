"""interceptor/observe: the log and the talk with the service manager, over real sockets."""

from __future__ import annotations

import json
import os
import pty
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from interceptor.observe import systemd
from interceptor.observe.log import choose_format

pytestmark = pytest.mark.usefixtures("leak_check")

LOG = """
import sys
from interceptor.config import Config
from interceptor.observe import log
early = log.get_logger(container="web1")
log.configure(Config(log_format=sys.argv[1], log_level=sys.argv[2]))
early.debug("a detail")
early.info("copy removed", op="umount2", path=b"/x\\xff")
try:
    1 / 0
except ZeroDivisionError:
    early.exception("internal error")
"""


def log_lines(log_format: str, level: str) -> str:
    """What `LOG` writes to standard error."""
    argv = [sys.executable, "-c", LOG, log_format, level]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert done.stdout == ""
    return done.stderr


def test_json_is_one_object_a_line_with_bound_fields() -> None:
    first, second = (json.loads(line) for line in log_lines("auto", "info").splitlines())
    assert (first["event"], first["container"], first["op"], first["level"]) == (
        "copy removed",
        "web1",
        "umount2",
        "info",
    )
    assert first["path"] == "/x\\xff"
    assert "ZeroDivisionError" in second["exception"]


@pytest.mark.parametrize(("level", "count"), [("debug", 3), ("info", 2), ("warning", 1)])
def test_level_is_kept(level: str, count: int) -> None:
    assert len(log_lines("json", level).splitlines()) == count


def test_console_has_event_and_fields_on_a_line() -> None:
    lines = log_lines("console", "info").splitlines()
    assert "copy removed" in lines[0]
    assert "container=web1" in lines[0]
    assert lines[-1] == "ZeroDivisionError: division by zero"


def test_automatic_format_follows_the_output(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    controller, terminal = pty.openpty()
    with os.fdopen(terminal, "w") as stream, os.fdopen(controller), open(tmp_path / "file", "w") as file:
        assert choose_format("auto", stream) == "console"
        assert choose_format("json", stream) == "json"
        assert choose_format("auto", file) == "json"
        status = os.fstat(file.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
        assert choose_format("auto", file) == "journald"
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino + 1}")
        assert choose_format("auto", file) == "json"


JOURNAL = """
import os, socket, subprocess, sys
subprocess.run(["mount", "-t", "tmpfs", "journal", "/run"], check=True)
os.makedirs("/run/systemd/journal")
journal = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
journal.bind("/run/systemd/journal/socket")
subprocess.run([sys.executable, "-c", sys.argv[1], "journald", "info"], check=True)
for _ in range(2):
    print(journal.recv(65536).hex())
"""


@pytest.mark.root
def test_journal_gets_each_fact_as_a_field() -> None:
    argv = ["unshare", "--mount", sys.executable, "-c", JOURNAL, LOG]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60)
    first, second = (bytes.fromhex(line) for line in done.stdout.splitlines())
    fields = first.splitlines()
    assert b"CONTAINER=web1" in fields
    assert b"OP=umount2" in fields
    assert b"PRIORITY=6" in fields
    assert b"SYSLOG_IDENTIFIER=interceptor" in fields
    assert rb"MESSAGE=copy removed container=web1 op=umount2 path=/x\xff" in fields
    assert b"PRIORITY=3" in second.splitlines()
    assert b"ZeroDivisionError" in second


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> socket.socket:
    """A socket where a service manager would listen."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listening.settimeout(30)
    path = str(tmp_path / "notify")
    listening.bind(path)
    monkeypatch.setenv("NOTIFY_SOCKET", path)
    return listening


def test_without_a_service_manager_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert systemd.ready("up") is False


def test_readiness_and_end_are_told(manager: socket.socket) -> None:
    with manager:
        assert systemd.ready("guarding 2 containers")
        assert manager.recv(1000) == b"READY=1\nSTATUS=guarding 2 containers"
        assert systemd.stopping()
        assert manager.recv(1000) == b"STOPPING=1"


def test_abstract_socket_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.settimeout(30)
        listening.bind("\0interceptor-test")
        monkeypatch.setenv("NOTIFY_SOCKET", "@interceptor-test")
        assert systemd.stopping()
        assert listening.recv(1000) == b"STOPPING=1"
