"""The view's log: one event a line on standard error, as the daemon's, without the library that the daemon has for it.

All containers wait while a successor of the view starts, and that library was two thirds of what it imported.
"""

from __future__ import annotations

import contextlib
import datetime
import sys
import traceback

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}

_least = LEVELS["warning"]


def configure(level: str) -> None:
    """Leave out what is below ``level``, one of `LEVELS`."""
    global _least
    _least = LEVELS[level]


class Logger:
    """Writes events with their facts as fields."""

    def __init__(self, **fields: object) -> None:
        self._fields = fields

    def bind(self, **fields: object) -> Logger:
        """One with these fields on each entry, too."""
        return Logger(**self._fields, **fields)

    def info(self, event: str, **fields: object) -> None:
        self._say("info", event, fields)

    def warning(self, event: str, **fields: object) -> None:
        self._say("warning", event, fields)

    def error(self, event: str, **fields: object) -> None:
        self._say("error", event, fields)

    def exception(self, event: str, **fields: object) -> None:
        """An error, with the exception that is being handled."""
        self._say("error", event, fields | {"exception": traceback.format_exc()})

    def _say(self, level: str, event: str, fields: dict[str, object]) -> None:
        if LEVELS[level] < _least:
            return
        now = datetime.datetime.now(datetime.UTC).isoformat().replace("+00:00", "Z")
        facts = {"timestamp": now, "level": level, "event": event, **self._fields, **fields}
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            sys.stderr.write(" ".join(f"{name}={value!r}" for name, value in facts.items()) + "\n")
            sys.stderr.flush()
