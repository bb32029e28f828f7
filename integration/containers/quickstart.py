"""The command line of ``integration/quickstart``; standard library only, so that ``--help`` works before an install."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

DESCRIPTION = """\
Boots a real systemd container on stock runc, guarded by the interceptor, and shows that

  * e2scrub_reap.service and systemd-logind.service finish (they are what an interceptor that fakes
    success makes hang for ever, at hundreds of umounts a second: see --show-the-bug),
  * copies of the view's mounts can be removed, as systemd does it for every private mount namespace,
  * the originals cannot, and nothing raw of /proc and /sys ever shows.

It ends with a table; the exit status is 0 only if every line of it is good. Nothing is left behind but
the cached root filesystem and Python environment.
"""
EXAMPLES = """\
examples:
  sudo ./integration/quickstart                  the whole demonstration
  sudo ./integration/quickstart --show-the-bug   the bug first, then its cure
  sudo ./integration/quickstart --keep           leave the container running, and say how to enter it
  sudo ./integration/quickstart --json facts.json
"""


def parser() -> argparse.ArgumentParser:
    """Return the command line's grammar."""
    result = argparse.ArgumentParser(
        "integration/quickstart",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("--json", metavar="FILE", type=Path, help="also write the facts to FILE as JSON")
    result.add_argument(
        "--keep", action="store_true", help="leave the container running until Ctrl-C, and say how to enter"
    )
    result.add_argument(
        "--show-the-bug",
        action="store_true",
        help="first run the same container against an agent that fakes success, and count the storm for five seconds",
    )
    result.add_argument(
        "--no-install",
        action="store_true",
        help="install and build nothing: use the Python environment at hand ($VIRTUAL_ENV, ./.venv or python3)",
    )
    result.add_argument(
        "--cache",
        metavar="DIR",
        type=Path,
        default=Path("/var/cache/interceptor"),
        help="where the root filesystem (and the Python environment) are kept (%(default)s)",
    )
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the quickstart and return its exit status."""
    options = parser().parse_args(arguments)
    if os.geteuid() != 0:
        print("integration/quickstart has to run as root: sudo ./integration/quickstart", file=sys.stderr)
        return 1
    from integration.containers import session  # needs the packages that the project depends on

    return session.run(session.Options(options.cache, options.json, options.keep, options.show_the_bug))


if __name__ == "__main__":
    sys.exit(main())
