"""Ranges of subordinate IDs: never handed out twice, kept over restarts, taken back when nobody needs them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interceptor.containers.reserved import Decided, Holder, Reservation, Reservations, needed
from interceptor.errors import ContainerError
from interceptor.idshift.subid import ID_MAX, Block, allocate, parse
from interceptor.kernel.process import start_time

BLOCKS = st.builds(Block, st.integers(1, 5000), st.integers(1, 3000))


def test_lines_that_make_no_sense_are_left_out() -> None:
    text = "interceptor:100:50\n# interceptor:1:1\n\nother:7:7\ninterceptor:x:5\ninterceptor:5\n1000:9:9\n"
    assert parse(text, ["interceptor", "1000"]) == [Block(100, 50), Block(9, 9)]
    assert parse("interceptor:0:5\n", ["interceptor"]) == []
    assert parse(f"a:{ID_MAX}:1\n", ["a"]) == [Block(ID_MAX, 1)]
    assert parse(f"a:{ID_MAX}:2\n", ["a"]) == []


@given(st.text(max_size=200), st.sampled_from(["interceptor", "0"]))
def test_any_text_can_be_parsed(text: str, user: str) -> None:
    assert all(block.first > 0 and block.end - 1 <= ID_MAX for block in parse(text, [user]))


@given(st.lists(BLOCKS, max_size=4), st.lists(BLOCKS, max_size=8), st.integers(1, 500))
def test_a_block_is_within_a_range_and_free(ranges: list[Block], taken: list[Block], size: int) -> None:
    block = allocate(ranges, taken, size)
    free = {i for r in ranges for i in range(r.first, r.end)} - {
        i for t in taken for i in range(t.first, t.end)
    }
    if block is None:
        # There is none: no run of that length in any one range.
        for whole in ranges:
            run = 0
            for i in range(whole.first, whole.end):
                run = run + 1 if i in free else 0
                assert run < size
    else:
        assert block.size == size
        assert free >= set(range(block.first, block.end))


@pytest.fixture
def store(tmp_path: Path) -> Reservations:
    (tmp_path / "subuid").write_text("interceptor:1000:100\ninterceptor:5000:50\n")
    return opened(tmp_path)


def opened(directory: Path) -> Reservations:
    sources = dict.fromkeys(("uids", "gids"), str(directory / "subuid"))
    return Reservations(str(directory / "reservations.json"), sources, "interceptor", 50)


def wanted(cid: str, root: Path, pid: int | None = None, start: int = 0) -> Reservation:
    own = os.getpid()
    holder = Holder(own, start_time(own) or 0) if pid is None else Holder(pid, start)
    return Reservation(cid, str(root), holder, "/b", [], [])


def test_ranges_are_exclusive_until_they_are_exhausted(store: Reservations, tmp_path: Path) -> None:
    blocks = [store.reserve(wanted(name, tmp_path), map_ids=True).uids for name in "abc"]
    assert blocks == [Block(1000, 50), Block(1050, 50), Block(5000, 50)]
    with pytest.raises(ContainerError, match="exhausted: 3 containers hold 50 IDs each"):
        store.reserve(wanted("d", tmp_path), map_ids=True)
    assert store.get("d") is None
    store.release("b")
    assert store.reserve(wanted("d", tmp_path), map_ids=True).uids == Block(1050, 50)
    assert store.reserve(wanted("managers", tmp_path), map_ids=False).uids is None


def test_without_a_range_the_error_says_what_to_write(tmp_path: Path) -> None:
    with pytest.raises(ContainerError, match="no range of IDs for the user 'interceptor'") as caught:
        opened(tmp_path).reserve(wanted("a", tmp_path), map_ids=True)
    assert caught.value.hint == "append a line, for ten containers for example: interceptor:1000000:500"


def test_reservations_outlive_the_daemon(store: Reservations, tmp_path: Path) -> None:
    made = store.reserve(wanted("a", tmp_path), map_ids=True)
    decided = [Decided("/", "idmapped", "it works on this filesystem")]
    store.amend("a", "/stage/rootfs", ["/scratch"], decided)
    again = opened(tmp_path)
    found = again.get("a")
    assert found is not None
    assert (found.uids, found.root, found.scratch) == (made.uids, "/stage/rootfs", ["/scratch"])
    assert found.decisions == decided
    assert again.reserve(wanted("b", tmp_path), map_ids=True).uids == Block(1050, 50)
    with pytest.raises(ContainerError, match="exists already"):
        again.reserve(wanted("a", tmp_path), map_ids=True)


def test_a_spoilt_file_is_not_taken_for_an_empty_one(store: Reservations, tmp_path: Path) -> None:
    (tmp_path / "reservations.json").write_text("[{")
    with pytest.raises(ContainerError, match=r"reservations\.json"):
        opened(tmp_path)


def test_what_nobody_needs_is_released(store: Reservations, tmp_path: Path) -> None:
    """Needed: while its maker lives, or while the runtime has a state of it. A PID alone proves nothing."""
    done = subprocess.Popen(["true"])
    done.wait()
    root = tmp_path / "runc"
    (root / "running").mkdir(parents=True)
    store.reserve(wanted("running", root, done.pid), map_ids=True)
    store.reserve(wanted("killed", root, done.pid), map_ids=True)
    store.reserve(wanted("other-process", root, os.getpid(), start=1), map_ids=True)
    assert {r.id for r in store.reclaim()} == {"killed", "other-process"}
    assert {r.id for r in opened(tmp_path).all()} == {"running"}
    assert needed(wanted("being-made", root))
