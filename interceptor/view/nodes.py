"""What a node of the view is: a row of the tables in ``proc.py`` and ``sys.py``, and how a path finds its row.

A row names a path relative to its filesystem and says where reads come from (``source``), what may be written
(``check``), what a write does (``effect``) and who may (``rights``, ``capability``, ``refusal``). A row whose source is
the real node stands for everything below its path too, unless a longer row says otherwise. Rows are plain data; nothing
here makes a system call.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Protocol

from interceptor.view.protocol import Base, Cgroups, Namespace
from interceptor.view.resources import Account

if TYPE_CHECKING:
    from interceptor.view.sysctl import Check


class NodeError(Exception):
    """An operation on a node that fails with ``errno``: exactly what the caller in the container gets to see."""

    def __init__(self, errno: int) -> None:
        super().__init__(os.strerror(errno))
        self.errno = errno


@dataclass(frozen=True, slots=True)
class Owner:
    """The container a node belongs to, as far as sources may know it."""

    id: str
    uid: int
    """What the container's root is on the host (kuid); 0 without a user namespace."""
    gid: int
    created_ns: int
    """When the container was created, nanoseconds of CLOCK_BOOTTIME."""
    groups: int = 65536
    """How many group ids, from 0 on, are mapped in the container."""
    userns: int = 0
    """Inode number of its user namespace; 0 if not known."""
    namespaces: tuple[int, int, int] = (0, 0, 0)
    """Inode numbers of its network, IPC and UTS namespaces (`Namespace`); 0 if not known."""
    cgroups: Cgroups | None = None
    """Its cgroup, where nodes show that."""
    account: Account = field(default_factory=Account, compare=False)
    """What such nodes have said."""

    def home(self, kind: Namespace) -> int:
        """Inode number of its namespace of a kind; 0 if not known."""
        return self.userns if kind is Namespace.USER else self.namespaces[kind]


class Host(Protocol):
    """What sources and stored values may ask about the host."""

    def boottime_ns(self) -> int:
        """CLOCK_BOOTTIME in nanoseconds: runs on during suspend."""

    def idle_ratio(self) -> float:
        """Idle seconds per second of uptime, summed over all processors, since the host booted."""

    def read(self, base: Base, path: bytes) -> bytes | None:
        """What the host's own node says; None if it has none or does not tell."""

    def read_all(self, base: Base, path: bytes) -> bytes | None:
        """The same of a node that may say much."""

    def read_cgroup(self, top: str, path: str) -> bytes | None:
        """What a file in a cgroup hierarchy says, which is mounted at ``top``; None if there is none."""


class Real(Enum):
    """The source that is the kernel's own node, in the container's namespaces and with its rights."""

    NODE = "real"


class Directory(Enum):
    """Sources of a directory that is there because rows are in it."""

    OF_ROWS = "directory"
    WHERE_NOT_REAL = "real where the container's namespaces have it, else for the rows in it that are there"


class Stored(Enum):
    """Sources that are a value kept for the container, the host's at first."""

    ALWAYS = "stored"
    WHERE_NOT_REAL = "real where the container's namespaces have the node and let it be written, else stored"


REAL = Real.NODE
Source = Real | Directory | Stored | Callable[[Owner, Host], bytes]
"""Where reads come from. A function gives the whole content; it is called when a reader is at offset 0."""


class Effect(Enum):
    """What a write does."""

    NONE = "none"
    """Fails with EIO, as a procfs entry without a write operation does (proc_reg_write in fs/proc/inode.c)."""
    REAL = "real"
    """Goes to the real node, whose errno is the caller's."""
    STORE = "per container"
    """Is kept for the container; the host is not touched."""
    RAISE = "raise host"
    """Is kept for the container, and the host's value is raised if it is lower, never lowered."""
    HOSTNAME = "hostname"
    """sethostname(2) in the container's UTS namespace: the real node takes writes from the initial root alone."""
    DOMAINNAME = "domainname"
    """setdomainname(2), for the same reason."""


class Rights(Enum):
    """By which rule of the kernel's a caller's rights over a node are judged."""

    SYSCTL = "the bits for owner, group or others, and no capability overrides them (test_perm)"
    NETWORK = "the owner's bits with CAP_NET_ADMIN, else those for others (net_ctl_permissions)"
    LIMITS = (
        "the owner's bits with CAP_SYS_RESOURCE, else those for others (set_permissions in kernel/ucount.c)"
    )
    CHECKPOINT = "as SYSCTL, and everything with CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN (ipc_permissions)"
    FILE = "as any file: by owner, group and others, or by CAP_DAC_OVERRIDE (generic_permission)"


