"""What the keeper forks, without a keeper: the rest is in tests/robust/."""

from __future__ import annotations

import subprocess
import sys

#: On one processor children often end before their parent goes on; the kernel reaps them, as for the keeper.
MANY = """
import os, signal
from interceptor.guards.spawner import _fork
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
for _ in range(400):
    _, pidfd = _fork(lambda: os._exit(0))
    os.close(pidfd)
"""


def test_a_child_that_ends_at_once_has_a_pidfd() -> None:
    done = subprocess.run([sys.executable, "-c", MANY], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
