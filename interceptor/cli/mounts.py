"""``interceptor mounts``: what is protected in a container."""

from __future__ import annotations

import click

from interceptor.cli.common import ask_daemon, config_option, json_option, print_facts


@click.command("mounts")
@click.argument("container", metavar="ID")
@config_option
@json_option
def command(container: str, config: str | None, as_json: bool) -> None:
    """List the mounts of container ID that the daemon protects or has made, by unique mount ID.

    The container's other mounts are its own business and are not listed.
    """
    answer = ask_daemon(config, {"op": "mounts", "id": container})
    print_facts(answer, as_json, empty="no protected mounts")
