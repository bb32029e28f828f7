"""Owners into a container's range and out of it: nothing is lost on the way, and what has no counterpart shows none."""

from __future__ import annotations

import stat
import struct

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from interceptor.idshift.owners import ACLS, CAPABILITY, ORIGINAL, Node, Shift, outside
from interceptor.idshift.subid import ID_MAX, Block

IDS = st.one_of(st.integers(0, 200), st.integers(0, ID_MAX))
BLOCKS = st.builds(Block, st.integers(1, 200_000), st.integers(1, 70_000))
SHIFTS = st.builds(Shift, BLOCKS, BLOCKS)


def acl(entries: list[tuple[int, int, int]]) -> bytes:
    """The value of an ACL's attribute (linux/posix_acl_xattr.h)."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


ENTRIES = st.lists(
    st.one_of(
        st.tuples(st.sampled_from([0x02, 0x08]), st.integers(0, 7), IDS),
        st.tuples(st.sampled_from([0x01, 0x04, 0x10, 0x20]), st.integers(0, 7), st.just(0xFFFFFFFF)),
    ),
    max_size=6,
)
XATTRS = st.fixed_dictionaries(
    {},
    optional={
        ACLS[0]: ENTRIES.map(acl),
        ACLS[1]: ENTRIES.map(acl),
        CAPABILITY: st.binary(min_size=16, max_size=16).map(
            lambda body: struct.pack("<I", 0x02000001) + body
        ),
        b"user.other": st.binary(max_size=9),
    },
)
NODES = st.builds(Node, mode=st.just(stat.S_IFREG | 0o644), uid=IDS, gid=IDS, xattrs=XATTRS)


def owners(value: bytes) -> list[tuple[int, int]]:
    """Tag and ID of each entry that names somebody."""
    found = [struct.unpack_from("<HHI", value, at) for at in range(4, len(value), 8)]
    return [(tag, number) for tag, _, number in found if tag in (0x02, 0x08)]


@given(SHIFTS, NODES)
def test_what_goes_in_comes_out(shift: Shift, node: Node) -> None:
    assert shift.outward(shift.inward(node)) == node


@given(SHIFTS, NODES)
def test_inside_there_are_only_ids_of_the_range_and_nobody_s(shift: Shift, node: Node) -> None:
    made = shift.inward(node)
    assert shift.uids.first <= made.uid < shift.uids.end or made.uid == outside(shift.uids)
    assert shift.gids.first <= made.gid < shift.gids.end or made.gid == outside(shift.gids)
    for name in ACLS:
        for tag, number in owners(made.xattrs.get(name, acl([]))):
            ids = shift.uids if tag == 0x02 else shift.gids
            assert ids.first <= number < ids.end or number == outside(ids)
    assert not shift.uids.first <= outside(shift.uids) < shift.uids.end
    beyond = [node.uid >= shift.uids.size, node.gid >= shift.gids.size]
    for name in ACLS:
        for tag, number in owners(node.xattrs.get(name, acl([]))):
            beyond.append(number >= (shift.uids if tag == 0x02 else shift.gids).size)
    assert (ORIGINAL in made.xattrs) == any(beyond), "a note only where something would be lost"


@given(SHIFTS, NODES, st.integers(0, 70_000))
def test_an_owner_that_the_container_has_given_counts(shift: Shift, node: Node, number: int) -> None:
    if number < shift.uids.size:
        given_away = replace(shift.inward(node), uid=shift.uids.first + number)
        assert shift.outward(given_away).uid == number


@given(SHIFTS, st.integers(0, ID_MAX), st.binary(min_size=16, max_size=16))
def test_a_capability_is_for_a_root_of_the_container_s(shift: Shift, root: int, body: bytes) -> None:
    """Revision 3: kept where its root has a counterpart, else of no effect inside, and not shown there."""
    value = struct.pack("<I", 0x03000001) + body + struct.pack("<I", root)
    node = Node(stat.S_IFREG, xattrs={CAPABILITY: value})
    made = shift.inward(node)
    if root >= shift.uids.size:
        assert CAPABILITY not in made.xattrs
        return
    assert struct.unpack_from("<I", made.xattrs[CAPABILITY], 20)[0] == shift.uids.first + root
    back = shift.outward(made).xattrs[CAPABILITY]
    plain = struct.pack("<I", 0x02000001) + body
    assert back == (value if root else plain), "for the first root, the plain revision says the same"


@given(SHIFTS, st.binary(min_size=16, max_size=16), IDS)
def test_a_capability_that_is_not_the_container_s_never_comes_out(
    shift: Shift, body: bytes, root: int
) -> None:
    value = struct.pack("<I", 0x03000001) + body + struct.pack("<I", root)
    found = shift.outward(Node(stat.S_IFREG, xattrs={CAPABILITY: value})).xattrs
    assert (CAPABILITY in found) == (shift.uids.first <= root < shift.uids.end)
