"""The table of requests and verdicts, row by row."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interceptor.mounts.lineage import MountClass
from interceptor.mounts.policy import Circumstances, Deed, Request, decide

C = MountClass
PLAIN = Circumstances()
circumstances = st.builds(Circumstances, st.booleans(), st.booleans(), st.booleans())
requests = st.sampled_from(Request)
classes = st.sampled_from(MountClass)


@pytest.mark.parametrize(
    ("request_", "kind", "deed", "error"),
    [
        (Request.UMOUNT, C.ORIGINAL_SUBMOUNT, Deed.KERNEL, 0),
        (Request.DETACH, C.ORIGINAL_SUBMOUNT, Deed.KERNEL, 0),
        (Request.MOVE, C.ORIGINAL_SUBMOUNT, Deed.KERNEL, 0),
        (Request.UMOUNT, C.ORIGINAL_BASE, Deed.KERNEL, 0),
        (Request.DETACH, C.ORIGINAL_BASE, Deed.REFUSE, errno.EBUSY),
        (Request.MOVE, C.ORIGINAL_BASE, Deed.REFUSE, errno.EINVAL),
        (Request.REMOUNT, C.ORIGINAL_BASE, Deed.CARRY_FLAGS, 0),
        (Request.UMOUNT, C.COPIED_SUBMOUNT, Deed.REPLACE_BASE, 0),
        (Request.DETACH, C.COPIED_SUBMOUNT, Deed.REPLACE_BASE, 0),
        (Request.UMOUNT, C.COPIED_BASE, Deed.REMOVE_BASE, 0),
        (Request.DETACH, C.COPIED_BASE, Deed.KERNEL, 0),
        (Request.MOVE, C.COPIED_BASE, Deed.KERNEL, 0),
        (Request.REMOUNT, C.COPIED_BASE, Deed.CARRY_FLAGS, 0),
        (Request.UMOUNT, C.SHIELD, Deed.KERNEL, 0),
        (Request.UMOUNT, C.IMMUTABLE, Deed.KERNEL, 0),
        (Request.UMOUNT, C.FREE, Deed.KERNEL, 0),
        (Request.MOVE, C.FREE, Deed.KERNEL, 0),
        (Request.BENEATH, C.ORIGINAL_BASE, Deed.REFUSE, errno.EINVAL),
        (Request.BENEATH, C.COPIED_BASE, Deed.KERNEL, 0),
        (Request.BENEATH, C.FREE, Deed.KERNEL, 0),
    ],
)
def test_the_table(request_: Request, kind: MountClass, deed: Deed, error: int) -> None:
    verdict = decide(request_, kind, PLAIN)
    assert (verdict.deed, verdict.error) == (deed, error)


def test_a_copy_whose_unmount_would_reach_an_original_stays() -> None:
    reaching = Circumstances(reaches_original=True)
    for request in (Request.UMOUNT, Request.DETACH):
        verdict = decide(request, C.COPIED_BASE, reaching)
        assert (verdict.deed, verdict.error, verdict.lasting) == (Deed.REFUSE, errno.EBUSY, False)
        assert decide(request, C.COPIED_SUBMOUNT, reaching).deed is Deed.KERNEL


def test_a_copied_base_with_mounts_of_the_containers_own_is_busy() -> None:
    assert decide(Request.UMOUNT, C.COPIED_BASE, Circumstances(own_mounts=True)).deed is Deed.KERNEL
    assert decide(Request.DETACH, C.COPIED_BASE, Circumstances(own_mounts=True)).deed is Deed.KERNEL


def test_a_copied_submount_with_mounts_of_the_containers_own_goes_lazily_only() -> None:
    verdict = decide(Request.UMOUNT, C.COPIED_SUBMOUNT, Circumstances(own_mounts=True))
    assert (verdict.deed, verdict.error) == (Deed.REFUSE, errno.EBUSY)
    assert decide(Request.DETACH, C.COPIED_SUBMOUNT, Circumstances(own_mounts=True)).deed is Deed.REPLACE_BASE


def test_immutables_are_protected_where_configured() -> None:
    verdict = decide(Request.UMOUNT, C.IMMUTABLE, Circumstances(protect_immutable=True))
    assert (verdict.deed, verdict.error) == (Deed.REFUSE, errno.EPERM)
    assert decide(Request.UMOUNT, C.FREE, Circumstances(protect_immutable=True)).deed is Deed.KERNEL


@given(requests, classes, circumstances)
def test_originals_are_never_taken_down_by_us(
    request: Request, kind: MountClass, around: Circumstances
) -> None:
    verdict = decide(request, kind, around)
    if verdict.deed in (Deed.REMOVE_BASE, Deed.REPLACE_BASE):
        assert kind in (C.COPIED_BASE, C.COPIED_SUBMOUNT)
        assert not around.reaches_original


@given(requests, classes, circumstances)
def test_every_refusal_has_an_errno_and_every_verdict_a_reason(
    request: Request, kind: MountClass, around: Circumstances
) -> None:
    verdict = decide(request, kind, around)
    assert (verdict.deed is Deed.REFUSE) == (verdict.error > 0)
    assert verdict.reason


@given(requests, classes, circumstances, circumstances)
def test_a_lasting_verdict_does_not_depend_on_what_can_change(
    request: Request, kind: MountClass, one: Circumstances, other: Circumstances
) -> None:
    verdict = decide(request, kind, one)
    if verdict.lasting and one.protect_immutable == other.protect_immutable and not other.reaches_original:
        assert decide(request, kind, other) == verdict


@pytest.mark.parametrize("request_", [Request.UMOUNT, Request.DETACH])
def test_an_original_that_the_kernel_has_locked_is_left_to_it(request_: Request) -> None:
    verdict = decide(request_, C.ORIGINAL_BASE, Circumstances(locked=True))
    assert verdict.deed is Deed.KERNEL and verdict.lasting


@pytest.mark.parametrize("kind", [C.FREE, C.IMMUTABLE, C.COPIED_BASE, C.COPIED_SUBMOUNT])
def test_nothing_is_unmounted_lazily_with_an_original_below_it(kind: C) -> None:
    verdict = decide(Request.DETACH, kind, Circumstances(holds_original=True))
    assert (verdict.deed, verdict.error, verdict.lasting) == (Deed.REFUSE, errno.EBUSY, False)
    assert decide(Request.UMOUNT, C.FREE, Circumstances(holds_original=True)).deed is Deed.KERNEL


@pytest.mark.parametrize("kind", [C.FREE, C.IMMUTABLE, C.COPIED_BASE, C.COPIED_SUBMOUNT])
def test_nothing_is_put_beneath_what_an_original_stands_on(kind: C) -> None:
    verdict = decide(Request.BENEATH, kind, Circumstances(holds_original=True))
    assert (verdict.deed, verdict.error, verdict.lasting) == (Deed.REFUSE, errno.EINVAL, False)
