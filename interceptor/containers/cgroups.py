"""In which cgroups a container's first process is, and where on the host their files are (cgroups(7))."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from interceptor.view import cgroup
from interceptor.view.host import read_cgroup

#: Those of version 1 whose files are read.
_CONTROLLERS = frozenset({"memory", "cpu", "cpuacct", "cpuset", "blkio", "pids"})
_PATHS_MAX = 3000
"""Bytes of paths that fit into the order to the view (`interceptor.view.protocol.CONTROL_MAX`)."""

_ESCAPED = re.compile(r"\\([0-7]{3})")


def places(cgroups: str, mountinfo: str) -> dict[str, tuple[str, str]]:
    """By controller (`cgroup.UNIFIED`: version 2) the mount point of its hierarchy and the cgroup's path in that.

    From /proc/PID/cgroup and the mountinfo of whoever is going to read. Hierarchies that are mounted nowhere, or
    without that cgroup in sight, are left out, and so is a hierarchy's root, which limits nothing and is nobody's own.
    """
    tops = _mounted(mountinfo)
    found = {}
    for line in cgroups.splitlines():
        _, names, path = [*line.split(":", 2), "", ""][:3]
        for controller in names.split(",") if names else [cgroup.UNIFIED]:
            if controller not in tops or (controller and controller not in _CONTROLLERS):
                continue
            top, root = tops[controller]
            inside = (
                path.removeprefix(root.rstrip("/")) if f"{path}/".startswith(f"{root.rstrip('/')}/") else ""
            )
            if inside.strip("/") and "/../" not in f"{inside}/":
                found[controller] = (top, inside.strip("/"))
    return found


def _mounted(mountinfo: str) -> dict[str, tuple[str, str]]:
    """Mount point and mount root by controller; the first mount of each counts."""
    found: dict[str, tuple[str, str]] = {}
    for line in mountinfo.splitlines():
        head, _, tail = line.partition(" - ")
        words, (kind, _, options) = head.split(" "), [*tail.split(" "), "", "", ""][:3]
        if kind not in ("cgroup", "cgroup2") or len(words) < 5:
            continue
        root, top = (_ESCAPED.sub(lambda m: chr(int(m[1], 8)), word) for word in words[3:5])
        names = [cgroup.UNIFIED] if kind == "cgroup2" else options.split(",")
        for name in names:
            found.setdefault(name, (top, root))
    return found


def cgroups_of(pid: int) -> dict[str, Any]:
    """What the view is told (`interceptor.view.protocol.Cgroups`). `OSError` if the process is gone."""
    text = Path(f"/proc/{pid}/cgroup").read_text(errors="replace")
    where = places(text, Path("/proc/self/mountinfo").read_text(errors="replace"))
    if sum(len(os.fsencode(top + path)) for top, path in where.values()) > _PATHS_MAX:
        where = {}
    files = cgroup.files_of(where, read_cgroup)
    user, system = cgroup.cpu_time(files) or (0, 0)
    return {"places": where, "user_us": user, "system_us": system, "stalled_us": cgroup.stalled(files)}
