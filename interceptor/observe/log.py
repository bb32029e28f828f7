"""The log: structured, one event a line.

Every entry is a short constant event with its facts as fields: ``log.info("container set up", container=id)``. Fields
with one meaning everywhere: ``container`` (the OCI ID), ``op`` (the system call or control operation), ``mount`` (a
unique mount ID), ``pid`` and ``tid`` as numbered on the host.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING, Any, TextIO, cast

import structlog
from structlog.typing import EventDict, FilteringBoundLogger, Processor, WrappedLogger

if TYPE_CHECKING:
    from interceptor.config import Config

#: syslog(3) priorities by structlog's level names.
_PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}


def get_logger(**fields: object) -> FilteringBoundLogger:
    """A logger with ``fields`` on each entry. Before `configure`, warnings and errors go to standard error."""
    if not structlog.is_configured():
        _configure("console" if sys.stderr.isatty() else "json", logging.WARNING)
    return cast(FilteringBoundLogger, structlog.get_logger(**fields))


def configure(config: Config) -> None:
    """Set up the log of this process as ``config`` says. The last call counts, also for loggers made before it."""
    _configure(choose_format(config.log_format, sys.stderr), getattr(logging, config.log_level.upper()))


def choose_format(wanted: str, stream: TextIO) -> str:
    """``console``, ``json`` or ``journald``: what ``auto`` means for an output that goes to ``stream``."""
    if wanted != "auto":
        return wanted
    if stream.isatty():
        return "console"
    return "journald" if _is_journal(stream) else "json"


def _is_journal(stream: TextIO) -> bool:
    """Whether ``stream`` is what systemd connected to the journal: $JOURNAL_STREAM of systemd.exec(5)."""
    status = os.fstat(stream.fileno())
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def _configure(chosen: str, level: int) -> None:
    processors: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if chosen == "console":
        processors.append(
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
            )
        )
    elif chosen == "journald":
        processors += [structlog.processors.format_exc_info, _journal_entry]
    else:
        processors += [
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(default=_json_default),
        ]
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=_JournalFactory()
        if chosen == "journald"
        else structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )


def _json_default(value: object) -> str:
    """Paths of containers are bytes, and need not be text."""
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else repr(value)


def _journal_entry(_logger: WrappedLogger, method: str, event: EventDict) -> tuple[tuple[()], dict[str, Any]]:
    """The entry as journal fields: the event with its facts as MESSAGE, and each fact as a field that can be matched.

    ``journalctl CONTAINER=web1`` then shows one container's entries.
    """
    text = str(event.pop("event", ""))
    level = event.pop("level", method)
    event.pop("timestamp", None)  # the journal has its own
    values = {key: v if isinstance(v, str) else _json_default(v) for key, v in event.items()}
    shown = " ".join(f"{key}={value}" for key, value in values.items() if key != "exception")
    fields = {key.upper(): value for key, value in values.items()}
    fields |= {"MESSAGE": f"{text} {shown}".rstrip(), "PRIORITY": str(_PRIORITIES.get(level, 6))}
    return (), fields | {"SYSLOG_IDENTIFIER": "interceptor"}


class _JournalLogger:
    """Hands each entry to the journal."""

    def msg(self, **fields: str) -> None:
        # Here, so that only a process that writes to the journal loads libsystemd.
        from cysystemd.journal import send

        send(**fields)

    debug = info = warning = error = critical = exception = msg


class _JournalFactory:
    def __call__(self, *_args: object) -> _JournalLogger:
        return _JournalLogger()
