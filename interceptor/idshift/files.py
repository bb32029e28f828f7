"""Reading and making single files with all their properties, in trees in which nobody's symbolic link is followed.

What is read is a plain tree, a mounted overlay, or the bare upper directory of one (``layer``). In that the kernel
keeps notes of its own as ``trusted.overlay.*``: what we know of them is here and nowhere else. Attributes of such a
name that an image brings along are escaped there (Documentation/filesystems/overlayfs.rst, "Nesting overlayfs
mounts").
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from types import TracebackType

from interceptor.idshift.changes import Seen, parent
from interceptor.idshift.owners import Node
from interceptor.kernel.inode import inode_flags, set_inode_flags

_OVERLAY = b"trusted.overlay."
_ESCAPED = b"trusted.overlay.overlay."
#: A file without data: that of the next layer with such a path counts.
METACOPY = _OVERLAY + b"metacopy"
OPAQUE = _OVERLAY + b"opaque"
#: Immutable and append-only, which the kernel does not set on files of the upper directory itself.
_PROTECTED = _OVERLAY + b"protattr"

#: What XFS shows of an ACL beside the ACL itself.
_REPEATED = (b"trusted.SGI_ACL_FILE", b"trusted.SGI_ACL_DEFAULT")

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Tree:
    """A directory tree. Paths are bytes relative to its root, which is the empty path."""

    def __init__(self, root: bytes | str, layer: bool) -> None:
        """``layer``: it is an overlay's upper directory as it is on disk. Raises `OSError`."""
        self.layer = layer
        # The directories down to the one that was used last.
        self._chain = [(b"", os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))]

    def close(self) -> None:
        """Lets go of it."""
        for _, fd in self._chain:
            os.close(fd)
        self._chain.clear()

    def __enter__(self) -> Tree:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def forget(self) -> None:
        """Directories may have been replaced by others."""
        while len(self._chain) > 1:
            os.close(self._chain.pop()[1])

    def directory(self, path: bytes) -> int:
        """A descriptor on a directory, up to the next call. Raises `OSError`, for a symbolic link as well."""
        while not _within(path, self._chain[-1][0]):
            os.close(self._chain.pop()[1])
        top, fd = self._chain[-1]
        for name in path[len(top) :].split(b"/"):
            if name:
                fd = os.open(name, _DIRECTORY, dir_fd=fd)
                top = top + b"/" + name if top else name
                self._chain.append((top, fd))
        return fd

    def at(self, path: bytes) -> bytes:
        """A path for system calls that do not follow a symbolic link in its last place, up to the next call."""
        return b"/proc/self/fd/%d/%s" % (self.directory(parent(path)), path.rpartition(b"/")[2] or b".")

    def lstat(self, path: bytes) -> os.stat_result | None:
        """What stands there; None: nothing. Raises `OSError`."""
        try:
            return os.lstat(self.at(path))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def xattr(self, path: bytes, name: bytes) -> bytes | None:
        """An extended attribute; None: the file has none of that name. Raises `OSError`."""
        try:
            return os.getxattr(self.at(path), name, follow_symlinks=False)
        except OSError as error:
            if error.errno not in (errno.ENODATA, errno.ENOTSUP):
                raise
            return None

    def walk(self) -> Iterator[tuple[bytes, os.stat_result]]:
        """Every name, directories before what is in them, whiteouts of a layer left out; within one filesystem."""
        root = os.fstat(self._chain[0][1])
        yield b"", root
        pending = [b""]
        while pending:
            directory = pending.pop()
            with os.scandir(self.directory(directory)) as entries:
                found = [(os.fsencode(entry.name), entry.stat(follow_symlinks=False)) for entry in entries]
            for name, status in sorted(found):
                path = directory + b"/" + name if directory else name
                if self.layer and is_whiteout(status):
                    continue
                yield path, status
                if stat.S_ISDIR(status.st_mode) and status.st_dev == root.st_dev:
                    pending.append(path)

    def read(self, path: bytes, status: os.stat_result | None = None) -> Node:
        """The properties of what stands at a path. Raises `OSError`."""
        at = self.at(path)
        status = os.lstat(at) if status is None else status
        plain = stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)
        flags = inode_flags(at) if plain and not self.layer else ""
        xattrs = {}
        for name in map(os.fsencode, os.listxattr(at, follow_symlinks=False)):
            if self.layer and name == _PROTECTED:
                flags = os.getxattr(at, name, follow_symlinks=False).decode()
            elif self.layer and name.startswith(_ESCAPED):
                xattrs[_OVERLAY + name[len(_ESCAPED) :]] = os.getxattr(at, name, follow_symlinks=False)
            elif not (self.layer and name.startswith(_OVERLAY)) and name not in _REPEATED:
                xattrs[name] = os.getxattr(at, name, follow_symlinks=False)
        return Node(
            mode=status.st_mode,
            uid=status.st_uid,
            gid=status.st_gid,
            size=status.st_size,
            rdev=status.st_rdev,
            atime_ns=status.st_atime_ns,
            mtime_ns=status.st_mtime_ns,
            target=os.readlink(at) if stat.S_ISLNK(status.st_mode) else b"",
            xattrs=xattrs,
            flags="".join(sorted(flags)),
        )

    def make(self, path: bytes, node: Node) -> None:
        """Makes a file that is not there yet, as yet without its metadata; a regular one is empty. Raises `OSError`."""
        at = self.at(path)
        if stat.S_ISDIR(node.mode):
            os.mkdir(at, 0o700)
        elif stat.S_ISLNK(node.mode):
            os.symlink(node.target, at)
        else:
            os.mknod(at, stat.S_IFMT(node.mode) | 0o600, node.rdev)

    def dress(self, path: bytes, node: Node, fresh: bool = False) -> None:
        """Gives what stands at a path all the metadata but its flags, and takes from it what it has beyond, which
        what has just been made (``fresh``) has not. Raises `OSError`."""
        at = self.at(path)
        # The order matters: a new owner takes setuid and capabilities away, times are changed by all of it.
        os.chown(at, node.uid, node.gid, follow_symlinks=False)
        wanted = self._on_disk(node)
        for name in [] if fresh else map(os.fsencode, os.listxattr(at, follow_symlinks=False)):
            kept = self.layer and name.startswith(_OVERLAY) and name != _PROTECTED
            kept = (kept and not name.startswith(_ESCAPED)) or name in _REPEATED
            if name not in wanted and not kept:
                os.removexattr(at, name, follow_symlinks=False)
        for name, value in wanted.items():
            os.setxattr(at, name, value, follow_symlinks=False)
        if not stat.S_ISLNK(node.mode):
            os.chmod(at, stat.S_IMODE(node.mode))
        os.utime(at, ns=(node.atime_ns, node.mtime_ns), follow_symlinks=False)

    def make_file(self, path: bytes, node: Node, give_data: Callable[[int], object]) -> None:
        """`make` and `dress` for a regular file, by its descriptor, which takes two thirds of the time; ``give_data``
        is called with that. Raises `OSError`."""
        directory = self.directory(parent(path))
        fd = os.open(path.rpartition(b"/")[2], _NEW, 0o600, dir_fd=directory)
        try:
            give_data(fd)
            # In the order of `dress`.
            os.fchown(fd, node.uid, node.gid)
            for name, value in self._on_disk(node).items():
                os.setxattr(fd, name, value)
            os.fchmod(fd, stat.S_IMODE(node.mode))
            os.utime(fd, ns=(node.atime_ns, node.mtime_ns))
        finally:
            os.close(fd)

    def seal(self, path: bytes, node: Node) -> None:
        """Gives what stands at a path its flags, after which it cannot be moved, linked or changed; in a layer it has
        them already. Raises `OSError`."""
        if not self.layer and node.flags:
            set_inode_flags(self.at(path), node.flags)

    def _on_disk(self, node: Node) -> dict[bytes, bytes]:
        if not self.layer:
            return node.xattrs
        wanted = {
            _ESCAPED + name[len(_OVERLAY) :] if name.startswith(_OVERLAY) else name: value
            for name, value in node.xattrs.items()
        }
        if node.flags:
            wanted[_PROTECTED] = node.flags.encode()
        return wanted

    def loosen(self, path: bytes) -> None:
        """Takes away what forbids changes of a file or of a directory's entries. Raises `OSError`."""
        status = self.lstat(path)
        if status is not None and (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            at = self.at(path)
            if inode_flags(at):
                set_inode_flags(at, "")


def describe(tree: Tree) -> dict[bytes, Seen]:
    """What `interceptor.idshift.changes` compares."""
    found = {}
    for path, status in tree.walk():
        if stat.S_ISDIR(status.st_mode):
            # Not by its time of change: an overlay notes things in directories of its own accord.
            node = tree.read(path, status)
            told = (node.mode, node.uid, node.gid, node.mtime_ns, sorted(node.xattrs.items()), node.flags)
            found[path] = Seen(True, status.st_ino, zlib.crc32(repr(told).encode()))
        else:
            found[path] = Seen(False, status.st_ino, status.st_ctime_ns)
    return found


def is_whiteout(status: os.stat_result) -> bool:
    """Whether a file of a layer says that there is none."""
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def remove_tree(path: bytes | str) -> None:
    """Removes a directory with all that is in it; none is no error, nor is somebody who does the same. Raises
    `OSError`."""
    with contextlib.suppress(FileNotFoundError):
        with Tree(path, layer=False) as tree:
            found = [(one, stat.S_ISDIR(status.st_mode)) for one, status in tree.walk()]
            for one, directory in sorted(found, reverse=True):
                if one:
                    with contextlib.suppress(FileNotFoundError):
                        _remove(tree, one, directory)
        os.rmdir(path)


def _remove(tree: Tree, path: bytes, directory: bool) -> None:
    remove = os.rmdir if directory else os.unlink
    try:
        remove(tree.at(path))
    except PermissionError:
        tree.loosen(parent(path))
        tree.loosen(path)
        remove(tree.at(path))


def _within(path: bytes, directory: bytes) -> bool:
    return directory == b"" or path == directory or path.startswith(directory + b"/")
