"""From samples to figures: percentiles, and ratios of what was measured in the same round. Pure."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

Key = tuple[str, str, int]
Rounds = Sequence[Sequence[int]]

#: Entries in the mount table. LARGEST stands for the most that was measured.
FEW, MANY = 20, 2000
SIZES = (FEW, 200, MANY, 20000)
LARGEST = -1


@dataclass(frozen=True)
class Percentiles:
    """Microseconds."""

    p50: float
    p99: float
    p999: float
    count: int

    @staticmethod
    def of(nanoseconds: Iterable[int]) -> Percentiles:
        """Of samples in nanoseconds. Raises `ValueError` where there are none."""
        ordered = sorted(nanoseconds)
        if not ordered:
            raise ValueError("no samples")
        p50, p99, p999 = (ordered[int(len(ordered) * share)] / 1000 for share in (0.5, 0.99, 0.999))
        return Percentiles(p50, p99, p999, len(ordered))

    def as_json(self) -> dict[str, float]:
        """With two decimals: tens of nanoseconds."""
        return {
            "p50": round(self.p50, 2),
            "p99": round(self.p99, 2),
            "p999": round(self.p999, 2),
            "n": self.count,
        }


@dataclass(frozen=True)
class Ratio:
    """The median of the ratios of each round, and the quartiles as their spread."""

    value: float
    low: float
    high: float
    bar: float | None = None
    at_least: bool = False
    """The bar is the least, not the most."""

    @property
    def holds(self) -> bool | None:
        """None where there is no bar."""
        if self.bar is None:
            return None
        return self.value >= self.bar if self.at_least else self.value <= self.bar


@dataclass(frozen=True)
class Comparison:
    """A ratio of medians: figures of a contestant at a number of mounts, one above and one below the line.

    Several figures on one side are added: the calls of a pair.
    """

    above: tuple[Key, ...]
    below: tuple[Key, ...]
    bar: float | None = None
    quantile: float = 0.5


def _pair(contestant: str, mounts: int) -> tuple[Key, ...]:
    return (("free_bind", contestant, mounts), ("free_umount", contestant, mounts))


def _one(figure: str, contestant: str, mounts: int = FEW) -> tuple[Key, ...]:
    return ((figure, contestant, mounts),)


#: Bars are this project's promises. "many": with 2,000 mounts in the table instead of 20.
COMPARISONS: Mapping[str, Comparison] = {
    "denied_vs_resolving_floor_p50": Comparison(
        _one("denied", "guarded"), _one("denied", "floor_resolve"), 1.15
    ),
    "denied_vs_resolving_floor_p99": Comparison(
        _one("denied", "guarded"), _one("denied", "floor_resolve"), 1.5, quantile=0.99
    ),
    "denied_vs_resolving_floor_p50_many": Comparison(
        _one("denied", "guarded", MANY), _one("denied", "floor_resolve", MANY), 1.15
    ),
    "denied_lazy_vs_resolving_floor_p50": Comparison(
        _one("denied_lazy", "guarded"), _one("denied", "floor_resolve"), 1.5
    ),
    "denied_vs_answering_floor_p50": Comparison(_one("denied", "guarded"), _one("denied", "floor_answer")),
    "denied_vs_kernel": Comparison(_one("denied", "guarded"), _one("denied", "kernel")),
    "denied_flatness": Comparison(_one("denied", "guarded", LARGEST), _one("denied", "guarded"), 1.1),
    "denied_vs_python_listener": Comparison(_one("denied", "guarded"), _one("denied", "python")),
    "free_umount_vs_continuing_floor_p50": Comparison(
        _one("free_umount", "guarded"), _one("free_umount", "floor_continue"), 1.5
    ),
    "free_umount_vs_continuing_floor_p50_many": Comparison(
        _one("free_umount", "guarded", MANY), _one("free_umount", "floor_continue", MANY), 1.5
    ),
    "free_pair_vs_continuing_floor": Comparison(_pair("guarded", FEW), _pair("floor_continue", FEW)),
    "free_pair_vs_kernel": Comparison(_pair("guarded", FEW), _pair("kernel", FEW), 1.7),
    "free_pair_vs_kernel_many": Comparison(_pair("guarded", MANY), _pair("kernel", MANY), 1.7),
    "propagation_vs_kernel": Comparison(_one("propagation", "guarded"), _one("propagation", "kernel"), 1.05),
    "propagation_floor_vs_kernel": Comparison(
        _one("propagation", "floor_answer"), _one("propagation", "kernel")
    ),
    "tmpfs_pair_vs_kernel": Comparison(
        _one("tmpfs", "guarded") + _one("tmpfs_umount", "guarded"),
        _one("tmpfs", "kernel") + _one("tmpfs_umount", "kernel"),
    ),
    "systemd_replay_vs_kernel": Comparison(
        _one("systemd_service", "guarded"), _one("systemd_service", "kernel"), 1.3
    ),
    "systemd_replay_floor_vs_kernel": Comparison(
        _one("systemd_service", "floor_continue"), _one("systemd_service", "kernel")
    ),
    "new_proc_vs_kernel": Comparison(_one("new_proc", "guarded"), _one("new_proc", "kernel")),
}

#: Microseconds at most, of the median.
HANDLED_US: Mapping[str, float] = {
    "new_proc": 300.0,
    "new_proc_umount": 100.0,
    "copied_submount": 300.0,
    "copied_base": 100.0,
    "new_api": 1500.0,
}


def ratios(samples: Mapping[Key, Rounds]) -> dict[str, Ratio]:
    """Every comparison whose figures were all measured."""
    found = {}
    for name, comparison in COMPARISONS.items():
        sized = replace(
            comparison, above=_sized(comparison.above, samples), below=_sized(comparison.below, samples)
        )
        if all(key in samples for key in sized.above + sized.below):
            found[name] = ratio(sized, samples)
    return found


def _sized(keys: tuple[Key, ...], samples: Mapping[Key, Rounds]) -> tuple[Key, ...]:
    largest = max((mounts for _, _, mounts in samples), default=FEW)
    return tuple((figure, who, largest if mounts == LARGEST else mounts) for figure, who, mounts in keys)


def ratio(comparison: Comparison, samples: Mapping[Key, Rounds]) -> Ratio:
    """Medians (or the quantile asked for) of each round are compared with those of the same round."""
    each = [
        above / below
        for above, below in zip(
            _side(comparison.above, samples, comparison.quantile),
            _side(comparison.below, samples, comparison.quantile),
            strict=True,
        )
    ]
    low, middle, high = statistics.quantiles(each, n=4, method="inclusive") if len(each) > 1 else each * 3
    return Ratio(middle, low, high, comparison.bar)


def _side(keys: tuple[Key, ...], samples: Mapping[Key, Rounds], quantile: float) -> list[float]:
    columns = [[_quantile(r, quantile) for r in samples[key]] for key in keys]
    return [sum(values) for values in zip(*columns, strict=True)]


def _quantile(nanoseconds: Sequence[int], quantile: float) -> float:
    return float(sorted(nanoseconds)[int(len(nanoseconds) * quantile)])


def microseconds(samples: Mapping[Key, Rounds]) -> dict[Key, Percentiles]:
    """Of all rounds together."""
    return {key: Percentiles.of(itertools.chain.from_iterable(rounds)) for key, rounds in samples.items()}


def noise(rounds: Rounds) -> float:
    """How much the medians of rounds differ: their interquartile range as a share of their median."""
    medians = [statistics.median(r) for r in rounds]
    if len(medians) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(medians, n=4, method="inclusive")
    return (high - low) / middle
