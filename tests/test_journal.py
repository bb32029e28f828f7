"""What can be read from the journal."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interceptor._native import ffi
from interceptor.guards.journal import Journal
from interceptor.observe.latency import bucket_limit_us, percentile


def bucket_of(ns: int) -> int:
    """native/guard.c, record()."""
    if ns < 256:
        return 0
    octave = ns.bit_length() - 1
    return (octave - 8) * 8 + ((ns >> (octave - 3)) & 7)


@given(st.integers(min_value=256, max_value=2**28 - 1))
def test_a_latency_is_within_an_eighth_below_its_buckets_limit(ns: int) -> None:
    limit = bucket_limit_us(bucket_of(ns)) * 1000
    assert ns < limit <= ns * 1.1251


@given(st.lists(st.integers(min_value=0, max_value=50), min_size=1, max_size=60), st.floats(0.01, 1.0))
def test_a_percentile_has_its_share_at_or_below(buckets: list[int], share: float) -> None:
    found = percentile(buckets, share)
    if sum(buckets) == 0:
        assert found is None
        return
    index = next(i for i in range(len(buckets)) if bucket_limit_us(i) == found)
    assert sum(buckets[: index + 1]) >= share * sum(buckets)
    assert sum(buckets[:index]) < share * sum(buckets)


def test_a_new_journal_is_empty_and_cannot_change_its_size() -> None:
    journal = Journal.create("test")
    stats = journal.stats()
    assert stats["counts"] == {"continued": 0, "denied": 0, "handled": 0}
    assert stats["umounts_by_unit"] == {}
    assert journal.open_calls() == 0
    with pytest.raises(PermissionError):
        os.ftruncate(journal.fd.fileno(), 4096)


def test_records_have_the_sizes_that_both_sides_count_on() -> None:
    assert ffi.sizeof("struct ix_slot") == 256
    assert ffi.sizeof("struct ix_ask") % 8 == 0
    assert ffi.sizeof("struct ix_answer") % 8 == 0
