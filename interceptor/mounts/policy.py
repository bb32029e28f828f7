"""What each request gets: the table of DESIGN.md, section 5. Pure: class and circumstances in, verdict out."""

from __future__ import annotations

import enum
import errno
from dataclasses import dataclass

from interceptor.mounts.lineage import MountClass


class Request(enum.Enum):
    """Requests that a guard asks about."""

    UMOUNT = "umount"
    DETACH = "umount -l"
    MOVE = "move"
    REMOUNT = "remount"
    BENEATH = "move beneath"


class Deed(enum.Enum):
    """What is to be done."""

    KERNEL = "the kernel runs the call"
    REFUSE = "the call fails"
    REMOVE_BASE = "the copied base goes whole"
    REPLACE_BASE = "the copied base is replaced by one with a shield"
    CARRY_FLAGS = "the read-only flag reaches the submounts"


@dataclass(frozen=True, slots=True)
class Verdict:
    """A deed and its reason; ``lasting`` verdicts hold for this mount as long as the policy does."""

    deed: Deed
    reason: str
    error: int = 0
    lasting: bool = False


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What besides its class decides about a mount."""

    reaches_original: bool = False
    """Unmounting it would unmount an original base by propagation."""
    holds_original: bool = False
    """An original base stands below it, on a root that was pivoted away for example."""
    own_mounts: bool = False
    """The container has mounts of its own on it."""
    protect_immutable: bool = False
    """Configuration: protect_immutable_unmounts."""
    locked: bool = False
    """It came into a mount namespace of a nested user namespace, so the kernel has locked it already."""


_ORIGINALS = (MountClass.ORIGINAL_BASE, MountClass.ORIGINAL_SUBMOUNT)
_WELDED = (MountClass.ORIGINAL_SUBMOUNT, MountClass.SHIELD)
_BASES = (MountClass.ORIGINAL_BASE, MountClass.COPIED_BASE)


def decide(request: Request, kind: MountClass, circumstances: Circumstances) -> Verdict:
    """The verdict on a request."""
    if request is Request.REMOUNT:
        return _remount(kind)
    if request is Request.MOVE:
        return _move(kind)
    if request is Request.BENEATH:
        return _beneath(kind, circumstances)
    if kind is MountClass.ORIGINAL_BASE:
        return _original_base(request, circumstances)
    if request is Request.DETACH and circumstances.holds_original and kind not in _WELDED:
        return Verdict(Deed.REFUSE, "would take an original base along", errno.EBUSY)
    if kind is MountClass.COPIED_BASE:
        return _copied_base(request, circumstances)
    if kind is MountClass.COPIED_SUBMOUNT:
        return _copied_submount(request, circumstances)
    if circumstances.reaches_original:
        return Verdict(Deed.REFUSE, "would unmount an original by propagation", errno.EBUSY)
    if kind is MountClass.IMMUTABLE and circumstances.protect_immutable:
        return Verdict(Deed.REFUSE, "protect_immutable_unmounts", errno.EPERM, lasting=True)
    reason = {
        MountClass.ORIGINAL_SUBMOUNT: "welded: the kernel answers EINVAL",
        MountClass.SHIELD: "welded: the kernel answers EINVAL",
    }.get(kind, "the container's own business")
    # A lazy unmount takes along what is below by then: that verdict is for now.
    return Verdict(Deed.KERNEL, reason, lasting=request is not Request.DETACH or kind in _WELDED)


def _remount(kind: MountClass) -> Verdict:
    if kind in _BASES:
        return Verdict(Deed.CARRY_FLAGS, "a base and its submounts are one filesystem to the container")
    return Verdict(Deed.KERNEL, "locked flags cannot be cleared", lasting=True)


def _move(kind: MountClass) -> Verdict:
    if kind is MountClass.ORIGINAL_BASE:
        return Verdict(Deed.REFUSE, "original bases stay", errno.EINVAL, lasting=True)
    return Verdict(Deed.KERNEL, "welded submounts do not move, bases move whole", lasting=True)


def _beneath(kind: MountClass, circumstances: Circumstances) -> Verdict:
    """Originals of cloned namespaces are known by what they stand on: that must not change."""
    if circumstances.holds_original or (kind is MountClass.ORIGINAL_BASE and not circumstances.locked):
        return Verdict(Deed.REFUSE, "original bases stay on what they stand on", errno.EINVAL)
    return Verdict(Deed.KERNEL, "no original stands on it", lasting=False)


def _original_base(request: Request, circumstances: Circumstances) -> Verdict:
    if circumstances.locked:
        return Verdict(Deed.KERNEL, "locked: EINVAL is the kernel's", lasting=True)
    if request is Request.DETACH:
        return Verdict(Deed.REFUSE, "original bases stay", errno.EBUSY, lasting=True)
    return Verdict(Deed.KERNEL, "its welded submounts keep it busy: EBUSY is the kernel's", lasting=True)


def _copied_base(request: Request, circumstances: Circumstances) -> Verdict:
    if circumstances.reaches_original:
        return Verdict(Deed.REFUSE, "would unmount an original by propagation", errno.EBUSY)
    if request is Request.DETACH:
        return Verdict(Deed.KERNEL, "a lazy unmount takes the welded submounts along")
    if circumstances.own_mounts:
        return Verdict(Deed.KERNEL, "the container's own mounts keep it busy: EBUSY is the kernel's")
    return Verdict(Deed.REMOVE_BASE, "a copy goes whole")


def _copied_submount(request: Request, circumstances: Circumstances) -> Verdict:
    if circumstances.reaches_original:
        return Verdict(
            Deed.KERNEL, "stands in the place of an original by propagation: EINVAL is the kernel's"
        )
    if request is Request.UMOUNT and circumstances.own_mounts:
        return Verdict(Deed.REFUSE, "the container's own mounts keep it busy", errno.EBUSY)
    return Verdict(Deed.REPLACE_BASE, "a copied submount goes, a shield stays in its place")
