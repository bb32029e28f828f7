"""The way back: what a container has changed in its clone becomes a change of the manager's own tree.

Three steps, and whoever is killed in any of them, or loses power, leaves something from which the next one gets to the
same end:

1. *Stage.* The clone is compared with its manifest. What is to be made is made in ``staged``, complete, with data and
   unshifted owners, on the manager's filesystem but not in its tree. A leftover of a killed predecessor is thrown away.
2. *Journal.* The list of moves is written, once everything is on disk. From here on the clone is not looked at.
3. *Apply.* Each staged file is renamed to its place; what stood there is replaced, or set aside into ``staged``. A
   step that was made already is known by its staged file's being gone. Then directories get their metadata, the
   manifest is replaced, the journal goes.

A file without data never gets out: data is taken from the mounted overlay, which has it from the layer below.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from typing import NoReturn

import msgspec

from interceptor.errors import ContainerError, InterceptorError
from interceptor.idshift import stack
from interceptor.idshift.changes import Changes, Seen, compare, parent
from interceptor.idshift.clone import OLD, Record, load_manifest, load_record, mount_clone, opened, store
from interceptor.idshift.coherence import forget
from interceptor.idshift.files import METACOPY, OPAQUE, Tree, describe, remove_tree
from interceptor.idshift.owners import Node
from interceptor.kernel import mount
from interceptor.kernel.fd import OwnedFd
from interceptor.kernel.flags import CLONE_NEWNS, MountFlag
from interceptor.kernel.inode import copy_data, syncfs
from interceptor.kernel.namespaces import unshare
from interceptor.kernel.process import close_all_but
from interceptor.kernel.stat import fs_magic

#: OVERLAYFS_SUPER_MAGIC of linux/magic.h.
_OVERLAYFS = 0x794C7630


class Move(msgspec.Struct, frozen=True):
    """A staged file goes to its place; none: what stands there is only set aside."""

    path: bytes
    staged: int | None


class Journal(msgspec.Struct, frozen=True):
    """All that step 3 needs."""

    moves: list[Move]
    last: list[tuple[bytes, Node]]
    """What gets its metadata only when all is in place: directories, whose times change, and what has flags."""
    manifest: dict[bytes, Seen]


#: Told of each step before it is made.
Step = Callable[[str], object]


def _nothing(_: str) -> None:
    return


def claim(directory: str) -> OwnedFd:
    """What identifies the clone that is there now: another one may have its place when its turn comes. Raises
    `FileNotFoundError`."""
    return OwnedFd(os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))


def give_back(directory: str, final: bool, step: Step = _nothing) -> int:
    """Gives back all changes of the clone in ``directory``; returns how many names and directories they concern. No
    process must be changing it meanwhile. ``final``: nobody will use the clone any more.

    In a mount namespace of the caller's own. Raises `OSError`, `InterceptorError`; `FileNotFoundError` where the clone
    is gone.
    """
    with claim(directory) as claimed:
        _lock(directory, claimed)
        return _give_back(directory, final, step)


def finish(directory: str, step: Step = _nothing) -> int:
    """Gives back all changes of a clone that nobody uses any more, and removes it. Whoever comes second finds nothing
    to do. As `give_back`."""
    try:
        with claim(directory) as claimed:
            count, rest = _finish(directory, claimed, step)
    except FileNotFoundError:
        if os.path.exists(f"{directory}/record"):
            raise
        return 0
    remove_tree(rest)
    return count


def _lock(directory: str, claimed: OwnedFd) -> None:
    fcntl.flock(claimed.fileno(), fcntl.LOCK_EX)
    if os.stat(directory).st_ino != os.fstat(claimed.fileno()).st_ino:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), directory)


def _give_back(directory: str, final: bool, step: Step) -> int:
    record = load_record(directory)
    count = 0
    if os.path.exists(f"{directory}/journal"):
        count += _apply(directory, record, step)
    remove_tree(f"{directory}/staged")
    with _Stage(directory, record, step) as staging:
        journal = staging.journal(final)
    if journal is None:
        remove_tree(f"{directory}/staged")
    else:
        step("journal")
        store(f"{directory}/journal", journal)
        count += _apply(directory, record, step)
    _refresh(record)
    return count


def _finish(directory: str, claimed: OwnedFd, step: Step) -> tuple[int, str]:
    """Returns where what is left of it waits to be removed."""
    _lock(directory, claimed)
    count = _give_back(directory, True, step)
    index = load_record(directory).index
    with contextlib.suppress(FileNotFoundError):
        if os.readlink(index) == os.fsencode(directory):
            os.unlink(index)
    rest = f"{directory}{OLD}{os.fstat(claimed.fileno()).st_ino}"
    os.rename(directory, rest)
    return count, rest


# ---- step 1 ------------------------------------------------------------------------------------------------


class _Stage:
    """Makes all that is new, beside the manager's tree."""

    def __init__(self, directory: str, record: Record, step: Step) -> None:
        self._directory = directory
        self._record = record
        self._step = step
        self._shift = record.shift
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> _Stage:
        self._stack.__enter__()
        enter = self._stack.enter_context
        self._clone = enter(Tree(f"{self._directory}/upper", layer=self._record.metadata))
        self._target = enter(Tree(self._record.target, layer=self._record.overlay))
        self._below = enter(Tree(below, layer=False)) if (below := self._lower()) is not None else None
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _place(self, name: str) -> str:
        place = f"{self._directory}/staged/{name}"
        os.makedirs(place, 0o700)
        return place

    def _lower(self) -> str | None:
        """The manager's layers below its upper one, as one tree."""
        lower = [os.fsdecode(path) for path in self._record.lower]
        if len(lower) < 2:
            return lower[0] if lower else None
        options = [(os.fsdecode(name), value) for name, value in self._record.options]
        kept = [(name, None if value is None else os.fsdecode(value)) for name, value in options]
        place = self._place("below")
        with stack.mount_layers(lower, kept, self._place("layers")) as tree:
            mount.attach(tree, mount.AT_FDCWD, place)
        self._stack.callback(mount.umount2, place)
        return place

    def journal(self, final: bool) -> Journal | None:
        """What is to be done, with everything staged and on disk; None: nothing."""
        _restore_times(self._directory, self._clone)
        now = describe(self._clone)
        changes = compare(load_manifest(self._directory), now)
        if changes == Changes((), (), ()):
            return None
        self._staged = self._stack.enter_context(Tree(self._place("new"), layer=self._record.overlay))
        os.mkdir(f"{self._directory}/staged/aside", 0o700)
        if self._record.metadata:
            now |= self._take_data(changes, now, final)
        moves = [*self._entered(changes), *self._removals(changes), *self._made(changes, now)]
        last = [
            (path, node)
            for path in sorted({*changes.entered, *changes.made}, reverse=True)
            if (node := self._shift.outward(self._clone.read(path))).flags or now[path].directory
        ]
        syncfs(self._target.directory(b""))
        return Journal(moves, last, now)

    def _take_data(self, changes: Changes, now: dict[bytes, Seen], final: bool) -> dict[bytes, Seen]:
        """Has the data of what is without, and yet to be given back, at hand. What moved in the clone gets its data
        there, too: below, its old path is about to change. Returns what thereby got another stamp."""
        bare = [
            path
            for path in changes.made
            if not now[path].directory and self._clone.xattr(path, METACOPY) is not None
        ]
        self._whole = self._clone
        if not bare:
            return {}
        place = self._place("whole")
        with mount_clone(self._directory, self._record, "work2", self._place("layers2")) as tree:
            mount.attach(tree, mount.AT_FDCWD, place)
        self._stack.callback(mount.umount2, place)
        self._whole = self._stack.enter_context(Tree(place, layer=False))
        if final:
            return {}
        before = load_manifest(self._directory)
        moved = [path for path in bare if path not in before or before[path].inode != now[path].inode]
        # Copying up is a write, after which a file has another time. Whoever comes after us has to know, too.
        known = [(path, now[path].inode, self._clone.read(path)) for path in moved]
        store(f"{self._directory}/times", known)
        for path in moved:
            with opened(self._whole, path, os.O_WRONLY):
                pass  # the kernel copies it up for whoever opens it so
        self._step("times")
        _restore_times(self._directory, self._clone)
        inodes = {now[path].inode for path in moved}
        return {
            path: seen._replace(stamp=os.lstat(self._clone.at(path)).st_ctime_ns)
            for path, seen in now.items()
            if seen.inode in inodes
        }

    def _removals(self, changes: Changes) -> Iterator[Move]:
        for number, path in enumerate(changes.removed):
            self._step(f"stage {path!r}")
            if self._shown_below(path) is None:
                yield Move(path, None)
                continue
            name = b"w%d" % number
            os.mknod(self._staged.at(name), stat.S_IFCHR, 0)
            os.rename(self._staged.at(name), self._staged.at(b"%d" % self._number()))
            yield Move(path, self._count)

    def _entered(self, changes: Changes) -> Iterator[Move]:
        """Directories that the upper layer does not have yet."""
        for path in changes.entered:
            status = self._target.lstat(path)
            if status is None or not stat.S_ISDIR(status.st_mode):
                yield Move(path, self._directory_for(path, opaque=False))

    def _made(self, changes: Changes, now: dict[bytes, Seen]) -> Iterator[Move]:
        links: dict[int, bytes] = {}
        fresh = {path for path in changes.made if now[path].directory}
        for path in changes.made:
            self._step(f"stage {path!r}")
            if path in fresh:
                below = None if parent(path) in fresh else self._shown_below(path)
                yield Move(
                    path, self._directory_for(path, opaque=below is not None and stat.S_ISDIR(below.st_mode))
                )
                continue
            first = links.get(now[path].inode)
            name = b"%d" % self._number()
            if first is None:
                links[now[path].inode] = name
                self._file_for(path, name)
            else:
                os.link(self._staged.at(first), self._staged.at(name), follow_symlinks=False)
            yield Move(path, self._count)

    _count = 0

    def _number(self) -> int:
        self._count += 1
        return self._count

    def _directory_for(self, path: bytes, opaque: bool) -> int:
        name = b"%d" % self._number()
        node = self._shift.outward(self._clone.read(path))
        self._staged.make(name, node)
        if opaque:
            os.setxattr(self._staged.at(name), OPAQUE, b"y")
        self._staged.dress(name, node)
        return self._count

    def _file_for(self, path: bytes, name: bytes) -> None:
        node = self._shift.outward(self._clone.read(path))
        self._staged.make(name, node)
        if stat.S_ISREG(node.mode):
            bare = self._clone.layer and self._clone.xattr(path, METACOPY) is not None
            source = self._whole if bare else self._clone
            with opened(source, path, os.O_RDONLY) as data, opened(self._staged, name, os.O_WRONLY) as copy:
                copy_data(data, copy)
        self._staged.dress(name, node)

    def _shown_below(self, path: bytes) -> os.stat_result | None:
        """What the lower layers would show at a path if the upper one had nothing there."""
        if self._below is None:
            return None
        above = parent(path)
        while above:
            status = self._target.lstat(above)
            if status is not None and (
                not stat.S_ISDIR(status.st_mode) or self._target.xattr(above, OPAQUE) == b"y"
            ):
                return None
            above = parent(above)
        return self._below.lstat(path)


