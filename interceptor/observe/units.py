"""Who a process is to systemd."""

from __future__ import annotations

from pathlib import Path

_ENDINGS = (".service", ".scope")


def unit_of(tid: int) -> str:
    """The unit that a thread belongs to, by its cgroup (cgroups(7)); ``-`` where that is not known or it is gone."""
    try:
        cgroups = Path(f"/proc/{tid}/cgroup").read_text(errors="replace")
    except OSError:
        return "-"
    return unit_in(cgroups)


def unit_in(cgroups: str) -> str:
    """The innermost unit named in the text of a cgroup file."""
    names = [name for line in cgroups.splitlines() for name in line.split("/") if name.endswith(_ENDINGS)]
    return names[-1] if names else "-"
