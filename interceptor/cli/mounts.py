"""``interceptor mounts``: what each mount of a container is."""

from __future__ import annotations

import click

from interceptor.cli.common import ask_daemon, config_option, json_option, print_facts, printable


@click.command("mounts")
@click.argument("container", metavar="ID")
@click.option("--pid", type=int, metavar="PID", help="The mount namespace of this process (host's number).")
@config_option
@json_option
def command(container: str, pid: int | None, config: str | None, as_json: bool) -> None:
    """Print the tree of container ID's mounts with the class of each.

    \b
    original-base, original-submount   /proc, /sys and their covers as created: they stay
    copied-base, copied-submount       those that came later: they go
    shield                             stands where a copied cover was removed
    immutable                          the other mounts it was created with: flags are never weakened
    free                               the container's own business

    Without --pid it is the container's first mount namespace, and what that has lost since its creation is listed last.
    """
    from interceptor.cli.place import namespace_of

    namespace = 0
    if pid is not None:
        where = ask_daemon(config, {"op": "whereabouts", "id": container})
        namespace = namespace_of(pid, where)
    rows = ask_daemon(config, {"op": "tree", "id": container, "namespace": namespace})
    assert isinstance(rows, list)
    if not as_json:
        rows = [_line(row) for row in rows]
    print_facts(rows, as_json, empty="no mounts")


def _line(row: dict[str, object]) -> dict[str, object]:
    depth = row["depth"]
    assert isinstance(depth, int)
    return {
        "path": "  " * depth + printable(str(row["path"])),
        "class": row["class"] if row["present"] else f"{row['class']}, gone",
        "fstype": row.get("fstype"),
        "root": printable(str(row["root"])),
        "id": row["id"],
    }
