"""Composites that were made before, to be had again without being put together.

A service manager takes the same copies apart in the same way for every service that it starts.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable
from typing import NamedTuple

from interceptor.kernel.fd import OwnedFd
from interceptor.mounts.managed import Covered
from interceptor.mounts.weld import Kept, Welder

#: How many are kept for all containers together: each is some twenty mounts of the workshop's and of the welder's.
MADE_MAX = 256


class Likeness(NamedTuple):
    """What makes two composites of a container alike."""

    owner: str
    """Path of the shelf that they are made from."""
    dev: tuple[int, int]
    attributes: int
    """`MountAttr` bits of the base."""
    inside: bytes
    shielded: frozenset[bytes]


class Made:
    """The composites that are kept; those used least recently go first."""

    def __init__(self, welder: Welder) -> None:
        self._welder = welder
        self._slots: OrderedDict[Likeness, tuple[str, str, tuple[bytes, ...]]] = OrderedDict()
        """Slot of the rack, path of the bare tree, paths that this did not have."""

    def weld(self, like: Likeness, bare: Kept, place: str, covers: Iterable[Covered]) -> OwnedFd:
        """The weld of what stands at ``place``, which is used up; kept from now on. Raises `SyscallError`."""
        tree, slot = self._welder.weld_to_keep(place)
        self._slots[like] = slot, bare.path, tuple(c.path for c in covers if not _has(bare.path, c.path))
        if len(self._slots) > MADE_MAX:
            self._let_go(next(iter(self._slots)))
        return tree

    def again(self, like: Likeness) -> OwnedFd | None:
        """Another one like it; None where there is none, or where something has appeared that it does not cover."""
        if like not in self._slots:
            return None
        slot, bare, absent = self._slots[like]
        if any(_has(bare, path) for path in absent):
            self._let_go(like)
            return None
        self._slots.move_to_end(like)
        return self._welder.again(slot)

    def absent(self, like: Likeness) -> tuple[bytes, ...]:
        """What one that is kept does not cover, since it was not there."""
        return self._slots[like][2]

    def forget(self, owner: str, dev: tuple[int, int] | None = None) -> None:
        """All that were made for one owner go, or those of one device."""
        for like in [k for k in self._slots if k.owner == owner and dev in (None, k.dev)]:
            self._let_go(like)

    def _let_go(self, like: Likeness) -> None:
        slot, *_ = self._slots.pop(like)
        self._welder.let_go(slot)


def _has(tree: str, path: bytes) -> bool:
    return os.path.lexists(os.path.join(os.fsencode(tree), path))
