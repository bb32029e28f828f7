"""`interceptor top` and `interceptor events`: what operators see of calls, and that it costs containers nothing."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import select
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from integration.storm.contestants import Caller, compiled, mounts_with
from integration.storm.crowd import STORM_CALLS
from integration.storm.workloads import DENIED
from interceptor.cli.events import line_of, wanted
from interceptor.cli.top import facts_of, histograms, ordered
from interceptor.client import follow
from interceptor.control import Stream, start_control_server
from interceptor.errors import InterceptorError
from interceptor.guards.journal import Seen
from interceptor.library import GuardedChild, Interceptor
from interceptor.observe.feed import REPEATED_MAX_S, WAITING_MAX, Event, Feed, Follower, Repetitions
from interceptor.sockets import RootServer
from interceptor.watch import LOOK_S, _Notes
from tests.conftest import Serve

#: Seconds that anything here may take.
PATIENCE = 30.0

# ---- feed ----------------------------------------------------------------------------------------------------


def test_a_reader_that_does_not_keep_up_loses_events_and_is_told_how_many() -> None:
    async def body() -> list[Event]:
        follower = Follower()
        for n in range(WAITING_MAX + 5):
            follower.put({"event": "call", "n": n})
        found: list[Event] = []
        async for event in follower.events():
            found.append(event)
            if event["event"] == "dropped":
                follower.put({"event": "call", "n": -1})
            if event.get("n") == -1:
                break
        return found

    found = asyncio.run(body())
    assert [event.get("n") for event in found] == [*range(WAITING_MAX), None, -1]
    assert found[WAITING_MAX] == {"event": "dropped", "count": 5}


def test_the_feed_is_on_while_somebody_follows() -> None:
    async def body() -> list[bool]:
        changes: list[bool] = []
        feed = Feed(changes.append)
        feed.publish({"event": "lost on nobody"})
        one, two = feed.follow(), feed.follow()
        waiting = [asyncio.ensure_future(anext(f)) for f in (one, two)]
        await asyncio.sleep(0)  # sleep: no time passes, both begin to wait
        assert len(feed) == 2
        feed.publish({"event": "x"})
        assert [await w for w in waiting] == [{"event": "x"}] * 2
        await one.aclose()
        assert changes == [True]
        await two.aclose()
        return changes

    assert asyncio.run(body()) == [True, False]


def test_what_repeats_is_told_at_once_and_then_ever_more_rarely_with_counts() -> None:
    repetitions = Repetitions()
    told: list[tuple[float, object]] = []
    for tenth in range(400):
        now = tenth / 10
        if first := repetitions.add("key", {"event": "call"}, 1, now):
            told.append((now, first["count"]))
        told += [(now, event["count"]) for event in repetitions.due(now)]
    assert told[:3] == [(0.0, 1), (1.0, 10), (3.0, 20)]
    pauses = [b[0] - a[0] for a, b in itertools.pairwise(told)]
    assert pauses[-1] == pytest.approx(REPEATED_MAX_S)
    # Nothing is lost on the way.
    held_back = 400 - sum(int(str(count)) for _, count in told)
    assert 0 <= held_back <= REPEATED_MAX_S * 10


def test_what_has_ended_is_news_when_it_comes_again() -> None:
    repetitions = Repetitions()
    assert repetitions.add("key", {}, 1, 0.0) == {"count": 1}
    assert repetitions.due(5.0) == []
    assert repetitions.add("key", {}, 2, 5.0) == {"count": 2}


def row(version: int, count: int) -> Seen:
    return Seen(version, count, 7, "umount", "denied", 16, b"/proc", "-", "umount", "")


def test_only_what_is_new_in_a_guards_notes_counts() -> None:
    notes = _Notes()
    assert notes.fresh({0: row(1, 5), 1: row(2, 1)}) == [(row(1, 5), 5), (row(2, 1), 1)]
    assert notes.fresh({0: row(1, 8), 1: row(2, 1)}) == [(row(1, 8), 3)]
    # Another row in the same place, that happens to have counted as much.
    assert notes.fresh({0: row(3, 8)}) == [(row(3, 8), 8)]


# ---- lines ---------------------------------------------------------------------------------------------------

CALL = {
    "event": "call",
    "container": "web",
    "operation": "umount",
    "verdict": "denied",
    "errno": 16,
    "path": "/proc",
    "unit": "a.service",
    "comm": "umount",
    "tid": 7,
    "reason": "",
    "count": 3,
}


def test_a_line_has_caller_unit_path_and_verdict() -> None:
    assert line_of(CALL)[10:] == "web  umount[7] of a.service  umount /proc  denied EBUSY ×3"


def test_a_containers_names_cannot_move_the_terminals_cursor() -> None:
    evil = "\x1b[2J\udcff\n"
    line = line_of({**CALL, "path": evil, "comm": evil, "unit": evil})
    assert line.isprintable()


@pytest.mark.parametrize(
    "event",
    [
        {"event": "dropped", "count": 3},
        {"event": "missed", "container": "web", "count": 3},
        {"event": "container", "container": "web", "what": "gone", "reason": "poststop"},
        {
            "event": "repeated",
            "container": "web",
            "op": "umount",
            "path": None,
            "calls": 9,
            "unit": "-",
            "hint": "x",
        },
    ],
)
def test_every_event_has_a_line(event: dict[str, Any]) -> None:
    line = line_of(event)
    assert re.match(r"\d\d:\d\d:\d\d  \S", line)
    assert str(event.get("count", "")) in line


def test_what_is_not_asked_for_is_left_out_but_losses_never_are() -> None:
    assert wanted(CALL, (), ())
    assert wanted(CALL, ("web",), ("denied", "handled"))
    assert not wanted(CALL, ("db",), ())
    assert not wanted(CALL, (), ("handled",))
    assert wanted({"event": "dropped", "count": 1}, ("db",), ("handled",))
    assert wanted({"event": "container", "container": "web", "what": "gone"}, (), ("handled",))


# ---- top's arithmetic ------------------------------------------------------------------------------------------


def container(cid: str, calls: int, cached: int = 0) -> dict[str, Any]:
    counts = [[40, calls]] if calls else []
    return {
        "id": cid,
        "calls": [["umount", "denied", calls * 1000, counts]],
        "asked": 1,
        "cached": cached,
        "missed": 1,
        "waiting": 2,
    }


def test_rates_are_of_what_was_called_in_between() -> None:
    before = {"containers": {"web": container("web", 100, 50)}}
    now = {
        "containers": {
            "web": container("web", 300, 250),
            "new": container("new", 10),
            "idle": container("idle", 0),
        }
    }
    facts = facts_of(before, now, 2.0)
    assert {r["container"]: r["calls_per_second"] for r in facts["rows"]} == {"web": 100.0, "new": 5.0}
    assert facts["cache_hits_per_second"] == 100.0
    assert (facts["questions_waiting"], facts["containers"], facts["calls_per_second"]) == (6, 3, 105.0)
    assert all(r["p50_us"] == r["p99_us"] == pytest.approx(9.216) for r in facts["rows"])


def test_a_container_that_was_made_anew_begins_from_nothing() -> None:
    then, now = histograms(container("web", 100)), histograms(container("web", 10))
    key = ("umount", "denied")
    assert now[key].since(then[key]).count == 10


def test_rows_are_in_the_order_asked_for() -> None:
    rows = [
        {
            "container": c,
            "operation": o,
            "verdict": "denied",
            "calls_per_second": n,
            "p50_us": -n,
            "p99_us": 1,
        }
        for c, o, n in (("b", "umount", 1), ("a", "umount", 2), ("a", "mount", 3))
    ]
    assert [r["calls_per_second"] for r in ordered(rows, "calls")] == [3, 2, 1]
    assert [r["calls_per_second"] for r in ordered(rows, "p50")] == [1, 2, 3]
    assert next((r["container"], r["operation"]) for r in ordered(rows, "container")) == ("a", "mount")
    assert [r["operation"] for r in ordered(rows, "operation")] == ["mount", "umount", "umount"]


# ---- streams over the control socket ------------------------------------------------------------------------------


def test_a_stream_ends_with_its_client_and_makes_nobody_else_wait(serve: Serve, tmp_path: Path) -> None:
    path = str(tmp_path / "control.sock")
    changes: list[bool] = []
    feeds: list[Feed] = []

    async def handler(message: dict[str, object]) -> object:
        if message["op"] == "events":
            return Stream(feeds[0].follow())
        # As large as an event may be: the stalled reader's socket is soon full.
        for n in range(3 * WAITING_MAX):
            feeds[0].publish({"event": "call", "n": n, "filler": "x" * 1000})
        return len(feeds[0])

    async def make() -> RootServer:
        feeds.append(Feed(changes.append))
        return await start_control_server(path, handler)

    serve(make)
    with closing(socket.socket(socket.AF_UNIX)) as stalled:
        stalled.connect(path)
        stalled.sendall(b'{"op": "events"}\n')
        lines = stalled.makefile("rb")
        assert json.loads(lines.readline()) == {"ok": True, "result": "following"}
        assert ask(path, "publish") == 1
        assert ask(path, "publish") == 1
        events = (json.loads(line) for line in lines)
        seen: list[dict[str, Any]] = []
        for event in events:
            seen.append(event)
            if event["event"] == "dropped":
                break
        assert len(seen) < 4 * WAITING_MAX
        assert seen[-1]["count"] + len(seen) - 1 == 6 * WAITING_MAX
        lines.close()
    while not changes or changes[-1]:
        assert ask(path, "publish") in (0, 1)
    assert changes == [True, False]


def ask(path: str, op: str) -> object:
    from interceptor.client import request

    return request(path, {"op": op}, PATIENCE)


# ---- with a daemon -------------------------------------------------------------------------------------------


class Following:
    """What a command of ours tells, line by line."""

    def __init__(self, out: int) -> None:
        self._out = out
        self._buffered = bytearray()

    def has_more(self, seconds: float) -> bool:
        """Whether there is something to read within that time."""
        return b"\n" in self._buffered or bool(select.select([self._out], [], [], seconds)[0])

    def __call__(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The next event for which the condition says yes."""
        while not condition(event := self.next()):
            pass
        return event

    def next(self) -> dict[str, Any]:
        """The next event."""
        while b"\n" not in self._buffered:
            assert self.has_more(PATIENCE), "no event"
            data = os.read(self._out, 65536)
            assert data, "the command has ended"
            self._buffered.extend(data)
        one, _, rest = bytes(self._buffered).partition(b"\n")
        self._buffered[:] = rest
        event = json.loads(one)
        assert isinstance(event, dict)
        return event


