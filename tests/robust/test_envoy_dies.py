"""kill -9 of a container's envoy: another one is there at once, with or without a daemon in between."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from interceptor.library import GuardedChild, Interceptor
from tests.robust.support import eventually, family, has_ended, kill

pytestmark = pytest.mark.root

KILLS = 5
OUTAGE_S = 1.0
REAL = "/proc/sys/net/ipv4/ip_default_ttl"


@pytest.fixture
def daemon() -> Iterator[Interceptor]:
    with Interceptor() as running:
        yield running


def envoy_of(daemon: Interceptor, child: GuardedChild) -> int:
    (known,) = [c for c in daemon.request("ps") if c["id"] == child.cid]
    return int(known["envoy_pid"])


def write_and_read(value: str) -> str:
    """Through the envoy in any case: a write."""
    Path(REAL).write_text(value)
    return Path(REAL).read_text()


def test_a_killed_envoy_is_replaced_within_a_second(daemon: Interceptor) -> None:
    with daemon.spawn() as child, daemon.spawn() as other:
        untouched = envoy_of(daemon, other)
        for number in range(KILLS):
            before = envoy_of(daemon, child)
            kill(before)
            killed = time.monotonic()
            assert child.run(_until_it_works, str(50 + number)).value == f"{50 + number}\n"
            assert time.monotonic() - killed < OUTAGE_S + 1  # and a process in the container
            eventually(lambda before=before: envoy_of(daemon, child) not in (0, before), "another")  # type: ignore[misc]
        assert child.run(os.listdir, "/sys/devices/virtual/net").value == ["lo"]
        assert envoy_of(daemon, other) == untouched


def _until_it_works(value: str) -> str:
    end = time.monotonic() + 30
    while True:
        try:
            return write_and_read(value)
        except OSError:
            if time.monotonic() > end:
                raise


def test_an_envoy_that_died_without_a_daemon_is_replaced_by_the_next(daemon: Interceptor) -> None:
    with daemon.spawn() as child:
        before = envoy_of(daemon, child)
        assert child.run(write_and_read, "60").value == "60\n"
        daemon.kill()
        kill(before)
        daemon.start()
        assert child.run(_until_it_works, "61").value == "61\n"
        eventually(lambda: envoy_of(daemon, child) not in (0, before), "another")
        # And that one is known to whoever comes next: the view as well as the daemon.
        kill(family(daemon).standing["view"])
        assert child.run(_until_it_works, "62").value == "62\n"


def test_the_successor_ends_with_its_container(daemon: Interceptor) -> None:
    child = daemon.spawn()
    before = envoy_of(daemon, child)
    os.kill(before, signal.SIGKILL)
    eventually(lambda: envoy_of(daemon, child) not in (0, before), "another")
    after = envoy_of(daemon, child)
    child.close()
    assert has_ended(after)
