"""Which nodes the kernel currently knows, by inode number and by path.

The kernel counts how often it was told of an inode and gives the counts back with FORGET; an inode lives as long as its
count, so memory is bounded by the kernel's own caches. Numbers are never used again: generations are not needed.

What the kernel was told must mean the same to a successor: each number is in the ledger, a file, before the kernel
hears of it. Counts are not, so a successor keeps what it inherited for as long as the container lives.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from interceptor.view.envoy import Container
from interceptor.view.nodes import NodeError, Row, Table
from interceptor.view.protocol import Attr, Base
from interceptor.view.wire import ROOT_ID

_NO_BASE = 9
_INHERITED = 1 << 62
"""Lookups of an inode that a predecessor told the kernel of: more than can be given back."""
_LINES_MIN, _LINES_EACH = 20000, 4
"""How many lines the ledger may have, and how many more for each inode, before it is made anew."""


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
    attr: Attr | None = None
    """As last seen; rights are judged by it."""
    stored: bool = False
    """Whether the container's own value is meant, and not the real node. Valid once `attr` is known."""
    attr_until: float = 0.0
    """Until when, by the monotonic clock, `attr` may be given out again."""
    pumped: tuple[int, int] | None = None
    """What the pump knows of it: its envoy, `NodeFlag`; None: nothing."""


class Ledger:
    """The file with every number that the kernel may know. Lines are appended, and the file is made anew at a start."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd = -1
        self._unwritten: list[bytes] = []
        self.lines = 0
        """Written since the last `start`."""

    def read(self) -> tuple[dict[int, tuple[str, Base | None, bytes, int]], int]:
        """What is in it, by number, and the greatest number. A line cut short by a kill is one never told."""
        found: dict[int, tuple[str, Base | None, bytes, int]] = {}
        greatest = ROOT_ID
        with contextlib.suppress(FileNotFoundError), open(self._path, "rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                number, kind, cid, base, path = line[:-1].split(b" ", 4)
                greatest = max(greatest, int(number))
                if kind == b"-":
                    found.pop(int(number), None)
                else:
                    which = None if int(base) == _NO_BASE else Base(int(base))
                    found[int(number)] = (cid.decode("ascii"), which, path, int(kind, 8))
        return found, greatest

    def start(self, inodes: list[Inode], greatest: int) -> None:
        """Begin anew with these."""
        beside = self._path + ".new"
        with open(beside, "wb") as file:
            # The greatest number stays known even when nothing that had it does.
            file.write(b"%d - - %d \n" % (greatest, _NO_BASE))
            file.writelines(_line(inode) for inode in inodes)
        os.rename(beside, self._path)
        self.lines = 0
        self._unwritten.clear()
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def add(self, inode: Inode) -> None:
        """Note it, to be written by `flush`."""
        self._unwritten.append(_line(inode))

    def remove(self, number: int) -> None:
        """Note that the kernel has forgotten it."""
        self._unwritten.append(b"%d - - %d \n" % (number, _NO_BASE))

    def flush(self) -> None:
        """Write what was noted: before the kernel is told."""
        if self._unwritten:
            if self._fd >= 0:
                os.write(self._fd, b"".join(self._unwritten))
                self.lines += len(self._unwritten)
            self._unwritten.clear()


def _line(inode: Inode) -> bytes:
    assert inode.container is not None
    cid = inode.container.owner.id.encode("ascii")
    base = _NO_BASE if inode.base is None else inode.base
    return b"%d %o %s %d %s\n" % (inode.number, inode.kind, cid, base, inode.path)


class InodeTable:
    """All inodes, with the root always among them."""

    def __init__(self, ledger: Ledger | None = None) -> None:
        self.root = Inode(ROOT_ID, None, None, b"", None, stat.S_IFDIR)
        self._by_number: dict[int, Inode] = {self.root.number: self.root}
        self._by_path: dict[tuple[Container, Base | None, bytes], Inode] = {}
        self._next = self.root.number + 1
        self._ledger = ledger
        self.dropped: Callable[[int], None] = lambda _number: None

    def __len__(self) -> int:
        return len(self._by_number)

    def inherit(self, containers: Mapping[str, Container], table: Table) -> int:
        """Takes over what a predecessor told the kernel about these containers; how many inodes that are."""
        if self._ledger is None:
            return 0
        found, greatest = self._ledger.read()
        self._next = greatest + 1
        for number, (cid, base, path, kind) in found.items():
            container = containers.get(cid)
            if container is not None:
                row = None if base is None else table.find(base, path)
                inode = Inode(number, container, base, path, row, kind, _INHERITED)
                self._by_number[number] = self._by_path[container, base, path] = inode
        inherited = self._known()
        self._ledger.start(inherited, greatest)
        return len(inherited)

    def flush(self) -> None:
        """To be called before the kernel is told of inodes that `intern` gave."""
        if self._ledger is None:
            return
        self._ledger.flush()
        if self._ledger.lines > _LINES_MIN + _LINES_EACH * len(self._by_number):
            self._ledger.start(self._known(), self._next - 1)

    def _known(self) -> list[Inode]:
        return [inode for inode in self._by_number.values() if inode is not self.root]

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
            if b"\n" in path:
                raise NodeError(errno.ENOENT)  # no node of the kernel's is named like that
            inode = Inode(self._next, container, base, path, row, kind)
            self._next += 1
            self._by_number[inode.number] = inode
            self._by_path[key] = inode
            if self._ledger is not None:
                self._ledger.add(inode)
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
        self._drop(inode)

    def _drop(self, inode: Inode) -> None:
        assert inode.container is not None
        if self._by_number.pop(inode.number, None) is not None:
            self.dropped(inode.number)
            if self._ledger is not None:
                self._ledger.remove(inode.number)
        key = (inode.container, inode.base, inode.path)
        if self._by_path.get(key) is inode:
            del self._by_path[key]

    def drop_inherited(self, container: Container) -> None:
        """The container is gone: what a predecessor told the kernel about it is forgotten as well."""
        gone = [
            i for i in self._by_number.values() if i.container is container and i.lookups > _INHERITED // 2
        ]
        for inode in gone:
            self._drop(inode)
