"""A manager's overlay and a clone of it, on a filesystem of their own, for tests in a private mount namespace."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import subprocess
import tempfile
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from interceptor.errors import SyscallError
from interceptor.idshift import clone
from interceptor.idshift.files import Tree, remove_tree
from interceptor.idshift.overlay import Layers
from interceptor.idshift.owners import Node, Shift
from interceptor.idshift.subid import Block
from interceptor.kernel import mount
from interceptor.kernel.flags import UmountFlag

UIDS, GIDS = Block(1_000_000, 65536), Block(2_000_000, 65536)
SHIFT = Shift(UIDS, GIDS)

#: How to make each filesystem in a file; tmpfs is mounted as it is.
FILESYSTEMS = {"ext4": ["mkfs.ext4", "-q"], "xfs": ["mkfs.xfs", "-q"], "tmpfs": []}


@contextlib.contextmanager
def disk(fstype: str) -> Iterator[Path]:
    """An empty filesystem, mounted in the calling process's own mount namespace."""
    place = Path(tempfile.mkdtemp(dir="/var/tmp", prefix="interceptor-clone-"))
    at = place / "disk"
    at.mkdir()
    try:
        if FILESYSTEMS[fstype]:
            with open(place / "image", "wb") as image:
                image.truncate(400 << 20)
            subprocess.run([*FILESYSTEMS[fstype], str(place / "image")], check=True)
            subprocess.run(["mount", "-o", "loop", str(place / "image"), str(at)], check=True)
        else:
            mount.mount(b"disk", str(at), b"tmpfs")
        yield at
    finally:
        if os.path.ismount(at):
            mount.umount2(str(at), UmountFlag.MNT_DETACH)
        with contextlib.suppress(OSError):
            os.unlink(place / "image")
        os.rmdir(at)
        os.rmdir(place)


#: A file as it is compared: everything but its inode's number and the time of the last look at it.
Facts = dict[bytes, tuple[Node, int, tuple[tuple[int, int], ...]]]


@dataclass(frozen=True)
class Lab:
    """One container's layers."""

    place: Path
    overlay: bool
    """The manager has an overlay; else a plain tree."""
    metadata: bool

    @property
    def manager(self) -> Path:
        """The manager's tree as it sees it."""
        return self.place / "merged"

    @property
    def inside(self) -> Path:
        """As the container sees it."""
        return self.place / "inside"

    @property
    def directory(self) -> str:
        """The clone."""
        layers = Layers((str(self.place / "l1"),), str(self.place / "layer/diff")) if self.overlay else None
        return clone.place_of(str(self.manager), layers)

    @property
    def target(self) -> Path:
        """What the changes go to."""
        return self.place / "layer/diff" if self.overlay else self.manager

    def record(self) -> clone.Record:
        lower = (str(self.place / "l1").encode(), str(self.place / "l0").encode())
        return clone.Record(
            cid="lab",
            uids=UIDS,
            gids=GIDS,
            runtime="runc",
            runtime_root="/nowhere",
            manager=os.fsencode(self.manager),
            target=os.fsencode(self.target),
            overlay=self.overlay,
            lower=lower if self.overlay else (),
            options=(),
            metadata=self.metadata,
            index=os.fsencode(self.place / "index/lab"),
        )

    def show_manager(self) -> None:
        """The manager's overlay, mounted anew, so that nothing remembered is seen."""
        if self.overlay:
            self.hide(self.manager)
            layers = f"lowerdir={self.place}/l1:{self.place}/l0,upperdir={self.place}/layer/diff"
            data = f"{layers},workdir={self.place}/layer/work,index=off"
            mount.mount(b"overlay", str(self.manager), b"overlay", 0, data.encode())

    def show_inside(self) -> None:
        """The container's root filesystem."""
        self.hide(self.inside)
        stage = tempfile.mkdtemp(dir=self.place)
        with clone.mount_clone(self.directory, self.record(), "work", stage) as tree:
            mount.attach(tree, mount.AT_FDCWD, str(self.inside))

    def seen(self) -> tuple[Facts, set[frozenset[bytes]]]:
        """What the container has, with the manager's owners, by a mount of its own. In the one where it was changed, a
        file that had no data when the kernel first looked has another number than a link that was made to it since."""
        place, stage = tempfile.mkdtemp(dir=self.place), tempfile.mkdtemp(dir=self.place)
        with clone.mount_clone(self.directory, self.record(), "work3", stage) as tree:
            mount.attach(tree, mount.AT_FDCWD, place)
        try:
            return facts(place, shifted=True)
        finally:
            mount.umount2(place)

    def hide(self, path: Path) -> None:
        """Takes off all that is mounted there."""
        with contextlib.suppress(SyscallError):
            while True:
                mount.umount2(str(path), UmountFlag.MNT_DETACH)

    def start(self) -> None:
        """Makes the clone, as the creation of a container does."""
        self.show_manager()
        clone.create(self.directory, self.record(), lambda: None)
        self.show_inside()

    def close(self) -> None:
        for path in (self.inside, self.manager):
            self.hide(path)
        remove_tree(str(self.place))


def make_lab(at: Path, overlay: bool = True, metadata: bool = True) -> Lab:
    """Directories only."""
    place = Path(tempfile.mkdtemp(dir=at))
    for name in ("l0", "l1", "layer", "layer/diff", "layer/work", "merged", "inside"):
        (place / name).mkdir()
    return Lab(place, overlay, metadata)


def facts(root: Path | str, *, shifted: bool = False) -> tuple[Facts, set[frozenset[bytes]]]:
    """Every file of a tree by path, with owners as the manager has them, a checksum and where its data lies; and the
    names that are links of each other."""
    found: Facts = {}
    links = defaultdict(set)
    with Tree(str(root), layer=False) as tree:
        for path, status in tree.walk():
            node = replace(tree.read(path, status), atime_ns=0)
            if shifted:
                node = SHIFT.outward(node)
            if stat.S_ISDIR(node.mode):
                node = replace(node, size=0)
            data, extents = _data(tree.at(path)) if stat.S_ISREG(node.mode) else (0, ())
            found[path] = (node, data, extents)
            if status.st_nlink > 1 and not stat.S_ISDIR(node.mode):
                links[status.st_dev, status.st_ino].add(path)
    # A link whose other names are hidden, by another layer or a mount, is one of nobody's here.
    return found, {frozenset(names) for names in links.values() if len(names) > 1}


def _data(path: bytes) -> tuple[int, tuple[tuple[int, int], ...]]:
    fd = os.open(path, os.O_RDONLY | os.O_NOATIME)
    try:
        size, at, checksum, extents = os.fstat(fd).st_size, 0, 0, []
        while at < size:
            try:
                start = os.lseek(fd, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                break
            at = os.lseek(fd, start, os.SEEK_HOLE)
            checksum = zlib.crc32(os.pread(fd, at - start, start), checksum)
            # Filesystems keep whole blocks, of different sizes; the tests' holes are larger than that.
            extents.append((start >> 20, at - 1 >> 20))
        return checksum, tuple(extents)
    finally:
        os.close(fd)


def same(one: tuple[Facts, set[frozenset[bytes]]], other: tuple[Facts, set[frozenset[bytes]]]) -> None:
    """Fails with what differs."""
    differing = {
        path: (one[0].get(path), other[0].get(path))
        for path in one[0].keys() | other[0].keys()
        if one[0].get(path) != other[0].get(path)
    }
    assert not differing, "\n".join(f"{path!r}\n  {a}\n  {b}" for path, (a, b) in differing.items())
    assert one[1] == other[1]