def _restore_times(directory: str, tree: Tree) -> None:
    """Of files that were only given their data."""
    try:
        with open(f"{directory}/times", "rb") as file:
            found = msgspec.msgpack.decode(file.read(), type=list[tuple[bytes, int, Node]])
    except FileNotFoundError:
        return
    for path, inode, node in found:
        status = tree.lstat(path)
        # Whoever was killed may have let the container go on.
        if status is not None and (status.st_ino, status.st_size) == (inode, node.size):
            tree.dress(path, node)
    os.unlink(f"{directory}/times")


# ---- step 3 ------------------------------------------------------------------------------------------------


def _apply(directory: str, record: Record, step: Step) -> int:
    with open(f"{directory}/journal", "rb") as file:
        journal = msgspec.msgpack.decode(file.read(), type=Journal)
    with (
        Tree(record.target, layer=record.overlay) as target,
        Tree(f"{directory}/staged", layer=record.overlay) as staged,
    ):
        for number, move in enumerate(journal.moves):
            step(f"move {move.path!r}")
            _move(target, staged, move, number)
        for path, node in journal.last:
            step(f"metadata of {path!r}")
            target.loosen(path)
            target.dress(path, node)
            target.seal(path, node)
        syncfs(target.directory(b""))
    step("manifest")
    store(f"{directory}/manifest", journal.manifest)
    step("done")
    os.unlink(f"{directory}/journal")
    remove_tree(f"{directory}/staged")
    return len(journal.moves) + len(journal.last)


