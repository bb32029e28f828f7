"""``interceptor serve``: the daemon."""

from __future__ import annotations

import os
import sys

import click

from interceptor.cli.common import config_option
from interceptor.errors import InterceptorError


@click.command("serve")
@config_option
@click.option(
    "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="Instead of log_level."
)
def command(config: str | None, log_level: str | None) -> None:
    """Run the daemon in the foreground, until SIGTERM or SIGINT.

    It listens on seccomp.sock (for runtimes: linux.seccomp.listenerPath) and control.sock (for the hook and for this
    command) in its runtime_dir. Guards of running containers outlive it, and the next one takes them over.
    """
    import msgspec

    from interceptor.config import load
    from interceptor.observe import log

    settings = load(config)
    if log_level is not None:
        settings = msgspec.structs.replace(settings, log_level=log_level)
    if os.geteuid() != 0:
        raise InterceptorError("the daemon must run as root", "use sudo, or the systemd unit")
    log.configure(settings)
    from interceptor.daemon import serve

    sys.exit(serve(settings))
