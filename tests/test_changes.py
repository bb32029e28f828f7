"""What a container has done, from two descriptions: random trees, random edits, and a tree in memory to play it on."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from interceptor.idshift.changes import Changes, Seen, compare, parent


@dataclass
class Inode:
    number: int
    content: int | None
    """None: a directory."""
    stamp: int


@dataclass
class Disk:
    """A filesystem: names to inodes, numbers used again as soon as they can be, and a clock."""

    names: dict[bytes, Inode] = field(default_factory=lambda: {b"": Inode(1, None, 0)})
    clock: int = 0

    def tick(self) -> int:
        self.clock += 1
        return self.clock

    def below(self, path: bytes) -> list[bytes]:
        return [one for one in self.names if one == path or one.startswith(path + b"/")]

    def add(self, path: bytes, content: int | None) -> None:
        """A new file or directory, in place of a file; nothing where there is no directory for it."""
        if not path or not self.is_directory(parent(path)) or self.is_directory(path):
            return
        self.names.pop(path, None)
        used = {inode.number for inode in self.names.values()}
        number = next(n for n in range(1, len(used) + 2) if n not in used)
        self.names[path] = Inode(number, content, self.tick())
        self.touch(parent(path))

    def is_directory(self, path: bytes) -> bool:
        return path in self.names and self.names[path].content is None

    def touch(self, path: bytes) -> None:
        self.names[path].stamp = self.tick()

    def write(self, path: bytes, content: int) -> None:
        if path in self.names and not self.is_directory(path):
            self.names[path].content = content
            self.touch(path)

    def remove(self, path: bytes) -> None:
        if path and path in self.names:
            for one in self.below(path):
                self.names.pop(one)
            self.touch(parent(path))

    def link(self, path: bytes, to: bytes) -> None:
        there = path in self.names and not self.is_directory(path)
        if there and self.is_directory(parent(to)) and to not in self.names:
            self.names[to] = self.names[path]
            self.touch(path)
            self.touch(parent(to))

    def rename(self, path: bytes, to: bytes) -> None:
        """rename(2): what moves gets another time of change, what is in it does not."""
        if not path or path not in self.names or not to or not self.is_directory(parent(to)):
            return
        if (to + b"/").startswith(path + b"/") or (path + b"/").startswith(to + b"/"):
            return  # into itself, or over what it is in
        if to in self.names and (self.is_directory(to) or self.is_directory(path)):
            return
        self.names.pop(to, None)
        for one in self.below(path):
            self.names[to + one[len(path) :]] = self.names.pop(one)
        for one in (to, parent(path), parent(to)):
            self.touch(one)

    def describe(self) -> dict[bytes, Seen]:
        return {p: Seen(i.content is None, i.number, i.stamp) for p, i in self.names.items()}

    def look(self) -> tuple[dict[bytes, int | None], set[frozenset[bytes]]]:
        """What counts: contents by path, and which names are links of each other."""
        links: dict[int, set[bytes]] = {}
        for path, inode in self.names.items():
            links.setdefault(inode.number, set()).add(path)
        return {p: i.content for p, i in self.names.items()}, {frozenset(names) for names in links.values()}

    def copy(self) -> Disk:
        made = {id(inode): Inode(inode.number, inode.content, inode.stamp) for inode in self.names.values()}
        return Disk({path: made[id(inode)] for path, inode in self.names.items()}, self.clock)


def play(manager: Disk, changes: Changes, container: Disk) -> None:
    """What `interceptor.idshift.giveback` does on disk."""
    for path in changes.entered:
        assert manager.is_directory(path)
    for path in changes.removed:
        assert path in manager.names
        manager.remove(path)
    made: dict[int, bytes] = {}
    for path in changes.made:
        manager.remove(path)
        inode = container.names[path]
        if inode.number in made:
            manager.link(made[inode.number], path)
        else:
            manager.add(path, inode.content)
            if inode.content is not None:
                made[inode.number] = path
        assert path in manager.names


NAMES = st.lists(st.sampled_from([b"a", b"b", b"a-", b"c"]), min_size=1, max_size=3).map(b"/".join)
EDITS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), NAMES, st.one_of(st.none(), st.integers(0, 9))),
        st.tuples(st.just("write"), NAMES, st.integers(0, 9)),
        st.tuples(st.just("remove"), NAMES),
        st.tuples(st.sampled_from(["rename", "link"]), NAMES, NAMES),
    ),
    max_size=20,
)


def edit(disk: Disk, edits: list[tuple[object, ...]]) -> None:
    for name, *arguments in edits:
        getattr(disk, str(name))(*arguments)


@given(EDITS, EDITS, EDITS)
def test_changes_make_of_what_was_what_is(
    image: list[tuple[object, ...]], first: list[tuple[object, ...]], second: list[tuple[object, ...]]
) -> None:
    container = Disk()
    edit(container, image)
    manager = container.copy()
    for edits in (first, second):
        before = container.describe()
        edit(container, edits)
        play(manager, compare(before, container.describe()), container)
        assert manager.look() == container.look()


@given(EDITS)
def test_nothing_is_given_back_where_nothing_changed(image: list[tuple[object, ...]]) -> None:
    disk = Disk()
    edit(disk, image)
    assert compare(disk.describe(), disk.describe()) == Changes((), (), ())


@given(EDITS, NAMES)
def test_only_what_changed_is_given_back(image: list[tuple[object, ...]], path: bytes) -> None:
    disk = Disk()
    edit(disk, image)
    before = disk.describe()
    disk.write(path, 10)
    changes = compare(before, disk.describe())
    aliases = {p for p, i in disk.names.items() if i.content == 10}
    assert set(changes.made) == aliases
    assert changes.removed == ()


def test_a_directory_in_place_of_another_brings_all_that_is_in_it() -> None:
    """Its entries' own stamps are as old as they were: a rename does not touch them."""
    disk = Disk()
    for path, content in ((b"a", None), (b"a/d", None), (b"a/d/f", 1), (b"b", None)):
        disk.add(path, content)
    before = disk.describe()
    disk.rename(b"a/d", b"b/d")
    disk.remove(b"a")
    disk.rename(b"b", b"a")
    after = disk.describe()
    assert after[b"a/d/f"] == before[b"a/d/f"]
    assert set(compare(before, after).made) == {b"a", b"a/d", b"a/d/f"}
