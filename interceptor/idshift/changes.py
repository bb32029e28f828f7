"""What a container has done to its tree, from two descriptions of it, as a list of changes to another one. Pure.

A description has a line for each name: which inode it is, and a stamp that differs after any change. Names come and go,
inodes move; what counts is what stands at a path. Of a directory that is another one than before nothing is taken for
unchanged, whatever its entries' stamps say: a rename does not touch what is further down.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Seen(NamedTuple):
    """What stands at a path."""

    directory: bool
    inode: int
    stamp: int
    """Of a directory, of its own metadata; of anything else, the time of its last change."""


#: By path, without a leading slash; the tree's root is the empty one.
Description = Mapping[bytes, Seen]


class Changes(NamedTuple):
    """In the order in which they have to be made. Paths of directories come before what is in them."""

    removed: tuple[bytes, ...]
    """With all that was in them. None is below another."""
    made: tuple[bytes, ...]
    """Whatever stands there is replaced. Directories are made empty, files with all their properties."""
    entered: tuple[bytes, ...]
    """Directories that are the same, with changes of their own or below them: their metadata in the end."""


def parent(path: bytes) -> bytes:
    """The directory of a path."""
    return path.rpartition(b"/")[0]


def compare(before: Description, now: Description) -> Changes:
    """What makes of a tree that is as ``before`` one that is as ``now``. Both have the root."""
    fresh: set[bytes] = set()
    changed: set[bytes] = set()
    inodes: set[int] = set()
    for path in sorted(now):
        seen, old = now[path], before.get(path)
        same = (
            old is not None
            and (old.directory, old.inode) == (seen.directory, seen.inode)
            and (path == b"" or parent(path) not in fresh)
        )
        if seen.directory and not same:
            fresh.add(path)
        elif old is None or not same or old.stamp != seen.stamp:
            changed.add(path)
            if not seen.directory:
                inodes.add(seen.inode)
    # All names of an inode, or they would part.
    made = {path for path, seen in now.items() if not seen.directory and seen.inode in inodes} | fresh
    removed = {
        path for path in before if path not in now and path != b"" and _stays(parent(path), now, fresh)
    }
    entered = {path for path in changed if now[path].directory}
    for path in made | removed | entered:
        while path:
            path = parent(path)
            if path not in fresh:
                entered.add(path)
    return Changes(tuple(sorted(removed)), tuple(sorted(made)), tuple(sorted(entered)))


def _stays(path: bytes, now: Description, fresh: set[bytes]) -> bool:
    return path in now and now[path].directory and path not in fresh
