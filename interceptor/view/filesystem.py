"""The FUSE operations of the view: what the kernel asks, answered from the tables and by the envoys.

A name that the kernel hands over is bytes, a single component, and is never resolved here; only envoys open nodes.
Rights are judged here (rights.py), and the envoy's kernel checks the container root's once more. What an operation
needs to know is in the request and in the inode: a handle keeps nothing that a successor could not do without.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple, TypeVar

from interceptor.kernel.fuse import NodeFlag, Pump
from interceptor.view import proc, wire
from interceptor.view import sys as sysfs
from interceptor.view.envoy import Container
from interceptor.view.host import KernelHost, Within
from interceptor.view.inodes import Inode, InodeTable
from interceptor.view.listing import BASE_NAMES, Listed, Listing, directory_attr, look
from interceptor.view.nodes import FOREVER_S, Effect, NodeError, Rights, Row, Table, join
from interceptor.view.pages import Pages
from interceptor.view.protocol import DATA_MAX, NAME_MAX, PATH_MAX, Attr, Base, Namespace, Op, is_name
from interceptor.view.rights import EXECUTE, READ, WRITE, Caller, may
from interceptor.view.wire import Opcode, OpenFlag, Request

TABLE = Table({Base.PROC: proc.ROWS, Base.SYS: sysfs.ROWS})
ROOT_MODE = 0o711
"""The root can be walked through by everybody and read by nobody but the host's root: it names all containers."""
_OPENED_MAX = 4096
"""Most handles that something is remembered about. What is forgotten is asked for again."""
_FOREIGN = 1 << 61
"""Marks handles of callers that are in another namespace than the container's own (FOREIGN of native/pump.c)."""

# What the pump knows of an inode, as numbers: this is asked for every entry of every listing.
_DIRECTORY, _REAL = int(NodeFlag.DIRECTORY), int(NodeFlag.READ)
_REAL_KEPT = _REAL | int(NodeFlag.KEEP)
_OWN = 1 << 16
"""It has been told what the container's own value is."""
_OWN_TEXT = _OWN | int(NodeFlag.TEXT)

_SETATTR_SIZE, _SETATTR_TIMES, _SETATTR_FH, _SETATTR_NOW = 1 << 3, 1 << 4 | 1 << 5, 1 << 6, 1 << 7 | 1 << 8

T = TypeVar("T")
Handler = Callable[[Request], Coroutine[Any, Any, bytes | None]]


class Seen(NamedTuple):
    """A node as its caller finds it."""

    attr: Attr
    stored: bool
    """Whether the container's own value is meant, and not the real node."""
    within: Within | None
    """Where the caller is, if that is not the container's own namespace of the node's kind."""


