"""The ``interceptor`` command: one file a subcommand, imported only when it is used."""

from __future__ import annotations

import importlib
import sys

import click

from interceptor import __version__
from interceptor.errors import InterceptorError

#: Subcommands in the order of ``--help``, which is that of use; each is ``command`` in the module of its name.
COMMANDS = (
    "doctor",
    "serve",
    "unit",
    "ps",
    "mounts",
    "explain",
    "ownership",
    "sync",
    "stats",
    "top",
    "events",
)


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"interceptor.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command


@click.group(
    cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="interceptor")
def cli() -> None:
    """Make mount and unmount work in system containers without showing what is hidden from them.

    \b
    First time on this machine:
      interceptor doctor          what the kernel offers, and what is missing
      interceptor unit            a systemd unit for the daemon
    Every day:
      interceptor serve           the daemon, in the foreground
      interceptor ps              the containers it guards
      interceptor mounts ID       a container's mounts, and what each is
      interceptor explain ID PATH what a mount is, and what it may be asked for
      interceptor ownership ID    how its files were given to its IDs
      interceptor sync ID         give changes in a clone back to its manager
      interceptor stats ID        what its calls were answered
      interceptor top             what is called now, and how long it takes
      interceptor events --follow what is decided, as it happens

    A container is guarded when its bundle names the daemon's seccomp.sock as linux.seccomp.listenerPath and
    interceptor-hook as its createRuntime and poststop hook.
    """


def main() -> None:
    """Run the command line. Exit status: 0 done, 1 failed, with one line of explanation, 2 used wrongly."""
    try:
        cli()
    except InterceptorError as error:
        hint = f" ({error.hint})" if error.hint else ""
        print(f"interceptor: {error}{hint}", file=sys.stderr)
        sys.exit(1)
