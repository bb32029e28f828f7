"""What a run of the quickstart found out, and how it is judged: pure data, one line of the table for each fact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: More umounts than this by one service are a storm; systemd 257 needs about ten.
STORM = 200
#: "A handful": more calls than this for one umount_recursive means that something comes back.
HANDFUL = 60
KINDS = ("continued", "denied", "handled")
ANSWERED_BY = {
    "continued": "natively: the kernel runs it",
    "denied": "an error of ours",
    "handled": "by the daemon",
}


@dataclass(frozen=True)
class Line:
    """One row of the table."""

    what: str
    value: str
    good: bool


@dataclass(frozen=True)
class Service:
    """A unit's ``Result`` (systemctl show; ``not-run`` and ``hanging`` are ours) and how many umounts it made."""

    result: str
    umounts: int | None


@dataclass(frozen=True)
class Refusal:
    """An unmount of an original: what was tried, the errno, and the one that is right."""

    path: str
    flags: int
    errno: int
    expected: int


@dataclass(frozen=True)
class Recursive:
    """One umount_recursive: calls made and the mounts that are left at and below its prefix."""

    prefix: str
    calls: int
    left: int


@dataclass(frozen=True)
class Latency:
    """Microseconds from receipt to reply of one kind of answer; None where none was given."""

    p50: float | None
    p99: float | None
    count: int = 0


@dataclass
class Facts:
    """Filled in step by step; a fact that is still missing at the end makes its line bad."""

    services: dict[str, Service] = field(default_factory=dict)
    device: tuple[str, bool] | None = None
    inner_proc: bool = False
    copies_removed: int = 0
    copies_kept: list[str] = field(default_factory=list)
    recursive: list[Recursive] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    originals: int = 0
    originals_lost: list[str] = field(default_factory=list)
    looked_at: int = 0
    raw: list[str] = field(default_factory=list)
    latency: dict[str, Latency] = field(default_factory=dict)
    left_processes: list[str] | None = None
    bug: Mapping[str, Any] | None = None

    @property
    def originals_intact(self) -> bool:
        """Whether there are originals and each is the very mount that it was."""
        return self.originals > 0 and not self.originals_lost


def lines(facts: Facts) -> list[Line]:
    """Return the table."""
    return [
        *_bug_lines(facts),
        *_service_lines(facts),
        *_device_lines(facts),
        Line(
            "inner PID namespace mounts its own /proc",
            "with the view" if facts.inner_proc else "no",
            facts.inner_proc,
        ),
        *_copy_lines(facts),
        *_original_lines(facts),
        Line(
            "raw nodes seen",
            f"{len(facts.raw)} in {facts.looked_at} looks" + _list(facts.raw),
            facts.looked_at > 0 and not facts.raw,
        ),
        *_latency_lines(facts),
        _left_line(facts),
    ]


def as_json(facts: Facts) -> dict[str, Any]:
    """Return the facts in the form of ``--json``."""
    result: dict[str, Any] = {
        "services": {
            name: {"result": service.result, "umounts": service.umounts}
            for name, service in facts.services.items()
        },
        "copies_removed": facts.copies_removed,
        "originals_intact": facts.originals_intact,
        "raw_seen": len(facts.raw),
        "latency_us": {kind: {"p50": one.p50, "p99": one.p99} for kind, one in facts.latency.items()},
    }
    if facts.bug is not None:
        result["bug"] = dict(facts.bug)
    return result


def _bug_lines(facts: Facts) -> list[Line]:
    if facts.bug is None:
        return []
    rate = facts.bug["calls_per_second"]
    return [Line("the bug: faked umounts a second", f"{rate:,.0f} (a storm was to be seen)", rate > 0)]


def _service_lines(facts: Facts) -> list[Line]:
    result = []
    for name, service in facts.services.items():
        count = "umounts not counted" if service.umounts is None else f"{service.umounts} umounts"
        good = service.result == "success" and (service.umounts or 0) <= STORM
        result.append(Line(name, f"{service.result}, {count}", good))
    return result or [Line("services", "none ran", False)]


def _device_lines(facts: Facts) -> list[Line]:
    if facts.device is None:
        return []
    path, usable = facts.device
    return [Line(f"host device {path}", "bound in and still there" if usable else "lost", usable)]


def _copy_lines(facts: Facts) -> list[Line]:
    removed = f"{facts.copies_removed}" + (f", kept: {_list(facts.copies_kept)}" if facts.copies_kept else "")
    result = [Line("copies removed", removed, facts.copies_removed > 0 and not facts.copies_kept)]
    for walk in facts.recursive:
        ended = f"{walk.calls} calls, {walk.left} mounts left"
        result.append(
            Line(f"umount_recursive {walk.prefix}", ended, walk.calls <= HANDFUL and walk.left == 0)
        )
    return result


def _original_lines(facts: Facts) -> list[Line]:
    wrong = [one for one in facts.refusals if one.errno != one.expected]
    text = f"{len(facts.refusals) - len(wrong)} of {len(facts.refusals)} refused with the right error"
    text += _list([f"{one.path} flags {one.flags}: errno {one.errno}, not {one.expected}" for one in wrong])
    intact = f"{facts.originals - len(facts.originals_lost)} of {facts.originals}" + _list(
        facts.originals_lost
    )
    return [
        Line("unmounts of originals", text, bool(facts.refusals) and not wrong),
        Line("originals still in place, by mount ID", intact, facts.originals_intact),
    ]


def _latency_lines(facts: Facts) -> list[Line]:
    result = []
    for kind in KINDS:
        one = facts.latency.get(kind, Latency(None, None))
        measured = one.p50 is not None and one.p99 is not None
        text = f"{one.p50:.1f} / {one.p99:.1f} ({one.count} calls)" if measured else "not measured"
        result.append(
            Line(f"µs per trapped umount, median / p99: {kind} ({ANSWERED_BY[kind]})", text, measured)
        )
    return result


def _left_line(facts: Facts) -> Line:
    left = facts.left_processes
    text = "not looked for" if left is None else f"{len(left)}" + _list(left)
    return Line("processes left when container and daemon are gone", text, left == [])


def _list(items: list[str]) -> str:
    return "".join(f"\n  {item}" for item in items)
