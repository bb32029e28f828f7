"""The differences that are meant, each with the kernel's answer alone and the reason. All others are defects."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.fidelity.calls import Call, Opened
from tests.fidelity.stage import MS_BIND, MS_MOVE, MS_REMOUNT
from tests.fidelity.twins import Difference

MOVE_MOUNT_BENEATH = 0x200
_COVER = re.compile(
    rb"(.*/)?(proc|proclink)/(sys|uptime|swaps)(/.*)?|"
    rb"(.*/)?sys/(kernel|devices/virtual|module/nf_conntrack/parameters)(/.*)?"
)
_PROPAGATION = re.compile(r" (shared|master):\d+")
_SOURCE = re.compile(r"( - \S+) \S* (\S+)$")


@dataclass(frozen=True)
class Point:
    """Where two outcomes part: at a call, or after the last one in the mounts."""

    difference: Difference
    index: int

    @property
    def call(self) -> Call:
        return self.difference.script[min(self.index, len(self.difference.script) - 1)]

    @property
    def name(self) -> str:
        return self.call.name

    @property
    def answers(self) -> tuple[str, str]:
        """Ours and the kernel's alone; equal where only the mounts differ."""
        index = min(self.index, len(self.difference.script) - 1)
        return self.difference.ours[0][index], self.difference.theirs[0][index]

    @property
    def is_call(self) -> bool:
        return self.index < len(self.difference.script)

    @property
    def flags(self) -> int:
        """Of mount(2)."""
        flags = self.call.arguments[3] if self.name == "mount" else 0
        return flags if isinstance(flags, int) else 0

    @property
    def is_umount(self) -> bool:
        return self.name in ("umount2", "umount")

    @property
    def path(self) -> bytes:
        """What the call is about: a source that is moved, else the target."""
        arguments = self.call.arguments
        if self.name == "mount":
            found = arguments[0 if self.flags & MS_MOVE and not self.flags & MS_REMOUNT else 1]
        else:
            found = arguments[0 if self.is_umount else 1]
        return found if isinstance(found, bytes) else b""

    def mounts_equal(self, pattern: re.Pattern[str], into: str) -> bool:
        """Whether the mounts are equal but for what ``pattern`` finds."""
        ours, theirs = (
            sorted(pattern.sub(into, line) for line in state or ())
            for state in (self.difference.ours[1], self.difference.theirs[1])
        )
        return not self.is_call and ours == theirs


def point_of(difference: Difference) -> Point:
    """Where the outcomes part."""
    pairs = zip(difference.ours[0], difference.theirs[0], strict=True)
    return Point(difference, next((i for i, (a, b) in enumerate(pairs) if a != b), len(difference.script)))


@dataclass(frozen=True)
class Meant:
    """One kind of difference: a row of the table."""

    request: str
    here: str
    alone: str
    why: str
    holds: Callable[[Point], bool]

    def row(self) -> str:
        return f"| {self.request} | {self.here} | {self.alone} | {self.why} |"


def _is_copy(point: Point) -> bool:
    """Whether the call is about a copy on the stage; in a chroot there is nothing else."""
    on_stage = point.path.startswith(b"/tmp/f/") and not point.path.startswith(b"/tmp/f/proclink")
    return on_stage or (point.difference.context == "chroot" and b"/fd/" not in point.path)


def _is_cover(point: Point) -> bool:
    return bool(_COVER.fullmatch(point.path))


def _binds_cover(point: Point) -> bool:
    """Whether something at or below a cover is what ends up elsewhere."""
    return not point.is_call and any(
        isinstance(argument, bytes) and _COVER.fullmatch(argument)
        for call in point.difference.script
        if call.name in ("mount", "open_tree", "move_mount")
        for argument in call.arguments[:2]
    )


def _makes_new(point: Point) -> bool:
    return point.name == "mount" and point.call.arguments[2] in (b"proc", b"sysfs")


def _sets_access_times(point: Point) -> bool:
    """Whether a new one is to have MS_NOATIME, MS_NODIRATIME or MS_STRICTATIME, or the attribute for it."""
    if point.name == "fsmount":
        attributes = point.call.arguments[2]
        return isinstance(attributes, int) and bool(attributes & 0xF0)
    return _makes_new(point) and bool(point.flags & (0x400 | 0x800 | 1 << 24))


def _is_busy(point: Point) -> bool:
    """Whether the script holds the mount by a descriptor or a working directory."""
    return any(call.name in ("open", "chdir", "fsmount") for call in point.difference.script)


def _weakens(point: Point) -> bool:
    return (point.name == "mount" and bool(point.flags & MS_REMOUNT)) or point.name == "mount_setattr"


def _moves(point: Point) -> bool:
    return point.name == "move_mount" or (point.name == "mount" and not point.flags & (MS_BIND | MS_REMOUNT))


