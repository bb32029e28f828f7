"""What Prometheus is told, how it is served, and that the dashboard asks for nothing else."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from interceptor.exporter import REQUEST_MAX, answer
from interceptor.guards.journal import Journal
from interceptor.library import Interceptor
from interceptor.observe.exposition import CONTAINERS_MAX, OTHERS, DaemonFigures, Exposition
from interceptor.observe.latency import BUCKETS, OPERATIONS, VERDICTS, Histogram, Reading

FIGURES = DaemonFigures(registrations=3, guard_deaths=1, storms=2, containers=2, guards=2, followers=0)

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def parsed(text: bytes) -> Samples:
    """Every sample by name and labels, as Prometheus' own parser reads them."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def reading(count: int, operation: str = "umount", verdict: str = "denied", bucket: int = 40) -> Reading:
    """Of as many calls of one kind."""
    buckets = [0] * BUCKETS
    buckets[bucket] = count
    return Reading({(operation, verdict): Histogram(count * 9000, buckets)}, cached=count, missed=1)


def calls(samples: Samples) -> dict[str, float]:
    return {
        dict(labels)["container"]: v
        for (name, labels), v in samples.items()
        if name == "interceptor_calls_total"
    }


# ---- the text ------------------------------------------------------------------------------------------------


def test_calls_are_by_container_operation_and_verdict() -> None:
    found = parsed(Exposition().text({"web": reading(7)}, FIGURES))
    labels = (("container", "web"), ("operation", "umount"), ("verdict", "denied"))
    assert found["interceptor_calls_total", labels] == 7
    assert found["interceptor_cache_hits_total", ()] == 7
    assert found["interceptor_guard_deaths_total", ()] == 1


def test_a_histogram_is_cumulative_and_in_seconds() -> None:
    # The first bucket of the octave that begins at 8.192 µs, and one beyond all octaves.
    both = reading(3)
    both.add(reading(2, bucket=BUCKETS - 1))
    found = parsed(Exposition().text({"web": both}, FIGURES))
    below = {
        float(dict(labels)["le"]): value
        for (name, labels), value in found.items()
        if name == "interceptor_call_duration_seconds_bucket" and ("verdict", "denied") in labels
    }
    assert below[8.192e-06] == 0
    assert below[16.384e-06] == 3
    assert below[float("inf")] == 5
    assert list(below.values()) == sorted(below.values())
    assert found["interceptor_call_duration_seconds_sum", (("verdict", "denied"),)] == pytest.approx(5 * 9e-6)


def test_sums_never_fall_when_containers_end() -> None:
    exposition = Exposition()
    exposition.text({"web": reading(7), "db": reading(5)}, FIGURES)
    exposition.ended("web", reading(8))
    found = parsed(exposition.text({"db": reading(5)}, FIGURES))
    assert found["interceptor_cache_hits_total", ()] == 13
    assert found["interceptor_call_duration_seconds_count", (("verdict", "denied"),)] == 13
    assert calls(found) == {"db": 5}


def test_more_containers_share_one_label_and_its_sum_never_falls() -> None:
    exposition = Exposition()
    many = {f"c{n}": reading(1) for n in range(CONTAINERS_MAX + 3)}
    found = calls(parsed(exposition.text(many, FIGURES)))
    assert len(found) == CONTAINERS_MAX + 1
    assert found[OTHERS] == 3
    # A place that becomes free is for new ones: a counter does not move from one series to another.
    for cid in ("c0", f"c{CONTAINERS_MAX}"):
        exposition.ended(cid, many.pop(cid))
    found = calls(parsed(exposition.text({**many, "new": reading(9)}, FIGURES)))
    assert found[OTHERS] == 3
    assert found["new"] == 9
    assert "c0" not in found


def test_a_new_journal_reads_as_nothing() -> None:
    journal = Journal.create("test")
    with journal.fd:
        assert journal.reading() == Reading()
        assert journal.seen() == {}


# ---- the dashboard -------------------------------------------------------------------------------------------


def dashboard() -> dict[str, Any]:
    found = json.loads(resources.files("interceptor.data").joinpath("grafana-dashboard.json").read_text())
    assert isinstance(found, dict)
    return found


def expressions() -> Iterator[str]:
    found = dashboard()
    for panel in found["panels"]:
        yield from (target["expr"] for target in panel["targets"])
    yield from (
        variable["definition"] for variable in found["templating"]["list"] if variable["type"] == "query"
    )


def exported() -> dict[str, set[str]]:
    """Every metric that is exported, with its labels. ``job`` and ``instance`` are Prometheus' own."""
    full = Reading({(o, v): Histogram() for o in OPERATIONS for v in VERDICTS})
    found: dict[str, set[str]] = {}
    for name, labels in parsed(Exposition().text({"web": full}, FIGURES)):
        found.setdefault(name, {"job", "instance"}).update(dict(labels))
    return found


def test_every_metric_of_the_dashboard_is_exported_with_its_labels() -> None:
    metrics = exported()
    for expression in expressions():
        names = re.findall(r"\binterceptor_\w+", expression)
        assert names, expression
        assert set(names) <= metrics.keys(), expression
        used = {
            *re.findall(r"(\w+)=~?\"", expression),
            *(
                label.strip()
                for group in re.findall(r"by \(([^)]*)\)", expression)
                for label in group.split(",")
            ),
        }
        assert used <= set.union(*(metrics[name] for name in names)), expression


