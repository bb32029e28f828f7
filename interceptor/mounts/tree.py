"""The mounts of a namespace as a tree. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from interceptor.mounts.lineage import Mount

M = TypeVar("M", bound=Mount)


@dataclass
class Node(Generic[M]):
    """A mount that can be seen, with those mounted on it."""

    mount: M
    children: list[Node[M]] = field(default_factory=list)


def visible_tree(mounts: Sequence[M], top: bytes) -> Node[M]:
    """The mounts at and below the path ``top`` that nothing covers, parents before children.

    ``mounts`` are in the kernel's order (older first). Of several at one point the youngest is seen, and what is
    mounted on one that is covered is not seen at all. Raises `LookupError` if nothing is mounted at ``top``.
    """
    ids = {m.mnt_id: m for m in mounts}
    covered = {m.parent_id for m in mounts if m.parent_id in ids and ids[m.parent_id].point == m.point}
    nodes: dict[int, Node[M]] = {}
    root: Node[M] | None = None
    inside = top.rstrip(b"/") + b"/"
    for mount in sorted(mounts, key=lambda m: m.point.count(b"/") if m.point != b"/" else 0):
        if mount.mnt_id in covered or not (mount.point == top or mount.point.startswith(inside)):
            continue
        node = Node(mount)
        if mount.point == top:
            root = node
        else:
            parent = nodes.get(_seen_parent(mount, ids))
            if parent is None:
                continue
            parent.children.append(node)
        nodes[mount.mnt_id] = node
    if root is None:
        raise LookupError(f"nothing is mounted at {top!r}")
    return root


def _seen_parent(mount: M, ids: dict[int, M]) -> int:
    """The ID of the mount that this one is seen on: its parent, past those it was stacked upon at the same point."""
    parent = ids.get(mount.parent_id)
    while parent is not None and parent.point == mount.point:
        parent = ids.get(parent.parent_id)
    return parent.mnt_id if parent is not None else 0


def chain_to_root(mount: M, ids: dict[int, M]) -> list[M]:
    """The mount, its parent, and so on to the root of its namespace."""
    chain = [mount]
    while (parent := ids.get(chain[-1].parent_id)) is not None and parent is not chain[-1]:
        chain.append(parent)
    return chain
