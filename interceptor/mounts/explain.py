"""What each operation on a mount would get, from whom and why, in words. Pure: the verdicts are those of policy.py."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from interceptor.errors import errno_name
from interceptor.mounts.lineage import Baseline, Mount, MountClass, is_base, welded_to
from interceptor.mounts.policy import Circumstances, Deed, Request, Verdict, decide

KERNEL, INTERCEPTOR = "kernel", "interceptor"

#: What each class is, for those who have not read the table.
MEANING: Mapping[MountClass, str] = {
    MountClass.ORIGINAL_BASE: "a procfs or sysfs that the container was created with; it stays",
    MountClass.ORIGINAL_SUBMOUNT: "a cover that the container was created with; it is welded on and stays",
    MountClass.COPIED_BASE: "a procfs or sysfs that came to be later; it may go, its covers with it",
    MountClass.COPIED_SUBMOUNT: "a cover of such a later one; it may go, a shield then stands in its place",
    MountClass.SHIELD: "an empty, read-only mount where a copied cover was removed, so that nothing raw shows",
    MountClass.IMMUTABLE: "a mount that the container was created with; its flags can not be weakened",
    MountClass.FREE: "the container's own business",
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one operation gets."""

    operation: str
    result: str
    """An errno's name, ``0`` for success, or words where the arguments decide."""
    by: str
    """`KERNEL` or `INTERCEPTOR`."""
    why: str


#: What the kernel answers where policy.py leaves a call to it, as far as the class alone tells.
_KERNELS: Mapping[tuple[Request, MountClass], str] = {
    (Request.UMOUNT, MountClass.ORIGINAL_BASE): "EBUSY",
    (Request.UMOUNT, MountClass.COPIED_BASE): "EBUSY",
    **{
        (request, kind): "EINVAL"
        for request in (Request.UMOUNT, Request.DETACH, Request.MOVE, Request.BENEATH)
        for kind in (MountClass.ORIGINAL_SUBMOUNT, MountClass.SHIELD)
    },
    (Request.UMOUNT, MountClass.COPIED_SUBMOUNT): "EINVAL",
    (Request.DETACH, MountClass.COPIED_SUBMOUNT): "EINVAL",
    (Request.MOVE, MountClass.COPIED_SUBMOUNT): "EINVAL",
    (Request.BENEATH, MountClass.COPIED_SUBMOUNT): "EINVAL",
    (Request.DETACH, MountClass.COPIED_BASE): "0",
}
_OWN = "as the kernel decides"
_NEVER_WEAKER = "0, or EPERM where it would clear ro, nosuid, nodev or noexec"


def outcomes(kind: MountClass, circumstances: Callable[[Request], Circumstances]) -> list[Outcome]:
    """What unmounting, moving, remounting and binding a mount of that class gets, as long as nothing changes."""
    return [_outcome(request, kind, decide(request, kind, circumstances(request))) for request in Request] + [
        _bind(kind)
    ]


def _outcome(request: Request, kind: MountClass, verdict: Verdict) -> Outcome:
    if verdict.deed is Deed.REFUSE:
        return Outcome(request.value, errno_name(verdict.error), INTERCEPTOR, verdict.reason)
    if verdict.deed in (Deed.REMOVE_BASE, Deed.REPLACE_BASE):
        return Outcome(request.value, "0", INTERCEPTOR, f"{verdict.deed.value}: {verdict.reason}")
    if request is Request.REMOUNT:
        return _remount(kind, verdict)
    result = _KERNELS.get((request, kind), _OWN)
    return Outcome(request.value, result, KERNEL, verdict.reason)


def _remount(kind: MountClass, verdict: Verdict) -> Outcome:
    if verdict.deed is Deed.CARRY_FLAGS:
        return Outcome(Request.REMOUNT.value, _NEVER_WEAKER, INTERCEPTOR, verdict.reason)
    if kind is MountClass.FREE:
        return Outcome(Request.REMOUNT.value, _OWN, KERNEL, MEANING[kind])
    return Outcome(Request.REMOUNT.value, _NEVER_WEAKER, KERNEL, verdict.reason)


def _bind(kind: MountClass) -> Outcome:
    """Binds that are not recursive are not asked about (native/act.c, bind_in_namespace), so policy.py has none."""
    if kind in (MountClass.ORIGINAL_BASE, MountClass.COPIED_BASE):
        return Outcome("bind", "0", INTERCEPTOR, "the covers come along, and nothing else")
    return Outcome("bind", _OWN, KERNEL, "there are no covers below that would have to come along")


def lineage(
    chain: Sequence[Mount], kinds: Sequence[MountClass], baseline: Baseline, first: bool
) -> list[str]:
    """Where a mount comes from, one line a step; ``kinds`` are the classes of ``chain``, ``first`` the namespace's."""
    mount, kind = chain[0], kinds[0]
    lines = []
    if kind in (MountClass.ORIGINAL_BASE, MountClass.ORIGINAL_SUBMOUNT):
        lines.append(
            "installed when the container was created"
            if first
            else "stands where the original stands, in a mount namespace cloned from the first"
        )
    base = welded_to(chain, baseline.plan)
    if base is not None:
        position = next(i for i, m in enumerate(chain) if m.mnt_id == base.mnt_id)
        lines.append(f"welded to {kinds[position].value} {base.mnt_id} at {_text(base.point)}")
        mount, kind = base, kinds[position]
    if kind is MountClass.COPIED_BASE:
        lines.append(_origin(mount, baseline))
    if chain[0].peer_group:
        lines.append(f"in peer group {chain[0].peer_group}: what is mounted on one of it is mounted on all")
    if chain[0].master:
        lines.append(f"receives mounts and unmounts from peer group {chain[0].master}")
    return lines


def _origin(base: Mount, baseline: Baseline) -> str:
    same = next((b for b in baseline.bases() if b.dev == base.dev), None)
    if same is None:
        return "a filesystem of its own, mounted in the container"
    what = "a copy" if is_base(base) else f"a copy of its directory {_text(base.root)}"
    return f"{what} of original-base {same.mnt_id} at {_text(same.point)}"


def born(mnt_id: int, known: Sequence[tuple[int, int]]) -> tuple[int, int | None]:
    """Between which times a mount came to be: unique mount IDs only ever grow.

    ``known`` are pairs of an ID and when a mount of that ID was made, in order. Both ends are the same for one that is
    known; the second is None where nothing younger is.
    """
    index = bisect.bisect_left(known, (mnt_id, 0))
    if index < len(known) and known[index][0] == mnt_id:
        return known[index][1], known[index][1]
    before = known[index - 1][1] if index else 0
    return before, known[index][1] if index < len(known) else None


def _text(path: bytes) -> str:
    return path.decode(errors="replace")
