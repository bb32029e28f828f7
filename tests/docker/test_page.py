"""README.md's page for Docker, executed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from integration.docker.page import commands

ROOT = Path(__file__).resolve().parent.parent.parent
SECONDS = 300


def test_the_page_has_ten_lines() -> None:
    assert len(commands()) <= 10


@pytest.mark.root
@pytest.mark.slow
def test_the_page_does_what_it_says() -> None:
    argv = [sys.executable, "-m", "integration.docker.page"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False, timeout=SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the original stays" in done.stdout
    # `interceptor ps` names the container, `docker commit` the image.
    assert "sha256:" in done.stdout.strip().splitlines()[-1]
