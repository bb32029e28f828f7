"""Which nodes the kernel currently knows, by inode number and by path.

The kernel counts how often it was told of an inode and gives the counts back with FORGET; an inode lives as long as its
count, so memory is bounded by the kernel's own caches. Numbers are never used again: generations are not needed.
"""

from __future__ import annotations

import errno
import stat
from dataclasses import dataclass

import pyfuse3

from interceptor.view.envoy import Container
from interceptor.view.nodes import NodeError, Row
from interceptor.view.protocol import Base


@dataclass(slots=True, eq=False)
class Inode:
    """A node that the kernel knows. Without a container it is the root; without a base, a container's directory."""

    number: int
    container: Container | None
    base: Base | None
    path: bytes
    row: Row | None
    kind: int
    """S_IFREG, S_IFDIR or S_IFLNK."""
    lookups: int = 0


class InodeTable:
    """All inodes, with the root always among them."""

    def __init__(self) -> None:
        self.root = Inode(pyfuse3.ROOT_INODE, None, None, b"", None, stat.S_IFDIR)
        self._by_number: dict[int, Inode] = {self.root.number: self.root}
        self._by_path: dict[tuple[Container, Base | None, bytes], Inode] = {}
        self._next = self.root.number + 1

    def __len__(self) -> int:
        return len(self._by_number)

    def get(self, number: int) -> Inode:
        """The inode of this number. `NodeError` ESTALE if the kernel should not know it any more."""
        try:
            return self._by_number[number]
        except KeyError:
            raise NodeError(errno.ESTALE) from None

    def intern(
        self, container: Container, base: Base | None, path: bytes, row: Row | None, kind: int
    ) -> Inode:
        """The inode of this node, a new one if there is none or if the node is of another kind now.

        The caller counts a lookup when the kernel is told of it, or calls `drop_unused` if that fails.
        """
        key = (container, base, path)
        inode = self._by_path.get(key)
        if inode is None or inode.kind != kind:
            inode = Inode(self._next, container, base, path, row, kind)
            self._next += 1
            self._by_number[inode.number] = inode
            self._by_path[key] = inode
        return inode

    def forget(self, number: int, lookups: int) -> None:
        """The kernel gives this many lookups back. Unknown numbers are ignored: FORGET has no answer."""
        inode = self._by_number.get(number)
        if inode is not None and inode is not self.root:
            inode.lookups -= lookups
            self.drop_unused(inode)

    def drop_unused(self, inode: Inode) -> None:
        """Let go of an inode that the kernel does not know."""
        if inode.lookups > 0 or inode.container is None:
            return
        self._by_number.pop(inode.number, None)
        key = (inode.container, inode.base, inode.path)
        if self._by_path.get(key) is inode:
            del self._by_path[key]
