"""``python -m tests.fidelity [--list]``: where a guarded container differs from one of the kernel's alone. As root."""

from __future__ import annotations

import sys

from interceptor.library import Interceptor
from tests.fidelity.differences import table
from tests.fidelity.stage import CONTEXTS
from tests.fidelity.tables import FREE, free_differences, plays, survey


def main(arguments: list[str]) -> int:
    """``--list`` prints the table of the README, made from what was found; without it there are counts as well."""
    defects = 0
    with Interceptor() as daemon:
        if "--list" in arguments:
            found = survey(daemon, "root")
            print(table(found.rows()), end="")
            return bool(found.defects)
        for context in CONTEXTS:
            for name in plays(FREE, context):
                differences = free_differences(daemon, context, name)
                defects += len(differences)
                print(f"{context}: free: {name}: {len(differences)} differences")
            found = survey(daemon, context)
            defects += len(found.defects)
            print(f"{context}: procfs, sysfs: {found.scripts} scripts, {len(found.defects)} defects; meant:")
            for request, count in found.meant.items():
                print(f"{count:6} {request}")
            for difference in found.defects:
                print(difference)
    return bool(defects)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
