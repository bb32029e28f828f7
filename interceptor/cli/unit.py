"""``interceptor unit``: the systemd unit, for the place where this command is installed."""

from __future__ import annotations

import os
import shutil
import sys
from importlib import resources

import click

from interceptor.errors import InterceptorError

#: What ExecStart= of the packaged file names.
PACKAGED_PATH = "/usr/local/bin/interceptor"


@click.command("unit")
def command() -> None:
    """Print a systemd unit that runs this very command as the daemon.

    \b
      interceptor unit > /etc/systemd/system/interceptor.service
      systemctl daemon-reload
      systemctl enable --now interceptor
    """
    click.echo(unit_for(_own_path()), nl=False)


def unit_for(executable: str) -> str:
    """The packaged unit with ``executable``, an absolute path, as its daemon."""
    text = resources.files("interceptor.data").joinpath("interceptor.service").read_text()
    # systemd.service(5): ExecStart= takes specifiers and quotes; a path with such characters must be quoted for it.
    quoted = executable.replace("%", "%%").replace("\\", "\\\\").replace('"', '\\"')
    return text.replace(
        PACKAGED_PATH, f'"{quoted}"' if quoted != executable or " " in executable else executable
    )


def _own_path() -> str:
    """The installed command, also when run as ``python -m interceptor``."""
    beside = os.path.join(os.path.dirname(sys.executable), "interceptor")
    found = shutil.which(sys.argv[0]) if os.path.basename(sys.argv[0]) == "interceptor" else None
    path = found or shutil.which(beside) or shutil.which("interceptor")
    if path is None:
        raise InterceptorError("the installed command cannot be found", "install the package: pip install .")
    return os.path.abspath(path)