def test_every_metric_is_on_the_dashboard() -> None:
    used = {name for expression in expressions() for name in re.findall(r"\binterceptor_\w+", expression)}
    assert used == exported().keys()


def test_counters_are_shown_as_rates_and_parentheses_match() -> None:
    for expression in expressions():
        assert expression.count("(") == expression.count(")")
        assert expression.count("{") == expression.count("}")
        for name in re.findall(r"\binterceptor_\w+(?:_total|_bucket|_sum|_count)\b", expression):
            if not expression.startswith("label_values"):
                assert re.search(rf"(rate|increase)\({name}", expression), expression


def test_the_dashboard_is_one_that_grafana_takes() -> None:
    found = dashboard()
    assert found["schemaVersion"] >= 39
    assert found["title"] and found["uid"]
    panels = found["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    variables = {f"${{{variable['name']}}}" for variable in found["templating"]["list"]}
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        assert panel["type"] in ("timeseries", "stat")
        assert panel["title"]
        assert panel["datasource"]["uid"] in variables
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        grid = panel["gridPos"]
        assert grid["w"] > 0 and grid["x"] + grid["w"] <= 24
        cells = {(grid["x"] + dx, grid["y"] + dy) for dx in range(grid["w"]) for dy in range(grid["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells


# ---- HTTP ----------------------------------------------------------------------------------------------------


async def text() -> bytes:
    return b"x 1\n"


@pytest.mark.parametrize(
    ("head", "status", "body"),
    [
        (b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n", b"200 OK", b"x 1\n"),
        (b"GET /metrics?name=x HTTP/1.0\r\n\r\n", b"200 OK", b"x 1\n"),
        (b"HEAD /metrics HTTP/1.1\r\n\r\n", b"200 OK", b""),
        (b"GET /other HTTP/1.1\r\n\r\n", b"404 Not Found", b"see /metrics\n"),
        (b"POST /metrics HTTP/1.1\r\n\r\n", b"405 Method Not Allowed", b"GET it\n"),
        (b"\x16\x03\x01\r\n\r\n", b"400 Bad Request", b"not HTTP\n"),
    ],
)
def test_requests_get_what_http_says(head: bytes, status: bytes, body: bytes) -> None:
    said, _, rest = asyncio.run(answer(head, text)).partition(b"\r\n\r\n")
    assert said.split(b"\r\n")[0] == b"HTTP/1.1 " + status
    assert rest == body


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        return int(server.getsockname()[1])


@pytest.mark.root
def test_a_daemon_serves_a_port_whatever_clients_do() -> None:
    address = f"127.0.0.1:{free_port()}"
    with Interceptor(metrics=address) as daemon, daemon.spawn() as child:
        for _ in range(3):
            child.run(["umount", "/proc/sys"])
        port = int(address.rpartition(":")[2])
        with closing(socket.create_connection(("127.0.0.1", port))) as silent:
            with closing(socket.create_connection(("127.0.0.1", port))) as endless:
                endless.sendall(b"x" * 2 * REQUEST_MAX)
                assert endless.recv(1) == b""
            with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as reply:
                found = parsed(reply.read())
                assert reply.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            silent.close()
        labels = (("container", child.cid), ("operation", "umount"), ("verdict", "continued"))
        assert found["interceptor_calls_total", labels] == 3
        assert found["interceptor_cache_hits_total", ()] == 2
        assert found["interceptor_questions_total", ()] == found["interceptor_cache_misses_total", ()] == 1
        assert found["interceptor_registrations_total", ()] == found["interceptor_containers", ()] == 1
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"http://{address}/other", timeout=30)


@pytest.mark.root
def test_a_daemon_serves_a_unix_socket_and_keeps_what_ended_in_its_sums(tmp_path: Path) -> None:
    path = tmp_path / "metrics.sock"

    def scrape() -> Samples:
        with closing(socket.socket(socket.AF_UNIX)) as client:
            client.connect(str(path))
            client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            with client.makefile("rb") as reply:
                return parsed(reply.read().partition(b"\r\n\r\n")[2])

    with Interceptor(metrics=str(path)) as daemon:
        assert path.stat().st_mode & 0o777 == 0o600
        with daemon.spawn() as child:
            child.run(["umount", "-l", "/proc"])
            assert calls(scrape()) == {child.cid: 1}
        found = scrape()
        assert calls(found) == {}
        assert found["interceptor_call_duration_seconds_count", (("verdict", "denied"),)] == 1
        assert found["interceptor_containers", ()] == 0
    assert not path.exists()


@pytest.mark.root
def test_without_the_key_no_port_is_open() -> None:
    with Interceptor() as daemon:
        inodes = {line.split()[9] for line in Path("/proc/net/tcp").read_text().splitlines()[1:]}
        own = {link.name for link in Path(f"/proc/{daemon.pid}/fd").iterdir()}
        sockets = {Path(f"/proc/{daemon.pid}/fd/{fd}").readlink().name for fd in own}
    assert any(name.startswith("socket:") for name in sockets)
    assert not {f"socket:[{inode}]" for inode in inodes} & sockets
