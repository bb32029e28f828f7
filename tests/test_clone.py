"""Clones on real filesystems: what goes in, what the container changes, what comes back; and who is killed when."""

from __future__ import annotations

import functools
import os
import pickle
import stat
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from interceptor.idshift import clone, giveback
from interceptor.idshift.files import METACOPY, OPAQUE, Tree, is_whiteout, remove_tree
from interceptor.idshift.owners import outside
from interceptor.kernel import mount
from interceptor.kernel.flags import CLONE_NEWNS, MountFlag
from interceptor.kernel.namespaces import unshare
from tests.clone_lab import GIDS, UIDS, Lab, disk, facts, make_lab, same
from tests.clone_zoo import MTIME, ZOO, build

pytestmark = pytest.mark.root

LONG = os.environ.get("INTERCEPTOR_LONG") == "1"

#: Filesystem, whether the manager has an overlay, whether the clone is one by metadata.
KINDS = {
    "ext4": ("ext4", True, True),
    "xfs": ("xfs", True, True),
    "tmpfs": ("tmpfs", True, True),
    "ext4, copied": ("ext4", True, False),
    "xfs, by reflink": ("xfs", True, False),
    "ext4, plain": ("ext4", False, True),
    "ext4, plain, copied": ("ext4", False, False),
}


def private(body: Callable[[], Any]) -> Any:
    """The result of ``body`` in a process with a mount namespace of its own; its exception is the failure."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        status, told = 1, b""
        try:
            unshare(CLONE_NEWNS)
            mount.mount(b"none", b"/", None, MountFlag.MS_REC | MountFlag.MS_PRIVATE)
            told = pickle.dumps(body())
            status = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            with open(write, "wb") as pipe:
                pipe.write(told)
            os._exit(status)
    os.close(write)
    with open(read, "rb") as pipe:
        told = pipe.read()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    return pickle.loads(told)


def lab_of(kind: str, at: Path) -> Lab:
    _, overlay, metadata = KINDS[kind]
    return make_lab(at, overlay, metadata)


def no_stub(lab: Lab) -> None:
    """No file without data is where the manager looks."""
    with Tree(str(lab.target), layer=lab.overlay) as tree:
        assert [path for path, _ in tree.walk() if tree.xattr(path, METACOPY) is not None] == []


# ---- every property, both ways ----


@functools.cache
def journeys(kind: str) -> dict[str, Any]:
    """Descriptions of the zoo at each station."""

    def body() -> dict[str, Any]:
        found: dict[str, Any] = {}
        with disk(KINDS[kind][0]) as at:
            lab = lab_of(kind, at)
            (lab.place / "reference").mkdir()
            build(str(lab.place / "reference"))
            found["reference"] = facts(lab.place / "reference")
            build(str(lab.place / "l0" if lab.overlay else lab.target))
            lab.start()
            found["inside"] = lab.seen()
            touch(lab.inside)
            found["touched"] = lab.seen()
            giveback.give_back(lab.directory, final=False)
            lab.show_manager()
            found["given back"] = facts(lab.manager)
            no_stub(lab)
            (lab.inside / "new").mkdir()
            os.chown(lab.inside / "new", UIDS.first, GIDS.first)
            build(str(lab.inside / "new"), UIDS.first, GIDS.first)
            giveback.finish(lab.directory)
            lab.show_manager()
            found["made inside"] = facts(lab.manager / "new")
            no_stub(lab)
            lab.close()
        return found

    result = private(body)
    assert isinstance(result, dict)
    return result


def touch(root: Path) -> None:
    """Changes no more than the time of everything that can be changed, so that all of it is given back."""
    for directory, below, files in os.walk(os.fsencode(root)):
        for name in [*below, *files]:
            at = os.path.join(directory, name)
            times = (os.lstat(at).st_atime_ns, MTIME + 1)
            try:
                os.utime(at, ns=times, follow_symlinks=False)
            except PermissionError:
                assert os.path.basename(directory) == b"flags"


def part(station: tuple[Any, Any], name: str) -> tuple[Any, Any]:
    """One property's files and links."""
    prefix = name.encode() + b"/"
    found = {path: row for path, row in station[0].items() if path.startswith(prefix)}
    links = {names for names in station[1] if any(path.startswith(prefix) for path in names)}
    return found, links


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("kind", KINDS)
def test_a_property_is_preserved(kind: str, name: str) -> None:
    stations = journeys(kind)
    reference = part(stations["reference"], name)
    assert reference[0]
    same(part(stations["inside"], name), reference)
    same(part(stations["given back"], name), part(stations["touched"], name))
    # By one nanosecond later, each, and nothing else is different.
    later = {
        p: (replace(node, mtime_ns=node.mtime_ns - (node.flags == "")), *rest)
        for p, (node, *rest) in part(stations["given back"], name)[0].items()
    }
    same((later, reference[1]), reference)
    same(part(stations["made inside"], name), reference)