@contextmanager
def events_of(daemon: Interceptor, child: GuardedChild) -> Iterator[Following]:
    """What ``events --follow`` tells, from the moment on at which calls of the child are among it."""
    argv = [sys.executable, "-u", "-m", "interceptor", "events", "--follow", "--json"]
    argv += ["--config", str(daemon.directory / "config.toml")]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        following = Following(process.stdout.fileno())
        try:
            deadline = time.monotonic() + PATIENCE
            while not (following.has_more(LOOK_S) and call("/proc/uptime")(following.next())):
                assert time.monotonic() < deadline, "calls are made, and not told"
                child.run(["umount", "/proc/uptime"])
            yield following
        finally:
            process.terminate()


def call(path: str) -> Callable[[dict[str, Any]], bool]:
    return lambda event: event["event"] == "call" and event["path"] == path


@pytest.mark.root
def test_decisions_are_told_with_caller_path_and_verdict() -> None:
    with Interceptor() as daemon, daemon.spawn() as child, events_of(daemon, child) as following:
        child.run(["mount", "-t", "proc", "proc", "/mnt"])
        made = following(call("/mnt"))
        assert (made["operation"], made["verdict"], made["comm"]) == ("mount", "handled", "mount")
        assert made["container"] == child.cid
        child.run(["umount", "-l", "/proc"])
        denied = following(call("/proc"))
        assert (denied["operation"], denied["verdict"], denied["errno"]) == ("umount_lazy", "denied", 16)
        child.run(["umount", "/nowhere"])
        assert following(call("/nowhere"))["reason"] == "a path that does not resolve"
        # A container that comes while somebody follows, and a guard that is replaced, are followed too.
        with daemon.spawn() as other:
            assert following(lambda e: e.get("what") == "registered")["container"] == other.cid
            (guard,) = (int(c["guard_pid"]) for c in daemon.request("ps") if c["id"] == other.cid)
            os.kill(guard, 9)
            other.run(["umount", "/nothing"])
            assert following(call("/nothing"))["container"] == other.cid
        assert following(lambda e: e.get("what") == "gone")["container"] == other.cid


