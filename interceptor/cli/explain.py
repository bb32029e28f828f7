"""``interceptor explain``: what a mount is, and what each operation on it would get."""

from __future__ import annotations

import os

import click

from interceptor.cli.common import ask_daemon, config_option, json_option, print_facts, print_table
from interceptor.errors import InterceptorError


@click.command("explain")
@click.argument("container", metavar="ID")
@click.argument("path")
@click.option(
    "--pid", type=int, metavar="PID", help="As this process sees it (host's number); default: the first one."
)
@config_option
@json_option
def command(container: str, path: str, pid: int | None, config: str | None, as_json: bool) -> None:
    """Say what the mount at PATH in container ID is: its class, since when, where it comes from, and what unmounting,
    moving, remounting and binding it would get, from whom, and why. Of what it was created with, say how owners of
    files are mapped, too.

    Of a PATH that is no mount point, the mount that it lies on is described. Symbolic links are followed, /proc/PID and
    the like excepted.
    """
    from interceptor.cli.place import mount_at, namespace_of

    where = ask_daemon(config, {"op": "whereabouts", "id": container})
    assert isinstance(where, dict)
    try:
        mnt_id, mount_root = mount_at(pid or int(where["pid"]), os.fsencode(path), where)
    except OSError as error:
        raise InterceptorError(f"{path}: {error}") from None
    message: dict[str, object] = {"op": "lineage", "id": container, "mount": mnt_id}
    if pid is not None:
        message["namespace"] = namespace_of(pid, where)
    facts = ask_daemon(config, message)
    assert isinstance(facts, dict)
    facts["is_mount_point"] = mount_root
    if as_json:
        print_facts(facts, as_json, empty="")
        return
    _print(path, facts)


def _print(path: str, facts: dict[str, object]) -> None:
    from interceptor.cli.common import printable

    if not facts["is_mount_point"]:
        click.echo(f"{printable(path)} is no mount point: unmounting it is EINVAL. It lies on this mount:")
    shown = ("path", "class", "meaning", "since", "fstype", "root", "flags", "id")
    rows = [{"": name, " ": printable(str(facts[name]))} for name in shown]
    lineage, operations = facts["lineage"], facts["operations"]
    assert isinstance(lineage, list) and isinstance(operations, list)
    rows += [{"": "lineage" if not i else "", " ": printable(str(line))} for i, line in enumerate(lineage)]
    if facts["owners"] is not None:
        rows.append({"": "owners", " ": printable(str(facts["owners"]))})
    print_table(rows, header=False)
    click.echo()
    print_table(operations)
