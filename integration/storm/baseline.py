"""What moved since the figures that were committed last. Pure but for the file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

FILE = Path(__file__).with_name("baseline.json")

#: A ratio has moved when it is this much off, beyond both runs' own spread.
MOVED = 0.1


def load(path: Path = FILE) -> dict[str, dict[str, float | None]]:
    """``ratios`` and ``us`` of the run that was committed; empty where there is none."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return {"ratios": {}, "us": {}}
    return {"ratios": found["ratios"], "us": found["us"]}


def moved(
    now: Mapping[str, float | None],
    then: Mapping[str, float | None],
    spread: Mapping[str, tuple[float, float]],
) -> list[str]:
    """A line for each ratio that moved by more than its own spread and `MOVED`, worst first."""
    changes = []
    for name, value in now.items():
        before = then.get(name)
        if value is None or not before:
            continue
        low, high = spread.get(name, (value, value))
        change = value / before - 1
        if abs(change) > MOVED and not low <= before <= high:
            changes.append((change, f"{name}: {before:.2f} → {value:.2f} ({change:+.0%})"))
    return [text for _, text in sorted(changes, reverse=True)]
