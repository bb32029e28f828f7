"""What a directory of the view holds: the real directory's entries, and the rows that the tables add to them.

A position in a listing is a cookie that the kernel hands back. The real directory's are its own (``d_off``, below 2^32
in procfs and sysfs); ours are above 2^61, so that a listing can be picked up anywhere without state.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Iterable
from typing import NamedTuple

from interceptor.view.envoy import Container
from interceptor.view.host import Within
from interceptor.view.inodes import Inode
from interceptor.view.nodes import NodeError, Row, Table, join
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
    stored: bool = False

    @property
    def is_dot(self) -> bool:
        """Whether this is ``.`` or ``..``, which the kernel does not count as looked up."""
        return self.name in (b".", b"..")


def directory_attr(mode: int, time_ns: int) -> Attr:
    """Attributes of a directory that we make up. One link: how many directories are in it is not known (find(1))."""
    return Attr(stat.S_IFDIR | mode, 1, 0, 0, 0, time_ns, time_ns, time_ns)


def fixed_attr(row: Row, container: Container) -> Attr:
    """Attributes that a row gives its node."""
    if row.mode is None:
        raise ValueError(f"row {row.path!r} has no attributes of its own")
    at = container.since_ns
    uid, gid = (container.owner.uid, container.owner.gid) if row.rooted else (0, 0)
    return Attr(row.mode, 1, uid, gid, 0, at, at, at)


def shown_attr(row: Row, container: Container, real: Attr) -> Attr:
    """A real node's attributes as the row lets them be seen."""
    if row.rooted and stat.S_ISREG(real.mode):
        return real._replace(uid=container.owner.uid, gid=container.owner.gid)
    return real


def is_there(table: Table, container: Container, base: Base, row: Row) -> bool:
    """Whether a container has what a row makes up."""
    if row.is_stored:
        return container.values.has(base, row)
    if row.may_be_real:  # a directory: as long as something is in it
        below = table.children(base, row.path).values()
        return any(is_there(table, container, base, child) for child in below)
    return True


async def look(
    table: Table, container: Container, base: Base, path: bytes, row: Row, within: Within | None = None
) -> tuple[Attr, bool]:
    """A node's attributes, and whether the container's own value is meant. `NodeError` ENOENT if it is not there."""
    if not row.is_fixed_at(path):
        return shown_attr(row, container, await container.getattr(base, path, within)), False
    real = None
    if row.may_be_real:
        try:
            real = await container.getattr(base, path, within)
        except NodeError as error:
            if error.errno != errno.ENOENT:
                raise
    return found_or_made(table, container, base, row, real)


def found_or_made(
    table: Table, container: Container, base: Base, row: Row, real: Attr | None
) -> tuple[Attr, bool]:
    """As `look`, at the row's own path, where the real node is known, or that there is none."""
    if real is not None and means_real(row, real):
        return shown_attr(row, container, real), False
    if not is_there(table, container, base, row):
        raise NodeError(errno.ENOENT)
    return fixed_attr(row, container), row.is_stored


def means_real(row: Row, real: Attr) -> bool:
    """Whether a real node, where a row may be real, is what the container gets: it must be writable there."""
    return row.may_be_real and (stat.S_ISDIR(real.mode) or bool(real.mode & 0o222))


class Listing:
    """One reading of a directory, from some position on."""

    def __init__(
        self,
        inode: Inode,
        table: Table,
        containers: Iterable[tuple[bytes, Container]],
        within: Within | None = None,
    ) -> None:
        self.inode = inode
        self._within = within
        self._table = table
        self._containers = containers
        self._real_ones: dict[bytes, Attr] = {}
        """Attributes of the real directory's entries, as far as they were read."""
        self._from_beginning = False
        self._to_the_end = False

    async def page(self, position: int) -> list[Listed]:
        """Entries from ``position`` on; an empty list at the end. `NodeError` as the real directory has it."""
        if position == 0:
            return self._dots()
        if position == _AFTER_DOT:
            return self._dots()[1:]
        if (
            self.inode.row is not None
            and self.inode.row.covers_below
            and position < _ROWS
            and not self._to_the_end
        ):
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
        """The next entries of the real directory; names that rows stand for come with the rows."""
        container, base, directory = self.inode.container, self.inode.base, self.inode.path
        above = self.inode.row
        assert container is not None and base is not None and above is not None
        rows = self._table.children(base, directory)
        self._from_beginning |= cookie == 0
        while True:
            try:
                entries, following = await container.list(base, directory, cookie, self._within)
            except NodeError as error:
                if error.errno == errno.ENOENT and above.may_be_real:
                    return []
                raise
            page = []
            self._to_the_end = following == 0
            for name, attr, after in entries:
                self._real_ones[name] = attr
                row = rows.get(name, above)
                if name not in rows or row.mode is None:
                    shown = shown_attr(row, container, attr)
                    page.append(Listed(name, shown, after, container, base, join(directory, name), row))
            # Everything on a page may have vanished meanwhile; a cookie that does not move would go round for ever.
            if page or following in (0, cookie):
                return page
            cookie = following

    async def _made_up(self) -> list[Listed]:
        """What is there because we say so: containers, their two filesystems, rows with attributes of their own."""
        container, base = self.inode.container, self.inode.base
        if container is None:
            return [
                Listed(name, directory_attr(0o555, c.since_ns), _ROWS + index, c, None, b"", None)
                for index, (name, c) in enumerate(self._containers, 1)
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
        within_real = self.inode.row is not None and self.inode.row.covers_below
        for index, (name, row) in enumerate(self._table.children(base, self.inode.path).items(), 1):
            if row.mode is None and within_real:
                continue  # the real directory has listed it, if it is there
            path = join(self.inode.path, name)
            try:
                if row.may_be_real and self._from_beginning and self._to_the_end:
                    attr, stored = found_or_made(self._table, container, base, row, self._real_ones.get(name))
                    found.append(Listed(name, attr, _ROWS + index, container, base, path, row, stored))
                    continue
                attr, stored = await look(self._table, container, base, path, row, self._within)
            except NodeError:
                continue
            found.append(Listed(name, attr, _ROWS + index, container, base, path, row, stored))
        return found
