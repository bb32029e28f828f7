"""The tree of mounts that can be seen."""

from __future__ import annotations

import pytest

from interceptor.mounts.tree import Node, chain_to_root, visible_tree
from tests.mount_facts import Facts, Namespace


def points(node: Node[Facts]) -> list[bytes]:
    return [node.mount.point, *(p for child in node.children for p in points(child))]


def test_only_what_is_below_the_top_belongs_to_it() -> None:
    space = Namespace()
    host = space.add(b"/")
    root = space.add(b"/b/rootfs", host)
    space.add(b"/b/rootfs2", host)
    space.add(b"/b/rootfs/proc", root)
    assert points(visible_tree(space.mounts, b"/b/rootfs")) == [b"/b/rootfs", b"/b/rootfs/proc"]


def test_of_stacked_mounts_the_youngest_is_seen() -> None:
    space = Namespace()
    host = space.add(b"/")
    below = space.add(b"/b", host)
    hidden = space.add(b"/b/proc", below)
    above = space.add(b"/b", below)
    seen = space.add(b"/b/proc", above)
    tree = visible_tree(space.mounts, b"/b")
    assert tree.mount == above
    assert [c.mount for c in tree.children] == [seen]
    assert hidden not in [c.mount for c in tree.children]


def test_a_mount_on_a_stack_is_a_child_of_what_the_stack_stands_on() -> None:
    space = Namespace()
    root = space.add(b"/")
    first = space.add(b"/proc/kcore", root)
    second = space.add(b"/proc/kcore", first)
    tree = visible_tree(space.mounts, b"/")
    assert [c.mount for c in tree.children] == [second]


def test_a_top_that_is_no_mount_is_an_error() -> None:
    space = Namespace()
    space.add(b"/")
    with pytest.raises(LookupError):
        visible_tree(space.mounts, b"/b/rootfs")


def test_the_chain_ends_at_the_root() -> None:
    space = Namespace()
    root = space.add(b"/")
    proc = space.add(b"/proc", root)
    sys = space.add(b"/proc/sys", proc)
    assert chain_to_root(sys, {m.mnt_id: m for m in space.mounts}) == [sys, proc, root]
