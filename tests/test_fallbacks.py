"""Every mechanism that has a fallback is taken away in turn, and all of them at once; everything works as before."""

from __future__ import annotations

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


@pytest.mark.slow
@pytest.mark.parametrize("names", [*([name] for name in ALL), ALL], ids=lambda names: "+".join(names[:2]))
def test_without(names: list[str], tmp_path: Path) -> None:
    # A process of its own: the filter cannot be taken off again.
    argv = [sys.executable, "-m", "tests.without", *names]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]


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
