"""README.md's pages for managers of containers, executed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from integration.pages.managers import MANAGERS
from integration.pages.shell import commands

ROOT = Path(__file__).resolve().parent.parent.parent
SECONDS = 300


@pytest.mark.parametrize("name", MANAGERS)
def test_the_page_has_ten_lines(name: str) -> None:
    assert len(commands(name)) <= 10


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.parametrize("name", MANAGERS)
def test_the_page_does_what_it_says(name: str) -> None:
    argv = [sys.executable, "-m", "integration.pages", name]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False, timeout=SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    # What `sh` says, beside the command itself.
    lines = done.stdout.splitlines()
    assert "the original stays" in lines
    # `interceptor ps` has a container.
    head = next(number for number, line in enumerate(lines) if "guard pid" in line)
    assert lines[head + 1].split()[1].isdecimal()
