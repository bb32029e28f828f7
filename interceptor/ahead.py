"""Composites made before they are asked for, and left with the guard, which then need not ask.

What was asked for is likely to be asked for again: a service manager mounts the same and takes the same copies apart
for every service that it starts.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from interceptor.containers.registry import Container
from interceptor.errors import InterceptorError
from interceptor.guards.link import Ask, ForNew, ForSwap
from interceptor.kernel import stat
from interceptor.kernel.fd import OwnedFd
from interceptor.kernel.namespaces import open_namespace
from interceptor.kernel.stat import MountStat
from interceptor.mounts.arguments import NewMount
from interceptor.mounts.composite import Composer
from interceptor.observe.log import get_logger

#: As many as a guard has room for (native/ahead.c).
PLACES = 24
#: How many that are alike: while one is made, another is used.
DEPTH = 2
#: Kinds of new mounts that are remembered to have been asked for.
NEW_KINDS = 4
#: A guard that asks for what it was given so long ago, in seconds, does not have it any more.
LOST_S = 1.0


@dataclass(frozen=True)
class _New:
    """A new mount, for the container's own namespaces."""

    new: NewMount


@dataclass(frozen=True)
class _Swap:
    """A composite like a base, with shields."""

    dev: tuple[int, int]
    attributes: int
    shielded: frozenset[bytes]


class _Order:
    """What is made again once it is used."""

    def __init__(self, key: _New | _Swap, of: Ask | MountStat) -> None:
        self.key = key
        self.of = of
        """The question about a new mount; a base like the one that is taken apart."""
        self.since = time.monotonic()


class Stock:
    """What the guard of one container has."""

    def __init__(self) -> None:
        self.orders: OrderedDict[int, _Order] = OrderedDict()
        self._asked: OrderedDict[NewMount, None] = OrderedDict()
        self._number = 0

    def add(self, order: _Order) -> int:
        self._number = self._number % 0xFFFFFFFF + 1
        self.orders[self._number] = order
        if len(self.orders) > PLACES:
            self.orders.popitem(last=False)
        return self._number

    def was_asked_for(self, new: NewMount) -> bool:
        """Whether it was asked for not long ago; from now on it was."""
        before = new in self._asked
        self._asked[new] = None
        self._asked.move_to_end(new)
        if len(self._asked) > NEW_KINDS:
            self._asked.popitem(last=False)
        return before

    def has_enough(self, key: _New | _Swap) -> bool:
        return sum(order.key == key for order in self.orders.values()) >= DEPTH

    def drop_lost(self, key: _New | _Swap) -> None:
        """It was asked for: what is not on its way has gone."""
        now = time.monotonic()
        for number in [n for n, o in self.orders.items() if o.key == key and now - o.since > LOST_S]:
            del self.orders[number]


class Ahead:
    """Makes them after what is being done now, and hands them over."""

    def __init__(
        self,
        composer: Composer,
        soon: Callable[..., object],
        hand_over: Callable[[Container, int, OwnedFd, int, ForNew | ForSwap], bool],
    ) -> None:
        self._composer = composer
        self._soon = soon
        self._hand_over = hand_over
        self._stocks: dict[str, Stock] = {}
        self._log = get_logger().bind()

    def forget(self, container: Container) -> None:
        """Its guard is another one, or gone."""
        self._stocks.pop(container.cid, None)

    def asked_for_new(self, container: Container, ask: Ask, new: NewMount) -> None:
        """A question about a new mount, for the container's own namespaces (none of others is kept alive)."""
        stock = self._stock(container)
        if new.gid is None and stock.was_asked_for(new):
            stock.drop_lost(_New(new))
            self._ensure(container, _Order(_New(new), ask))

    def asked_for_swap(self, container: Container, base: MountStat, shielded: frozenset[bytes]) -> None:
        """A question about a cover of a copied base. What comes next in the table is likely to be next to go."""
        key = _Swap(base.dev, base.attributes, shielded)
        self._stock(container).drop_lost(key)
        self._ensure(container, _Order(key, base))
        self._ensure_next(container, key, base)

    def taken(self, container: Container, number: int) -> None:
        """The guard has used one."""
        order = self._stock(container).orders.pop(number, None)
        if order is not None:
            self._ensure(container, order)
            if isinstance(order.key, _Swap) and isinstance(order.of, MountStat):
                self._ensure_next(container, order.key, order.of)

    def _stock(self, container: Container) -> Stock:
        return self._stocks.setdefault(container.cid, Stock())

    def _ensure_next(self, container: Container, key: _Swap, base: MountStat) -> None:
        for covered in container.material.plan.of(base.fstype):
            below = any(covered.path.startswith(s + b"/") for s in key.shielded)
            if covered.path not in key.shielded and not below:
                following = _Swap(key.dev, key.attributes, key.shielded | {covered.path})
                self._ensure(container, _Order(following, base))
                return

    def _ensure(self, container: Container, order: _Order) -> None:
        if not self._stock(container).has_enough(order.key):
            self._soon(self._make, container, order)

    def _make(self, container: Container, order: _Order) -> None:
        if container.closed or self._stock(container).has_enough(order.key):
            return
        try:
            made = (
                self._new(container, order) if isinstance(order.key, _New) else self._swap(container, order)
            )
        except (InterceptorError, OSError) as error:
            self._log.debug("no composite was made ahead", container=container.cid, error=str(error))
            return
        if made is None:
            return
        tree, purpose = made
        with tree:
            there_id = stat.statx(tree).mnt_id
            container.note_birth(there_id, time.clock_gettime_ns(time.CLOCK_BOOTTIME))
            stock = self._stock(container)
            number = stock.add(_Order(order.key, order.of))
            if not self._hand_over(container, number, tree, there_id, purpose):
                del stock.orders[number]
                return
        self._ensure(container, order)

    def _new(self, container: Container, order: _Order) -> tuple[OwnedFd, ForNew] | None:
        assert isinstance(order.key, _New) and isinstance(order.of, Ask)
        new = order.key.new
        own = container.pidns_ino if new.fstype == b"proc" else container.netns_ino
        with open_namespace(container.pid, "pid") as pid_namespace:
            if new.fstype == b"proc" and os.fstat(pid_namespace.fileno()).st_ino != own:
                return None
            tree = self._composer.fresh(new, container.material, pid_namespace, container.netns)
        return tree, ForNew(order.of, own)

    def _swap(self, container: Container, order: _Order) -> tuple[OwnedFd, ForSwap] | None:
        assert isinstance(order.key, _Swap) and isinstance(order.of, MountStat)
        key = order.key
        tree = self._composer.again(order.of, b"", key.shielded, container.material)
        if tree is None:
            return None
        absent = self._composer.absent(order.of, key.shielded, container.material)
        return tree, ForSwap(key.dev, key.attributes, key.shielded, absent)
