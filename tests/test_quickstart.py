"""The main job on real input: the quickstart itself, with a real systemd container on stock runc."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from integration.containers import cgroups
from integration.containers.facts import STORM

pytestmark = [pytest.mark.root, pytest.mark.slow]

QUICKSTART = Path(__file__).parent.parent / "integration/quickstart"
MOST_SECONDS = 600  # the root filesystem may have to be made first


Run = tuple[subprocess.CompletedProcess[str], dict[str, Any]]


def traces() -> set[str]:
    """Return what a quickstart makes on the host: its directories, cgroups and mounts."""
    directories = [str(path) for path in Path("/run").glob("interceptor-quickstart-*")]
    groups = [str(path) for path in cgroups.find().glob("quickstart-*")]
    mounts = [
        line
        for line in Path("/proc/self/mountinfo").read_text().splitlines()
        if "interceptor-quickstart-" in line
    ]
    return {*directories, *groups, *mounts}


@pytest.fixture(scope="module")
def before() -> set[str]:
    return traces()


@pytest.fixture(scope="module")
def run(before: set[str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    file = tmp_path_factory.mktemp("quickstart") / "facts.json"
    argv = [str(QUICKSTART), "--no-install", "--show-the-bug", "--json", str(file)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=MOST_SECONDS)
    print(done.stdout, done.stderr)
    return done, json.loads(file.read_text()) if file.exists() else {}


def test_every_line_of_the_table_is_good(run: Run) -> None:
    done, _ = run
    assert done.returncode == 0, done.stdout + done.stderr
    assert "BAD" not in done.stdout


def test_services_that_used_to_hang_succeed_with_few_umounts(run: Run) -> None:
    _, found = run
    assert {"e2scrub_reap.service", "systemd-logind.service", "interceptor-private.service"} <= set(
        found["services"]
    )
    for name, service in found["services"].items():
        assert service["result"] == "success", name
        assert service["umounts"] is not None, name
        assert service["umounts"] <= STORM, name
    # e2scrub_reap is the reason for the project: a service that unmounts nothing has not walked its copy of /sys.
    assert found["services"]["e2scrub_reap.service"]["umounts"] > 0


def test_copies_go_originals_stay_and_nothing_raw_shows(run: Run) -> None:
    _, found = run
    assert found["copies_removed"] >= 3
    assert found["originals_intact"] is True
    assert found["raw_seen"] == 0


def test_each_kind_of_answer_was_measured(run: Run) -> None:
    _, found = run
    for kind in ("continued", "denied", "handled"):
        latency = found["latency_us"][kind]
        assert 0 < latency["p50"] <= latency["p99"], kind


def test_the_bug_is_a_storm(run: Run) -> None:
    _, found = run
    assert found["bug"]["calls_per_second"] > 100
    assert "e2scrub_reap.service" in found["bug"]["umounts"]


def test_nothing_is_left_behind(run: Run, before: set[str]) -> None:
    assert run
    assert traces() <= before