class View:
    """The filesystem. Containers are added and removed by the server, between operations."""

    def __init__(self, host: KernelHost, table: Table = TABLE, inodes: InodeTable | None = None) -> None:
        self.containers: dict[str, Container] = {}
        self.inodes = inodes or InodeTable()
        self._host = host
        self._table = table
        self._contents: dict[int, bytes] = {}
        """What a made-up node said when a handle read it from its beginning."""
        self._ends: dict[int, int] = {}
        """Where a handle's last read of a real node came to its end."""
        self._foreign: dict[int, Seen] = {}
        """Nodes as handles of callers further in have them."""
        # Above whatever a predecessor gave out.
        self._next_handle = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        self._started_ns = time.time_ns()
        self._pump: Pump | None = None
        self._pages: Pages | None = None
        self.handlers: dict[int, Handler] = {
            Opcode.LOOKUP: self.lookup,
            Opcode.GETATTR: self.getattr,
            Opcode.SETATTR: self.setattr,
            Opcode.READLINK: self.readlink,
            Opcode.ACCESS: self.access,
            Opcode.OPEN: self.open,
            Opcode.READ: self.read,
            Opcode.WRITE: self.write,
            Opcode.RELEASE: self.release,
            Opcode.FSYNC: self.fsync,
            Opcode.OPENDIR: self.opendir,
            Opcode.READDIR: self.readdir,
            Opcode.READDIRPLUS: self.readdirplus,
            Opcode.RELEASEDIR: self.release,
            Opcode.FSYNCDIR: self.fsync,
            Opcode.STATFS: self.statfs,
            Opcode.SETXATTR: self.setxattr,
            Opcode.CREATE: self.create,
            Opcode.MKNOD: self.make,
            Opcode.MKDIR: self.make,
            Opcode.SYMLINK: self.make,
            Opcode.LINK: self.make,
            Opcode.UNLINK: self.change,
            Opcode.RMDIR: self.change,
            Opcode.RENAME: self.change,
            Opcode.RENAME2: self.change,
        }
        # flush, poll and the other operations on extended attributes stay ENOSYS: the kernel then stops asking and
        # answers by itself (0, always ready, EOPNOTSUPP).

    def use(self, pump: Pump) -> None:
        """Have the pump serve what it can."""
        self._pump = pump
        self._pages = Pages(pump, self.inodes)
        self.inodes.dropped = pump.forget

    # Names and attributes

    async def lookup(self, request: Request) -> bytes:
        parent = self.inodes.get(request.node)
        name = request.body[:-1]
        if len(name) > NAME_MAX:
            raise NodeError(errno.ENAMETOOLONG)
        if not is_name(name):
            raise NodeError(errno.ENOENT)
        if parent.attr is not None and parent.attr.mode & 0o111 != 0o111:
            await self._require(parent, request, EXECUTE)
        container, base, path, row = self._resolve(parent, name)
        within = self._within(container, row, request)
        attr, stored = await self._look(container, base, path, row, within)
        if within is not None:
            # Not to be taken for granted: the next one may be elsewhere.
            inode = self.inodes.intern(container, base, path, row, stat.S_IFMT(attr.mode))
            inode.lookups += 1
            return wire.entry(inode.number, attr, 0, 0)
        inode = self._know(container, base, path, row, attr, stored)
        inode.lookups += 1
        return _entry(inode)

    def _within(self, container: Container | None, row: Row | None, request: Request) -> Within | None:
        """Where the caller is, if a node of this row is another there than in the container's own namespace."""
        if container is None or row is None or row.namespace is None:
            return None
        home = container.owner.home(row.namespace)
        if not home or (row.namespace is Namespace.USER and container.envoy.stays_in_user_namespace):
            return None
        return self._host.within(request.pid, row.namespace, home, container.owner.userns)

    async def _find(self, inode: Inode, request: Request) -> Seen:
        """The node as the caller finds it."""
        within = self._within(inode.container, inode.row, request)
        if within is None or inode.container is None:
            attr = inode.attr or await self._refresh(inode)
            return Seen(attr, inode.stored, None)
        attr, stored = await self._look(inode.container, inode.base, inode.path, inode.row, within)
        return Seen(attr, stored, within)

    async def _opened(self, inode: Inode, request: Request, fh: int) -> Seen:
        """The node as it was when this handle was opened, as far as that matters."""
        if not fh & _FOREIGN:
            return Seen(inode.attr or await self._refresh(inode), inode.stored, None)
        # A predecessor's handle: where its user is now is where it was then, for all we know.
        return self._foreign.get(fh) or await self._find(inode, request)

    def _know(
        self,
        container: Container,
        base: Base | None,
        path: bytes,
        row: Row | None,
        attr: Attr,
        stored: bool,
    ) -> Inode:
        inode = self.inodes.intern(container, base, path, row, stat.S_IFMT(attr.mode))
        self._seen(inode, attr, stored)
        return inode

    def _seen(self, inode: Inode, attr: Attr, stored: bool) -> None:
        inode.attr = attr
        inode.stored = stored
        inode.attr_until = time.monotonic() + _attr_cache_s(inode)
        if self._pump is None or inode.container is None or inode.base is None:
            return
        self._teach(inode, attr)

    def _teach(self, inode: Inode, attr: Attr) -> None:
        """Tell the pump of what everybody may read: that needs nobody's judgement."""
        container, base, row = inode.container, inode.base, inode.row
        assert self._pump is not None and container is not None and base is not None
        learned: tuple[int, int] | None = None
        if row is not None and attr.mode & 0o444 == 0o444 and container.envoy.number >= 0:
            flags = 0
            if stat.S_ISDIR(attr.mode):
                flags = _DIRECTORY
            elif inode.stored:
                flags = _OWN_TEXT if row.is_text else _OWN
            elif not callable(row.source):
                flags = _REAL_KEPT if row.kept and base is Base.PROC else _REAL
            learned = container.envoy.number, flags
        if learned == inode.pumped:
            return
        if learned is None:
            self._pump.forget(inode.number)
        else:
            assert row is not None
            namespace = -1 if row.namespace is None else row.namespace
            self._pump.learn(inode.number, learned[0], base, inode.path, learned[1] & ~_OWN, namespace)
            if inode.stored:
                self._pump.say(inode.number, container.values.get(base, row))
        inode.pumped = learned

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

    async def _look(
        self,
        container: Container,
        base: Base | None,
        path: bytes,
        row: Row | None,
        within: Within | None = None,
    ) -> tuple[Attr, bool]:
        if base is None or row is None:
            return directory_attr(0o555, container.since_ns), False
        return await look(self._table, container, base, path, row, within)

    async def _refresh(self, inode: Inode) -> Attr:
        if inode.container is None:
            inode.attr = directory_attr(ROOT_MODE, self._started_ns)
        else:
            attr, stored = await self._look(inode.container, inode.base, inode.path, inode.row)
            self._seen(inode, attr, stored)
            return attr
        return inode.attr

    async def getattr(self, request: Request) -> bytes:
        inode = self.inodes.get(request.node)
        if self._within(inode.container, inode.row, request) is not None:
            return wire.attributes(inode.number, (await self._find(inode, request)).attr, 0)
        attr = inode.attr
        # Every read has the kernel ask again, for the time of access, which nobody keeps here.
        if attr is None or time.monotonic() >= inode.attr_until:
            attr = await self._refresh(inode)
        return wire.attributes(inode.number, attr, _attr_cache_s(inode))

    async def setattr(self, request: Request) -> bytes:
        """As proc_sys_setattr (fs/proc/proc_sysctl.c): no chmod, no chown; sizes and times are taken and forgotten."""
        valid = wire.number_32(request.body)
        if valid & wire.SETATTR_OWNERSHIP:
            raise NodeError(errno.EPERM)
        inode = self.inodes.get(request.node)
        if valid & _SETATTR_SIZE and not valid & _SETATTR_FH:
            await self._require(inode, request, WRITE)
        if valid & _SETATTR_TIMES:
            attr = (await self._find(inode, request)).attr
            if request.uid not in (attr.uid, 0):
                if not valid & _SETATTR_NOW:
                    raise NodeError(errno.EPERM)
                await self._require(inode, request, WRITE)
        return await self.getattr(request)

    def forget(self, number: int, lookups: int) -> None:
        if self._pages is not None:
            self._pages.settle()
        self.inodes.forget(number, lookups)

    def drop(self, container: Container) -> None:
        """The container is gone."""
        if self._pages is not None:
            self._pages.drop_container(container)
        self.inodes.drop_inherited(container)

    async def readlink(self, request: Request) -> bytes:
        node = self.inodes.get(request.node)
        if node.container is None or node.base is None:
            raise NodeError(errno.EINVAL)
        return await node.container.readlink(node.base, node.path)

    # Rights

    def _caller(self, inode: Inode, request: Request, within: Within | None = None) -> Caller:
        owner = inode.container.owner if inode.container is not None else None
        return Caller(request.uid, request.gid, lambda: self._host.credentials(request.pid), owner, within)

    async def _require(self, inode: Inode, request: Request, mask: int, *, really: bool = False) -> Seen:
        """The node as the caller finds it. `NodeError` if it may not: EACCES, or what the row refuses its root with.

        ``really``: the real user is meant, as by access(2).
        """
        seen = await self._find(inode, request)
        attr = seen.attr
        caller = self._caller(inode, request, seen.within)
        if (
            really and not caller.is_root
        ):  # who has the capabilities only if it is root (access_override_creds)
            caller.give_up_capabilities()
        rights = inode.row.rights if inode.row is not None else Rights.FILE
        owner = inode.container.owner if inode.container is not None else None
        refusal = inode.row.refusal if inode.row is not None else None
        if mask & WRITE and refusal is not None and caller.is_root and not stat.S_ISDIR(attr.mode):
            raise NodeError(refusal)
        if not may(rights, attr, caller, mask, owner):
            raise NodeError(errno.EACCES)
        return seen

    async def access(self, request: Request) -> bytes:
        inode = self.inodes.get(request.node)
        mask = wire.number_32(request.body) & (READ | WRITE | EXECUTE)
        await self._require(inode, request, mask, really=True)
        return b""

    # Files

    async def open(self, request: Request) -> bytes:
        node = self.inodes.get(request.node)
        flags = wire.number_32(request.body)
        access = flags & os.O_ACCMODE
        mask = (READ, WRITE, READ | WRITE, READ | WRITE)[access]
        if flags & os.O_TRUNC:
            mask |= WRITE
        seen = await self._require(node, request, mask)
        container, base, row = _of_container(node)
        if access != os.O_RDONLY and not seen.stored and row.effect is Effect.REAL:
            # Permission for sysctls does not follow from the mode alone, and whoever writes expects to hear of it
            # when opening. A read tells by itself.
            await container.open(base, node.path, access, seen.within)
        return wire.opened(self._handle(seen), OpenFlag.DIRECT_IO | OpenFlag.NOFLUSH)

    def _handle(self, seen: Seen) -> int:
        handle, self._next_handle = self._next_handle, self._next_handle + 1
        if seen.within is not None:
            handle |= _FOREIGN
            _remember(self._foreign, handle, seen)
        return handle

    async def read(self, request: Request) -> bytes:
        node = self.inodes.get(request.node)
        arguments = wire.io(request.body)
        container, base, row = _of_container(node)
        seen = await self._opened(node, request, arguments.fh)
        if seen.stored:
            content = container.values.get(base, row)
            if arguments.offset and not row.is_text:
                return b""
        elif callable(row.source):
            content = self._made_up(container, row, arguments)
        else:
            return await self._read_real(container, base, node.path, arguments, seen.within)
        return content[arguments.offset : arguments.offset + arguments.size]

    async def read_asked(self, request: Request, asked: int) -> bytes:
        """`read` of a real node, for which the pump has asked the envoy in vain so far."""
        node = self.inodes.get(request.node)
        container, _, _ = _of_container(node)
        return await container.read_asked(node.path, asked, wire.io(request.body).size)

    def _made_up(self, container: Container, row: Row, arguments: wire.IoIn) -> bytes:
        """The content of a made-up node: one reader's is the same from its beginning to its end."""
        assert callable(row.source)
        content = self._contents.get(arguments.fh)
        if content is None or not arguments.offset:
            content = row.source(container.owner, self._host)
            _remember(self._contents, arguments.fh, content)
        return content

    async def _read_real(
        self, container: Container, base: Base, path: bytes, arguments: wire.IoIn, within: Within | None
    ) -> bytes:
        # A read that came to the end is followed by one that finds nothing more: that one need not be asked.
        if self._ends.pop(arguments.fh, None) == arguments.offset:
            return b""
        data = await container.read(base, path, arguments.offset, arguments.size, within)
        if 0 < len(data) < arguments.size:
            _remember(self._ends, arguments.fh, arguments.offset + len(data))
        return data

    async def write(self, request: Request) -> bytes:
        node = self.inodes.get(request.node)
        arguments = wire.io(request.body)
        container, base, row = _of_container(node)
        seen = await self._opened(node, request, arguments.fh)
        within = seen.within
        data = wire.io_data(request.body)[:DATA_MAX]
        # What is appended goes to the end of a file of size 0; the kernel's idea of the size here is our last write.
        offset = 0 if arguments.flags & os.O_APPEND else arguments.offset
        if row.capability is not None and not self._caller(node, request, within).has(row.capability):
            raise NodeError(errno.EPERM)
        if row.effect in (Effect.HOSTNAME, Effect.DOMAINNAME):
            await self._write_name(container, row, offset, data, within)
            return wire.written(len(data))
        if seen.stored and row.effect is not Effect.NONE:
            taken = self._write_stored(container, base, row, offset, data)
            if node.pumped is not None and self._pump is not None and node.stored:
                self._pump.say(node.number, container.values.get(base, row))
            return wire.written(taken)
        if row.effect is Effect.NONE or (row.is_stored and not row.may_be_real):
            raise NodeError(errno.EIO)
        if row.check is None or offset:
            return wire.written(await container.write(base, node.path, offset, data, within))
        # A number is taken as the row has it; how much of it counts as taken does not change by that.
        current = await container.read(base, node.path, 0, DATA_MAX, within)
        accepted = row.check(container.owner, current, data)
        await container.write(base, node.path, 0, accepted.value, within)
        return wire.written(accepted.taken)

    def _write_stored(self, container: Container, base: Base, row: Row, offset: int, data: bytes) -> int:
        assert row.check is not None
        current = container.values.get(base, row)
        if offset and not row.is_text:
            return len(data)  # ignored: sysctl_writes_strict
        accepted = row.check(container.owner, current, _at(offset, current, data))
        container.values.set(base, row, accepted.value)
        if row.effect is Effect.RAISE:
            self._host.raise_to(base, row.path, int(accepted.value.split()[0]))
        return accepted.taken if not offset else len(data)

    async def _write_name(
        self, container: Container, row: Row, offset: int, data: bytes, within: Within | None
    ) -> None:
        assert row.check is not None
        current = await container.read(Base.PROC, row.path, 0, DATA_MAX, within) if offset else b"\n"
        accepted = row.check(container.owner, current, _at(offset, current, data))
        op = Op.SETHOSTNAME if row.effect is Effect.HOSTNAME else Op.SETDOMAINNAME
        await container.set_name(op, accepted.value[:-1], within)

    async def release(self, request: Request) -> bytes:
        fh = wire.number_64(request.body)
        self._contents.pop(fh, None)
        self._ends.pop(fh, None)
        self._foreign.pop(fh, None)
        return b""

    async def fsync(self, request: Request) -> bytes:
        raise NodeError(errno.EINVAL)  # as for any file without the operation (vfs_fsync_range in fs/sync.c)

    # Directories

    async def opendir(self, request: Request) -> bytes:
        seen = await self._require(self.inodes.get(request.node), request, READ)
        return wire.opened(self._handle(seen), 0)

    async def readdir(self, request: Request) -> bytes:
        return await self._list(request, plus=False)

    async def readdirplus(self, request: Request) -> bytes:
        return await self._list(request, plus=True)

    async def _list(self, request: Request, *, plus: bool) -> bytes:
        inode = self.inodes.get(request.node)
        arguments = wire.io(request.body)
        named = ((id.encode(), container) for id, container in self.containers.items())
        within = None
        if arguments.fh & _FOREIGN:
            within = (await self._opened(inode, request, arguments.fh)).within
        listing = Listing(inode, self._table, named, within)
        pages = await listing.page(arguments.offset)
        while pages and sum(_room(entry, plus) for entry in pages) < arguments.size:
            following = await listing.page(pages[-1].cookie)
            if not following:
                break
            pages += following
        # From here on nothing waits and nothing fails: what was handed over counts as looked up.
        parts: list[bytes] = []
        known: list[Inode] = []
        room = arguments.size
        for entry in pages:
            room -= _room(entry, plus)
            if room < 0:
                break
            parts.append(self._listed(inode, entry, plus, known if within is None else None))
        data = b"".join(parts)
        if plus and within is None and self._pages is not None:
            self._pages.keep(inode, arguments.offset, arguments.size, data, known)
        return data

    def _listed(self, directory: Inode, entry: Listed, plus: bool, looked_up: list[Inode] | None) -> bytes:
        """An entry as the kernel reads it. What it counts as looked up is added to ``looked_up``, if it may be."""
        mode, cookie = entry.attr.mode, entry.cookie
        if entry.is_dot or entry.container is None:
            known, number = None, directory.number
        elif not plus or looked_up is None:
            # No number that the kernel would not give back; any but 0, which readdir(3) leaves out, will do.
            known, number = None, 1 << 32 | hash(entry.path) & 0xFFFFFFFF
        else:
            inode = self._know(entry.container, entry.base, entry.path, entry.row, entry.attr, entry.stored)
            inode.lookups += 1
            looked_up.append(inode)
            known, number = _entry(inode), inode.number
        if plus:
            return wire.direntplus(entry.name, known, number, mode, cookie)
        return wire.dirent(entry.name, number, mode, cookie)

    async def statfs(self, request: Request) -> bytes:
        return wire.statfs(NAME_MAX)

    # What procfs and sysfs have no operation for: the caller hears what the real filesystem would have said.

    async def setxattr(self, request: Request) -> bytes:
        await self._require(self.inodes.get(request.node), request, WRITE)
        raise NodeError(errno.EOPNOTSUPP)

    async def create(self, request: Request) -> bytes:
        await self._refuse_new(request, errno.EACCES)  # lookup_open in fs/namei.c
        return b""

    async def make(self, request: Request) -> bytes:
        await self._refuse_new(request, errno.EPERM)
        return b""

    async def _refuse_new(self, request: Request, otherwise: int) -> None:
        """In /proc/sys a name that does not exist cannot even be looked up (proc_sys_lookup)."""
        directory = self.inodes.get(request.node)
        if directory.base is Base.PROC:
            raise NodeError(errno.ENOENT)
        await self._require(directory, request, WRITE)
        raise NodeError(otherwise)

    async def change(self, request: Request) -> bytes:
        """In /proc/sys no capability overrides the mode of a directory (test_perm in fs/proc/proc_sysctl.c)."""
        directory = self.inodes.get(request.node)
        if directory.base is Base.PROC:
            raise NodeError(errno.EACCES)
        await self._require(directory, request, WRITE)
        raise NodeError(errno.EPERM)


