"""Which strategy a root filesystem or a mount gets. Pure: what was found by trying in, decision out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from interceptor.errors import ContainerError

Strategy = Literal["idmapped", "shiftfs", "clone", "none"]

#: In the order of preference; ``none`` is what is left where a container's settings or the thing itself say so.
STRATEGIES: tuple[Strategy, ...] = ("idmapped", "shiftfs", "clone")

#: Of these, what one mount alone can get: a clone is made of root filesystems only.
FOR_BINDS: tuple[Strategy, ...] = ("idmapped", "shiftfs")


@dataclass(frozen=True)
class Found:
    """What is known of one root filesystem or bind source."""

    path: str
    root: bool = False
    fstype: str = ""
    skip: bool = False
    """The container's settings say so."""
    special: bool = False
    """A device, a FIFO or a socket."""
    owned_inside: bool = False
    """It belongs to the container's IDs already."""
    failures: Mapping[str, str] = field(default_factory=dict)
    """Of the strategies that were tried and did not work, why."""


@dataclass(frozen=True)
class Decision:
    """A strategy, and the reason in words."""

    strategy: Strategy
    reason: str


def needs_mapping(found: Found, wanted: str = "auto") -> Decision | None:
    """The decision where nothing has to be tried; None where mapping is to be attempted."""
    if found.skip:
        return Decision("none", "skip_id_shift says so")
    if wanted == "none" and found.root:
        return Decision("none", "ownership = none says so")
    if found.special:
        return Decision("none", "no file or directory: nothing in it to own")
    if found.owned_inside:
        return Decision("none", "it belongs to the container's IDs already")
    return None


def worth_trying(found: Found, allowed: Sequence[str], wanted: str = "auto") -> list[Strategy]:
    """What to attempt, in order, until one works: `choose` then decides."""
    if needs_mapping(found, wanted) is not None:
        return []
    return [strategy for strategy, refusal in _refusals(found, allowed, wanted) if refusal is None]


def choose(found: Found, allowed: Sequence[str], wanted: str = "auto") -> Decision:
    """The decision after the attempts. ``allowed``: the configuration's strategies; ``wanted``: the container's own.

    A root filesystem that would belong to nobody is an error, a bind like that is left as it is: it may be meant so.
    Raises `ContainerError`.
    """
    if (settled := needs_mapping(found, wanted)) is not None:
        return settled
    reasons = []
    for strategy, refusal in _refusals(found, allowed, wanted):
        reason = refusal or found.failures.get(strategy)
        if reason is None:
            return Decision(strategy, "it works on this filesystem")
        reasons.append(f"{strategy}: {reason}")
    why = "; ".join(reasons)
    if found.root:
        raise ContainerError(
            f"{found.path} ({found.fstype}): its owners cannot be mapped to the container's IDs: {why}",
            "see: interceptor doctor",
        )
    return Decision("none", why)


def _refusals(found: Found, allowed: Sequence[str], wanted: str) -> Iterator[tuple[Strategy, str | None]]:
    """Each strategy in order, with the reason for not even trying it."""
    for strategy in STRATEGIES if found.root else FOR_BINDS:
        if strategy not in allowed:
            yield strategy, "forbidden by ownership_strategies"
        elif found.root and wanted not in ("auto", strategy):
            yield strategy, f"the container asks for {wanted}"
        else:
            yield strategy, None
