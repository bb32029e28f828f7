"""Every combination of the tables, in identical containers: only what is meant differs (I4)."""

from __future__ import annotations

from pathlib import Path

import pytest

from interceptor.library import Interceptor
from tests.fidelity.differences import MEANT, table
from tests.fidelity.stage import CONTEXTS
from tests.fidelity.tables import FREE, OURS, free_differences, plays, survey

pytestmark = pytest.mark.root

README = Path(__file__).resolve().parents[2] / "README.md"


def _mark(context: str) -> list[pytest.MarkDecorator]:
    """The sanitized run has time for one context."""
    return [] if context == "root" else [pytest.mark.slow]


@pytest.mark.parametrize(
    ("context", "name"),
    [
        pytest.param(context, name, marks=_mark(context))
        for context in CONTEXTS
        for name in plays(FREE, context)
    ],
)
def test_what_is_the_container_s_own_business_is_the_kernel_s_answer(
    real_interceptor: Interceptor, context: str, name: str
) -> None:
    differences = free_differences(real_interceptor, context, name)
    assert not differences, "\n".join(map(str, differences[:10]))


@pytest.mark.parametrize(
    ("context", "name"),
    [
        pytest.param(context, name, marks=_mark(context))
        for context in CONTEXTS
        if context != "root"
        for name in plays(OURS, context)
    ],
)
def test_procfs_and_sysfs_differ_only_as_meant(
    real_interceptor: Interceptor, context: str, name: str
) -> None:
    found = survey(real_interceptor, context, [name])
    assert not found.defects, "\n".join(map(str, found.defects[:10]))


def test_the_readme_lists_the_differences_that_occur(real_interceptor: Interceptor) -> None:
    found = survey(real_interceptor, "root")
    assert not found.defects, "\n".join(map(str, found.defects[:10]))
    assert [meant.request for meant in found.rows()] == [meant.request for meant in MEANT]
    assert table(found.rows()) in README.read_text()
