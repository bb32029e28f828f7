"""The values that a container has for itself, kept in a file so that they outlive the view.

A value is the host's when it is first asked for, and from then on the container's. The file is replaced whole at every
change; it lives as long as the container.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os

from interceptor.view.nodes import Host, NodeError, Row
from interceptor.view.protocol import Base


class Values:
    """What one container has stored."""

    def __init__(self, host: Host, path: str | None = None) -> None:
        """Takes up what is in the file ``path``, if it is there. Without a path nothing is kept."""
        self._host = host
        self._path = path
        self._values: dict[str, bytes] = {}
        if path is not None:
            with contextlib.suppress(FileNotFoundError), open(path, encoding="ascii") as file:
                self._values = {key: value.encode("latin-1") for key, value in json.load(file).items()}

    def has(self, base: Base, row: Row) -> bool:
        """Whether there is a value: the host has such a node, or the row says what to begin with."""
        return row.default is not None or self._find(base, row) is not None

    def get(self, base: Base, row: Row) -> bytes:
        """The value as reads show it. `NodeError` ENOENT without one."""
        value = self._find(base, row)
        if value is None:
            raise NodeError(errno.ENOENT)
        return value

    def _find(self, base: Base, row: Row) -> bytes | None:
        key = _key(base, row)
        value = self._values.get(key)
        if value is None:
            value = self._host.read(base, row.path)
            if value is None:
                value = row.default
            if value is not None:
                self._values[key] = value
                self._save()
        return value

    def set(self, base: Base, row: Row, value: bytes) -> None:
        """Keep a value. `NodeError` EIO if it cannot be kept, and then it has not changed."""
        key = _key(base, row)
        before = self._values.get(key)
        if before == value:
            return
        self._values[key] = value
        try:
            self._save()
        except OSError:
            if before is not None:
                self._values[key] = before
            raise NodeError(errno.EIO) from None

    def _save(self) -> None:
        if self._path is None:
            return
        beside = self._path + ".new"
        with open(beside, "w", encoding="ascii") as file:
            json.dump({key: value.decode("latin-1") for key, value in self._values.items()}, file)
        os.rename(beside, self._path)

    def drop(self) -> None:
        """The container is gone."""
        self._values.clear()
        if self._path is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)


def _key(base: Base, row: Row) -> str:
    return f"{base.name.lower()}/{row.path.decode('ascii')}"
