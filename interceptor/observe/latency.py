"""What guards count, as numbers: operations, verdicts, and how long calls took. Pure; native/api.h has the layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

#: By ``enum ix_kind``.
OPERATIONS = (
    *("other", "mount", "bind", "remount", "propagation", "move", "umount", "umount_lazy"),
    *("fsopen", "fsmount", "open_tree", "move_mount", "openat2"),
)
#: By ``enum ix_outcome``: left to the kernel, refused by the guard, done by the guard.
VERDICTS = ("continued", "denied", "handled")
#: Eight an octave from 256 ns on.
BUCKETS = 168
OCTAVE = 8


def bucket_limit_us(bucket: int) -> float:
    """Upper limit of a bucket in microseconds: eight buckets an octave from 256 ns on (native/guard.c)."""
    octave, part = divmod(bucket, OCTAVE)
    return float(1 << (octave + 8)) * (1 + (part + 1) / OCTAVE) / 1000


def percentile(buckets: Sequence[int], share: float) -> float | None:
    """The limit of the bucket below which ``share`` (0 to 1) of the calls lie, in microseconds."""
    total = sum(buckets)
    wanted = share * total
    seen = 0
    for index, count in enumerate(buckets):
        seen += count
        if count and seen >= wanted:
            return bucket_limit_us(index)
    return None


@dataclass
class Histogram:
    """Latencies from receipt to reply."""

    sum_ns: int = 0
    buckets: list[int] = field(default_factory=lambda: [0] * BUCKETS)

    @property
    def count(self) -> int:
        return sum(self.buckets)

    def add(self, other: Histogram) -> None:
        """Takes in what another has counted."""
        self.sum_ns += other.sum_ns
        self.buckets = [a + b for a, b in zip(self.buckets, other.buckets, strict=True)]

    def since(self, then: Histogram) -> Histogram:
        """What was counted after an earlier look at the same; all of it where that was at something else."""
        buckets = [a - b for a, b in zip(self.buckets, then.buckets, strict=True)]
        if min(buckets) < 0:
            return self
        return Histogram(max(0, self.sum_ns - then.sum_ns), buckets)


@dataclass
class Reading:
    """One journal at one moment; also the sum of several."""

    calls: dict[tuple[str, str], Histogram] = field(default_factory=dict)
    """By operation and verdict; what never happened is left out."""
    asked: int = 0
    cached: int = 0
    missed: int = 0
    overloaded: int = 0
    lost: int = 0
    orphaned: int = 0
    waiting: int = 0

    def add(self, other: Reading) -> None:
        """Takes in what another has counted."""
        for key, histogram in other.calls.items():
            self.calls.setdefault(key, Histogram()).add(histogram)
        for name in COUNTERS:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def by_verdict(self) -> Mapping[str, Histogram]:
        """Latencies of all operations together."""
        found = {verdict: Histogram() for verdict in VERDICTS}
        for (_, verdict), histogram in self.calls.items():
            found[verdict].add(histogram)
        return found


#: Fields of a `Reading` that are plain numbers.
COUNTERS = ("asked", "cached", "missed", "overloaded", "lost", "orphaned", "waiting")
