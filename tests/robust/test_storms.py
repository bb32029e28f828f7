"""A program in a loop: what the operator hears of it."""

from __future__ import annotations

import json

import pytest

from interceptor.library import GuardedChild, Interceptor
from interceptor.observe.units import unit_in
from tests import guarded as inside
from tests.robust.support import eventually

EVENT = "a call is repeated without effect"


def _told(daemon: Interceptor) -> list[dict[str, object]]:
    lines = (json.loads(line) for line in daemon.log_path.read_text().splitlines() if line.startswith("{"))
    return [line for line in lines if line.get("event") == EVENT]


def _storm(path: bytes, calls: int) -> None:
    for _ in range(calls):
        inside.try_umount(path)


@pytest.mark.root
def test_a_call_that_is_repeated_without_effect_is_told_of_once(
    daemon: Interceptor, child: GuardedChild
) -> None:
    for _ in range(3):
        child.call(_storm, b"/proc/sys", 2000)
    eventually(lambda: bool(_told(daemon)), "the storm is told of")
    (told,) = _told(daemon)
    assert (told["container"], told["op"], told["path"]) == (child.cid, "umount", "/proc/sys")
    assert isinstance(told["calls"], int)
    assert told["calls"] >= 100


@pytest.mark.root
def test_calls_that_have_an_effect_are_not_told_of(daemon: Interceptor, child: GuardedChild) -> None:
    def body() -> None:
        for _ in range(300):
            assert inside.try_mount(b"own", b"/mnt", b"tmpfs") == 0
            assert inside.try_umount(b"/mnt") == 0

    child.call(body)
    child.call(_storm, b"/proc/uptime", 20)
    assert _told(daemon) == []


@pytest.mark.parametrize(
    ("cgroups", "unit"),
    [
        ("0::/system.slice/e2scrub_reap.service\n", "e2scrub_reap.service"),
        ("4:cpu:/\n0::/docker/web/init.scope\n", "init.scope"),
        ("0::/a.service/payload/b.service/x\n", "b.service"),
        ("0::/\n", "-"),
        ("", "-"),
    ],
)
def test_the_unit_is_the_innermost_one(cgroups: str, unit: str) -> None:
    assert unit_in(cgroups) == unit
