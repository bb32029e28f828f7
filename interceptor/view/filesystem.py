"""The FUSE operations of the view, on trio: what the kernel asks, answered from the tables and by the envoys.

A name that the kernel hands over is bytes, a single component, and is never resolved here; only envoys open nodes. The
kernel checks permissions by the attributes given (default_permissions), the envoy's kernel checks the container root's
rights once more. An operation that fails in a way nobody thought of is EIO for its caller and a line in the log.
"""

from __future__ import annotations

import errno
import functools
import os
import stat
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, ParamSpec, TypeVar

import pyfuse3
import structlog
from pyfuse3 import EntryAttributes, FileInfo, FUSEError

from interceptor.view import proc
from interceptor.view import sys as sysfs
from interceptor.view.envoy import Container
from interceptor.view.inodes import Inode, InodeTable
from interceptor.view.listing import BASE_NAMES, Listing, directory_attr, fixed_attr, shown_attr
from interceptor.view.nodes import FOREVER_S, REAL, Effect, Host, NodeError, Row, Table, join
from interceptor.view.protocol import DATA_MAX, NAME_MAX, PATH_MAX, Attr, Base, is_name

log = structlog.get_logger(__name__)

TABLE = Table({Base.PROC: proc.ROWS, Base.SYS: sysfs.ROWS})
BLOCK_SIZE = 4096
ROOT_MODE = 0o711
"""The root can be walked through by everybody and read by nobody but the host's root: it names all containers."""

_P = ParamSpec("_P")
_R = TypeVar("_R")


def answered(operation: Callable[_P, Coroutine[Any, Any, _R]]) -> Callable[_P, Coroutine[Any, Any, _R]]:
    """Make sure that the kernel gets an errno whatever goes wrong: pyfuse3 ends at any other exception."""

    @functools.wraps(operation)
    async def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return await operation(*args, **kwargs)
        except NodeError as error:
            raise FUSEError(error.errno) from None
        except FUSEError:
            raise
        except Exception as error:
            log.exception("operation_failed", operation=getattr(operation, "__name__", "?"), error=str(error))
            raise FUSEError(errno.EIO) from None

    return wrapper


class KernelHost:
    """The host as sources see it. Keeps the real /proc/uptime open, so that no path is resolved later."""

    def __init__(self) -> None:
        self._uptime_fd = os.open("/proc/uptime", os.O_RDONLY | os.O_CLOEXEC)

    def boottime_ns(self) -> int:
        """CLOCK_BOOTTIME in nanoseconds."""
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME)

    def idle_ratio(self) -> float:
        """Idle seconds per second of uptime, summed over all processors."""
        up, idle = os.pread(self._uptime_fd, 128, 0).split()
        return float(idle) / max(float(up), 0.01)


@dataclass(slots=True, eq=False)
class OpenFile:
    """An open file of the view."""

    inode: Inode
    append: bool
    content: bytes | None = None
    """What a made-up node said when it was last read from its beginning."""


