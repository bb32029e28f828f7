"""Daemons for tests that harm them: each test gets its own, and is asked what it left behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from interceptor.library import GuardedChild, Interceptor
from interceptor.spawn.create import spawn


@pytest.fixture
def daemon(leak_check: None) -> Iterator[Interceptor]:
    """A daemon of this test's own: it may be killed."""
    with Interceptor(question_timeout=60.0) as running:
        yield running


@pytest.fixture
def child(daemon: Interceptor) -> Iterator[GuardedChild]:
    """An idle container of that daemon."""
    with daemon.spawn() as running:
        yield running


@pytest.fixture(scope="module")
def _shared_daemon() -> Iterator[Interceptor]:
    with Interceptor() as running:
        with running.spawn() as used:
            used.run(["true"])
        yield running


@pytest.fixture
def real_daemon(_shared_daemon: Interceptor) -> Iterator[Interceptor]:
    """One daemon for all tests of a module, which must survive each of them."""
    yield _shared_daemon
    assert _shared_daemon.is_running, _shared_daemon.log_path.read_text()[-4000:]


@pytest.fixture
def unguarded() -> Iterator[GuardedChild]:
    """The same container without filter and welds: what the kernel alone does."""
    with spawn(None, None) as running:
        yield running