class Capability(Enum):
    """Those that some rows ask for, by number (linux/capability.h)."""

    DAC_OVERRIDE = 1
    DAC_READ_SEARCH = 2
    NET_ADMIN = 12
    SYS_RAWIO = 17
    SYS_PTRACE = 19
    SYS_ADMIN = 21
    SYS_RESOURCE = 24
    CHECKPOINT_RESTORE = 40


_LASTING = frozenset({b"all", b"default", b"lo"})
"""What every network namespace has as long as it lives."""


@dataclass(frozen=True, slots=True)
class Row:
    """One node, or with a real source one node and all below it."""

    path: bytes
    source: Source
    mode: int | None = None
    """Kind and permissions of the node at ``path`` itself, owned by the host's root; None: as the real node's."""
    check: Check | None = None
    effect: Effect = Effect.NONE
    rooted: bool = False
    """Files belong to the container's root, whatever the real ones say."""
    cache_s: int = 0
    """How many seconds the kernel may take names and attributes for granted; 0 where they can go unseen."""
    by_device: bool = False
    """Names right below are those of network devices, which come and go unseen: they are asked for each time."""
    namespace: Namespace | None = None
    """Of which kind of namespace the real node is: whoever is in another than the container's finds that one's."""
    kept: bool = False
    """An open descriptor of the real node says the same to whoever reads it (its inode decides, not the reader)."""
    rights: Rights = Rights.FILE
    capability: Capability | None = None
    """What a writer must have, too, or hear EPERM."""
    refusal: int | None = None
    """Errno for opening for writing, for everybody who might; None: by mode alone."""
    default: bytes | None = None
    """What a stored value is at first where the host has no such node; None: then the container has none either."""
    is_text: bool = False
    """Read and written from any position, as strings are. Numbers come whole, at position 0 (kernel/sysctl.c)."""

    def __post_init__(self) -> None:
        if self.source is not REAL and (self.mode is None or self.effect is Effect.REAL):
            raise ValueError(f"row {self.path!r}: only the real node has attributes and effects of its own")
        if (self.effect in (Effect.STORE, Effect.RAISE)) != (self.is_stored and self.check is not None):
            raise ValueError(f"row {self.path!r}: what is stored has a source and a check for it")

    @property
    def covers_below(self) -> bool:
        """Whether this row stands for what is below its path, too."""
        return self.source is REAL or self.source is Directory.WHERE_NOT_REAL

    @property
    def may_be_real(self) -> bool:
        """Whether the container's namespaces may have the node: it is asked for there first."""
        return self.source is Stored.WHERE_NOT_REAL or self.source is Directory.WHERE_NOT_REAL

    @property
    def is_stored(self) -> bool:
        """Whether the container may have a value of its own here."""
        return isinstance(self.source, Stored)

    def name_cache_s(self, path: bytes) -> int:
        """How many seconds the kernel may take the name at ``path``, which this row stands for, for granted."""
        if self.by_device:
            directory, _, name = path.rpartition(b"/")
            if directory == self.path and name not in _LASTING:
                return 0
        return self.cache_s

    def is_fixed_at(self, path: bytes) -> bool:
        """Whether the attributes at ``path``, which this row stands for, are the row's own."""
        return self.mode is not None and path == self.path


FOREVER_S = 3600
"""``cache_s`` of what cannot change while the container lives."""


def real(
    path: bytes,
    *,
    mode: int | None = None,
    check: Check | None = None,
    effect: Effect = Effect.REAL,
    rooted: bool = False,
    cache_s: int = 0,
    by_device: bool = False,
    namespace: Namespace | None = None,
    kept: bool = False,
    rights: Rights = Rights.FILE,
    refusal: int | None = None,
) -> Row:
    """The row of a node, and of all below it, that is read and written where it really is."""
    return Row(
        path,
        REAL,
        mode=mode,
        check=check,
        effect=effect,
        rooted=rooted,
        cache_s=cache_s,
        by_device=by_device,
        namespace=namespace,
        kept=kept,
        rights=rights,
        refusal=refusal,
    )


