"""mountinfo without what differs between equal namespaces: numbers of mounts, devices and peer groups."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

_NUMBER = re.compile(r"(shared|master|propagate_from):(\d+)")

#: A container's subtree of the view, and what a mount's data says of this process alone.
_NAMES = re.compile(r"/ix-[0-9a-f]+/")
_OWN = re.compile(r"\b(fd|pgrp|pipe_ino)=\d+")


@dataclass(frozen=True)
class Mount:
    """One line of proc_pid_mountinfo(5)."""

    mnt_id: int
    parent_id: int
    dev: str
    root: str
    point: str
    options: str
    optional: str
    fstype: str
    source: str
    super_options: str

    @property
    def is_cover(self) -> bool:
        """Whether it is one of ours: the view, a shield, something masked."""
        return self.source.startswith("interceptor")


def parse(text: str) -> list[Mount]:
    """All lines."""
    mounts = []
    for line in text.splitlines():
        left, right = line.split(" - ", 1)
        mnt_id, parent_id, dev, root, point, options, *optional = left.split(" ")
        fstype, source, super_options = [*right.split(" "), "", ""][:3]
        mounts.append(
            Mount(
                int(mnt_id),
                int(parent_id),
                dev,
                _NAMES.sub("/ix/", root),
                point,
                options,
                " ".join(optional),
                fstype,
                source,
                _OWN.sub(r"\1=N", super_options),
            )
        )
    return mounts


def without_covers(mounts: list[Mount]) -> list[Mount]:
    """As on a machine of its own: what stands on a cover stands on what the cover is on."""
    parents = {m.mnt_id: m for m in mounts}

    def uncovered(parent: int) -> int:
        while parent in parents and parents[parent].is_cover:
            parent = parents[parent].parent_id
        return parent

    return [
        Mount(m.mnt_id, uncovered(m.parent_id), *(getattr(m, f) for f in list(m.__dataclass_fields__)[2:]))
        for m in mounts
        if not m.is_cover
    ]


def normal(mounts: list[Mount]) -> tuple[str, ...]:
    """Lines that are equal for equal mount trees, whatever order things were mounted in."""
    ids = {m.mnt_id: m for m in mounts}

    def depth(mount: Mount) -> int:
        """How many mounts at the same point this one is stacked upon."""
        parent = ids.get(mount.parent_id)
        if parent is None or parent is mount or parent.point != mount.point:
            return 0
        return 1 + depth(parent)

    def place(mount: Mount) -> str:
        return f"{mount.point}[{depth(mount)}]"

    def parent(mount: Mount) -> str:
        above = ids.get(mount.parent_id)
        return "-" if above is None else place(above)

    def chain(mount: Mount) -> list[str]:
        above = ids.get(mount.parent_id)
        return [place(mount), *(chain(above) if above is not None and above is not mount else ())]

    ordered = sorted(mounts, key=chain)
    devices = _numbered()
    groups = _numbered()

    def line(m: Mount) -> str:
        fields = "".join(f" {word}" for word in m.optional.split())
        optional = _NUMBER.sub(lambda found: f"{found[1]}:{groups(found[2])}", fields)
        return (
            f"{place(m)} on {parent(m)} dev {devices(m.dev)} root {m.root} {m.options}{optional} "
            f"- {m.fstype} {m.source} {m.super_options}"
        )

    return tuple(line(m) for m in ordered)


def _numbered() -> Callable[[str], int]:
    seen: dict[str, int] = {}
    return lambda name: seen.setdefault(name, len(seen))
