"""Which paths of procfs and sysfs are covered, and by what. Pure data."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

#: Paths within procfs and sysfs that the view stands in for (DESIGN.md, section 3).
VIEW_PROC = (b"uptime", b"swaps", b"sys")
VIEW_SYS = (b"kernel", b"devices/virtual", b"module/nf_conntrack/parameters")

#: Those that are covered as well where the configuration says ``cgroup_aware``.
CGROUP_PROC = (b"meminfo", b"cpuinfo", b"stat", b"loadavg", b"diskstats")
CGROUP_SYS = (b"devices/system/cpu/online",)

BASE_TYPES = (b"proc", b"sysfs")


class Cover(enum.Enum):
    """What stands on a managed path."""

    VIEW = "view"
    MASKED = "masked"
    READONLY = "readonly"
    SHIELD = "shield"


@dataclass(frozen=True, slots=True)
class Covered:
    """One managed path: relative to its filesystem's root, without slashes at either end."""

    path: bytes
    cover: Cover
    readonly: bool = False
    """The view, read-only: the runtime asked for a read-only path there."""


@dataclass(frozen=True)
class Plan:
    """All that is covered in one container, parents before what lies below them."""

    proc: tuple[Covered, ...]
    sys: tuple[Covered, ...]

    @cached_property
    def _paths(self) -> tuple[frozenset[bytes], frozenset[bytes]]:
        return frozenset(c.path for c in self.proc), frozenset(c.path for c in self.sys)

    def of(self, fstype: bytes) -> tuple[Covered, ...]:
        """The covers of a base of that filesystem type (``proc`` or ``sysfs``)."""
        return self.proc if fstype == b"proc" else self.sys

    def paths(self, fstype: bytes) -> frozenset[bytes]:
        """Every path of that filesystem type on which something welded may stand."""
        return self._paths[fstype != b"proc"]


@dataclass
class _Draft:
    view: dict[bytes, bool] = field(default_factory=dict)
    masked: set[bytes] = field(default_factory=set)
    readonly: set[bytes] = field(default_factory=set)


def viewed(cgroup_aware: bool) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
    """The paths that the view stands in for, in procfs and in sysfs."""
    return (
        VIEW_PROC + (CGROUP_PROC if cgroup_aware else ()),
        VIEW_SYS + (CGROUP_SYS if cgroup_aware else ()),
    )


def make_plan(
    masked: Iterable[bytes] = (), readonly: Iterable[bytes] = (), *, cgroup_aware: bool = False
) -> Plan:
    """The plan for a container with these OCI maskedPaths and readonlyPaths (absolute; others than procfs's and
    sysfs's are the runtime's business). A path that is both masked and managed is masked.
    """
    masked, readonly = list(masked), list(readonly)
    proc, sys = viewed(cgroup_aware)
    return Plan(proc=_plan(b"/proc/", proc, masked, readonly), sys=_plan(b"/sys/", sys, masked, readonly))


def _plan(
    prefix: bytes, view: tuple[bytes, ...], masked: list[bytes], readonly: list[bytes]
) -> tuple[Covered, ...]:
    hidden = {p[len(prefix) :].strip(b"/") for p in masked if p.startswith(prefix)} - {b""}
    fixed = {p[len(prefix) :].strip(b"/") for p in readonly if p.startswith(prefix)} - {b""}
    covers = {path: Covered(path, Cover.VIEW, readonly=path in fixed) for path in view}
    # A read-only path inside the view is the view's own affair, one above it is the base's.
    covers |= {
        path: Covered(path, Cover.READONLY)
        for path in fixed
        if path not in covers and not _related(path, view)
    }
    covers |= {path: Covered(path, Cover.MASKED) for path in hidden}
    return tuple(covers[path] for path in sorted(covers, key=lambda p: (p.count(b"/"), p)))


def _related(path: bytes, view: tuple[bytes, ...]) -> bool:
    return any(path.startswith(v + b"/") or v.startswith(path + b"/") for v in view)
