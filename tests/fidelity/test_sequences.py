"""Scripts of several calls, made up and shrunk by hypothesis."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from interceptor.library import Interceptor
from tests.fidelity.calls import AT_FDCWD, AT_RECURSIVE, Argument, Call, Opened
from tests.fidelity.cases import OPERATIONS, Script, attributes
from tests.fidelity.differences import meaning
from tests.fidelity.stage import DETACHED, MNT, MS_BIND, MS_MOVE, MS_REC, MS_REMOUNT, in_f
from tests.fidelity.tables import LONG
from tests.fidelity.twins import Player, compare, twins

pytestmark = [pytest.mark.root, pytest.mark.slow]

EXAMPLES = 5000 if LONG else 150
_SETTINGS = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

#: Of the container's own: mounts, places for them, and paths that change what they are as calls go on.
PLACES = (
    *("dir", "dir/sub", "mnt", "mnt/in", "stack", "shared", "shared/in", "slave", "slave/in", "unbind", "ro"),
    *(
        "new",
        "new2",
        "new/sub",
        "new/in",
        "new2/in",
        "link",
        "mntlink",
        "file",
        "filemnt",
        "mnt/..",
        "dangling",
    ),
)
#: A base that is copied, made and moved on the stage. What happens on covers and originals is in the tables.
OUR_PLACES = ("new", "new2", "dir", "dir/sub", "mnt", "stack", "link")

# Not MNT_EXPIRE: whoever looks at a mount takes its mark away, and a guard looks. The tables have it.
flags_of_mount = st.sampled_from(
    (
        0,
        1,
        6,
        MS_BIND,
        MS_BIND | MS_REC,
        MS_MOVE,
        MS_REMOUNT | MS_BIND | 1,
        MS_REMOUNT | MS_BIND,
        MS_REMOUNT | 1,
    )
) | st.builds(lambda bits: sum(set(bits)), st.lists(st.sampled_from(OPERATIONS), min_size=1, max_size=3))
propagation = st.builds(
    lambda kind, deep: kind | deep,
    st.sampled_from([1 << 17, 1 << 18, 1 << 19, 1 << 20]),
    st.sampled_from([0, MS_REC]),
)
abi = st.sampled_from(["native", "native", "i386"])
opened = st.builds(Opened, st.integers(0, 2))


def _calls(places: tuple[str, ...], sources: st.SearchStrategy[Argument]) -> st.SearchStrategy[Call]:
    place = st.sampled_from(places).map(in_f)
    at = st.tuples(st.just(AT_FDCWD), place) | st.tuples(
        st.sampled_from([MNT, DETACHED]) | opened, st.just(b"")
    )
    return st.one_of(
        st.builds(lambda s, t, f, a: Call("mount", (s, t, b"tmpfs", f, None), a), sources, place, flags_of_mount, abi),
        st.builds(lambda t, f, a: Call("mount", (None, t, None, f, None), a), place, propagation, abi),
        st.builds(lambda t, f, a: Call("umount2", (t, f), a), place, st.sampled_from([0, 0, 2, 8, 10]), abi),
        st.builds(lambda t: Call("umount", (t,), "i386"), place),
        st.builds(lambda f, r: Call("open_tree", (*f, 1 | r | 0x1000)), at, st.sampled_from([0, AT_RECURSIVE])),
        st.builds(lambda f, t, g: Call("move_mount", (*f, *t, 0x44 | g)), at, at, st.sampled_from([0, 0x200, 0x100])),
        st.builds(lambda t, s, r: Call("mount_setattr", (*t, 0x1000 | r, attributes(s), 32)),
                  at, st.sampled_from([0, 1, 2, 0x10]), st.sampled_from([0, AT_RECURSIVE])),
        st.builds(lambda t: Call("chdir", (t,)), place),
        st.builds(lambda t: Call("mkdir", (t + b"/in", 0o755)), place),
        st.builds(lambda t: Call("rmdir", (t,)), place),
        st.builds(lambda a, b: Call("rename", (a, b)), place, place),
        st.just(Call("unshare", (0x20000,))),
        st.builds(lambda t: Call("pivot_root", (t, t)), place),
        st.builds(lambda t: Call("pivot_root", (t, t + b"/in")), place),
    )  # fmt: skip


free_scripts = st.lists(
    _calls(PLACES, st.sampled_from(PLACES).map(in_f) | st.just(b"x")), min_size=2, max_size=10
).map(tuple)


@pytest.fixture(scope="module", params=["root", "nested", "chroot"])
def players(
    request: pytest.FixtureRequest, interceptors: object
) -> Iterator[tuple[tuple[Player, Player], str]]:
    """One in each twin, for all examples."""
    daemon = interceptors("real")  # type: ignore[operator]
    assert isinstance(daemon, Interceptor)
    with twins(daemon, welded=True) as both, both.players(request.param) as pair:
        yield pair, request.param


@_SETTINGS
@given(script=free_scripts)
def test_scripts_on_the_container_s_own_mounts(
    players: tuple[tuple[Player, Player], str], script: Script
) -> None:
    pair, context = players
    differences = list(compare(pair, context, [script]))
    assert not differences, str(differences[0])


_our_place = st.sampled_from(OUR_PLACES).map(in_f)
_our_calls = st.one_of(
    st.builds(
        lambda t, k, a: Call("mount", (b"x", t, k, 0, None), a),
        _our_place,
        st.sampled_from([b"proc", b"sysfs"]),
        abi,
    ),
    st.builds(
        lambda s, t, f, a: Call("mount", (s, t, None, MS_BIND | f, None), a),
        _our_place | st.sampled_from([b"/proc", b"/sys", b"/sys/devices", b"/sys/class", in_f("proc")]),
        _our_place,
        st.sampled_from([0, MS_REC]),
        abi,
    ),
    st.builds(lambda t, f, a: Call("umount2", (t, f), a), _our_place, st.sampled_from([0, 0, 2, 8]), abi),
    st.builds(lambda s, t: Call("mount", (s, t, None, MS_MOVE, None)), _our_place, _our_place),
    st.builds(lambda t: Call("mount", (b"x", t, b"tmpfs", 0, None)), _our_place),
    st.builds(lambda t: Call("open_tree", (AT_FDCWD, t, 1 | AT_RECURSIVE)), _our_place),
    st.builds(lambda n, t: Call("move_mount", (n, b"", AT_FDCWD, t, 4)), opened, _our_place),
    st.just(Call("unshare", (0x20000,))),
)


@pytest.fixture(scope="module")
def our_players(interceptors: object) -> Iterator[tuple[Player, Player]]:
    """One in a trapped container, one in what the kernel alone would have made."""
    daemon = interceptors("real")  # type: ignore[operator]
    with twins(daemon, welded=False) as both, both.players("root") as pair:
        yield pair


@_SETTINGS
@given(script=st.lists(_our_calls, min_size=2, max_size=8).map(tuple))
def test_scripts_on_procfs_and_sysfs(our_players: tuple[Player, Player], script: Script) -> None:
    for difference in compare(our_players, "root", [script]):
        assert meaning(difference) is not None, str(difference)
