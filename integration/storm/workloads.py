"""What is called: plans of mount(2), umount2(2) and other calls as data, each call with the errno it must have."""

from __future__ import annotations

import errno
from dataclasses import dataclass

from integration.storm import systemd
from interceptor.kernel.flags import MountFlag, UmountFlag

#: Directories that every container of a benchmark has, made by `contestants.furnish`, as those of `systemd`.
SOURCE, TARGET, COPY = "/tmp/source", "/tmp/target", "/tmp/copy"


@dataclass(frozen=True)
class Step:
    """One call. ``figure`` names what its time counts for; empty: it only prepares or clears away."""

    figure: str
    call: str


def umount(figure: str, target: str, *, flags: int = 0, expected: int = 0) -> Step:
    """umount2(2)."""
    return Step(figure, f"umount2 {target} {flags} {expected}")


def mount(figure: str, source: str, target: str, fstype: str, flags: int = 0, expected: int = 0) -> Step:
    """mount(2); ``-`` is NULL."""
    return Step(figure, f"mount {source} {target} {fstype} {flags} {expected}")


def new_api(figure: str, fstype: str, target: str, expected: int = 0) -> Step:
    """fsopen(2), fsconfig(2), fsmount(2), move_mount(2)."""
    return Step(figure, f"new_api {fstype} {target} {expected}")


@dataclass(frozen=True)
class Workload:
    """Calls that are made in turn, ``turn`` times before it is another contestant's turn.

    A workload for which ``guarded`` is set asks for what only an intercepted container has. ``whole`` names what the
    sum of all steps counts for, if anything.
    """

    name: str
    steps: tuple[Step, ...]
    turn: int
    guarded: bool = False
    whole: str = ""


BIND = int(MountFlag.MS_BIND)
RECURSIVE_BIND = int(MountFlag.MS_BIND | MountFlag.MS_REC)
DETACH = int(UmountFlag.MNT_DETACH)

#: An original submount to us; to the kernel, without us, a directory on which nothing is mounted. EINVAL from both.
DENIED = Workload("denied", (umount("denied", "/proc/sys", expected=errno.EINVAL),), 500)

#: An original base, lazily: nobody but us could let a container ask for this again and again.
DENIED_LAZY = Workload(
    "denied_lazy", (umount("denied_lazy", "/proc", flags=DETACH, expected=errno.EBUSY),), 500, guarded=True
)

FREE = Workload("free", (mount("free_bind", SOURCE, TARGET, "-", BIND), umount("free_umount", TARGET)), 200)

PROPAGATION = Workload(
    "propagation", (mount("propagation", "-", "/tmp", "-", int(MountFlag.MS_PRIVATE)),), 500
)

#: A new procfs, which then is a copied base: one of its own, in another place.
PROC = Workload("proc", (mount("new_proc", "proc", TARGET, "proc"), umount("new_proc_umount", TARGET)), 20)

#: A copy of /proc; its submount goes, then all of it.
COPIES = Workload(
    "copies",
    (
        mount("", "/proc", COPY, "-", RECURSIVE_BIND),
        umount("copied_submount", f"{COPY}/sys"),
        umount("copied_base", COPY),
    ),
    20,
    guarded=True,
)

TMPFS = Workload("tmpfs", (mount("tmpfs", "t", TARGET, "tmpfs"), umount("tmpfs_umount", TARGET)), 50)

REMOUNT = Workload(
    "remount",
    (
        mount("", "t", TARGET, "tmpfs"),
        mount("remount", "-", TARGET, "-", BIND | int(MountFlag.MS_REMOUNT | MountFlag.MS_RDONLY)),
        umount("", TARGET),
    ),
    50,
)

NEW_API = Workload("new_api", (new_api("new_api", "proc", TARGET), umount("new_api_umount", TARGET)), 20)


#: Errnos differ: where covers were copied there is something to unmount.
SYSTEMD = Workload(
    "systemd", tuple(Step("", call) for call in systemd.service()), 10, whole="systemd_service"
)

ALL = (DENIED, DENIED_LAZY, FREE, TMPFS, REMOUNT, PROPAGATION, PROC, COPIES, NEW_API, SYSTEMD)

#: Those that are also measured in tables of other sizes than `figures.FEW`.
BY_SIZE = (DENIED, FREE)
