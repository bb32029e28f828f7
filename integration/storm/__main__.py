"""The command line of the benchmark, its table and its file."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from integration.storm import figures, view
from integration.storm.contestants import arena, compiled
from integration.storm.figures import FEW, MANY, Key, Percentiles, Ratio
from integration.storm.rounds import Samples, play
from integration.storm.workloads import ALL
from interceptor.errors import InterceptorError
from interceptor.library import Interceptor

#: Rounds of each workload, and what --quick does with them.
ROUNDS, QUICK_ROUNDS = 30, 2


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m integration.storm", description="What a trapped call costs.")
    parser.add_argument("--json", metavar="FILE", help="write all figures there, raw samples too")
    parser.add_argument("--quick", action="store_true", help="a few rounds: that it works, not how fast")
    parser.add_argument("--rounds", type=int, help=f"rounds of each workload (default: {ROUNDS})")
    parser.add_argument("--only", metavar="WORKLOAD", choices=[w.name for w in ALL], action="append")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace, console: Console) -> Samples:
    """Everything that is asked for, at each number of mounts at once, so that these are compared in turns too."""
    workloads = [w for w in ALL if not options.only or w.name in options.only]
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    with contextlib.ExitStack() as stack:
        program = stack.enter_context(compiled())
        daemon = stack.enter_context(Interceptor(log_level="warning"))
        status = stack.enter_context(console.status("setting up"))
        contestants = [
            c for mounts in (FEW, MANY) for c in stack.enter_context(arena(daemon, program, mounts))
        ]
        return play(contestants, workloads, rounds, status.update)


def times_table(us: dict[Key, Percentiles]) -> Table:
    """Percentiles of every figure, contestants below each other."""
    table = Table("call", "answered by", "mounts", "p50 µs", "p99 µs", "p99.9 µs", "calls", title="Times")
    last = ""
    for (figure, contestant, mounts), p in us.items():
        if figure != last and last:
            table.add_section()
        good = contestant != "guarded" or figure not in figures.HANDLED or p.p50 <= figures.HANDLED_US
        p50 = f"{p.p50:.1f}" if good else f"[red]{p.p50:.1f}[/red]"
        shown = (f"{p.p99:.1f}", f"{p.p999:.1f}", str(p.count))
        table.add_row("" if figure == last else figure, contestant, str(mounts), p50, *shown)
        last = figure
    for column in table.columns[2:]:
        column.justify = "right"
    return table


def ratios_table(ratios: dict[str, Ratio]) -> Table:
    """Each ratio beside its bar."""
    table = Table("ratio", "median", "quartiles", "bar", title="Ratios")
    for name, r in ratios.items():
        colour = {True: "green", False: "red", None: "default"}[r.holds]
        bar = "" if r.bar is None else f"{r.bar:g}"
        table.add_row(name, f"[{colour}]{r.value:.2f}[/{colour}]", f"{r.low:.2f}–{r.high:.2f}", bar)
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def as_json(samples: Samples) -> dict[str, object]:
    """``ratios`` and ``us`` for those who compare, the rest for those who doubt."""
    ratios = figures.ratios(samples)
    us: dict[str, dict[str, dict[str, object]]] = {}
    raw: dict[str, dict[str, dict[str, list[list[int]]]]] = {}
    for (figure, contestant, mounts), p in figures.microseconds(samples).items():
        us.setdefault(figure, {}).setdefault(contestant, {})[str(mounts)] = p.as_json()
        rounds = samples[figure, contestant, mounts]
        raw.setdefault(figure, {}).setdefault(contestant, {})[str(mounts)] = [list(r) for r in rounds]
    return {
        "machine": {"kernel": platform.release(), "arch": platform.machine(), "cpus": os.cpu_count()},
        "noise": round(max(figures.noise(rounds) for rounds in samples.values()), 3),
        "ratios": {name: round(r.value, 3) for name, r in ratios.items()},
        "spread": {name: [round(r.low, 3), round(r.high, 3)] for name, r in ratios.items()},
        "bars": {name: r.bar for name, r in ratios.items() if r.bar is not None},
        "us": us,
        "samples_ns": raw,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints; exit status 0 also where a bar is missed: that is for whoever reads the table."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given[:1] == ["view"]:
        return view.main(given[1:])
    options = parse(given)
    console = Console()
    if os.geteuid() != 0:
        print("storm: must be run as root: it makes containers", file=sys.stderr)
        return 1
    try:
        samples = measure(options, console)
    except InterceptorError as error:
        print(f"storm: {error}", file=sys.stderr)
        return 1
    console.print(times_table(figures.microseconds(samples)))
    console.print(ratios_table(figures.ratios(samples)))
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(as_json(samples), file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
