"""Listings that the pump gives out again for a while (native/pages.c), and the lookups that this counts as.

The kernel counts every entry of READDIRPLUS as a lookup of its inode and gives it back one day. So a page holds one of
its own for each inode in it while it is kept, and how often it was given out is added before any is given back.
"""

from __future__ import annotations

from interceptor.kernel.fuse import Pump
from interceptor.view.envoy import Container
from interceptor.view.inodes import Inode, InodeTable
from interceptor.view.protocol import Base

LIFE_NS = 10_000_000_000
"""As long as the kernel may take names for granted: a listing may be that much older than a name that is asked for."""


class Pages:
    """The inodes of each page that is kept, by the pump's slot."""

    def __init__(self, pump: Pump, inodes: InodeTable) -> None:
        self._pump = pump
        self._inodes = inodes
        self._kept: dict[int, tuple[Inode, list[Inode]]] = {}

    def keep(self, directory: Inode, offset: int, size: int, data: bytes, listed: list[Inode]) -> None:
        """Have this part of a directory given out again, if it may be."""
        if not _lasts(directory, listed):
            return
        self.drop(self._pump.page_slot(directory.number, offset))
        if not self._pump.keep_page(directory.number, offset, size, LIFE_NS, data):
            self.drop_all()
            return
        for inode in listed:
            inode.lookups += 1
        self._kept[self._pump.page_slot(directory.number, offset)] = directory, listed

    def settle(self) -> None:
        """Count what was given out: to be called before lookups are given back."""
        if self._pump.pages_given():
            for slot, (_, listed) in self._kept.items():
                _count(listed, self._pump.page_given(slot))

    def drop(self, slot: int) -> None:
        """Give a page out no longer, nor hold its inodes."""
        _, listed = self._kept.pop(slot, (None, []))
        _count(listed, self._pump.drop_page(slot) - 1)
        for inode in listed:
            self._inodes.drop_unused(inode)

    def drop_all(self) -> None:
        """As `drop`, of all: there is no room for more."""
        for slot in list(self._kept):
            self.drop(slot)

    def drop_container(self, container: Container) -> None:
        """As `drop`, of a container that is gone."""
        for slot, (directory, _) in list(self._kept.items()):
            if directory.container is container:
                self.drop(slot)


def _count(inodes: list[Inode], lookups: int) -> None:
    if lookups:
        for inode in inodes:
            inode.lookups += lookups


def _lasts(directory: Inode, listed: list[Inode]) -> bool:
    """sysctls come with modules, and go; what else there is in directories, as devices, is asked for each time."""
    row = directory.row
    if directory.base is not Base.PROC or row is None or (row.by_device and directory.path == row.path):
        return False
    return all(inode.row is not None and inode.row.name_cache_s(inode.path) for inode in listed)
