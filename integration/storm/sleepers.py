"""A thousand containers that only sleep: what our processes hold for them, and whether the next one waits longer.

``python -m integration.storm sleepers``; it is part of a whole run as well.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table

from integration.storm.crowd import (
    IDLE_SECONDS,
    _registrations_us,
    cpu_us,
    our_processes,
    private_kb,
    switches,
)
from integration.storm.figures import Ratio
from interceptor.library import Interceptor

CONTAINERS, QUICK_CONTAINERS = 1000, 12
#: Registrations at the beginning and at the end that are compared.
SAMPLE = 30
#: What all our processes but the guards may have of their own.
OURS_KB = 150 * 1024
#: How much longer the last registrations may take than the first.
SLOWER = 1.1


@dataclass(frozen=True)
class Sleepers:
    """Figures of ``containers`` containers of one daemon. Times are microseconds, sizes private memory."""

    containers: int
    ours_kb: int
    """All but the guards."""
    daemon_kb: int
    envoys_kb: int
    guard_kb: float
    """The median."""
    first_registration_us: float
    last_registration_us: float
    """Medians, by the clock."""
    first_cpu_us: float
    last_cpu_us: float
    """Medians of the daemon's processor time."""
    idle_wake_ups: int
    idle_seconds: float

    @property
    def slower(self) -> Ratio:
        """The processor time of the last registrations to that of the first: what else runs does not count."""
        value = self.last_cpu_us / self.first_cpu_us
        return Ratio(value, value, value, SLOWER)

    @property
    def memory(self) -> Ratio:
        """Of all our processes but the guards, to what is allowed."""
        value = self.ours_kb / OURS_KB
        return Ratio(value, value, value, 1.0)

    def as_json(self) -> dict[str, float]:
        return asdict(self)


def sleepers(containers: int = CONTAINERS, idle_seconds: float = IDLE_SECONDS) -> Sleepers:
    """Makes them one after the other. Takes a quarter of a second each."""
    with Interceptor(log_level="info") as daemon, contextlib.ExitStack() as stack:
        spent = []
        for _ in range(containers):
            before = cpu_us([daemon.pid])
            stack.enter_context(daemon.spawn(["sleep", "infinity"]))
            spent.append(cpu_us([daemon.pid]) - before)
        known = daemon.request("ps")
        guards = {int(c["guard_pid"]) for c in known}
        others = [pid for pid in our_processes(daemon) if pid not in guards]
        took = _registrations_us(daemon)
        sample = min(SAMPLE, containers // 2)
        time.sleep(2)  # sleep: the last welds' trays go
        quiet = switches([*others, *guards])
        time.sleep(idle_seconds)  # sleep: this is what is measured
        return Sleepers(
            containers=containers,
            ours_kb=sum(private_kb(pid) for pid in others),
            daemon_kb=private_kb(daemon.pid),
            envoys_kb=sum(private_kb(int(c["envoy_pid"])) for c in known),
            guard_kb=statistics.median(private_kb(pid) for pid in guards),
            # The very first ones load and grow what all later ones use.
            first_registration_us=statistics.median(took[1:][:sample]),
            last_registration_us=statistics.median(took[-sample:]),
            first_cpu_us=statistics.median(spent[1:][:sample]),
            last_cpu_us=statistics.median(spent[-sample:]),
            idle_wake_ups=switches([*others, *guards]) - quiet,
            idle_seconds=idle_seconds,
        )


def table(found: Sleepers) -> Table:
    """Names and values."""
    shown = Table("figure", "value", title=f"{found.containers} containers that sleep")
    for name, value in found.as_json().items():
        shown.add_row(name.replace("_", " "), f"{value:g}" if isinstance(value, int) else f"{value:.0f}")
    shown.add_row("registration, last to first", f"{found.slower.value:.2f} (bar: {SLOWER})")
    shown.add_row("memory, to 150 MB", f"{found.memory.value:.2f} (bar: 1)")
    shown.columns[1].justify = "right"
    return shown


def main(arguments: Sequence[str]) -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser("python -m integration.storm sleepers", description=__doc__)
    parser.add_argument("--containers", type=int, default=CONTAINERS)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args(arguments)
    found = sleepers(options.containers)
    Console().print(table(found))
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(found.as_json(), file)
    return 0
