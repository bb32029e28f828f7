"""``interceptor ps``: the containers."""

from __future__ import annotations

import click

from interceptor.cli.common import ask_daemon, config_option, json_option, print_facts


@click.command("ps")
@config_option
@json_option
def command(config: str | None, as_json: bool) -> None:
    """List the containers that the daemon knows, with the state of their guards."""
    print_facts(ask_daemon(config, {"op": "ps"}), as_json, empty="no containers")
