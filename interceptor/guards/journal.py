"""The journal: a memfd shared with a guard and its successors, and what can be read from it."""

from __future__ import annotations

import array
import fcntl
import os
from dataclasses import dataclass
from typing import Any

from interceptor._native import ffi, lib
from interceptor.kernel.fd import OwnedFd
from interceptor.observe.latency import BUCKETS, OPERATIONS, VERDICTS, Histogram, Reading, percentile

_SIZE: int = ffi.sizeof("struct ix_journal")
_SLOTS_AT: int = ffi.offsetof("struct ix_journal", "slots")
_COUNTS_AT: int = ffi.offsetof("struct ix_journal", "missed")
_LATENCY_AT: int = ffi.offsetof("struct ix_journal", "latency")
_TALLY_AT: int = ffi.offsetof("struct ix_journal", "versions")
_SEEN_AT: int = ffi.offsetof("struct ix_journal", "seen")
#: Words of a histogram: the sum, the buckets.
_WORDS = BUCKETS + 1


@dataclass(frozen=True)
class Seen:
    """Calls of one thread that are alike, counted while somebody follows."""

    version: int
    """Another row has another one."""
    count: int
    tid: int
    operation: str
    verdict: str
    error: int
    path: bytes
    unit: str
    comm: str
    reason: str


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

    def _bytes(self, begin: int, end: int) -> bytes:
        """Zeros where it is a shorter one, of an older daemon."""
        return os.pread(self.fd.fileno(), end - begin, begin).ljust(end - begin, b"\0")

    def reading(self) -> Reading:
        """What has been counted since the container was registered."""
        head = array.array("Q", self._bytes(0, 6 * 8))
        rest = array.array("Q", self._bytes(_COUNTS_AT, _TALLY_AT))
        reading = Reading(
            asked=head[1],
            cached=head[2],
            overloaded=head[3],
            lost=head[4],
            orphaned=head[5],
            missed=rest[0],
            waiting=rest[1],
        )
        at = (_LATENCY_AT - _COUNTS_AT) // 8
        for operation in OPERATIONS:
            for verdict in VERDICTS:
                if rest[at]:
                    buckets = rest[at + 1 : at + _WORDS].tolist()
                    reading.calls[operation, verdict] = Histogram(rest[at], buckets)
                at += _WORDS
        return reading

    def stats(self) -> dict[str, object]:
        """Counts, latencies and umounts by unit since the container was registered."""
        reading = self.reading()
        latencies = {
            verdict: {
                "count": histogram.count,
                "p50": percentile(histogram.buckets, 0.5),
                "p99": percentile(histogram.buckets, 0.99),
            }
            for verdict, histogram in reading.by_verdict().items()
        }
        operations: dict[str, dict[str, int]] = {}
        for (operation, verdict), histogram in reading.calls.items():
            operations.setdefault(operation, {})[verdict] = histogram.count
        data = self._bytes(0, _SLOTS_AT).ljust(_SIZE, b"\0")
        units = {
            ffi.string(u.name).decode("utf-8", "replace"): int(u.umounts)
            for u in _journal(data).units
            if u.umounts
        }
        return {
            "counts": {name: latencies[name]["count"] for name in VERDICTS},
            "operations": operations,
            "latency_us": latencies,
            "asked": reading.asked,
            "cached": reading.cached,
            "missed": reading.missed,
            "overloaded": reading.overloaded,
            "lost": reading.lost,
            "noted": self.noted(),
            "umounts_by_unit": units,
        }

    def open_calls(self) -> int:
        """Calls received and not yet answered."""
        return sum(1 for slot in _journal(self._bytes(0, _SIZE)).slots if slot.phase)

    def noted(self) -> int:
        """How many calls were counted by those that follow."""
        return int.from_bytes(self._bytes(_TALLY_AT + 8, _TALLY_AT + 16), "little")

    def seen(self) -> dict[int, Seen]:
        """The rows of calls that somebody follows, by number; those that are being written are left out.

        All of it is what the container's guard says, and of text the guard says what the container likes.
        """
        data = self._bytes(_SEEN_AT, _SIZE)
        found = {}
        for number, row in enumerate(ffi.from_buffer("struct ix_seen[]", data)):
            if not row.done or row.done != row.begun:
                continue
            if row.kind < len(OPERATIONS) and row.verdict < len(VERDICTS):
                found[number] = Seen(
                    version=int(row.done),
                    count=int(row.count),
                    tid=int(row.tid),
                    operation=OPERATIONS[row.kind],
                    verdict=VERDICTS[row.verdict],
                    error=int(row.error),
                    path=_raw(row.path),
                    unit=_raw(row.unit).decode("utf-8", "replace"),
                    comm=_raw(row.comm).decode("utf-8", "replace"),
                    reason=_raw(row.reason).decode("utf-8", "replace"),
                )
        return found


def _journal(data: bytes) -> Any:
    """The buffer lives as long as what is returned."""
    return ffi.from_buffer("struct ix_journal *", data)


def _raw(field: Any) -> bytes:
    return bytes(ffi.buffer(field)).split(b"\0", 1)[0]


def _seal(fd: OwnedFd) -> None:
    fcntl.fcntl(fd.fileno(), fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)


assert (BUCKETS, len(OPERATIONS)) == (lib.IX_BUCKETS, lib.IX_KINDS), (
    "observe/latency.py and native/api.h differ"
)
