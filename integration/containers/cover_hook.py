"""A ``createRuntime`` hook that covers the paths of the naive agent with submounts, for ``--show-the-bug`` alone.

Each path is bound over itself inside the container's mount namespace, before pivot_root: enough for systemd to find
submounts that it wants to unmount. It hides nothing. Standard library only, because it is run by its path alone:
``python -I cover_hook.py PATH…``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def main() -> None:
    state = json.load(sys.stdin)
    config = json.loads((Path(state["bundle"]) / "config.json").read_text())
    rootfs = config["root"]["path"]
    for path in sys.argv[1:]:
        place = rootfs + path
        subprocess.run(
            ["nsenter", f"--mount=/proc/{state['pid']}/ns/mnt", "mount", "--bind", place, place], check=True
        )


if __name__ == "__main__":
    main()
