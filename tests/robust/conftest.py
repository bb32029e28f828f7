"""Daemons for tests that harm them: each test gets its own, and is asked what it left behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from interceptor.library import GuardedChild, Interceptor


@pytest.fixture
def daemon(leak_check: None) -> Iterator[Interceptor]:
    """A daemon of this test's own: it may be killed."""
    with Interceptor(log_level="info", question_timeout=60.0) as running:
        yield running


@pytest.fixture
def child(daemon: Interceptor) -> Iterator[GuardedChild]:
    """An idle container of that daemon."""
    with daemon.spawn() as running:
        yield running