def test_owners_outside_of_the_range_are_nobody_s_inside_and_come_back() -> None:
    def body() -> None:
        with disk("ext4") as at:
            lab = make_lab(at)
            for name in ("kept", "changed", "given"):
                (lab.place / "l0" / name).write_text("x")
                os.chown(lab.place / "l0" / name, 3_000_000, 70_000)
            lab.start()
            seen = os.stat(lab.inside / "kept")
            assert (seen.st_uid, seen.st_gid) == (outside(UIDS), outside(GIDS))
            (lab.inside / "changed").write_text("changed")
            os.chown(lab.inside / "given", UIDS.first + 5, -1)
            giveback.finish(lab.directory)
            lab.show_manager()
            owners = {p.name: (p.stat().st_uid, p.stat().st_gid) for p in lab.manager.iterdir()}
            assert owners == {
                "kept": (3_000_000, 70_000),
                "changed": (3_000_000, 70_000),
                "given": (5, 70_000),
            }
            assert (lab.manager / "changed").read_text() == "changed"
            assert not os.listxattr(lab.target / "changed") or b"interceptor" not in b"".join(
                map(os.fsencode, os.listxattr(lab.target / "changed"))
            )
            lab.close()

    private(body)


# ---- whiteouts, opaque directories, what is in the upper layer ----


def test_the_upper_layer_says_what_a_container_without_a_clone_would_have_left() -> None:
    def body() -> None:
        with disk("ext4") as at:
            lab = make_lab(at)
            for name in ("d/a", "d/b", "e/a", "f/x", "gone", "old"):
                path = lab.place / "l0" / name
                path.parent.mkdir(exist_ok=True)
                path.write_text(name)
            lab.show_manager()
            # From an earlier run, or by the manager: a whiteout and an opaque directory of its own.
            (lab.manager / "old").unlink()
            remove_tree(str(lab.manager / "f"))
            (lab.manager / "f").mkdir()
            (lab.manager / "f/new").write_text("new")
            lab.start()
            assert sorted(os.listdir(lab.inside)) == ["d", "e", "f", "gone"]
            (lab.inside / "gone").unlink()
            (lab.inside / "d/a").unlink()
            # Another one, with a number of its own: it has not just lost what was in it.
            (lab.inside / "e.new").mkdir()
            remove_tree(str(lab.inside / "e"))
            (lab.inside / "e.new").rename(lab.inside / "e")
            (lab.inside / "e/made").write_text("m")
            (lab.inside / "f/x").write_text("another x")
            (lab.inside / "brief").write_text("")
            (lab.inside / "brief").unlink()
            giveback.finish(lab.directory)
            upper = {}
            for directory, below, files in os.walk(lab.target):
                for name in [*below, *files]:
                    path = Path(directory, name)
                    kind = "whiteout" if is_whiteout(path.lstat()) else "file"
                    if path.is_dir():
                        kind = "opaque" if tree_is_opaque(path) else "directory"
                    upper[str(path.relative_to(lab.target))] = kind
            assert upper == {
                "old": "whiteout",
                "gone": "whiteout",
                "d": "directory",
                "d/a": "whiteout",
                "e": "opaque",
                "e/made": "file",
                "f": "opaque",
                "f/new": "file",
                "f/x": "file",
            }
            lab.show_manager()
            assert sorted(os.listdir(lab.manager / "e")) == ["made"]
            lab.close()

    private(body)


def tree_is_opaque(path: Path) -> bool:
    try:
        return os.getxattr(path, OPAQUE.decode()) == b"y"
    except OSError:
        return False


