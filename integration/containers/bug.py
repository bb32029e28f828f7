"""``--show-the-bug``: the same container against the naive agent, for five seconds of the storm."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from integration.containers import naive_agent
from integration.containers.facts import STORM
from integration.containers.steps import BOOT_SECONDS, Say
from integration.containers.systemd import Plan, started

SECONDS = 5.0


def show(name: str, lower: Path, directory: Path, say: Say) -> dict[str, Any]:
    """Boot the container, wait for the storm, count for `SECONDS`, end it; return calls per second and by unit."""
    hook = [sys.executable, "-I", str(Path(__file__).with_name("cover_hook.py")), *naive_agent.COVERED]
    with naive_agent.NaiveAgent(directory / "naive.sock", STORM) as agent:
        plan = Plan(name, lower, directory / name, agent.path, create_runtime=[hook])
        with started(plan) as booting:
            say(
                f"the naive agent says 0 to every umount2 of …{', …'.join(naive_agent.COVERED)}, and does nothing"
            )
            if booting.ready.wait_ready(booting.pid, BOOT_SECONDS, wake=agent.storm):
                say("systemd has booted: there is no storm to be seen with this systemd")
                return {"calls_per_second": 0.0, "umounts": dict(agent.counts.faked)}
            say(f"the storm has begun; counting for {SECONDS:.0f} s")
            before = agent.counts.faked.copy()
            begin = time.monotonic()
            time.sleep(SECONDS)  # sleep: the length of the measurement, not a wait for anything
            elapsed = time.monotonic() - begin
            faked = agent.counts.faked - before
            for unit, count in faked.most_common():
                say(f"  {unit}: {count / elapsed:,.0f} umounts a second, and not one of them took place")
            return {"calls_per_second": round(faked.total() / elapsed, 1), "umounts": dict(faked)}