@pytest.mark.root
def test_a_storm_is_few_lines_with_counts_that_add_up() -> None:
    calls = 20_000
    with (
        compiled() as program,
        Interceptor() as daemon,
        daemon.spawn(mounts=mounts_with(program)) as child,
        events_of(daemon, child) as following,
    ):
        caller = Caller(child, "none")
        try:
            caller.run(DENIED, calls)
        finally:
            caller.close()
        lines = told = 0
        while told < calls:
            event = following(lambda e: e.get("path") == "/proc/sys" or e["event"] in ("missed", "repeated"))
            if event["event"] == "repeated":
                assert "see why" in event["hint"]
                continue
            lines += 1
            told += event["count"]
        assert told == calls
        assert lines < 12


@pytest.mark.root
def test_nobody_notes_and_nobody_wakes_up_when_nobody_follows() -> None:
    def noted(child: GuardedChild) -> int:
        return int(daemon.request("stats", id=child.cid)["noted"])

    with Interceptor() as daemon, daemon.spawn() as child:
        with events_of(daemon, child):
            pass
        seen = noted(child)
        assert seen > 0
        # The client has hung up; the daemon hears of it, and tells the guard.
        while True:
            before = noted(child)
            child.run(["umount", "/proc/uptime"])
            if noted(child) == before:
                break
        # A timer that goes on would wake it up again and again; what is under way ends.
        deadline = time.monotonic() + PATIENCE
        before, now = 0, switches(daemon.pid)
        while before != now:
            assert time.monotonic() < deadline, "the daemon goes on looking"
            time.sleep(4 * LOOK_S)  # sleep: the time in which nothing must happen
            before, now = now, switches(daemon.pid)