def test_a_file_that_was_moved_keeps_its_data_when_its_old_place_is_gone_below() -> None:
    """Moved without data of its own, then given back: the layer below has nothing at its old path any more."""

    def body() -> None:
        with disk("ext4") as at:
            lab = make_lab(at)
            lab.show_manager()
            (lab.manager / "d").mkdir()
            for name in ("file", "d/one", "d/two"):
                (lab.manager / name).write_text(name)
            lab.start()
            os.rename(lab.inside / "file", lab.inside / "moved")
            os.link(lab.inside / "moved", lab.inside / "linked")
            os.rename(lab.inside / "d", lab.inside / "dir")
            giveback.give_back(lab.directory, final=False)
            no_stub(lab)
            lab.show_inside()
            for name, text in (
                ("moved", "file"),
                ("linked", "file"),
                ("dir/one", "d/one"),
                ("dir/two", "d/two"),
            ):
                assert (lab.inside / name).read_text() == text
            assert giveback.give_back(lab.directory, final=False) == 0
            (lab.inside / "linked").write_text("both")
            giveback.finish(lab.directory)
            lab.show_manager()
            assert (lab.manager / "moved").read_text() == "both"
            assert (lab.manager / "moved").stat().st_nlink == 2
            assert (lab.manager / "dir/two").read_text() == "d/two"
            lab.close()

    private(body)


# ---- random edits ----

NAMES = st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=3).map("/".join)
EDITS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), NAMES, st.integers(0, 200_000)),
        st.tuples(st.just("append"), NAMES, st.integers(1, 100)),
        st.tuples(st.just("mkdir"), NAMES, st.just(0)),
        st.tuples(st.just("mode"), NAMES, st.sampled_from([0o600, 0o4755, 0o1777])),
        st.tuples(st.just("owner"), NAMES, st.integers(0, 65535)),
        st.tuples(st.just("attribute"), NAMES, st.integers(0, 9)),
        st.tuples(st.just("remove"), NAMES, st.just(0)),
        st.tuples(st.just("fifo"), NAMES, st.just(0)),
        st.tuples(st.sampled_from(["rename", "exchange", "link", "symlink"]), NAMES, NAMES),
    ),
    max_size=15,
)


def apply_edits(root: Path, edits: list[tuple[str, str, Any]], uid: int, gid: int) -> None:
    """What of them is possible; the rest is refused by the kernel as it would be for the container."""
    for what, name, value in edits:
        try:
            _edit(root, what, root / name, value)
            if what in ("write", "mkdir", "fifo", "symlink"):
                at = root / (value if what == "symlink" else name)
                os.chown(at, uid, gid, follow_symlinks=False)
            if what == "owner":
                os.chown(root / name, uid + value, gid + value, follow_symlinks=False)
        except OSError:
            continue


def _edit(root: Path, what: str, at: Path, value: Any) -> None:
    if what in ("write", "append"):
        with open(os.open(at, os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CREAT, 0o644), "ab") as file:
            if what == "write":
                file.truncate(0)
            file.write(os.fsencode(at.name) * value)
    elif what == "mkdir":
        at.mkdir()
    elif what == "mode":
        at.chmod(value)
    elif what == "attribute":
        os.setxattr(at, f"trusted.{value}", b"v")
    elif what == "remove":
        remove_tree(str(at)) if at.is_dir() and not at.is_symlink() else at.unlink()
    elif what == "fifo":
        os.mkfifo(at)
    elif what == "rename":
        os.rename(at, root / value)
    elif what == "exchange":
        os.rename(at, root / "exchanged")
        os.rename(root / value, at)
        os.rename(root / "exchanged", root / value)
    elif what == "link":
        os.link(at, root / value, follow_symlinks=False)
    elif what == "symlink":
        os.symlink(at.name, root / value)


def check_random(kind: str, at: Path, image: Any, upper: Any, first: Any, second: Any) -> None:
    """A tree of several layers, edited inside, given back, edited again."""
    lab = lab_of(kind, at)
    if lab.overlay:
        apply_edits(lab.place / "l0", image[::2], 0, 0)
        apply_edits(lab.place / "l1", image[1::2], 0, 0)
    lab.show_manager()
    apply_edits(lab.manager, upper, 0, 0)
    lab.start()
    same(lab.seen(), facts(lab.manager))
    for number, edits in enumerate((first, second)):
        apply_edits(lab.inside, edits, UIDS.first, GIDS.first)
        seen = lab.seen()
        if number:
            giveback.finish(lab.directory)
        else:
            giveback.give_back(lab.directory, final=False)
            lab.show_inside()
            same(lab.seen(), seen)
            assert giveback.give_back(lab.directory, final=False) == 0
        lab.show_manager()
        no_stub(lab)
        same(facts(lab.manager), seen)
    lab.close()


