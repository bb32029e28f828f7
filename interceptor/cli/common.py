"""What subcommands share: options, and the printing of facts."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import click

#: Columns of an output that is not a terminal: more than any line needs.
UNCUT = 100_000

_F = TypeVar("_F", bound=Callable[..., Any])


def config_option(command: _F) -> _F:
    """``--config FILE``, as ``config``; None for the default file."""
    return click.option(
        "--config",
        metavar="FILE",
        type=click.Path(dir_okay=False),
        help="The configuration, instead of /etc/interceptor/config.toml.",
    )(command)


def json_option(command: _F) -> _F:
    """``--json``, as ``as_json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print the facts as JSON, for programs.")(
        command
    )


def ask_daemon(config: str | None, message: dict[str, object]) -> object:
    """The answer of the daemon that ``config`` (or the default configuration) describes. Raises `InterceptorError`."""
    from interceptor.client import request
    from interceptor.config import load

    return request(load(config).control_socket, message, timeout=10)


def print_facts(facts: object, as_json: bool, empty: str) -> None:
    """Print what the daemon said: as JSON; else a list of records as a table, one record as names and values.

    ``empty`` is printed instead of a table without rows.
    """
    if as_json:
        click.echo(json.dumps(facts, indent=2, ensure_ascii=False))
    elif isinstance(facts, Mapping):
        print_table([{"": name, " ": value} for name, value in facts.items()], header=False)
    elif isinstance(facts, list) and facts and all(isinstance(fact, Mapping) for fact in facts):
        print_table(facts)
    else:
        click.echo(empty if not facts else str(facts))


def print_table(rows: Sequence[Mapping[str, object]], header: bool = True) -> None:
    """Print ``rows``, whose keys are the columns, in order of first appearance. Not a terminal: nothing is cut off."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(box=None, show_header=header, pad_edge=False)
    for column in columns:
        table.add_column(column.replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*(Text(_cell(row.get(column))) for column in columns))
    Console(width=None if sys.stdout.isatty() else UNCUT).print(table)


def printable(text: str) -> str:
    """A path of a container, which may have any bytes in it, fit for a terminal."""
    shown = os.fsencode(text).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_cell(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return ", ".join(_cell(inner) for inner in value)
    return str(value)
