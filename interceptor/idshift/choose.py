"""Which strategy a root filesystem or a mount gets. Pure: what was found by trying in, decision out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from interceptor.errors import ContainerError

Strategy = Literal["idmapped", "clone", "none"]

#: In the order of preference.
STRATEGIES: tuple[Strategy, ...] = ("idmapped", "clone", "none")


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
    mapping_fails: str | None = None
    """Why the attempt to map it failed; None: it worked, or was not made."""
    clone_fails: str | None = "clones are not implemented yet"
    """The same of a clone."""


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


def choose(found: Found, allowed: Sequence[str], wanted: str = "auto") -> Decision:
    """The decision after the attempts. ``allowed``: the configuration's strategies; ``wanted``: the container's own.

    A root filesystem that would belong to nobody is an error, a bind like that is left as it is: it may be meant so.
    Raises `ContainerError`.
    """
    if (settled := needs_mapping(found, wanted)) is not None:
        return settled
    reasons = []
    for strategy, failure in (("idmapped", found.mapping_fails), ("clone", found.clone_fails)):
        if strategy == "clone" and not found.root:
            continue
        if strategy not in allowed:
            reasons.append(f"{strategy}: forbidden by ownership_strategies")
        elif found.root and wanted not in ("auto", strategy):
            reasons.append(f"{strategy}: the container asks for {wanted}")
        elif failure is not None:
            reasons.append(f"{strategy}: {failure}")
        else:
            assert strategy in ("idmapped", "clone")
            return Decision("idmapped" if strategy == "idmapped" else "clone", "it works on this filesystem")
    why = "; ".join(reasons)
    if found.root:
        raise ContainerError(
            f"{found.path} ({found.fstype}): its owners cannot be mapped to the container's IDs: {why}",
            "see: interceptor doctor",
        )
    return Decision("none", why)
