"""The layers of an overlay, from what ``/proc/self/mountinfo`` says of it. Pure: whether a path exists is asked for.

Sources: proc_pid_mountinfo(5); Documentation/filesystems/overlayfs.rst; seq_show_option() and ovl_show_options() of the
kernel for what is escaped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from interceptor.errors import ContainerError

#: Of no use, or harmful, for a second overlay over the same layers. ``index`` keeps it from being mounted at all.
_DROPPED = {"lowerdir", "lowerdir+", "datadir+", "upperdir", "workdir", "volatile", "index", "nfs_export"}
#: Flags of the superblock and of security modules, which stand in the same list.
_NOT_OURS = {"rw", "ro", "seclabel", "sync", "dirsync", "mand", "lazytime"}


@dataclass(frozen=True)
class MountLine:
    """One line of mountinfo, as far as it is needed here."""

    mnt_id: int
    point: str
    root: str
    fstype: str
    options: str
    """Of the superblock, still escaped."""


@dataclass(frozen=True)
class Layers:
    """The layers of an overlay, uppermost first, and what else it was mounted with."""

    lower: tuple[str, ...]
    upper: str | None
    options: tuple[tuple[str, str | None], ...] = ()


def unescape(text: str) -> str:
    r"""``\040`` and its like. Paths that are not UTF-8 are read with surrogateescape, so this stays one character a
    byte for all that is escaped."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match.group(1), 8)), text)


def parse_mountinfo(text: str) -> list[MountLine]:
    """Every mount, in the table's order."""
    found = []
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        fields, rest = left.split(" "), right.split(" ")
        if len(fields) < 6 or len(rest) < 3:
            continue
        found.append(MountLine(int(fields[0]), unescape(fields[4]), unescape(fields[3]), rest[0], rest[2]))
    return found


def mount_of(path: str, mounts: Iterable[MountLine]) -> MountLine:
    """The mount that a path without symbolic links leads into: the deepest mount point, the last of those stacked."""
    best: MountLine | None = None
    for line in mounts:
        inside = line.point == "/" or path == line.point or path.startswith(line.point + "/")
        if inside and (best is None or len(line.point) >= len(best.point)):
            best = line
    if best is None:
        raise ContainerError(f"{path}: on no mount")
    return best


def parse_layers(line: MountLine, exists: Callable[[str], bool]) -> Layers:
    """The layers of the overlay ``line``. Raises `ContainerError` where they cannot be made out.

    Managers shorten long lists by mounting from within a directory, which the table does not name: relative names are
    looked for below the ancestors of the upper directory and of the mount point.
    """
    lower: list[str] = []
    upper: str | None = None
    options: list[tuple[str, str | None]] = []
    for option in line.options.split(","):
        name, equals, value = option.partition("=")
        value = unescape(value)
        if name == "lowerdir":
            lower += split_lower(value)
        elif name == "lowerdir+":
            lower.append(value)
        elif name == "datadir+":
            raise ContainerError(f"{line.point}: an overlay with data-only layers cannot be mapped")
        elif name == "upperdir":
            upper = value
        elif name not in _DROPPED | _NOT_OURS:
            options.append((name, value if equals else None))
    if not lower:
        raise ContainerError(f"{line.point}: an overlay without lower directories?")
    relative = [path for path in [*lower, upper or "/"] if not path.startswith("/")]
    if relative:
        base = _base(relative, [upper or "", line.point, *lower], exists)
        if base is None:
            raise ContainerError(f"{line.point}: its layers {relative[0]!r} … cannot be found")
        lower = [path if path.startswith("/") else f"{base}/{path}" for path in lower]
        upper = upper if upper is None or upper.startswith("/") else f"{base}/{upper}"
    return Layers(tuple(lower), upper, tuple(options))


def split_lower(value: str) -> list[str]:
    """The paths of a ``lowerdir=``: separated by colons; a backslash takes the next character as it is."""
    paths, path, characters = [], "", iter(value)
    for character in characters:
        if character == "\\":
            path += next(characters, "")
        elif character == ":":
            paths.append(path)
            path = ""
        else:
            path += character
    paths.append(path)
    if "" in paths:
        raise ContainerError("an overlay with data-only layers cannot be mapped")
    return paths


def escape(value: str) -> str:
    """A path as a value in the option string of mount(2)."""
    return re.sub(r"([\\,])", r"\\\1", value)


def _base(relative: list[str], near: list[str], exists: Callable[[str], bool]) -> str | None:
    for path in near:
        while path.startswith("/") and path != "/":
            path = path.rpartition("/")[0] or "/"
            if all(exists(f"{path.rstrip('/')}/{one}") for one in relative):
                return path.rstrip("/")
    return None