@pytest.mark.parametrize("kind", ["ext4", "tmpfs", "ext4, copied", "ext4, plain"])
def test_random_changes_come_back(kind: str) -> None:
    examples = settings(
        max_examples=400 if LONG else 25,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )

    def body() -> None:
        with disk(KINDS[kind][0]) as at:

            def check(image: Any, upper: Any, first: Any, second: Any) -> None:
                check_random(kind, at, image, upper, first, second)

            examples(given(EDITS, EDITS, EDITS, EDITS)(check))()

    private(body)


# ---- killed in between ----


class Killed(BaseException):
    """Nothing that anybody would catch."""


def scenario(lab: Lab) -> Any:
    """Changes of every kind; what the container sees in the end."""
    for name in ("d/a", "d/b", "e/a", "e/b", "gone", "mode", "becomes", "keep"):
        path = (lab.place / "l0" if lab.overlay else lab.target) / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name * 100)
    lab.show_manager()
    (lab.manager / "d/b").write_text("upper")
    (lab.manager / "u").mkdir()
    (lab.manager / "u/v").write_text("v")
    lab.start()
    (lab.inside / "gone").unlink()
    (lab.inside / "mode").chmod(0o4711)
    (lab.inside / "d/a").write_text("changed")
    os.link(lab.inside / "d/a", lab.inside / "e/linked")
    os.rename(lab.inside / "d/b", lab.inside / "moved")
    os.rename(lab.inside / "u", lab.inside / "w")
    remove_tree(str(lab.inside / "e"))
    (lab.inside / "e").mkdir()
    (lab.inside / "e/new").write_text("new")
    (lab.inside / "becomes").unlink()
    (lab.inside / "becomes").mkdir()
    (lab.inside / "becomes/directory").write_text("x")
    return lab.seen()


@pytest.mark.parametrize("kind", ["ext4", "ext4, plain"])
def test_whoever_is_killed_before_any_step_leaves_it_to_the_next(kind: str) -> None:
    def body() -> int:
        with disk(KINDS[kind][0]) as at:
            for number in range(1000):
                lab = lab_of(kind, at)
                seen = scenario(lab)
                left = [number]

                def step(_: str, left: list[int] = left) -> None:
                    left[0] -= 1
                    if left[0] < 0:
                        raise Killed

                try:
                    giveback.give_back(lab.directory, False, step)
                    finished = True
                except Killed:
                    finished = False
                giveback.give_back(lab.directory, final=False)
                lab.show_manager()
                same(facts(lab.manager), seen)
                lab.show_inside()
                same(lab.seen(), seen)
                no_stub(lab)
                assert not os.path.exists(f"{lab.directory}/staged")
                lab.close()
                if finished:
                    return number
        return 0

    assert private(body) > 20


def test_a_clone_that_was_half_made_is_made_again() -> None:
    def body() -> None:
        with disk("ext4") as at:
            lab = make_lab(at)
            (lab.place / "l0/file").write_text("x")
            lab.show_manager()

            def killed() -> None:
                raise Killed

            with pytest.raises(Killed):
                clone.create(lab.directory, lab.record(), killed)
            assert not os.path.exists(lab.directory)
            lab.start()
            assert (lab.inside / "file").read_text() == "x"
            lab.close()

    private(body)


def test_what_an_overlay_attribute_of_the_image_says_is_not_taken_for_the_kernel_s() -> None:
    """An image with an overlay's upper directory in it: escaped on disk, as the kernel does."""

    def body() -> None:
        with disk("ext4") as at:
            lab = make_lab(at)
            lab.show_manager()
            (lab.manager / "d").mkdir()
            os.setxattr(lab.manager / "d", "trusted.overlay.opaque", b"y")
            lab.start()
            assert os.getxattr(lab.inside / "d", "trusted.overlay.opaque") == b"y"
            (lab.inside / "d").chmod(0o700)
            giveback.finish(lab.directory)
            lab.show_manager()
            assert os.getxattr(lab.manager / "d", "trusted.overlay.opaque") == b"y"
            assert stat.S_IMODE((lab.manager / "d").stat().st_mode) == 0o700
            lab.close()

    private(body)