def _room(entry: Listed, plus: bool) -> int:
    """Bytes that an entry takes in a listing (FUSE_DIRENTPLUS_SIZE, FUSE_DIRENT_SIZE)."""
    return (152 if plus else 24) + (len(entry.name) + 7 & ~7)


def _of_container(inode: Inode) -> tuple[Container, Base, Row]:
    if inode.container is None or inode.base is None or inode.row is None:
        raise NodeError(errno.EISDIR)
    return inode.container, inode.base, inode.row


def _at(offset: int, current: bytes, data: bytes) -> bytes:
    """What a string is after a write at ``offset``: up to there it stays as it is (_proc_do_string)."""
    before = current.removesuffix(b"\n")
    return before[:offset] + data if offset <= len(before) else before


def _attr_cache_s(inode: Inode) -> int:
    return FOREVER_S if inode.row is None else inode.row.cache_s


def _entry(inode: Inode) -> bytes:
    assert inode.attr is not None
    # A container's directory has no row: whether the container is still served must be asked each time.
    name_s = inode.row.name_cache_s(inode.path) if inode.row is not None else 0
    return wire.entry(inode.number, inode.attr, name_s, _attr_cache_s(inode))


def _remember(of_handles: dict[int, T], handle: int, what: T) -> None:
    """The oldest is forgotten where there are too many: not every handle is given back to us (native/pump.c)."""
    of_handles[handle] = what
    if len(of_handles) > _OPENED_MAX:
        del of_handles[next(iter(of_handles))]
