"""``interceptor doctor``: does this machine have what is needed?"""

from __future__ import annotations

import os
import sys

import click

from interceptor.cli.common import json_option, print_facts, print_table


@click.command("doctor")
@json_option
def command(as_json: bool) -> None:
    """Try each kernel feature that the daemon uses, and say what is missing and what that costs.

    Needs root, as the daemon does. Exit status 1 if something is missing that the daemon cannot do without.
    """
    facts = [_root(), _fuse()]
    if facts[0]["available"]:
        # Features are tried, never read off the kernel's version, and most tries take root.
        from interceptor.kernel.features import probe

        facts += [
            {
                "feature": feature.name,
                "minimum": feature.minimum,
                "available": feature.available,
                "needed": feature.needed,
                "why": feature.why,
            }
            for feature in probe()
        ]
    missing = [fact for fact in facts if fact["needed"] and not fact["available"]]
    if as_json:
        print_facts({"ok": not missing, "features": facts}, as_json, empty="")
    else:
        print_table(facts)
        click.echo(_verdict([str(fact["feature"]) for fact in missing]))
    sys.exit(1 if missing else 0)


def _root() -> dict[str, object]:
    why = "joins namespaces, mounts; the features below are tried only as root"
    return {"feature": "root", "minimum": "-", "available": os.geteuid() == 0, "needed": True, "why": why}


def _fuse() -> dict[str, object]:
    why = "the view; modprobe fuse"
    available = os.access("/dev/fuse", os.R_OK | os.W_OK)
    return {"feature": "/dev/fuse", "minimum": "-", "available": available, "needed": True, "why": why}


def _verdict(missing: list[str]) -> str:
    if missing:
        return f"\nThe daemon cannot work here: {', '.join(missing)} missing."
    return "\nThe daemon can work here."
