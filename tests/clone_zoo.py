"""A file of every kind, and with every property, that has to survive the way into a clone and back."""

from __future__ import annotations

import os
import socket
import stat
import struct
from collections.abc import Callable

from interceptor.kernel.inode import set_inode_flags

#: Seconds and nanoseconds that no test takes for now.
MTIME, ATIME = 981_173_106_123_456_789, 981_173_107_987_654_321


class Builder:
    """Makes files below ``root`` for owners from ``uid`` and ``gid`` on: 0 for the manager, or a container's range."""

    def __init__(self, root: str, uid: int = 0, gid: int = 0) -> None:
        self.root = os.fsencode(root)
        self.uid, self.gid = uid, gid

    def at(self, name: bytes) -> bytes:
        return os.path.join(self.root, name)

    def file(
        self, name: bytes, data: bytes = b"data", uid: int = 0, gid: int = 0, mode: int = 0o644
    ) -> bytes:
        with open(self.at(name), "wb") as file:
            file.write(data)
        return self.own(name, uid, gid, mode)

    def own(self, name: bytes, uid: int = 0, gid: int = 0, mode: int | None = None) -> bytes:
        path = self.at(name)
        os.chown(path, self.uid + uid, self.gid + gid, follow_symlinks=False)
        if mode is not None:
            os.chmod(path, mode)
        return path

    def directory(self, name: bytes, uid: int = 0, gid: int = 0, mode: int = 0o755) -> bytes:
        os.mkdir(self.at(name))
        return self.own(name, uid, gid, mode)

    def acl(self, name: str, *entries: tuple[int, int, int]) -> bytes:
        """The value of a POSIX ACL's attribute: tag, permissions, ID."""
        base = {0x02: self.uid, 0x08: self.gid}
        value = struct.pack("<I", 2)
        for tag, permissions, number in entries:
            shown = number + base[tag] if tag in base else 0xFFFFFFFF
            value += struct.pack("<HHI", tag, permissions, shown)
        return value


def contents(b: Builder) -> None:
    b.file(b"empty", b"")
    b.file(b"text", b"line\n" * 1000)
    b.file(b"bytes", bytes(range(256)) * 8192)


def holes(b: Builder) -> None:
    b.file(b"only", b"")
    os.truncate(b.at(b"only"), 64 << 20)
    path = b.file(b"between", b"x")
    fd = os.open(path, os.O_WRONLY)
    os.pwrite(fd, b"y" * 4096, 32 << 20)
    os.ftruncate(fd, 64 << 20)
    os.close(fd)


def hard_links(b: Builder) -> None:
    b.directory(b"one")
    b.directory(b"two")
    path = b.file(b"one/name", b"shared", 33, 7, 0o640)
    os.link(path, b.at(b"two/name"))
    os.link(path, b.at(b"one/other"))
    os.symlink("x", b.at(b"one/symlink"))
    b.own(b"one/symlink")
    os.link(b.at(b"one/symlink"), b.at(b"two/symlink"), follow_symlinks=False)


def modes(b: Builder) -> None:
    for mode in (0o000, 0o400, 0o777, 0o4755, 0o2755, 0o6711, 0o1644):
        b.file(b"%o" % mode, b"m", 5, 6, mode)
    b.directory(b"sticky", 1, 2, 0o3777)
    b.directory(b"closed", 1, 2, 0o000)


def capabilities(b: Builder) -> None:
    """Revision 2 as the manager has it; in a container that is revision 3 for its root."""
    body = struct.pack("<4I", 1 << 13, 0, 0, 0)
    plain = struct.pack("<I", 0x02000001) + body
    for name, root in ((b"plain", 0), (b"nested", 1000)):
        path = b.file(name, b"c", 0, 0, 0o755)
        value = struct.pack("<I", 0x03000001) + body + struct.pack("<I", b.uid + root)
        os.setxattr(path, "security.capability", plain if root == 0 and b.uid == 0 else value)


def acls(b: Builder) -> None:
    user, group = (0x02, 6, 1000), (0x08, 5, 50)
    entries = ((0x01, 6, 0), user, (0x04, 4, 0), group, (0x10, 7, 0), (0x20, 4, 0))
    path = b.file(b"file", b"a")
    os.setxattr(path, "system.posix_acl_access", b.acl("access", *entries))
    path = b.directory(b"directory")
    os.setxattr(path, "system.posix_acl_default", b.acl("default", *entries))


def attributes(b: Builder) -> None:
    path = b.file(b"file", b"x")
    os.setxattr(path, "user.name", b"value\0with NUL")
    os.setxattr(path, "trusted.name", b"t")
    os.setxattr(path, "security.name", b"s")
    os.setxattr(b.directory(b"directory"), "user.empty", b"")
    os.symlink("nowhere", b.at(b"link"))
    os.setxattr(b.own(b"link"), "trusted.link", b"l", follow_symlinks=False)


def devices(b: Builder) -> None:
    os.mknod(b.at(b"null"), stat.S_IFCHR | 0o666, os.makedev(1, 3))
    b.own(b"null", 0, 5, 0o666)
    os.mknod(b.at(b"block"), stat.S_IFBLK | 0o600, os.makedev(7, 200))
    b.own(b"block", 0, 6, 0o660)


def fifos(b: Builder) -> None:
    os.mkfifo(b.at(b"fifo"))
    b.own(b"fifo", 3, 4, 0o620)


def sockets(b: Builder) -> None:
    # By a short path: the name of a socket has 108 bytes.
    here = os.open(".", os.O_RDONLY)
    os.chdir(b.root)
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("socket")
    os.fchdir(here)
    os.close(here)
    b.own(b"socket", 8, 9, 0o755)


def symlinks(b: Builder) -> None:
    for name, target in ((b"relative", b"../x"), (b"absolute", b"/etc/passwd"), (b"bytes", b"\xff\xfe")):
        os.symlink(target, b.at(name))
        b.own(name, 1, 2)
    os.symlink(b"x" * 900, b.at(b"long"))
    b.own(b"long")


def flags(b: Builder) -> None:
    for name, letters in ((b"immutable", "i"), (b"append", "a")):
        b.file(name, b"f")
        os.utime(b.at(name), ns=(ATIME, MTIME))
        set_inode_flags(b.at(name), letters)


def names(b: Builder) -> None:
    for name in (b"\xff\xfe", b"new\nline", b"\\backslash", b"sp ace", b"co:lon,comma", b"n" * 255, b"-dash"):
        b.file(name, name)
    b.directory(b"\xc3\x28")
    b.file(b"\xc3\x28/\x80", b"in")


#: By name, as the tests are named.
ZOO: dict[str, Callable[[Builder], None]] = {
    one.__name__: one
    for one in (
        *(contents, holes, hard_links, modes, capabilities, acls, attributes, devices, fifos, sockets),
        *(symlinks, flags, names),
    )
}


def build(root: str, uid: int = 0, gid: int = 0) -> None:
    """All of it, each kind in a directory of its own, with times of its own."""
    for name, maker in ZOO.items():
        path = os.path.join(root, name)
        os.mkdir(path)
        os.chown(path, uid, gid)
        maker(Builder(path, uid, gid))
        for directory, below, files in os.walk(os.fsencode(path), topdown=False):
            for one in [*files, *below, b""]:
                at = os.path.join(directory, one) if one else directory
                try:
                    os.utime(at, ns=(ATIME, MTIME), follow_symlinks=False)
                except PermissionError:
                    assert name == "flags"