def _move(target: Tree, staged: Tree, move: Move, number: int) -> None:
    new = b"new/%d" % move.staged if move.staged is not None else None
    coming = staged.lstat(new) if new is not None else None
    if new is not None and coming is None:
        return  # done by a predecessor
    there = target.lstat(move.path)
    if there is not None:
        target.loosen(parent(move.path))
        target.loosen(move.path)
    either = any(status is not None and stat.S_ISDIR(status.st_mode) for status in (there, coming))
    if there is not None and (either or new is None):
        os.rename(target.at(move.path), staged.at(b"aside/%d" % number))
        target.forget()
    if new is not None:
        os.rename(staged.at(new), target.at(move.path))


# ---- in a process of its own -------------------------------------------------------------------------------


def launch(directory: str, final: bool) -> tuple[OwnedFd, int]:
    """Starts a child that does `give_back` in a mount namespace of its own; of a clone that nobody uses any more
    (``final``) nothing is left then. Returns a descriptor with what `result` understands, up to its end, and the
    child, which may take its time to end after that. Raises `OSError`."""
    with claim(directory) as claimed:
        read, write = os.pipe2(os.O_CLOEXEC)
        child = os.fork()
        if child == 0:
            _in_child(directory, claimed, final, write)
    os.close(write)
    return OwnedFd(read), child


