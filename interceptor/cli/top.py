"""``interceptor top``: what is called now, how often, and how long it takes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from interceptor.cli.common import UNCUT, ask_daemon, config_option, json_option
from interceptor.errors import NoDaemon

if TYPE_CHECKING:
    from rich.console import RenderableType

    from interceptor.observe.latency import Histogram

#: What rows can be sorted by, with whether the largest comes first.
SORTS = {"calls": True, "p50": True, "p99": True, "container": False, "operation": False}
_FIELD = {"calls": "calls_per_second", "p50": "p50_us", "p99": "p99_us"}

Key = tuple[str, str, str]
Row = dict[str, Any]


@click.command("top")
@click.option(
    "--interval", type=click.FloatRange(0.1, 3600), default=1.0, metavar="SECONDS", help="Default: 1."
)
@click.option("--sort", type=click.Choice(list(SORTS)), default="calls", help="Default: calls.")
@click.option(
    "--rows", type=click.IntRange(1), default=40, metavar="N", help="At most so many (default: 40)."
)
@click.option("--once", is_flag=True, help="One interval, then end; not drawn over and over.")
@config_option
@json_option
def command(interval: float, sort: str, rows: int, once: bool, config: str | None, as_json: bool) -> None:
    """Show trapped calls a second by container, operation and verdict, with their latencies, live.

    \b
    continued   the kernel ran the call: its own answer, which may be a refusal
    denied      the guard refused it
    handled     the guard did it, on the caller's behalf

    With --json it is one JSON object a line and interval. A daemon that goes away is waited for, except with --once.
    """
    if as_json or once:
        for facts in _intervals(config, interval, wait=not once):
            facts["rows"] = ordered(facts["rows"], sort)[:rows]
            _print_once(facts, as_json)
            if once:
                return
    else:
        _live(config, interval, sort, rows)


def _print_once(facts: Row, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(facts))
        return
    import sys

    from rich.console import Console

    # Not a terminal: nothing is cut off.
    Console(width=None if sys.stdout.isatty() else UNCUT).print(_screen(facts, None))


def _live(config: str | None, interval: float, sort: str, rows: int) -> None:
    from rich.live import Live
    from rich.text import Text

    with Live(Text("measuring…"), screen=True, auto_refresh=False) as live:
        try:
            for facts in _intervals(config, interval, wait=True):
                if "away" not in facts:
                    facts["rows"] = ordered(facts["rows"], sort)[:rows]
                live.update(_screen(facts, sort), refresh=True)
        except KeyboardInterrupt:
            return


def _intervals(config: str | None, interval: float, wait: bool) -> Iterator[Row]:
    """Facts of each interval; ``away`` with why, where there was no daemon. Raises `InterceptorError` without ``wait``,
    or where there is no daemon from the beginning.
    """
    before = look(config)
    while True:
        started = time.monotonic()
        time.sleep(interval)  # sleep: the interval that is measured
        try:
            now = look(config)
        except NoDaemon as error:
            if not wait:
                raise
            before = {}
            yield {"away": str(error), "rows": []}
            continue
        if before:
            yield facts_of(before, now, time.monotonic() - started)
        before = now


def look(config: str | None) -> dict[str, Any]:
    """What the daemon says of every container now, by ID. Raises `InterceptorError`."""
    found: dict[str, Any] = {}
    after = ""
    while True:
        page = ask_daemon(config, {"op": "readings", "after": after})
        assert isinstance(page, dict)
        found |= {str(container["id"]): container for container in page["containers"]}
        if not page["more"] or not page["containers"]:
            return {"containers": found}
        after = str(page["containers"][-1]["id"])


def facts_of(before: Mapping[str, Any], now: Mapping[str, Any], seconds: float) -> Row:
    """Rates and latencies between two looks. Pure."""
    from interceptor.observe.latency import percentile

    then = before["containers"]
    rows: list[Row] = []
    for cid, container in now["containers"].items():
        known = histograms(then.get(cid, {}))
        for key, histogram in histograms(container).items():
            new = histogram.since(known[key]) if key in known else histogram
            if count := new.count:
                rows.append(
                    {
                        **dict(zip(("container", "operation", "verdict"), (cid, *key), strict=True)),
                        "calls_per_second": round(count / seconds, 1),
                        "p50_us": percentile(new.buckets, 0.5),
                        "p99_us": percentile(new.buckets, 0.99),
                        "calls": histogram.count,
                    }
                )
    hits, misses = (_grown(name, then, now["containers"]) for name in ("cached", "missed"))
    return {
        "seconds": round(seconds, 3),
        "containers": len(now["containers"]),
        "calls_per_second": round(sum(row["calls_per_second"] for row in rows), 1),
        "cache_hits_per_second": round(hits / seconds, 1),
        "cache_misses_per_second": round(misses / seconds, 1),
        "questions_waiting": sum(c["waiting"] for c in now["containers"].values()),
        "rows": rows,
    }


def histograms(container: Mapping[str, Any]) -> dict[tuple[str, str], Histogram]:
    """What the daemon said of one container, by operation and verdict."""
    from interceptor.observe.latency import BUCKETS, Histogram

    found = {}
    for operation, verdict, sum_ns, counts in container.get("calls", []):
        buckets = [0] * BUCKETS
        for bucket, count in counts:
            buckets[bucket] = count
        found[operation, verdict] = Histogram(sum_ns, buckets)
    return found


def _grown(name: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> int:
    return sum(max(0, c[name] - then.get(cid, {}).get(name, 0)) for cid, c in now.items())


def ordered(rows: list[Row], sort: str) -> list[Row]:
    """Rows by what was asked for, then by name."""
    by_name = sorted(rows, key=lambda row: (row["container"], row["operation"], row["verdict"]))
    field = _FIELD.get(sort, sort)
    return sorted(by_name, key=lambda row: row[field], reverse=SORTS[sort])


def _screen(facts: Row, sort: str | None) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    if "away" in facts:
        return Text(f"{facts['away']}; waiting for one", style="red")
    head = Text(
        f"{facts['calls_per_second']:.0f} calls/s in {facts['containers']} containers; "
        f"cache: {facts['cache_hits_per_second']:.0f} hits/s, {facts['cache_misses_per_second']:.0f} misses/s; "
        f"{facts['questions_waiting']} questions wait for the daemon"
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("container", "operation", "verdict"):
        table.add_column(name, overflow="fold")
    for name in ("calls/s", "p50 µs", "p99 µs", "calls"):
        table.add_column(name, justify="right")
    for row in facts["rows"]:
        figures = (
            f"{row['calls_per_second']:.1f}",
            f"{row['p50_us']:.1f}",
            f"{row['p99_us']:.1f}",
            str(row["calls"]),
        )
        table.add_row(*(Text(row[name]) for name in ("container", "operation", "verdict")), *figures)
    tail = "nothing is called" if not facts["rows"] else f"sorted by {sort}; Ctrl-C ends this" if sort else ""
    return Group(head, table, Text(tail, style="dim"))
