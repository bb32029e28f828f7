"""Every mechanism that has a fallback is taken away in turn, and all of them at once; everything works as before."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from interceptor.kernel.features import probe
from tests.test_quality import ROOT
from tests.test_readme import ARCHITECTURE, rows, section
from tests.without import REFUSALS

pytestmark = pytest.mark.root

ALL = tuple(REFUSALS)
LONG = os.environ.get("INTERCEPTOR_LONG") == "1"


LONGER = ("tests/test_explain.py", "tests/robust/test_guard_dies.py") if LONG else ()

#: What is tried beyond tests/fidelity, where a fallback makes a difference that this does not show: mechanisms, tests.
#: Not where the test itself, in the container, has no procfs to read mountinfo from: in a chroot, or without its /proc.
BEYOND: dict[str, tuple[list[str], list[str]]] = {
    "two steps under signals": (
        ["SECCOMP_ADDFD_FLAG_SEND"],
        [
            *("tests/test_new_api.py", "tests/robust/test_exactly_once.py", "-k"),
            "test_new_api or (storm_of_signals_counts_once and move_mount)",
        ],
    ),
    "mountinfo in attacks": (
        ["statmount, listmount"],
        [
            "tests/attacks/test_spellings.py",
            "tests/attacks/test_lazy.py",
            "-k",
            "real and (plain or unshare)",
        ],
    ),
    # Old roots are beneath the root, and so not in mountinfo: then guards ask.
    "mountinfo in a life": (
        ["statmount, listmount"],
        ["tests/robust/test_own_mounts.py", *LONGER, "-k", "not without_a_question"],
    ),
    "mount(2) for attributes": (
        ["mount_setattr"],
        [
            *("tests/attacks/test_readonly.py", "tests/robust/test_own_mounts.py"),
            *("tests/robust/test_runtime_mounts.py", "-k", "not attacks or (real and (plain or unshare))"),
        ],
    ),
    "namespaces by inode number": (["statmount in another namespace"], ["tests/test_explain.py"]),
}


def _under(names: list[str], *command: str) -> None:
    # A process of its own: the filter cannot be taken off again.
    argv = [sys.executable, "-m", "tests.without", *names, *command]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("names", [*([name] for name in ALL), ALL], ids=lambda names: "+".join(names[:2]))
def test_without(names: list[str]) -> None:
    _under(names)


@pytest.mark.slow
@pytest.mark.parametrize("what", BEYOND)
def test_beyond_what_scripts_show(what: str, tmp_path: Path) -> None:
    names, tests = BEYOND[what]
    # With mounts of their own: some look for those that were left behind.
    pytest_alone = [
        "unshare",
        "--mount",
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--basetemp={tmp_path}",
    ]
    _under(names, "--", *pytest_alone, *tests)


def test_each_fallback_is_forced() -> None:
    assert {feature.name for feature in probe() if not feature.needed} == set(ALL)


def test_the_architecture_has_a_row_for_each_mechanism() -> None:
    """With the version that brought it, and what is done without."""
    table = {
        row[0].strip(" `"): [cell.strip() for cell in row[1:]]
        for row in rows(section(ARCHITECTURE, "Mechanisms"))
    }
    features = probe()
    assert list(table) == [feature.name for feature in features]
    for feature in features:
        since, without, test = table[feature.name]
        assert since == feature.minimum
        assert without.startswith("needed") is feature.needed, feature.name
        assert (test == "–") is feature.needed, feature.name
