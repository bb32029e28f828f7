"""``interceptor sync``: gives what containers have changed in clones of their root filesystems back to the manager."""

from __future__ import annotations

import json
import os
import subprocess

import click

from interceptor.cli.common import config_option, json_option, print_facts
from interceptor.errors import ContainerError


@click.command("sync")
@click.argument("container", required=False, metavar="[ID]")
@click.option("--all", "everything", is_flag=True, help="Every container that has a clone.")
@config_option
@json_option
def command(container: str | None, everything: bool, config: str | None, as_json: bool) -> None:
    """Give what container ID has changed in the clone of its root filesystem back to its manager, as it happens anyway
    when it is paused, stopped or deleted. A running container is paused meanwhile.

    Only containers with the ownership strategy `clone` have one (see `interceptor ownership ID`). No daemon is needed.
    """
    if everything == (container is not None):
        raise click.UsageError("give the ID of a container, or --all")
    from interceptor.config import load
    from interceptor.containers.clones import indexed

    clones = load(config).clones
    names = [one for one in sorted(indexed(clones)) if everything or one.startswith(str(container))]
    if not everything and len(names) != 1:
        what = "is no clone" if not names else "are several clones"
        raise ContainerError(f"there {what} of container {container}", "see: interceptor ownership ID")
    rows = [_sync(one, os.readlink(f"{clones}/{one}")) for one in names]
    print_facts(rows, as_json, empty="no container has a clone")


def _sync(cid: str, directory: str) -> dict[str, object]:
    """A row of the table."""
    from interceptor.idshift.clone import load_record
    from interceptor.idshift.giveback import in_child

    try:
        record = load_record(directory)
    except FileNotFoundError:
        return {"container": cid, "was": "removed with its files", "changes": 0}
    runtime = [record.runtime, "--root", record.runtime_root]
    status = _status(runtime, cid)
    # Where it does not get to stand still, what is given back is still whole files, each of some instant.
    paused = status == "running" and _call([*runtime, "pause", cid])
    try:
        return {
            "container": cid,
            "was": status or "gone",
            "changes": in_child(directory, final=status is None),
        }
    finally:
        if paused:
            _call([*runtime, "resume", cid])


def _status(runtime: list[str], cid: str) -> str | None:
    """What the runtime says of a container; None where it knows none. Raises `ContainerError`."""
    try:
        done = subprocess.run([*runtime, "state", cid], capture_output=True, check=False)
    except OSError as error:
        raise ContainerError(f"{runtime[0]}: {error.strerror}") from None
    try:
        return str(json.loads(done.stdout)["status"]) if done.returncode == 0 else None
    except (ValueError, KeyError):
        raise ContainerError(f"{runtime[0]} state {cid}: no state") from None


def _call(argv: list[str]) -> bool:
    return subprocess.run(argv, stdout=subprocess.DEVNULL, check=False).returncode == 0