def switches(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "interceptor", *arguments]
    return subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE, check=False)


@pytest.mark.root
def test_top_counts_what_is_called_between_two_looks() -> None:
    with compiled() as program, Interceptor() as daemon, daemon.spawn(mounts=mounts_with(program)) as child:
        config = str(daemon.directory / "config.toml")
        caller = Caller(child, "none")
        try:
            caller.begin(DENIED, STORM_CALLS)
            done = run("top", "--once", "--json", "--interval", "0.5", "--config", config)
            shown = run("top", "--once", "--interval", "0.5", "--config", config)
        finally:
            caller.close()
        facts = json.loads(done.stdout)
        (only,) = facts["rows"]
        assert (only["container"], only["operation"], only["verdict"]) == (child.cid, "umount", "continued")
        assert only["calls_per_second"] == facts["calls_per_second"] > 100
        assert 0 < only["p50_us"] <= only["p99_us"]
        assert facts["cache_hits_per_second"] > 100
        assert child.cid in shown.stdout
        assert "questions wait for the daemon" in shown.stdout


def test_top_without_a_daemon_says_so(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(f"runtime_dir = {json.dumps(str(tmp_path))}\n")
    for arguments in (("top", "--once"), ("top",), ("events", "--follow")):
        done = run(*arguments, "--config", str(config))
        assert done.returncode == 1
        assert "no daemon listens there" in done.stderr


@pytest.mark.root
def test_top_waits_for_a_daemon_that_went_away(tmp_path: Path) -> None:
    with Interceptor() as daemon, daemon.spawn() as child:
        argv = [sys.executable, "-u", "-m", "interceptor", "top", "--json", "--interval", "0.2"]
        argv += ["--config", str(daemon.directory / "config.toml")]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            lines = (json.loads(line) for line in process.stdout)
            assert next(lines)["containers"] == 1
            daemon.kill()
            assert "no daemon listens" in next(facts for facts in lines if "away" in facts)["away"]
            daemon.start()
            assert next(facts for facts in lines if "away" not in facts)["containers"] == 1
            process.terminate()
        assert child.run(["true"]).returncode == 0


def test_events_that_end_with_the_daemon_are_no_success(serve: Serve, tmp_path: Path) -> None:
    async def nothing() -> AsyncGenerator[Event, None]:
        yield {"event": "container", "container": "web", "what": "registered"}

    async def handler(_message: dict[str, object]) -> object:
        return Stream(nothing())

    async def make() -> RootServer:
        return await start_control_server(str(tmp_path / "control.sock"), handler)

    serve(make)
    config = tmp_path / "config.toml"
    config.write_text(f"runtime_dir = {json.dumps(str(tmp_path))}\n")
    done = run("events", "--follow", "--config", str(config))
    assert "web  registered" in done.stdout
    assert done.returncode == 1
    assert "the daemon has ended" in done.stderr


def test_a_refusal_of_a_stream_is_an_error(serve: Serve, tmp_path: Path) -> None:
    path = str(tmp_path / "control.sock")

    async def handler(_message: dict[str, object]) -> object:
        raise InterceptorError("not today")

    async def make() -> RootServer:
        return await start_control_server(path, handler)

    serve(make)
    with pytest.raises(InterceptorError, match="not today"):
        next(follow(path, {"op": "events"}, PATIENCE))
