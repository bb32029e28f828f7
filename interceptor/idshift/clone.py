"""A tree with shifted owners beside the manager's own, for kernels and filesystems that map nothing.

Everything that belongs to a clone is in one directory beside the manager's upper one, so that both live as long as each
other: on the same disk, through a reboot, and removed by the manager in one go.

* ``upper``: every file of the manager's tree, with the container's owners. In a clone by *metadata* a regular file has
  no data; it is the upper directory of an overlay over the manager's layers, mounted with ``metacopy=on``, and the
  kernel takes the data from there, or copies it when somebody is about to write. In a clone by *copy* it is the
  container's tree itself, with data by reference where the filesystem can, or else copied.
* ``record``, ``manifest``: whose it is, and what it was like when the manager last had everything.
* ``staged``, ``journal``: see `interceptor.idshift.giveback`, the way back.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator

import msgspec

from interceptor.errors import ContainerError, InterceptorError
from interceptor.idshift import stack
from interceptor.idshift.changes import Seen
from interceptor.idshift.files import METACOPY, Tree, describe, remove_tree
from interceptor.idshift.overlay import Layers
from interceptor.idshift.owners import Node, Shift
from interceptor.idshift.subid import Block
from interceptor.kernel import mount
from interceptor.kernel.fd import OwnedFd
from interceptor.kernel.flags import UmountFlag
from interceptor.kernel.inode import copy_data

#: Beside the manager's upper directory.
NAME = "interceptor-clone"


#: What is to be removed, beside a clone.
OLD = ".old-"
#: Files between two signs of life.
_BEAT = 200


class Record(msgspec.Struct, frozen=True):
    """Whose clone it is, and of what; enough to give its changes back after a reboot. Paths are bytes."""

    cid: str
    uids: Block
    gids: Block
    runtime: str
    runtime_root: str
    manager: bytes
    """Where the manager has its root filesystem."""
    target: bytes
    """What changes go to: the manager's upper directory, or its tree where that is no overlay."""
    overlay: bool
    lower: tuple[bytes, ...]
    """The manager's other layers, uppermost first."""
    options: tuple[tuple[bytes, bytes | None], ...]
    """The manager's, of its overlay."""
    metadata: bool
    """A clone by metadata; else by copy."""
    index: bytes
    """A symbolic link to the clone, by which it is found after a reboot."""

    @property
    def shift(self) -> Shift:
        """Between the manager's and the container's owners."""
        return Shift(self.uids, self.gids)


def load_record(directory: str) -> Record:
    """The record of a clone. Raises `ContainerError`, `FileNotFoundError`."""
    with open(f"{directory}/record", "rb") as file:
        try:
            return msgspec.msgpack.decode(file.read(), type=Record)
        except msgspec.DecodeError as error:
            raise ContainerError(f"{directory}/record: {error}") from None


def load_manifest(directory: str) -> dict[bytes, Seen]:
    """What the clone was like when the manager last had everything."""
    with open(f"{directory}/manifest", "rb") as file:
        return msgspec.msgpack.decode(file.read(), type=dict[bytes, Seen])


def store(path: str, value: object) -> None:
    """Writes a file that is there whole or not at all."""
    with open(f"{path}.new", "wb") as file:
        file.write(msgspec.msgpack.encode(value))
        file.flush()
        os.fsync(file.fileno())
    os.rename(f"{path}.new", path)


def place_of(root: str, layers: Layers | None) -> str:
    """Where the clone of a root filesystem goes. Raises `ContainerError` where its manager cannot keep it."""
    target = os.path.realpath(root if layers is None else layers.upper or "")
    if layers is not None and layers.upper is None:
        raise ContainerError(f"{root}: without an upper directory there is nowhere to give changes back to")
    parent, name = os.path.split(target)
    if os.stat(parent).st_dev != os.stat(target).st_dev:
        raise ContainerError(f"{target}: nothing beside it is on the same filesystem")
    return f"{parent}/{NAME}" if layers is not None else f"{parent}/{NAME}-{name}"


def create(directory: str, record: Record, alive: Callable[[], object]) -> None:
    """Makes a clone of the tree that stands at ``record.manager``; ``alive`` is called every now and then meanwhile.
    Raises `OSError`, `InterceptorError`.

    Whoever is killed meanwhile leaves what the next one removes.
    """
    beside, name = os.path.split(directory)
    for one in os.listdir(beside):
        if one == f"{name}.new" or one.startswith(f"{name}{OLD}"):
            remove_tree(f"{beside}/{one}")
    os.mkdir(f"{directory}.new", 0o700)
    new = f"{directory}.new"
    with Tree(record.manager, layer=False) as source:
        os.mkdir(f"{new}/upper")
        with Tree(f"{new}/upper", layer=record.metadata) as target:
            _fill(source, target, record.shift, alive)
    with Tree(f"{new}/upper", layer=record.metadata) as target:
        store(f"{new}/manifest", describe(target))
        # fsync(2) of a file has a journalling filesystem commit what was made before it, too. An upper directory of
        # which a power cut has left less than the manifest says would look like one of which much was removed.
        store(f"{new}/record", record)
    os.rename(new, directory)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(record.index)
    os.makedirs(os.path.dirname(record.index), 0o700, exist_ok=True)
    os.symlink(directory, record.index)


