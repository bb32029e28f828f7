"""python -m tests.search run --mode real --steps 100000 [--seed N] | replay FILE [--times N] [--mode MODE]; as root."""

from __future__ import annotations

import argparse
import random
import sys
import time
from dataclasses import replace
from pathlib import Path

from tests.search.arena import arena
from tests.search.program import Program
from tests.search.search import Failure, report, search

#: Programs under one seed: hypothesis remembers each of them.
ROUND = 250


def run(mode: str, steps: int, seconds: float, first_seed: int, directory: Path) -> int:
    """Rounds, each with the next seed, until so many steps were made or so much time has passed."""
    findings = 0
    begin = time.monotonic()
    with arena(mode) as place:
        seed = first_seed
        while place.totals.steps < steps and time.monotonic() - begin < seconds:
            try:
                search(place, seed, ROUND)
            except Failure as failure:
                findings += 1
                print(report(failure, directory, seed), flush=True)
            rate = place.totals.steps / (time.monotonic() - begin)
            print(f"{mode}, seed {seed}: {rate:.0f} steps/s, {findings} findings; {place.totals}", flush=True)
            seed += 1
    return findings


def replay(path: Path, times: int, mode: str | None) -> int:
    """The program of a file, again and again; how often it did what must not be."""
    program = Program.load(path)
    if mode:
        program = replace(program, mode=mode)
    print(program)
    wrong = 0
    with arena(program.mode) as place:
        for _ in range(times):
            outcome = place.run(program)
            if outcome.wrong:
                wrong += 1
                print(outcome.wrong, end="")
        print(f"errors {outcome.errors}; {outcome.before} to go, {outcome.calls} calls, {outcome.left} left")
    print(f"{wrong} of {times}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.search", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run")
    runs.add_argument("--mode", choices=("real", "continue", "random"), default="real")
    runs.add_argument("--steps", type=int, default=1_000_000)
    runs.add_argument("--seconds", type=float, default=float("inf"))
    runs.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    runs.add_argument("--directory", type=Path, default=Path.cwd())
    replays = commands.add_parser("replay")
    replays.add_argument("file", type=Path)
    replays.add_argument("--times", type=int, default=10)
    replays.add_argument("--mode", choices=("real", "continue", "random"))
    options = parser.parse_args()
    if options.command == "run":
        return bool(run(options.mode, options.steps, options.seconds, options.seed, options.directory))
    return bool(replay(options.file, options.times, options.mode))


if __name__ == "__main__":
    sys.exit(main())
