"""What a node of the view is: a row of the tables in ``proc.py`` and ``sys.py``, and how a path finds its row.

A row names a path relative to its filesystem and says where reads come from (``source``), what may be written
(``check``) and what a write does (``effect``). A row whose source is the real node stands for everything below its
path too, unless a longer row says otherwise. Rows are plain data; nothing here makes a system call.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from interceptor.view.protocol import Base


class NodeError(Exception):
    """An operation on a node that fails with ``errno``: exactly what the caller in the container gets to see."""

    def __init__(self, errno: int) -> None:
        super().__init__(os.strerror(errno))
        self.errno = errno


@dataclass(frozen=True, slots=True)
class Owner:
    """The container a node belongs to, as far as sources may know it."""

    id: str
    uid: int
    """What the container's root is on the host (kuid); 0 without a user namespace."""
    gid: int
    created_ns: int
    """When the container was created, nanoseconds of CLOCK_BOOTTIME."""


class Host(Protocol):
    """What sources may ask about the host."""

    def boottime_ns(self) -> int:
        """CLOCK_BOOTTIME in nanoseconds: runs on during suspend."""

    def idle_ratio(self) -> float:
        """Idle seconds per second of uptime, summed over all processors, since the host booted."""


class Real(Enum):
    """The source that is the kernel's own node, in the container's namespaces and with its rights."""

    NODE = "real"


class Directory(Enum):
    """The source of a directory that holds nothing but other rows."""

    OF_ROWS = "directory"


REAL = Real.NODE
Source = Real | Directory | Callable[[Owner, Host], bytes]
"""Where reads come from. A function gives the whole content; it is called when a reader is at offset 0."""

Check = Callable[[Owner, bytes], bytes]
"""Given what was written, what is to take effect. `NodeError` (EINVAL, as a rule) refuses it."""


class Effect(Enum):
    """What a write does."""

    NONE = "none"
    """Fails with EIO, as a procfs entry without a write operation does (proc_reg_write in fs/proc/inode.c)."""
    REAL = "real"
    """Goes to the real node, whose errno is the caller's."""


@dataclass(frozen=True, slots=True)
class Row:
    """One node, or with a real source one node and all below it."""

    path: bytes
    source: Source
    mode: int | None = None
    """Kind and permissions of the node at ``path`` itself, owned by the host's root; None: as the real node's."""
    check: Check | None = None
    effect: Effect = Effect.NONE
    rooted: bool = False
    """Files belong to the container's root, whatever the real ones say: those that the kernel lets it write by a rule
    of their own, while the view's files are judged by mode and owner (default_permissions)."""
    cache_s: float = 0.0
    """How long the kernel may take names and attributes for granted; 0 where they can go without our knowing."""

    def __post_init__(self) -> None:
        if self.source is not REAL and (self.mode is None or self.effect is Effect.REAL):
            raise ValueError(f"row {self.path!r}: only the real node has attributes and effects of its own")

    def is_fixed_at(self, path: bytes) -> bool:
        """Whether the attributes at ``path``, which this row stands for, are the row's own."""
        return self.mode is not None and path == self.path


FOREVER_S = 3600.0
"""``cache_s`` of what cannot change while the container lives."""


def real(
    path: bytes,
    *,
    mode: int | None = None,
    check: Check | None = None,
    rooted: bool = False,
    cache_s: float = 0.0,
) -> Row:
    """The row of a node, and of all below it, that is read and written where it really is."""
    return Row(path, REAL, mode=mode, check=check, effect=Effect.REAL, rooted=rooted, cache_s=cache_s)


def text(path: bytes, source: Callable[[Owner, Host], bytes], mode: int = 0o444) -> Row:
    """The row of a read-only file whose content we make up."""
    return Row(path, source, mode=stat.S_IFREG | mode, cache_s=FOREVER_S)


def constant(content: bytes) -> Callable[[Owner, Host], bytes]:
    """A source that always says the same."""
    return lambda _owner, _host: content


def join(directory: bytes, name: bytes) -> bytes:
    """The path of ``name`` in ``directory``, where the empty path is the filesystem's root."""
    return directory + b"/" + name if directory else name


class Table:
    """The rows of both filesystems, completed by the directories that lead to them."""

    def __init__(self, rows: Mapping[Base, Iterable[Row]]) -> None:
        """`ValueError` if two rows have the same path."""
        self._rows: dict[tuple[Base, bytes], Row] = {}
        self._children: dict[tuple[Base, bytes], dict[bytes, Row]] = {}
        for base, given in rows.items():
            for row in given:
                if (base, row.path) in self._rows:
                    raise ValueError(f"two rows for {base.name} {row.path!r}")
                self._rows[base, row.path] = row
            for row in list(given):
                self._connect(base, row)

    def _connect(self, base: Base, row: Row) -> None:
        while row.path:
            parent, _, name = row.path.rpartition(b"/")
            self._children.setdefault((base, parent), {})[name] = row
            above = self.find(base, parent)
            if above is None:
                above = Row(parent, Directory.OF_ROWS, mode=stat.S_IFDIR | 0o555, cache_s=FOREVER_S)
                self._rows[base, parent] = above
            elif above.path != parent:
                return  # within the real tree, which leads there by itself
            row = above

    def find(self, base: Base, path: bytes) -> Row | None:
        """The row that stands for ``path``: its own, or the nearest above that stands for what is below it too."""
        row = self._rows.get((base, path))
        if row is not None:
            return row
        while path:
            path = path.rpartition(b"/")[0]
            row = self._rows.get((base, path))
            if row is not None:
                return row if row.source is REAL else None
        return None

    def child(self, base: Base, directory: bytes, name: bytes) -> Row:
        """The row that stands for a name in a directory. `NodeError` ENOENT if the tables have none."""
        row = self.find(base, join(directory, name))
        if row is None:
            raise NodeError(errno.ENOENT)
        return row

    def children(self, base: Base, directory: bytes) -> Mapping[bytes, Row]:
        """The rows right below a directory, by name."""
        return self._children.get((base, directory), {})
