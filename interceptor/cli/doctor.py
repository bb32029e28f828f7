"""``interceptor doctor``: does this machine have what is needed?"""

from __future__ import annotations

import os
import sys

import click

from interceptor.cli.common import config_option, json_option, print_facts, print_table

#: Where container engines keep layers and volumes; those that are there are tried.
STORAGES = ("/var/lib/docker", "/var/lib/containerd", "/var/lib/containers", "/var/lib")


@click.command("doctor")
@config_option
@json_option
@click.option(
    "--storage",
    metavar="DIRECTORY",
    multiple=True,
    type=click.Path(exists=True, file_okay=False),
    help="Try ownership there, instead of where container engines keep their files. May be repeated.",
)
def command(config: str | None, as_json: bool, storage: tuple[str, ...]) -> None:
    """Try each kernel feature that the daemon uses, and say what is missing and what that costs. Then try, on each
    storage directory, how files can be given to a container's IDs, and say what a container there would get.

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
    ownership = _ownership(config, storage) if facts[0]["available"] else []
    missing = [fact for fact in facts if fact["needed"] and not fact["available"]]
    if as_json:
        print_facts({"ok": not missing, "features": facts, "ownership": ownership}, as_json, empty="")
    else:
        print_table(facts)
        if ownership:
            click.echo()
            print_table(ownership)
        click.echo(_verdict([str(fact["feature"]) for fact in missing]))
    sys.exit(1 if missing else 0)


def _ownership(config: str | None, storage: tuple[str, ...]) -> list[dict[str, object]]:
    """A row for each probe on each storage directory, and one for what follows from them."""
    from interceptor.config import load
    from interceptor.idshift.overlay import mount_of, parse_mountinfo
    from interceptor.idshift.probe import probe_storage, strategy

    allowed = load(config).ownership_strategies
    with open("/proc/self/mountinfo", errors="surrogateescape") as file:
        mounts = parse_mountinfo(file.read())
    rows: list[dict[str, object]] = []
    for directory in storage or [path for path in STORAGES if os.path.isdir(path)]:
        fstype = mount_of(os.path.realpath(directory), mounts).fstype
        probes = probe_storage(directory, fstype)
        for one in probes:
            rows.append(_row(directory, fstype, one.name, "works" if one.works else "fails", one.reason))
        rows.append(_row(directory, fstype, "a container gets", *strategy(probes, allowed)))
    return rows


def _row(storage: str, fstype: str, probe: str, result: str, reason: str) -> dict[str, object]:
    return {"storage": storage, "filesystem": fstype, "probe": probe, "result": result, "reason": reason}


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
