"""One guarded systemd container for all tests of this directory, kept by a process of its own: its mounts are there."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from integration.containers.toolbox import Box

#: A root filesystem may have to be made first, with 250 packages in it.
BOOT_SECONDS = 1200
SECONDS = 60

#: f_type of statfs(2) as ``stat -f -c %t`` prints it: of the view, and of shields.
FUSE, TMPFS = "65735546", "1021994"


@dataclass(frozen=True)
class Toolbox:
    """The container, entered by ``runc exec``: under its filter, with a listener of its own."""

    box: Box

    def try_(self, *argv: str, stdin: str = "", user: str = "root") -> subprocess.CompletedProcess[str]:
        """Run a program inside."""
        # Its systemd waits for nobody's readiness but its own services'; nor may runc take it for a service's.
        inside = ["env", "-u", "NOTIFY_SOCKET"]
        if user != "root":
            inside += ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups"]
        command = ["runc", "--root", self.box.state, "exec", self.box.id, *inside, *argv]
        return subprocess.run(
            command, input=stdin, capture_output=True, text=True, check=False, timeout=SECONDS
        )

    def run(self, *argv: str, stdin: str = "", user: str = "root") -> str:
        """The same; it must succeed."""
        done = self.try_(*argv, stdin=stdin, user=user)
        assert done.returncode == 0, f"{shlex.join(argv)}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def sh(self, script: str, *wrap: str, user: str = "root") -> str:
        """A shell script that must succeed, below the words of ``wrap``."""
        return self.run(*wrap, "sh", "-euc", script, user=user)

    def mounts(self) -> list[str]:
        """Mount points of the container's own mount namespace."""
        return sorted(line.split()[4] for line in self.run("cat", "/proc/1/mountinfo").splitlines())

    def interceptor(self, *arguments: str) -> object:
        """What the command line tells of it."""
        argv = [sys.executable, "-m", "interceptor", *arguments, "--config", self.box.config, "--json"]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=SECONDS)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture(scope="session")
def started() -> Iterator[Toolbox]:
    argv = [sys.executable, "-m", "integration.containers.toolbox"]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line, "the toolbox did not start; its words are above"
        yield Toolbox(Box(**json.loads(line)))
    finally:
        process.stdin.close()
        assert process.wait(SECONDS) == 0
        process.stdout.close()


@pytest.fixture
def toolbox(started: Toolbox) -> Iterator[Toolbox]:
    """The container; afterwards its mounts must be as before, its originals in place, its daemon's log clean."""
    before = started.mounts()
    with open(started.box.log) as log:
        log.seek(0, 2)
        yield started
        words = log.read()
    assert started.mounts() == before
    rows = started.interceptor("mounts", started.box.id)
    assert isinstance(rows, list)
    lost = [row["path"] for row in rows if not row["present"] and row["class"].startswith("original")]
    assert lost == []
    assert '"level": "error"' not in words and '"level": "warning"' not in words, words