def _fill(source: Tree, target: Tree, shift: Shift, alive: Callable[[], object]) -> None:
    links: dict[tuple[int, int], bytes] = {}
    later: list[tuple[bytes, Node]] = []
    for number, (path, status) in enumerate(source.walk()):
        if number % _BEAT == 0:
            alive()
        key = (status.st_dev, status.st_ino)
        if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
            if key in links:
                first = b"/proc/self/fd/%d/" % target.directory(b"") + links[key]
                os.link(first, target.at(path), follow_symlinks=False)
                continue
            links[key] = path
        node = shift.inward(source.read(path, status))
        if stat.S_ISDIR(node.mode) or node.flags:
            later.append((path, node))
        if stat.S_ISREG(node.mode):
            _make_file(source, target, path, node)
            continue
        if path:
            target.make(path, node)
        if not stat.S_ISDIR(node.mode):
            target.dress(path, node, fresh=True)
    # Their times change with each entry, and what is immutable gets no second link.
    for path, node in reversed(later):
        target.dress(path, node, fresh=True)
        target.seal(path, node)


def _make_file(source: Tree, target: Tree, path: bytes, node: Node) -> None:
    def give_data(fd: int) -> None:
        if not node.size:
            return
        if target.layer:
            os.ftruncate(fd, node.size)
            os.setxattr(fd, METACOPY, b"")
            return
        with opened(source, path, os.O_RDONLY) as data:
            copy_data(data, fd)

    target.make_file(path, node, give_data)


@contextlib.contextmanager
def opened(tree: Tree, path: bytes, mode: int) -> Iterator[int]:
    """A regular file, open. Raises `OSError`."""
    fd = os.open(tree.at(path), mode | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def mount_clone(directory: str, record: Record, work: str, stage: str) -> OwnedFd:
    """The container's root filesystem, as a detached mount. ``work``: the name of a work directory; ``stage``: an empty
    directory. Raises `SyscallError`."""
    if not record.metadata:
        return mount.clone_mount(mount.AT_FDCWD, f"{directory}/upper")
    os.makedirs(f"{directory}/{work}", 0o700, exist_ok=True)
    lower = [os.fsdecode(path) for path in ((record.target, *record.lower))]
    forced = {"metacopy", "redirect_dir", "index", "nfs_export"}
    options = [(os.fsdecode(name), value) for name, value in record.options]
    kept = [(name, None if value is None else os.fsdecode(value)) for name, value in options]
    return stack.mount_layers(
        lower,
        [
            *((name, value) for name, value in kept if name not in forced),
            ("index", "off"),
            ("redirect_dir", "on"),
            ("metacopy", "on"),
            ("upperdir", f"{directory}/upper"),
            ("workdir", f"{directory}/{work}"),
        ],
        stage,
    )


def try_metadata(directory: str, stage: str) -> str | None:
    """Why a clone by metadata does not work in a directory, found out by making one of a file; None: it does.

    ``stage``: an empty directory in a private mount namespace.
    """
    scratch = f"{directory}/{NAME}.try"
    try:
        remove_tree(scratch)
        for name in ("", "/lower", "/upper", "/work"):
            os.mkdir(scratch + name, 0o700)
        with open(f"{scratch}/lower/file", "w") as file:
            file.write("data")
        with Tree(f"{scratch}/lower", layer=False) as source, Tree(f"{scratch}/upper", layer=True) as target:
            _make_file(source, target, b"file", source.read(b"file"))
        options: list[stack.Option] = [("metacopy", "on"), ("redirect_dir", "on"), ("index", "off")]
        options += [("upperdir", f"{scratch}/upper"), ("workdir", f"{scratch}/work")]
        os.mkdir(f"{stage}/try", 0o700)
        os.mkdir(f"{stage}/layers", 0o700)
        with stack.mount_layers([f"{scratch}/lower"], options, f"{stage}/layers") as tree:
            mount.attach(tree, mount.AT_FDCWD, f"{stage}/try")
        try:
            with open(f"{stage}/try/file") as file:
                seen = file.read()
        finally:
            mount.umount2(f"{stage}/try", UmountFlag.MNT_DETACH)
        return None if seen == "data" else f"a file without data of its own reads {seen!r}"
    except (OSError, InterceptorError) as error:
        return str(error)
    finally:
        remove_tree(scratch)
