"""The command line of the benchmark, its table and its file."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from integration.storm import agents, baseline, figures, lxd, sleepers, view
from integration.storm.contestants import arena, compiled
from integration.storm.crowd import IDLE_SECONDS, Crowd, Storm, crowd, storm
from integration.storm.figures import FEW, MANY, SIZES, Key, Percentiles, Ratio
from integration.storm.lxd import Beside
from integration.storm.rounds import Samples, play
from integration.storm.sleepers import Sleepers
from integration.storm.workloads import ALL
from interceptor.errors import InterceptorError
from interceptor.library import Interceptor

#: Rounds of each workload, and what --quick does with them.
ROUNDS, QUICK_ROUNDS = 30, 2

#: How many containers at once, and for how long they are then left alone.
CROWDS, QUICK_CROWDS = (1, 2, 8, 64), (1, 2)
QUICK_IDLE_SECONDS = 1.0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m integration.storm", description="What a trapped call costs.")
    parser.add_argument("--json", metavar="FILE", help="write all figures there, raw samples too")
    parser.add_argument("--plot", metavar="FILE", help="draw a picture there (PNG)")
    parser.add_argument(
        "--peer",
        metavar="COMMAND",
        help="another OCI seccomp agent on the same work; {socket} in the command is the path that it shall serve",
    )
    parser.add_argument("--save-baseline", action="store_true", help="what later runs are compared with")
    parser.add_argument("--quick", action="store_true", help="a few rounds: that it works, not how fast")
    parser.add_argument("--rounds", type=int, help=f"rounds of each workload (default: {ROUNDS})")
    parser.add_argument("--only", metavar="WORKLOAD", choices=[w.name for w in ALL], action="append")
    return parser.parse_args(arguments)


@dataclass(frozen=True)
class Run:
    """All that was measured."""

    samples: Samples
    crowds: list[Crowd]
    storm: Storm | None
    sleepers: Sleepers | None = None
    lxd: Beside | None = None
    """None where LXD is not installed, and in a quick run."""

    def ratios(self) -> dict[str, Ratio]:
        """Those of single calls, and those of many containers."""
        found = figures.ratios(self.samples)
        rates = {c.containers: c.calls_per_second for c in self.crowds}
        if {1, 8} <= rates.keys():
            value = rates[8] / rates[1]
            found["eight_containers_vs_one"] = Ratio(value, value, value, 1.7, at_least=True)
        if self.storm:
            value = self.storm.p99_ratio
            found["worker_p99_beside_storm"] = Ratio(value, value, value, 2.0)
        if self.sleepers:
            found["last_registration_vs_first"] = self.sleepers.slower
            found["memory_beside_guards_vs_150_mb"] = self.sleepers.memory
        if self.lxd:
            found["denied_vs_lxd"] = self.lxd.ratio
        return found


def measure(options: argparse.Namespace, console: Console) -> Run:
    """Everything that is asked for, at each number of mounts at once, so that these are compared in turns too."""
    workloads = [w for w in ALL if not options.only or w.name in options.only]
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    with contextlib.ExitStack() as stack:
        program = stack.enter_context(compiled())
        status = stack.enter_context(console.status("setting up"))
        with contextlib.ExitStack() as inner:
            daemon = inner.enter_context(Interceptor(log_level="warning"))
            peers = {"python": inner.enter_context(agents.running(agents.PYTHON))}
            if options.peer:
                peers["peer"] = inner.enter_context(agents.running(options.peer))
            contestants = [
                c
                for mounts in ((FEW, MANY) if options.quick else SIZES)
                for c in inner.enter_context(arena(daemon, program, mounts, peers))
            ]
            samples = play(contestants, workloads, rounds, status.update)
        if options.only:
            return Run(samples, [], None)
        crowds = []
        for containers in QUICK_CROWDS if options.quick else CROWDS:
            status.update(f"{containers} containers")
            idle = QUICK_IDLE_SECONDS if options.quick else IDLE_SECONDS
            crowds.append(crowd(program, containers, idle_seconds=idle))
        status.update("a storm")
        stormed = storm(program, rounds)
        status.update("containers that sleep")
        asleep = sleepers.sleepers(
            sleepers.QUICK_CONTAINERS if options.quick else sleepers.CONTAINERS,
            QUICK_IDLE_SECONDS if options.quick else IDLE_SECONDS,
        )
        beside = None
        if lxd.installed() and not options.quick:
            status.update("LXD")
            beside = lxd.measure(program, rounds)
        return Run(samples, crowds, stormed, asleep, beside)


def times_table(us: dict[Key, Percentiles]) -> Table:
    """Percentiles of every figure, contestants below each other."""
    table = Table("call", "answered by", "mounts", "p50 µs", "p99 µs", "p99.9 µs", "calls", title="Times")
    last = ""
    for (figure, contestant, mounts), p in us.items():
        if figure != last and last:
            table.add_section()
        good = contestant != "guarded" or p.p50 <= figures.HANDLED_US.get(figure, p.p50)
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


def crowds_table(crowds: list[Crowd]) -> Table:
    """What many containers cost together."""
    table = Table(
        *("containers", "calls/s", "our CPU µs/call", "caller's", "guard KB", "all of ours KB"),
        *("registration µs", "wake-ups idle"),
        title="Many containers, all of them with denied calls",
    )
    for c in crowds:
        table.add_row(
            str(c.containers),
            f"{c.calls_per_second:.0f}",
            f"{c.our_cpu_us_per_call:.1f}",
            f"{c.caller_cpu_us_per_call:.1f}",
            f"{c.guard_private_kb:.0f}",
            str(c.our_private_kb),
            f"{c.registration_us:.0f}",
            f"{c.idle_wake_ups} in {c.idle_seconds:g} s",
        )
    for column in table.columns:
        column.justify = "right"
    return table


def as_json(run: Run) -> dict[str, object]:
    """``ratios`` and ``us`` for those who compare, the rest for those who doubt."""
    samples, ratios = run.samples, run.ratios()
    us: dict[str, dict[str, dict[str, object]]] = {}
    raw: dict[str, dict[str, dict[str, list[list[int]]]]] = {}
    for (figure, contestant, mounts), p in figures.microseconds(samples).items():
        us.setdefault(figure, {}).setdefault(contestant, {})[str(mounts)] = p.as_json()
        rounds = samples[figure, contestant, mounts]
        raw.setdefault(figure, {}).setdefault(contestant, {})[str(mounts)] = [list(r) for r in rounds]
    return {
        "machine": {"kernel": platform.release(), "arch": platform.machine(), "cpus": os.cpu_count()},
        "noise": round(max(figures.noise(rounds) for rounds in samples.values()), 3),
        "ratios": {"denied_vs_lxd": None} | {name: round(r.value, 3) for name, r in ratios.items()},
        "spread": {name: [round(r.low, 3), round(r.high, 3)] for name, r in ratios.items()},
        "bars": {name: r.bar for name, r in ratios.items() if r.bar is not None},
        "us": us,
        "crowds": [c.as_json() for c in run.crowds],
        "storm": run.storm.as_json() if run.storm else None,
        "sleepers": run.sleepers.as_json() if run.sleepers else None,
        "lxd": run.lxd.as_json() if run.lxd else None,
        "samples_ns": raw,
    }


def compare(facts: dict[str, Any], console: Console) -> None:
    """Says what moved since the figures that were committed last."""
    spread = {name: (low, high) for name, (low, high) in facts["spread"].items()}
    lines = baseline.moved(facts["ratios"], baseline.load()["ratios"], spread)
    console.print("Since the committed figures: " + ("; ".join(lines) if lines else "nothing moved"))


def save_baseline(facts: dict[str, Any]) -> None:
    """Writes what `compare` reads: everything but the samples."""
    kept = {key: value for key, value in facts.items() if key != "samples_ns"}
    baseline.FILE.write_text(json.dumps(kept, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints; exit status 0 also where a bar is missed: that is for whoever reads the table."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given[:1] == ["view"]:
        return view.main(given[1:])
    if given[:1] == ["sleepers"]:
        return sleepers.main(given[1:])
    options = parse(given)
    console = Console()
    if os.geteuid() != 0:
        print("storm: must be run as root: it makes containers", file=sys.stderr)
        return 1
    try:
        run = measure(options, console)
    except InterceptorError as error:
        print(f"storm: {error}", file=sys.stderr)
        return 1
    us = figures.microseconds(run.samples)
    console.print(times_table(us))
    if run.crowds:
        console.print(crowds_table(run.crowds))
    if run.sleepers:
        console.print(sleepers.table(run.sleepers))
    console.print(ratios_table(run.ratios()))
    if run.lxd:
        theirs = statistics.median(run.lxd.theirs)
        console.print(
            f"A denied mount: LXD {theirs:.0f} µs, this project {run.lxd.ours.p50:.1f} µs (medians)."
        )
    elif not lxd.installed():
        console.print("LXD is not installed and was not measured: apt-get install lxd.")
    facts = as_json(run)
    console.print(f"Noise: medians of rounds differ by up to {facts['noise']:.0%} (interquartile range).")
    if run.storm:
        said = run.storm.log_lines
        console.print(f"Beside a storm: worker's p99 x {run.storm.p99_ratio:.2f}; {said} lines of log.")
    compare(facts, console)
    if options.save_baseline:
        save_baseline(facts)
    if options.plot:
        # Here, because it takes a second to load.
        from integration.storm.plot import draw

        draw(us, options.plot)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(facts, file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
