"""``interceptor ownership``: how a container's files were given to its IDs."""

from __future__ import annotations

import click

from interceptor.cli.common import ask_daemon, config_option, json_option, print_facts


@click.command("ownership")
@click.argument("id")
@config_option
@json_option
def command(id: str, config: str | None, as_json: bool) -> None:
    """Say for the root filesystem and each bind of a container how owners are mapped, and why so."""
    print_facts(ask_daemon(config, {"op": "ownership", "id": id}), as_json, empty="nothing is mapped")
