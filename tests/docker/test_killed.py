"""A shim that is killed: nothing of its container stays, neither mounts nor a range nor a guard."""

from __future__ import annotations

import json
import os
import select
import signal
from pathlib import Path

import pytest

from integration.docker.engine import IMAGE, Docker

pytestmark = [pytest.mark.root, pytest.mark.slow]


def parent_of(pid: int) -> int:
    """Field 4 of proc_pid_stat(5)."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_a_killed_shim_takes_all_of_its_container_with_it(docker: Docker) -> None:
    docker.start("orphan", IMAGE, "sleep", "infinity")
    [container] = docker.daemon.ask("ps")
    pid = int(container["pid"])
    # Who inherits the orphans may be slow to reap them: a pidfd tells of the end itself.
    pidfds = [os.pidfd_open(int(container[name])) for name in ("pid", "guard_pid", "envoy_pid")]
    shim = parent_of(pid)
    assert Path(f"/proc/{shim}/comm").read_text().startswith("containerd-shim")
    os.kill(shim, signal.SIGKILL)
    docker("wait", "orphan")
    docker("rm", "-f", "orphan")
    for fd in pidfds:
        ended, _, _ = select.select([fd], [], [], 10)
        os.close(fd)
        assert ended
    assert docker.daemon.ask("ps") == []
    assert json.loads((docker.daemon.directory / "state/reservations.json").read_text()) == []
    assert not [point for point in docker.mounts() if "merged" in point or "stage" in point]
    assert docker.run(IMAGE, "echo", "again") == "again\n"