def text(
    path: bytes,
    source: Callable[[Owner, Host], bytes],
    mode: int = 0o444,
    *,
    rooted: bool = False,
    rights: Rights = Rights.FILE,
    refusal: int | None = None,
) -> Row:
    """The row of a read-only file whose content we make up."""
    return Row(
        path,
        source,
        mode=stat.S_IFREG | mode,
        rooted=rooted,
        cache_s=FOREVER_S,
        rights=rights,
        refusal=refusal,
        is_text=True,
    )


def own(
    path: bytes,
    check: Check,
    *,
    effect: Effect = Effect.STORE,
    mode: int = 0o644,
    source: Stored = Stored.ALWAYS,
    namespace: Namespace | None = None,
    rights: Rights = Rights.SYSCTL,
    capability: Capability | None = None,
    default: bytes | None = None,
    is_text: bool = False,
) -> Row:
    """The row of a value that each container has for itself."""
    return Row(
        path,
        source,
        mode=stat.S_IFREG | mode,
        check=check,
        effect=effect,
        rooted=True,
        cache_s=FOREVER_S if source is Stored.ALWAYS else 1,
        namespace=namespace,
        rights=rights,
        capability=capability,
        default=default,
        is_text=is_text,
    )


def cached(path: bytes, *, rights: Rights = Rights.SYSCTL) -> Row:
    """The row of a read-only node whose value never changes: asked of the host once."""
    return Row(path, Stored.ALWAYS, mode=stat.S_IFREG | 0o444, cache_s=FOREVER_S, rights=rights)


def constant(content: bytes) -> Callable[[Owner, Host], bytes]:
    """A source that always says the same."""
    return lambda _owner, _host: content


def directory(path: bytes, mode: int = 0o755) -> Row:
    """The row of an empty directory, or of one that holds nothing but other rows."""
    return Row(path, Directory.OF_ROWS, mode=stat.S_IFDIR | mode, cache_s=FOREVER_S)


def some_directory(path: bytes, rights: Rights, namespace: Namespace | None = None) -> Row:
    """The row of a directory that the host may have where the container's namespaces do not."""
    return Row(
        path,
        Directory.WHERE_NOT_REAL,
        mode=stat.S_IFDIR | 0o555,
        cache_s=1,
        namespace=namespace,
        kept=namespace is not None,
        rights=rights,
    )


def join(directory: bytes, name: bytes) -> bytes:
    """The path of ``name`` in ``directory``, where the empty path is the filesystem's root."""
    return directory + b"/" + name if directory else name


class Table:
    """The rows of both filesystems, completed by the directories that lead to them."""

    def __init__(self, rows: Mapping[Base, Iterable[Row]]) -> None:
        """`ValueError` if two rows have the same path."""
        self._rows: dict[tuple[Base, bytes], Row] = {}
        self._children: dict[tuple[Base, bytes], dict[bytes, Row]] = {}
        for base, given in rows.items():
            for row in given:
                if (base, row.path) in self._rows:
                    raise ValueError(f"two rows for {base.name} {row.path!r}")
                self._rows[base, row.path] = row
            for row in list(given):
                self._connect(base, row)

    def _connect(self, base: Base, row: Row) -> None:
        while row.path:
            parent, _, name = row.path.rpartition(b"/")
            self._children.setdefault((base, parent), {})[name] = row
            above = self.find(base, parent)
            if above is None:
                above = Row(parent, Directory.OF_ROWS, mode=stat.S_IFDIR | 0o555, cache_s=FOREVER_S)
                self._rows[base, parent] = above
            elif above.path != parent:
                return  # within the real tree, which leads there by itself
            row = above

    def find(self, base: Base, path: bytes) -> Row | None:
        """The row that stands for ``path``: its own, or the nearest above that stands for what is below it too."""
        row = self._rows.get((base, path))
        if row is not None:
            return row
        while path:
            path = path.rpartition(b"/")[0]
            row = self._rows.get((base, path))
            if row is not None:
                return row if row.covers_below else None
        return None

    def child(self, base: Base, directory: bytes, name: bytes) -> Row:
        """The row that stands for a name in a directory. `NodeError` ENOENT if the tables have none."""
        row = self.find(base, join(directory, name))
        if row is None:
            raise NodeError(errno.ENOENT)
        return row

    def children(self, base: Base, directory: bytes) -> Mapping[bytes, Row]:
        """The rows right below a directory, by name."""
        return self._children.get((base, directory), {})
