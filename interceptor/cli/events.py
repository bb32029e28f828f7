"""``interceptor events``: what is decided, as it happens."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import click

from interceptor.cli.common import config_option, json_option, printable
from interceptor.errors import InterceptorError, errno_name

#: Seconds until the daemon must have begun.
_BEGIN_S = 10.0


@click.command("events")
@click.option(
    "--follow", is_flag=True, required=True, help="Events from now on, until Ctrl-C: none are kept."
)
@click.option(
    "--container", "containers", metavar="ID", multiple=True, help="Of this container only; repeatable."
)
@click.option(
    "--verdict",
    "verdicts",
    type=click.Choice(["continued", "denied", "handled"]),
    multiple=True,
    help="Calls with this verdict only; repeatable.",
)
@config_option
@json_option
def command(
    follow: bool, containers: tuple[str, ...], verdicts: tuple[str, ...], config: str | None, as_json: bool
) -> None:
    """Tell of each decision: the container, the caller and its systemd unit, the call, its path and the verdict.

    What repeats (the same unit, call, path and verdict in a container) is told at once, and then in one line with a
    count, after one second at first and every ten at last. Other lines tell of containers that come and go, and of a
    call that is repeated without effect, with what to do. A terminal that does not keep up loses lines, and is told
    how many; no container is slowed down by that.
    """
    from interceptor.client import follow as stream
    from interceptor.config import load

    socket = load(config).control_socket
    try:
        for event in stream(socket, {"op": "events"}, _BEGIN_S):
            if wanted(event, containers, verdicts):
                click.echo(json.dumps(event) if as_json else line_of(event))
    except KeyboardInterrupt:
        return
    raise InterceptorError("the daemon has ended")


def wanted(event: dict[str, Any], containers: tuple[str, ...], verdicts: tuple[str, ...]) -> bool:
    """Whether an event is asked for. That some were lost always is."""
    if event["event"] == "dropped":
        return True
    if containers and event.get("container") not in containers:
        return False
    return not verdicts or event["event"] != "call" or event["verdict"] in verdicts


def line_of(event: dict[str, Any]) -> str:
    """One line for a terminal; what containers have named is made harmless."""
    kind = event["event"]
    if kind == "dropped":
        text = f"{event['count']} events are missing here: this reader was too slow"
    elif kind == "missed":
        text = (
            f"{event['container']}  {event['count']} calls are not told of: too many different ones at once"
        )
    elif kind == "container":
        text = f"{event['container']}  {event['what']}" + (
            f": {event['reason']}" if event.get("reason") else ""
        )
    elif kind == "repeated":
        text = (
            f"{event['container']}  {event['op']} {printable(event['path'] or '?')} "
            f"repeated without effect, {event['calls']} times, by {printable(event['unit'])}: {event['hint']}"
        )
    else:
        text = _call(event)
    return f"{datetime.now():%H:%M:%S}  {text}"


def _call(event: dict[str, Any]) -> str:
    verdict = event["verdict"] + (f" {errno_name(event['errno'])}" if event["errno"] else "")
    caller = f"{printable(event['comm']) or '?'}[{event['tid']}]"
    unit = "" if event["unit"] == "-" else f" of {printable(event['unit'])}"
    count = f" ×{event['count']}" if event["count"] > 1 else ""
    reason = f" ({event['reason']})" if event["reason"] else ""
    path = printable(event["path"]) or "-"
    return f"{event['container']}  {caller}{unit}  {event['operation']} {path}  {verdict}{count}{reason}"
