"""The journal: a memfd shared with a guard and its successors, and what can be read from it."""

from __future__ import annotations

import fcntl
import os
from typing import Any

from interceptor._native import ffi, lib
from interceptor.kernel.fd import OwnedFd

_SIZE: int = ffi.sizeof("struct ix_journal")
_BUCKETS: int = lib.IX_BUCKETS
OUTCOMES = ("continued", "denied", "handled")


def bucket_limit_us(bucket: int) -> float:
    """Upper limit of a bucket in microseconds: eight buckets an octave from 256 ns on (native/guard.c)."""
    octave, part = divmod(bucket, 8)
    return float(1 << (octave + 8)) * (1 + (part + 1) / 8) / 1000


def percentile(buckets: list[int], share: float) -> float | None:
    """The limit of the bucket below which ``share`` (0 to 1) of the calls lie, in microseconds."""
    total = sum(buckets)
    wanted = share * total
    seen = 0
    for index, count in enumerate(buckets):
        seen += count
        if count and seen >= wanted:
            return bucket_limit_us(index)
    return None


class Journal:
    """Read from the daemon's side; written by guards alone."""

    def __init__(self, fd: OwnedFd) -> None:
        self.fd = fd

    @classmethod
    def create(cls, name: str) -> Journal:
        """A new one, all zero. Its size is sealed, so that no holder can make another's access fail."""
        fd = OwnedFd(
            os.memfd_create(f"interceptor-journal-{name}"[:200], os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        )
        os.ftruncate(fd.fileno(), _SIZE)
        _seal(fd)
        return cls(fd)

    def _snapshot(self) -> Any:
        """A copy of the record; the buffer lives as long as what is returned."""
        return ffi.from_buffer("struct ix_journal *", os.pread(self.fd.fileno(), _SIZE, 0))

    def stats(self) -> dict[str, object]:
        """Counts, latencies and umounts by unit since the container was registered."""
        journal = self._snapshot()
        latencies: dict[str, dict[str, float | int | None]] = {}
        for index, outcome in enumerate(OUTCOMES):
            histogram = journal.latency[index]
            buckets = [int(histogram.buckets[i]) for i in range(_BUCKETS)]
            latencies[outcome] = {
                "count": int(histogram.count),
                "p50": percentile(buckets, 0.5),
                "p99": percentile(buckets, 0.99),
            }
        units = {
            ffi.string(u.name).decode("utf-8", "replace"): int(u.umounts) for u in journal.units if u.umounts
        }
        return {
            "counts": {name: latencies[name]["count"] for name in OUTCOMES},
            "latency_us": latencies,
            "asked": int(journal.asked),
            "cached": int(journal.cached),
            "overloaded": int(journal.overloaded),
            "lost": int(journal.lost),
            "umounts_by_unit": units,
        }

    def open_calls(self) -> int:
        """Calls received and not yet answered."""
        journal = self._snapshot()
        return sum(1 for slot in journal.slots if slot.phase)


def _seal(fd: OwnedFd) -> None:
    fcntl.fcntl(fd.fileno(), fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