def _in_child(directory: str, claimed: OwnedFd, final: bool, write: int) -> NoReturn:
    words, rest = "it ended without a word", None
    try:
        # Of what a daemon holds nothing is to be held here.
        close_all_but((0, 1, 2, claimed.fileno(), write))
        unshare(CLONE_NEWNS)
        mount.mount(b"none", b"/", None, MountFlag.MS_REC | MountFlag.MS_PRIVATE)
        if final:
            count, rest = _finish(directory, claimed, _nothing)
        else:
            _lock(directory, claimed)
            count = _give_back(directory, False, _nothing)
        words = str(count)
    except FileNotFoundError as error:
        # Whoever came first has done it.
        words = str(error) if os.path.exists(f"{directory}/record") else "0"
    except (InterceptorError, OSError, ValueError) as error:
        words = str(error) or repr(error)
    finally:
        os.write(write, words.encode(errors="backslashreplace")[:4096])
        os.close(write)
        try:
            # Nobody waits for that, nor for the end of what we were given as output.
            if rest is not None:
                null = os.open("/dev/null", os.O_RDWR)
                for fd in (0, 1, 2):
                    os.dup2(null, fd)
                remove_tree(rest)
        finally:
            os._exit(0)


def result(directory: str, words: bytes) -> int:
    """How much was changed, by what the child said. Raises `ContainerError` with what went wrong."""
    if not words.isdigit():
        raise ContainerError(
            f"changes in {directory} could not be given back: {words.decode(errors='replace')}",
            "they are kept there; try again: interceptor sync --all",
        )
    return int(words)


def in_child(directory: str, final: bool) -> int:
    """`launch`, waited for. Raises `ContainerError`, `OSError`."""
    try:
        read, _ = launch(directory, final)
    except FileNotFoundError:
        return 0
    with open(read.take(), "rb") as told:
        return result(directory, told.read())


def _refresh(record: Record) -> None:
    """What the kernel remembers of the manager's own overlay is from before."""
    if not record.overlay:
        return
    try:
        manager = OwnedFd(os.open(record.manager, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
    except OSError:
        return  # not mounted any more
    with manager:
        if fs_magic(manager) == _OVERLAYFS:
            forget(manager)
