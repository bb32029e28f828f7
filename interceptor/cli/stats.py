"""``interceptor stats``: what a container's calls were answered."""

from __future__ import annotations

import click

from interceptor.cli.common import ask_daemon, config_option, json_option, print_facts


@click.command("stats")
@click.argument("container", metavar="ID")
@config_option
@json_option
def command(container: str, config: str | None, as_json: bool) -> None:
    """Show how many trapped calls of container ID got which answer.

    A count that rises by hundreds a second is a program of the container in a loop.
    """
    print_facts(ask_daemon(config, {"op": "stats", "id": container}), as_json, empty="no calls yet")
