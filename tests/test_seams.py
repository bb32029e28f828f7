"""openat2 with RESOLVE_NO_XDEV, as libpathrs and runc 1.3 use it: a composite is one filesystem, nothing else is."""

from __future__ import annotations

import errno
import os

import pytest

from interceptor.errors import SyscallError
from interceptor.kernel import mount, process, stat
from interceptor.kernel.fd import FdLike, OwnedFd
from interceptor.kernel.flags import CLONE_NEWNS, CLONE_NEWUSER, MountFlag, ResolveFlag
from interceptor.kernel.namespaces import unshare
from interceptor.library import GuardedChild
from tests.attacks.contexts import become_root

pytestmark = pytest.mark.root

FUSE_SUPER_MAGIC = 0x65735546
CAREFUL = ResolveFlag.RESOLVE_NO_XDEV | ResolveFlag.RESOLVE_BENEATH | ResolveFlag.RESOLVE_NO_MAGICLINKS
IN_ROOT = ResolveFlag.RESOLVE_NO_XDEV | ResolveFlag.RESOLVE_IN_ROOT
HOSTNAME = b"sys/kernel/hostname"
#: What Docker sets in each of its containers, by way of runc.
PORTS = b"sys/net/ipv4/ip_unprivileged_port_start"


def base(path: bytes) -> OwnedFd:
    return process.openat2(mount.AT_FDCWD, path, os.O_PATH | os.O_DIRECTORY)


def opened(dirfd: FdLike, path: bytes, flags: int = os.O_PATH | os.O_NOFOLLOW, resolve: int = CAREFUL) -> str:
    """``view``, another filesystem's magic number, or the errno's name."""
    try:
        with process.openat2(dirfd, path, flags, resolve) as fd:
            assert not os.get_inheritable(fd.fileno())
            magic = stat.fs_magic(fd)
    except SyscallError as error:
        return errno.errorcode[error.errno or 0]
    return "view" if magic == FUSE_SUPER_MAGIC else hex(magic)


@pytest.mark.parametrize("resolve", [CAREFUL, IN_ROOT])
def test_covers_are_no_other_filesystem(real_guarded: GuardedChild, resolve: int) -> None:
    def inside() -> None:
        for place, paths in {
            b"/proc": (b"sys", HOSTNAME, b"./sys//kernel", b"uptime", b"sys/kernel/"),
            b"/sys": (b"kernel", b"devices/virtual/net", b"kernel/mm"),
            b"/sys/devices": (b"virtual", b"virtual/net/lo"),
        }.items():
            for path in paths:
                if not os.path.lexists(place + b"/" + path):
                    continue
                assert opened(base(place), path, resolve=resolve) == "view", path
        assert opened(base(b"/proc"), b"sys/nowhere", resolve=resolve) == "ENOENT"
        assert opened(base(b"/proc"), b"uptime/", resolve=resolve) == "ENOTDIR"
        assert opened(base(b"/proc"), b"meminfo", resolve=resolve) == "0x9fa0"

    real_guarded.call(inside)


@pytest.mark.parametrize("options", [{}, {b"hidepid": b"ptraceable"}])
def test_in_a_detached_procfs(real_guarded: GuardedChild, options: dict[bytes, bytes | None]) -> None:
    def inside() -> None:
        with mount.new_mount(b"proc", options) as tree:
            assert opened(tree, HOSTNAME) == "view"
            # As runc writes a sysctl: found with care, then opened anew.
            with process.openat2(tree, PORTS, os.O_PATH | os.O_NOFOLLOW, CAREFUL) as fd:
                path = f"/proc/self/fd/{fd.fileno()}"
                with OwnedFd(os.open(path, os.O_WRONLY | os.O_TRUNC)) as writable:
                    os.write(writable.fileno(), b"7")
            with process.openat2(tree, PORTS, os.O_RDONLY, CAREFUL) as fd:
                assert os.read(fd.fileno(), 100) == b"7\n"

    real_guarded.call(inside)


def test_what_the_container_mounted_is_another_filesystem(real_guarded: GuardedChild) -> None:
    """That is what the flag is for: an inner container's mounts over /proc must not deceive its runtime."""

    def inside() -> None:
        mount.mount(b"x", b"/proc/fs", b"tmpfs")
        mount.mount(b"/proc/sys/kernel", b"/proc/irq", None, MountFlag.MS_BIND)
        mount.mount(b"/proc/sys/vm", b"/proc/sys/net", None, MountFlag.MS_BIND)
        os.mkdir("/proc/fs/x")
        os.symlink("../sys", "/proc/fs/link")
        proc = base(b"/proc")
        for path in (b"fs", b"fs/x", b"fs/link", b"fs/link/kernel", b"irq", b"irq/hostname", b"sys/net/x"):
            assert opened(proc, path, os.O_PATH) == "EXDEV", path
        assert opened(proc, b"fs/../sys") == "EXDEV"
        assert opened(base(b"/"), b"proc/sys") == "EXDEV"
        assert opened(base(b"/"), b"tmp") == "EXDEV"
        mount.mount(b"x", b"/proc/sys", b"tmpfs")
        assert opened(proc, HOSTNAME) == "EXDEV"
        for path in (b"/proc/sys", b"/proc/sys/net", b"/proc/irq", b"/proc/fs"):
            mount.umount2(path)

    real_guarded.call(inside)


def test_without_the_rights_of_the_containers_root_the_kernel_alone_decides(
    real_guarded: GuardedChild,
) -> None:
    """What is given is opened by the guard: nobody gets more from it than the root of the container has."""

    def nested() -> None:
        unshare(CLONE_NEWUSER | CLONE_NEWNS)
        become_root()
        assert opened(base(b"/proc"), HOSTNAME) == "EXDEV"

    def somebody() -> None:
        os.setresgid(1000, 1000, 1000)
        os.setresuid(1000, 1000, 1000)
        assert opened(base(b"/proc"), HOSTNAME) == "EXDEV"

    real_guarded.call(nested)
    real_guarded.call(somebody)


def test_arguments_that_make_no_sense_get_the_kernels_errno(real_guarded: GuardedChild) -> None:
    def inside() -> None:
        proc = base(b"/proc")
        assert opened(proc, b"/sys") == "EXDEV"
        assert opened(proc, HOSTNAME, os.O_CREAT | os.O_WRONLY) == "EXDEV"
        assert opened(proc, b"", os.O_PATH) == "ENOENT"
        assert opened(9999, HOSTNAME) == "EBADF"
        assert opened(proc, HOSTNAME, resolve=CAREFUL | 1 << 40) == "EINVAL"
        assert opened(proc, HOSTNAME, resolve=CAREFUL | IN_ROOT) == "EINVAL"
        assert opened(proc, HOSTNAME, 1 << 40) == "EINVAL"

    real_guarded.call(inside)
