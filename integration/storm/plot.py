"""One picture of a run: medians and tails by answerer, and by the size of the mount table."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from integration.storm.figures import FEW, Key, Percentiles


def draw(us: Mapping[Key, Percentiles], path: str) -> None:
    """Writes a PNG."""
    figure = Figure(figsize=(15, 9))
    left, right = figure.subplots(1, 2)
    _bars(left, us)
    _sizes(right, us)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _bars(axes: Axes, us: Mapping[Key, Percentiles]) -> None:
    rows = [(name, who, p) for (name, who, mounts), p in us.items() if mounts == FEW]
    colours = {who: f"C{n}" for n, who in enumerate(sorted({who for _, who, _ in rows}))}
    for place, (_, who, p) in enumerate(rows):
        axes.barh(place, p.p50, color=colours[who])
        axes.plot([p.p50, p.p99], [place, place], color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [f"{name} · {who}" for name, who, _ in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("µs a call: median, line to p99")


def _sizes(axes: Axes, us: Mapping[Key, Percentiles]) -> None:
    for name, who in sorted({(name, who) for name, who, mounts in us if mounts != FEW}):
        points = sorted((mounts, p.p50) for (n, w, mounts), p in us.items() if (n, w) == (name, who))
        axes.plot(*zip(*points, strict=True), marker="o", label=f"{name} · {who}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("mounts in the container's table")
    axes.set_ylabel("µs a call, median")
    if axes.lines:
        axes.legend(fontsize=7)