class View(pyfuse3.Operations):
    """The filesystem. Containers are added and removed by the server, between operations."""

    supports_dot_lookup = False  # and with it no file handles: a node is reached by its path or not at all

    def __init__(self, host: Host, table: Table = TABLE) -> None:
        super().__init__()
        self.containers: dict[str, Container] = {}
        self.inodes = InodeTable()
        self._host = host
        self._table = table
        self._files: dict[int, OpenFile] = {}
        self._listings: dict[int, Listing] = {}
        self._next_handle = 1
        self._started_ns = time.time_ns()

    # Names and attributes

    @answered
    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> EntryAttributes:
        parent = self.inodes.get(parent_inode)
        if len(name) > NAME_MAX:
            raise NodeError(errno.ENAMETOOLONG)
        if not is_name(name):
            raise NodeError(errno.ENOENT)
        container, base, path, row = self._resolve(parent, name)
        attr = await self._look(container, base, path, row)
        inode = self.inodes.intern(container, base, path, row, stat.S_IFMT(attr.mode))
        inode.lookups += 1
        return _entry(inode, attr)

    def _resolve(self, parent: Inode, name: bytes) -> tuple[Container, Base | None, bytes, Row | None]:
        if parent.container is None:
            # An id is ASCII, so anything that is not cannot name a container.
            container = self.containers.get(name.decode("ascii", "replace"))
            if container is None:
                raise NodeError(errno.ENOENT)
            return container, None, b"", None
        if parent.base is None:
            base = BASE_NAMES.get(name)
            if base is None:
                raise NodeError(errno.ENOENT)
            return parent.container, base, b"", self._table.find(base, b"")
        path = join(parent.path, name)
        if len(path) > PATH_MAX:
            raise NodeError(errno.ENAMETOOLONG)
        return parent.container, parent.base, path, self._table.child(parent.base, parent.path, name)

    async def _look(self, container: Container, base: Base | None, path: bytes, row: Row | None) -> Attr:
        if base is None or row is None:
            return directory_attr(0o555, container.since_ns)
        if row.is_fixed_at(path):
            return fixed_attr(row, container)
        return shown_attr(row, container, await container.getattr(base, path))

    async def _attributes(self, inode: Inode) -> EntryAttributes:
        if inode.container is None:
            return _entry(inode, directory_attr(ROOT_MODE, self._started_ns))
        return _entry(inode, await self._look(inode.container, inode.base, inode.path, inode.row))

    @answered
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> EntryAttributes:
        return await self._attributes(self.inodes.get(inode))

    @answered
    async def setattr(
        self,
        inode: int,
        attr: EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> EntryAttributes:
        """As proc_sys_setattr (fs/proc/proc_sysctl.c): no chmod, no chown; sizes and times are taken and forgotten."""
        if fields.update_mode or fields.update_uid or fields.update_gid:
            raise NodeError(errno.EPERM)
        return await self._attributes(self.inodes.get(inode))

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for number, lookups in inode_list:
            self.inodes.forget(number, lookups)

    @answered
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        node = self.inodes.get(inode)
        if node.container is None or node.base is None:
            raise NodeError(errno.EINVAL)
        return await node.container.readlink(node.base, node.path)

    # Files

    @answered
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> FileInfo:
        node = self.inodes.get(inode)
        access = flags & os.O_ACCMODE
        if access != os.O_RDONLY and node.row is not None and node.row.source is REAL:
            # Permission for sysctls does not follow from the mode alone, and whoever writes expects to hear of it
            # when opening. A read tells by itself.
            container, base, _ = _of_container(node)
            await container.open(base, node.path, access)
        handle = self._handle()
        self._files[handle] = OpenFile(node, bool(flags & os.O_APPEND))
        # direct_io: sizes say nothing in procfs and content changes unseen, so every read comes to us. Seekable, as
        # sysctl files are (default_llseek).
        return FileInfo(fh=handle, direct_io=True, keep_cache=False, nonseekable=False)

    def _handle(self) -> int:
        handle, self._next_handle = self._next_handle, self._next_handle + 1
        return handle

    @answered
    async def read(self, fh: int, off: int, size: int) -> bytes:
        file = self._files[fh]
        container, base, row = _of_container(file.inode)
        if row.source is REAL:
            return await container.read(base, file.inode.path, off, size)
        if not callable(row.source):
            raise NodeError(errno.EISDIR)
        if off == 0 or file.content is None:
            file.content = row.source(container.owner, self._host)
        return file.content[off : off + size]

    @answered
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        file = self._files[fh]
        container, base, row = _of_container(file.inode)
        if row.effect is Effect.NONE:
            raise NodeError(errno.EIO)
        taken = buf[:DATA_MAX]
        # What is appended goes to the end of a file of size 0; the kernel's idea of the size here is our last write.
        position = 0 if file.append else off
        if row.check is None:
            return await container.write(base, file.inode.path, position, taken)
        await container.write(base, file.inode.path, position, row.check(container.owner, taken))
        return len(taken)

    @answered
    async def release(self, fh: int) -> None:
        self._files.pop(fh, None)

    @answered
    async def fsync(self, fh: int, datasync: bool) -> None:
        raise NodeError(errno.EINVAL)  # as for any file without the operation (vfs_fsync_range in fs/sync.c)

    # Directories

    @answered
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        node = self.inodes.get(inode)
        handle = self._handle()
        self._listings[handle] = Listing(node, self._table, self._named_containers)
        return handle

    def _named_containers(self) -> Iterable[tuple[bytes, Container]]:
        return ((id.encode(), container) for id, container in self.containers.items())

    @answered
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        listing = self._listings[fh]
        page = await listing.page(start_id)
        # From here on nothing waits and nothing fails: what was handed over counts as looked up.
        taken = 0
        for entry in page:
            if entry.is_dot or entry.container is None:
                if not pyfuse3.readdir_reply(
                    token, entry.name, _entry(listing.inode, entry.attr), entry.cookie
                ):
                    break
            else:
                kind = stat.S_IFMT(entry.attr.mode)
                inode = self.inodes.intern(entry.container, entry.base, entry.path, entry.row, kind)
                if not pyfuse3.readdir_reply(token, entry.name, _entry(inode, entry.attr), entry.cookie):
                    self.inodes.drop_unused(inode)
                    break
                inode.lookups += 1
            taken += 1
        listing.taken(taken)

    @answered
    async def releasedir(self, fh: int) -> None:
        self._listings.pop(fh, None)

    @answered
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        raise NodeError(errno.EINVAL)

    @answered
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = BLOCK_SIZE
        data.f_namemax = NAME_MAX
        return data

    # What procfs and sysfs have no operation for. Most callers are refused by the mode of the directory already; the
    # rest, those with CAP_DAC_OVERRIDE over it, hear what the real filesystem would have said to them.

    @answered
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> NoReturn:
        self._refuse_new(parent_inode, errno.EACCES)  # lookup_open in fs/namei.c

    @answered
    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: pyfuse3.RequestContext
    ) -> NoReturn:
        self._refuse_new(parent_inode)

    @answered
    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext) -> NoReturn:
        self._refuse_new(parent_inode)

    @answered
    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: pyfuse3.RequestContext
    ) -> NoReturn:
        self._refuse_new(parent_inode)

    @answered
    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: pyfuse3.RequestContext
    ) -> NoReturn:
        self._refuse_new(new_parent_inode)

    @answered
    async def unlink(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> NoReturn:
        self._refuse_change(parent_inode)

    @answered
    async def rmdir(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> NoReturn:
        self._refuse_change(parent_inode)

    @answered
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> NoReturn:
        self._refuse_change(parent_inode_old)

    def _refuse_new(self, directory: int, otherwise: int = errno.EPERM) -> NoReturn:
        """In /proc/sys a name that does not exist cannot even be looked up (proc_sys_lookup)."""
        raise NodeError(errno.ENOENT if self.inodes.get(directory).base is Base.PROC else otherwise)

    def _refuse_change(self, directory: int) -> NoReturn:
        """In /proc/sys no capability overrides the mode of a directory (test_perm in fs/proc/proc_sysctl.c)."""
        raise NodeError(errno.EACCES if self.inodes.get(directory).base is Base.PROC else errno.EPERM)

    # flush, poll, access and extended attributes stay ENOSYS: the kernel then stops asking and answers by itself
    # (0, always ready, by mode, EOPNOTSUPP).


def _of_container(inode: Inode) -> tuple[Container, Base, Row]:
    if inode.container is None or inode.base is None or inode.row is None:
        raise NodeError(errno.EISDIR)
    return inode.container, inode.base, inode.row


def _entry(inode: Inode, attr: Attr) -> EntryAttributes:
    entry = EntryAttributes()
    entry.st_ino = inode.number
    entry.generation = 0
    # A container's directory has no row: whether the container is still served must be asked each time.
    cache_s = inode.row.cache_s if inode.row is not None else 0.0
    entry.entry_timeout = cache_s
    entry.attr_timeout = FOREVER_S if inode.row is None else cache_s
    entry.st_mode = stat.S_IFMT(attr.mode) | attr.mode & 0o1777  # no setuid: this is not where programs live
    entry.st_nlink = attr.nlink
    entry.st_uid = attr.uid
    entry.st_gid = attr.gid
    entry.st_rdev = 0
    entry.st_size = attr.size
    entry.st_blksize = BLOCK_SIZE
    entry.st_blocks = 0
    entry.st_atime_ns = attr.atime_ns
    entry.st_mtime_ns = attr.mtime_ns
    entry.st_ctime_ns = attr.ctime_ns
    return entry
