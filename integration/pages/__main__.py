"""Executes a page of README.md, with the paths that it names, on private directories.

sudo python -m integration.pages docker|podman|containerd
"""

from __future__ import annotations

import argparse
import sys

from integration.containers.kernel_calls import unshare_mounts
from integration.pages.managers import MANAGERS
from integration.pages.shell import execute


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m integration.pages", description=__doc__.splitlines()[0])
    parser.add_argument("manager", choices=sorted(MANAGERS))
    parser.add_argument(
        "--script", action="store_true", help="a script from standard input in place of the page"
    )
    options = parser.parse_args()
    unshare_mounts()
    execute(MANAGERS[options.manager], sys.stdin.read() if options.script else None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