def _puts_beneath(point: Point) -> bool:
    """Whether it is to be mounted beneath the original `/proc` or `/sys`."""
    if point.name != "move_mount":
        return False
    target, flags = point.call.arguments[3:5]
    original = isinstance(target, bytes) and os.path.normpath(target) in (b"/proc", b"/sys")
    return original and isinstance(flags, int) and bool(flags & MOVE_MOUNT_BENEATH)


_ON_COVERS = (("0", "EINVAL"), ("EPERM", "EINVAL"))
_UNKNOWN = (b"pidns=/proc/self/ns/pid", b"gid=4294967295")

MEANT: tuple[Meant, ...] = (
    Meant(
        "umount of the original `/proc` or `/sys`",
        "EBUSY",
        "0 where nothing uses it, or with MNT_DETACH; EAGAIN with MNT_EXPIRE",
        "originals stay",
        lambda p: p.is_umount and p.answers in (("EBUSY", "0"), ("EBUSY", "EAGAIN")) and not _is_copy(p),
    ),
    Meant(
        "MNT_EXPIRE of a copied `/proc` or `/sys`",
        "EBUSY",
        "EAGAIN, then 0",
        "the kernel lets nothing expire that has mounts on it",
        lambda p: p.is_umount and p.answers == ("EBUSY", "EAGAIN") and _is_copy(p),
    ),
    Meant(
        "umount of a copied `/proc` or `/sys` that is in use",
        "0; its users keep it, covered",
        "EBUSY",
        "welded mounts go lazily or not at all, and nobody can tell who uses them",
        lambda p: p.is_umount and p.answers == ("0", "EBUSY") and _is_busy(p),
    ),
    Meant(
        "umount of a copied cover",
        "0, and a shield stands there",
        "EINVAL: no mount there",
        "whoever sees a mount in a copy can have it removed",
        lambda p: p.is_umount and p.answers == ("0", "EINVAL") and _is_cover(p),
    ),
    Meant(
        "move of the original `/proc` or `/sys`",
        "EINVAL",
        "0",
        "originals stay",
        lambda p: p.answers == ("EINVAL", "0") and _moves(p) and not _is_copy(p),
    ),
    Meant(
        "move of something beneath the original `/proc` or `/sys`",
        "EINVAL",
        "0",
        "originals stay where they stand",
        lambda p: p.answers == ("EINVAL", "0") and _puts_beneath(p),
    ),
    Meant(
        "remount or mount_setattr that clears nosuid, nodev, noexec or read-only of what the container was made with, "
        "or of a copy",
        "EPERM",
        "0",
        "the flags are welded",
        lambda p: _weakens(p) and p.answers == ("EPERM", "0"),
    ),
    Meant(
        "remount, mount_setattr or change of propagation of a cover",
        "0; EPERM where it clears a flag",
        "EINVAL: no mount there",
        "covers are mounts",
        lambda p: p.name in ("mount", "mount_setattr") and _is_cover(p) and p.answers in _ON_COVERS,
    ),
    Meant(
        "bind or clone of a managed path, or of something below it",
        "the view",
        "the raw node",
        "nothing raw shows",
        _binds_cover,
    ),
    Meant(
        "bind, not recursive, of a `/proc` or `/sys` that shares mounts with others",
        "private",
        "in its peer group",
        "what is taken from the copy must not go from the original",
        lambda p: p.mounts_equal(_PROPAGATION, ""),
    ),
    Meant(
        "new procfs or sysfs with access times other than those in sight",
        "done",
        "EPERM",
        "the kernel's rule protects a mount that the composite does not depend on",
        lambda p: _sets_access_times(p) and p.answers[1] == "EPERM" and not p.answers[0].startswith("E"),
    ),
    Meant(
        "new procfs with `pidns=` or `gid=4294967295`, by mount(2)",
        "EPERM",
        "done",
        "left to the kernel; `fsconfig` knows them",
        lambda p: _makes_new(p) and p.answers == ("EPERM", "0") and p.call.arguments[4] in _UNKNOWN,
    ),
    Meant(
        "source of a new one, if it is long or not plain ASCII; of a sysfs that was bound or cloned again",
        "`proc` or `sysfs`",
        "as given",
        "names of the container's making do not cross into the daemon",
        lambda p: p.mounts_equal(_SOURCE, r"\1 \2"),
    ),
    Meant(
        "`open_tree(OPEN_TREE_CLONE)` of a new procfs or sysfs that is not attached yet",
        "EINVAL",
        "done",
        "a detached tree is cloned only in the mount namespace that it was made in",
        lambda p: p.name == "open_tree" and isinstance(p.call.arguments[0], Opened) and p.answers[0] == "EINVAL",
    ),
)  # fmt: skip


def meaning(difference: Difference) -> Meant | None:
    """The row that a difference belongs to; None for a defect."""
    point = point_of(difference)
    return next((meant for meant in MEANT if meant.holds(point)), None)


def table(rows: Sequence[Meant] = MEANT) -> str:
    """For the README."""
    head = "| request | here | the kernel alone | why |\n|---|---|---|---|\n"
    return head + "\n".join(meant.row() for meant in rows) + "\n"
