"""What a directory of the view holds: the real directory's entries, and the rows that the tables add to them.

A position in a listing is a cookie that the kernel hands back. The real directory's are its own (``d_off``, below 2^32
in procfs and sysfs); ours are above 2^61, so that a listing can be picked up anywhere without state.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterable
from typing import NamedTuple

from interceptor.view.envoy import Container
from interceptor.view.inodes import Inode
from interceptor.view.nodes import REAL, NodeError, Row, Table, join
from interceptor.view.protocol import Attr, Base

_AFTER_DOT = 1 << 61
_AFTER_DOTDOT = _AFTER_DOT + 1
_ROWS = 1 << 62

BASE_NAMES = {b"proc": Base.PROC, b"sys": Base.SYS}


class Listed(NamedTuple):
    """A name in a listing and the node it leads to; ``cookie`` is the position after it."""

    name: bytes
    attr: Attr
    cookie: int
    container: Container | None
    base: Base | None
    path: bytes
    row: Row | None

    @property
    def is_dot(self) -> bool:
        """Whether this is ``.`` or ``..``, which the kernel does not count as looked up."""
        return self.name in (b".", b"..")


def directory_attr(mode: int, time_ns: int) -> Attr:
    """Attributes of a directory that we make up. One link: how many directories are in it is not known (find(1))."""
    return Attr(stat.S_IFDIR | mode, 1, 0, 0, 0, time_ns, time_ns, time_ns)


def fixed_attr(row: Row, container: Container) -> Attr:
    """Attributes that a row gives its node; it belongs to the host's root, as most of procfs and sysfs does."""
    if row.mode is None:
        raise ValueError(f"row {row.path!r} has no attributes of its own")
    at = container.since_ns
    return Attr(row.mode, 1, 0, 0, 0, at, at, at)


def shown_attr(row: Row, container: Container, real: Attr) -> Attr:
    """A real node's attributes as the row lets them be seen."""
    if row.rooted and stat.S_ISREG(real.mode):
        return real._replace(uid=container.owner.uid, gid=container.owner.gid)
    return real


class Listing:
    """An open directory. Keeps what was fetched and did not fit into the kernel's buffer."""

    def __init__(
        self, inode: Inode, table: Table, containers: Callable[[], Iterable[tuple[bytes, Container]]]
    ) -> None:
        self.inode = inode
        self._table = table
        self._containers = containers
        self._seen: set[bytes] = set()  # rows that the real directory has as well
        self._page: list[Listed] = []
        self._position = 0

    async def page(self, position: int) -> list[Listed]:
        """Entries from ``position`` on; an empty list at the end. `NodeError` as the real directory has it."""
        if position == 0 or position != self._position or not self._page:
            self._page = await self._fetch(position)
        return self._page

    def taken(self, count: int) -> None:
        """The first ``count`` entries of the page went to the kernel."""
        if count:
            self._position = self._page[count - 1].cookie
            del self._page[:count]

    async def _fetch(self, position: int) -> list[Listed]:
        if position == 0:
            self._seen.clear()
            return self._dots()
        if position == _AFTER_DOT:
            return self._dots()[1:]
        if self.inode.row is not None and self.inode.row.source is REAL and position < _ROWS:
            page = await self._real(0 if position == _AFTER_DOTDOT else position)
            if page:
                return page
        return [entry for entry in await self._made_up() if entry.cookie > position]

    def _dots(self) -> list[Listed]:
        inode = self.inode
        where = (inode.container, inode.base, inode.path, inode.row)
        attr = directory_attr(0o555, 0)  # only the kind and number of these reach anybody
        return [Listed(b".", attr, _AFTER_DOT, *where), Listed(b"..", attr, _AFTER_DOTDOT, *where)]

    async def _real(self, cookie: int) -> list[Listed]:
        """The next entries of the real directory; rows take precedence over real nodes of the same name."""
        container, base, directory = self.inode.container, self.inode.base, self.inode.path
        above = self.inode.row
        assert container is not None and base is not None and above is not None
        rows = self._table.children(base, directory)
        while True:
            entries, following = await container.list(base, directory, cookie)
            page = []
            for name, attr, after in entries:
                row = rows.get(name, above)
                if name in rows and row.mode is not None:
                    attr = fixed_attr(row, container)
                    self._seen.add(name)
                else:
                    attr = shown_attr(row, container, attr)
                page.append(Listed(name, attr, after, container, base, join(directory, name), row))
            # Everything on a page may have vanished meanwhile; a cookie that does not move would go round for ever.
            if page or following in (0, cookie):
                return page
            cookie = following

    async def _made_up(self) -> list[Listed]:
        """What is there because we say so: containers, their two filesystems, rows that are in no real directory."""
        container, base = self.inode.container, self.inode.base
        if container is None:
            return [
                Listed(name, directory_attr(0o555, c.since_ns), _ROWS + index, c, None, b"", None)
                for index, (name, c) in enumerate(self._containers(), 1)
            ]
        if base is not None:
            return await self._rows(container, base)
        return [
            Listed(
                name,
                directory_attr(0o555, container.since_ns),
                _ROWS + index,
                container,
                below,
                b"",
                self._table.find(below, b""),
            )
            for index, (name, below) in enumerate(BASE_NAMES.items(), 1)
        ]

    async def _rows(self, container: Container, base: Base) -> list[Listed]:
        found = []
        within_real = self.inode.row is not None and self.inode.row.source is REAL
        for index, (name, row) in enumerate(self._table.children(base, self.inode.path).items(), 1):
            path = join(self.inode.path, name)
            if row.mode is not None:
                if name in self._seen:
                    continue
                attr = fixed_attr(row, container)
            elif within_real:
                continue  # the real directory has listed it, if it is there
            else:
                try:
                    attr = shown_attr(row, container, await container.getattr(base, path))
                except NodeError:
                    continue
            found.append(Listed(name, attr, _ROWS + index, container, base, path, row))
        return found
