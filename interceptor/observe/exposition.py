"""Counters as Prometheus wants them. Pure: what is counted comes as arguments, text goes out.

The number of series is bounded: of containers, the first `CONTAINERS_MAX` have a label of their own, the rest share
one. Latencies, of all containers together, have one bucket an octave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from interceptor.observe.latency import BUCKETS, OCTAVE, VERDICTS, Histogram, Reading, bucket_limit_us

CONTAINERS_MAX = 256
#: The label of the others.
OTHERS = "(others)"
#: What is said with which content type.
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

#: Sums over all containers, those that are gone included: name without ``_total``, help, field of `Reading`.
_SUMS = (
    ("interceptor_cache_hits", "Verdicts that a guard knew.", "cached"),
    ("interceptor_cache_misses", "Verdicts that a guard had to find out.", "missed"),
    ("interceptor_questions", "Questions of guards to the daemon.", "asked"),
    ("interceptor_replies_lost", "Replies whose caller was gone or interrupted.", "lost"),
    ("interceptor_orphans", "Effects kept for a caller that was interrupted.", "orphaned"),
    ("interceptor_overloaded", "Calls let through unexamined: every receiver was stuck.", "overloaded"),
)
_DAEMON_COUNTERS = (
    ("interceptor_registrations", "Containers registered since the daemon started.", "registrations"),
    ("interceptor_guard_deaths", "Guards that died and were replaced.", "guard_deaths"),
    ("interceptor_repetitions", "Times that a call repeated without effect was told of.", "storms"),
)
_DAEMON_GAUGES = (
    ("interceptor_containers", "Containers registered now.", "containers"),
    ("interceptor_guards", "Guards at work now.", "guards"),
    ("interceptor_followers", "Clients of `interceptor events` now.", "followers"),
)


@dataclass(frozen=True)
class DaemonFigures:
    """What the daemon itself counts."""

    registrations: int
    guard_deaths: int
    storms: int
    containers: int
    guards: int
    followers: int


@dataclass
class Exposition:
    """What must be remembered from one scrape to the next, so that no sum ever falls."""

    _ended: Reading = field(default_factory=Reading)
    _ended_others: Reading = field(default_factory=Reading)
    _labelled: set[str] = field(default_factory=set)
    _others: set[str] = field(default_factory=set)

    def ended(self, cid: str, reading: Reading) -> None:
        """The container is gone: what it has counted stays in the sums."""
        self._ended.add(reading)
        if cid in self._others:
            self._ended_others.add(reading)
        self._others.discard(cid)
        self._labelled.discard(cid)

    def text(self, readings: Mapping[str, Reading], daemon: DaemonFigures) -> bytes:
        """All metrics, in the text format."""
        registry = CollectorRegistry()
        registry.register(_Collected(lambda: self._families(readings, daemon)))
        return generate_latest(registry)

    def _families(self, readings: Mapping[str, Reading], daemon: DaemonFigures) -> Iterable[Metric]:
        total = Reading()
        total.add(self._ended)
        for reading in readings.values():
            total.add(reading)
        yield self._calls(readings)
        yield _latencies(total.by_verdict())
        for name, text, attribute in _SUMS:
            yield CounterMetricFamily(name, text, value=getattr(total, attribute))
        waiting = sum(reading.waiting for reading in readings.values())
        yield GaugeMetricFamily(
            "interceptor_questions_waiting", "Questions that wait for the daemon now.", value=waiting
        )
        for name, text, attribute in _DAEMON_COUNTERS:
            yield CounterMetricFamily(name, text, value=getattr(daemon, attribute))
        for name, text, attribute in _DAEMON_GAUGES:
            yield GaugeMetricFamily(name, text, value=getattr(daemon, attribute))

    def _calls(self, readings: Mapping[str, Reading]) -> Metric:
        labels = ["container", "operation", "verdict"]
        family = CounterMetricFamily("interceptor_calls", "Trapped calls.", labels=labels)
        others = Reading()
        others.add(self._ended_others)
        for cid, reading in readings.items():
            if self._has_label(cid):
                _add_calls(family, cid, reading)
            else:
                others.add(reading)
        _add_calls(family, OTHERS, others)
        return family

    def _has_label(self, cid: str) -> bool:
        """Once and for all: counters must not move from one series to another."""
        if cid not in self._labelled and cid not in self._others:
            (self._labelled if len(self._labelled) < CONTAINERS_MAX else self._others).add(cid)
        return cid in self._labelled


class _Collected:
    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self.collect = collect


def _add_calls(family: CounterMetricFamily, container: str, reading: Reading) -> None:
    for (operation, verdict), histogram in sorted(reading.calls.items()):
        family.add_metric([container, operation, verdict], histogram.count)


def _latencies(by_verdict: Mapping[str, Histogram]) -> Metric:
    family = HistogramMetricFamily(
        "interceptor_call_duration_seconds",
        "From receipt of a trapped call to its reply.",
        labels=["verdict"],
    )
    for verdict in VERDICTS:
        histogram = by_verdict[verdict]
        buckets: list[tuple[str, float]] = []
        below = 0
        for end in range(OCTAVE, BUCKETS, OCTAVE):
            below += sum(histogram.buckets[end - OCTAVE : end])
            buckets.append((repr(bucket_limit_us(end - 1) / 1e6), below))
        # The last bucket takes all that is slower.
        buckets.append(("+Inf", histogram.count))
        family.add_metric([verdict], buckets, sum_value=histogram.sum_ns / 1e9)
    return family
