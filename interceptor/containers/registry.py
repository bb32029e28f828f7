"""The registered containers: all that is known and held of each, and how it is kept for a successor."""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Any

from interceptor.guards.link import Facts
from interceptor.kernel.fd import OwnedFd
from interceptor.mounts.composite import Material
from interceptor.mounts.lineage import UNIQUE_FROM, Baseline, MountClass, Recorded, roots
from interceptor.mounts.managed import Cover, Covered, Plan

#: As many as a guard knows again (native/newapi.c).
CONTEXTS_MAX = 64
BIRTHS_MAX = 256


@dataclass
class Container:
    """One container. Descriptors in here are closed by `close`."""

    cid: str
    pid: int
    """Its first process, in the host's numbering."""
    bundle: str
    created_ns: int
    """CLOCK_BOOTTIME."""
    uid: int
    gid: int
    """The host's numbers of its root."""
    pidfd: OwnedFd
    userns: OwnedFd
    netns: OwnedFd
    material: Material
    baseline: Baseline
    contexts: deque[tuple[OwnedFd, bytes]] = field(default_factory=lambda: deque(maxlen=CONTEXTS_MAX))
    """The last filesystem contexts that its processes were given, with their filesystem type."""
    listeners: dict[int, OwnedFd] = field(default_factory=dict)
    next_listener: int = 0
    settled: bool = False
    """What the runtime mounted after the hook has been taken in."""
    guard_pid: int = 0
    envoy_pid: int = 0
    envoy_pidfd: OwnedFd | None = None
    births: OrderedDict[int, int] = field(default_factory=OrderedDict)
    """When (CLOCK_BOOTTIME) the youngest composites were made that it asked for, by unique mount ID."""

    pidns_ino: int = 0
    netns_ino: int = 0
    """Inode numbers of its first process's namespaces; 0 where that has ended."""
    closed: bool = False

    def __post_init__(self) -> None:
        self.netns_ino = os.fstat(self.netns.fileno()).st_ino
        with contextlib.suppress(OSError):
            self.pidns_ino = os.stat(f"/proc/{self.pid}/ns/pid").st_ino

    def note_birth(self, mnt_id: int, now: int) -> None:
        """Remembers when a mount was made, by unique ID; the oldest is forgotten when there are too many."""
        if mnt_id < UNIQUE_FROM:
            return
        self.births[mnt_id] = now
        if len(self.births) > BIRTHS_MAX:
            self.births.popitem(last=False)

    def close(self) -> None:
        """Lets go of everything that is held for it."""
        self.closed = True
        for fd in [self.pidfd, self.userns, self.netns, *self.listeners.values()]:
            fd.close()
        if self.envoy_pidfd is not None:
            self.envoy_pidfd.close()
        self.listeners.clear()
        self.contexts.clear()
        self.material.close()


class Registry:
    """The one place that knows which containers there are."""

    def __init__(self) -> None:
        self._containers: dict[str, Container] = {}

    def add(self, container: Container) -> None:
        self._containers[container.cid] = container

    def get(self, cid: str) -> Container | None:
        return self._containers.get(cid)

    def remove(self, cid: str) -> Container | None:
        return self._containers.pop(cid, None)

    def all(self) -> list[Container]:
        return list(self._containers.values())

    def __len__(self) -> int:
        return len(self._containers)


def to_record(container: Container) -> dict[str, Any]:
    """What a successor needs to know, as JSON. Paths are Latin-1 text: one character a byte."""
    baseline = container.baseline
    return {
        "cid": container.cid,
        "pid": container.pid,
        "bundle": container.bundle,
        "created_ns": container.created_ns,
        "settled": container.settled,
        "uid": container.uid,
        "gid": container.gid,
        "guard_pid": container.guard_pid,
        "envoy_pid": container.envoy_pid,
        "namespace": baseline.namespace,
        "shield_dev": list(baseline.shield_dev),
        "plan": {"proc": _covers(baseline.plan.proc), "sys": _covers(baseline.plan.sys)},
        "mounts": [
            [m.mnt_id, m.kind.value, _text(m.point), list(m.dev), _text(m.root), m.attributes]
            for m in baseline.mounts.values()
        ],
    }


def baseline_of(record: dict[str, Any]) -> Baseline:
    """The baseline in a record of `to_record`."""
    plan = Plan(proc=_covered(record["plan"]["proc"]), sys=_covered(record["plan"]["sys"]))
    mounts = {
        mnt_id: Recorded(mnt_id, MountClass(kind), _bytes(point), (dev[0], dev[1]), _bytes(root), attributes)
        for mnt_id, kind, point, dev, root, attributes in record["mounts"]
    }
    shield = record["shield_dev"]
    return Baseline(record["namespace"], plan, mounts, (shield[0], shield[1]))


def facts_of(baseline: Baseline) -> Facts:
    """What a guard is told of a baseline."""
    return Facts(
        namespace=baseline.namespace,
        roots=roots(baseline),
        bases=[(m.mnt_id, m.point, m.dev) for m in baseline.bases()],
        proc=[c.path for c in baseline.plan.proc],
        sys=[c.path for c in baseline.plan.sys],
    )


def _covers(covers: tuple[Covered, ...]) -> list[list[object]]:
    return [[_text(c.path), c.cover.value, c.readonly] for c in covers]


def _covered(rows: list[list[Any]]) -> tuple[Covered, ...]:
    return tuple(Covered(_bytes(path), Cover(cover), readonly) for path, cover, readonly in rows)


def _text(raw: bytes) -> str:
    return raw.decode("latin-1")


def _bytes(text: str) -> bytes:
    return text.encode("latin-1")
