"""fsopen, fsmount, open_tree and move_mount in a guarded container: what the kernel refuses there works, welded."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import struct

import pytest

from interceptor.errors import SyscallError
from interceptor.kernel import mount, process, stat
from interceptor.kernel.features import probe
from interceptor.kernel.flags import (
    CLONE_NEWNS,
    PROC_SUPER_MAGIC,
    SYSFS_MAGIC,
    MountAttr,
    MountFlag,
    UmountFlag,
)
from interceptor.kernel.namespaces import unshare
from interceptor.library import GuardedChild
from tests.guarded import mounts, raw_below

pytestmark = pytest.mark.root
FUSE_SUPER_MAGIC = 0x65735546
PLACE = b"/tmp/place"


def magic(dirfd: object, path: bytes) -> int:
    with process.openat2(dirfd, path, os.O_PATH) as fd:  # type: ignore[arg-type]
        return stat.fs_magic(fd)


def below(place: bytes) -> list[bytes]:
    return [m.point for m in mounts() if m.point == place or m.point.startswith(place + b"/")]


def errno_of_call(call: object) -> int:
    try:
        call()  # type: ignore[operator]
    except SyscallError as error:
        return error.errno or 0
    return 0


def place() -> bytes:
    os.makedirs(PLACE, exist_ok=True)
    return PLACE


def test_a_new_procfs_is_a_welded_composite_from_its_first_moment(real_guarded: GuardedChild) -> None:
    def inside() -> None:
        tree = mount.new_mount(b"proc", {b"hidepid": b"2"}, MountAttr.MOUNT_ATTR_NOSUID)
        assert stat.fs_magic(tree) == PROC_SUPER_MAGIC
        assert magic(tree, b"sys") == magic(tree, b"uptime") == FUSE_SUPER_MAGIC
        mount.attach(tree, mount.AT_FDCWD, place())
        assert raw_below(PLACE) == []
        assert errno_of_call(lambda: mount.umount2(PLACE + b"/sys")) == 0, "a copied submount goes"
        assert raw_below(PLACE) == []
        assert errno_of_call(lambda: mount.umount2(PLACE)) == 0
        assert below(PLACE) == []

    real_guarded.call(inside)


def test_a_new_sysfs_is_a_welded_composite(real_guarded: GuardedChild) -> None:
    def inside() -> None:
        tree = mount.new_mount(b"sysfs", {})
        assert stat.fs_magic(tree) == SYSFS_MAGIC
        assert magic(tree, b"kernel") == magic(tree, b"devices/virtual") == FUSE_SUPER_MAGIC
        assert os.listdir(os.open("class/net", os.O_RDONLY, dir_fd=tree.fileno())) == ["lo"]

    real_guarded.call(inside)


def test_a_procfs_of_an_inner_pid_namespace_shows_that_namespace(real_guarded: GuardedChild) -> None:
    argv = [
        "unshare",
        "--pid",
        "--fork",
        "--mount",
        "sh",
        "-c",
        "mount -t proc proc /mnt && cat /mnt/1/comm && exec ls /mnt",
    ]
    shown = real_guarded.run(argv)
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.split()
    assert lines[0] == b"sh"
    assert [name for name in lines[1:] if name.isdigit()] == [b"1"]  # ls itself


def test_attributes_are_those_asked_for_and_can_be_taken_back(real_guarded: GuardedChild) -> None:
    def inside() -> None:
        tree = mount.new_mount(b"proc", {}, MountAttr.MOUNT_ATTR_RDONLY | MountAttr.MOUNT_ATTR_NOEXEC)
        mount.attach(tree, mount.AT_FDCWD, place())
        found = stat.statmount(stat.statx(mount.AT_FDCWD, PLACE).mnt_id)
        assert found.attributes & MountAttr.MOUNT_ATTR_RDONLY
        assert found.attributes & MountAttr.MOUNT_ATTR_NOEXEC
        tree.close()
        fd = process.openat2(mount.AT_FDCWD, PLACE, os.O_PATH)
        mount.mount_setattr(fd, clear=MountAttr.MOUNT_ATTR_RDONLY)
        mount.umount2(PLACE, 2)

    real_guarded.call(inside)


@pytest.mark.parametrize(
    ("source", "managed"),
    [(b"/proc", b"sys"), (b"/proc/.", b"uptime"), (b"/sys", b"kernel"), (b"/sys/devices", b"virtual")],
)
def test_a_clone_that_is_not_recursive_brings_its_welded_submounts(
    real_guarded: GuardedChild, source: bytes, managed: bytes
) -> None:
    def inside() -> None:
        tree = mount.clone_mount(mount.AT_FDCWD, source)
        assert magic(tree, managed) == FUSE_SUPER_MAGIC
        mount.attach(tree, mount.AT_FDCWD, place())
        assert len(below(PLACE)) > 1
        # Nothing but what is welded: the container's own mounts are for recursive clones.
        assert PLACE + b"/fs/cgroup" not in below(PLACE)
        tree.close()
        mount.umount2(PLACE)
        assert below(PLACE) == []

    real_guarded.call(inside)


def open_tree_attr(path: bytes, flags: int, set_: int = 0, clear: int = 0) -> int:
    """open_tree_attr(2), 467 on every architecture: a descriptor, or a negative errno."""
    libc = ctypes.CDLL(None, use_errno=True)
    attributes = struct.pack("=4Q", set_, clear, 0, 0)
    arguments = (ctypes.c_int(-100), path, ctypes.c_uint(flags), attributes, ctypes.c_size_t(len(attributes)))
    result = int(libc.syscall(ctypes.c_long(467), *arguments))
    return result if result >= 0 else -ctypes.get_errno()


@pytest.mark.parametrize("source", [b"/proc", b"/sys", b"/sys/devices"])
def test_open_tree_attr_brings_the_submounts_with_the_attributes(
    real_guarded: GuardedChild, source: bytes
) -> None:
    def inside() -> None:
        number = open_tree_attr(source, 1 | os.O_CLOEXEC, MountAttr.MOUNT_ATTR_RDONLY)
        assert number > 0, os.strerror(-number)
        assert not os.get_inheritable(number)
        mount.move_mount(number, b"", mount.AT_FDCWD, place(), 4)
        os.close(number)
        assert raw_below(PLACE) == []
        assert len(below(PLACE)) > 1
        found = stat.statmount(stat.statx(mount.AT_FDCWD, PLACE).mnt_id)
        assert found.attributes & MountAttr.MOUNT_ATTR_RDONLY
        mount.umount2(PLACE)
        # Attributes that are locked stay, whoever asks; a size too small and a mask that makes no sense are refused.
        cleared = open_tree_attr(b"/proc", 1, clear=MountAttr.MOUNT_ATTR_NOEXEC)
        assert cleared == -errno.EPERM, cleared
        assert open_tree_attr(b"/proc", 1, set_=1 << 30) == -errno.EINVAL

    real_guarded.call(inside)


def test_a_clone_of_ones_own_mount_is_the_kernels(real_guarded: GuardedChild) -> None:
    def inside() -> None:
        with mount.clone_mount(mount.AT_FDCWD, b"/tmp") as tree:
            mount.attach(tree, mount.AT_FDCWD, place())
        mount.umount2(PLACE)
        with mount.new_mount(b"tmpfs", {b"size": b"4k"}) as tree:
            mount.attach(tree, mount.AT_FDCWD, place())
        mount.umount2(PLACE)
        assert below(PLACE) == []

    real_guarded.call(inside)


def test_originals_do_not_move(real_guarded: GuardedChild) -> None:
    def inside() -> None:
        for original in (b"/proc", b"/proc/sys", b"/sys", b"/sys/devices/virtual"):
            move = lambda: mount.move_mount(mount.AT_FDCWD, original, mount.AT_FDCWD, place())  # noqa: B023, E731
            assert errno_of_call(move) == errno.EINVAL, original
        assert below(PLACE) == []

    real_guarded.call(inside)


@pytest.mark.parametrize("unshared", [False, True])
def test_nothing_goes_beneath_an_original(real_guarded: GuardedChild, unshared: bool) -> None:
    """There it would be what stands in the original's place, which the original could then be moved away from."""
    missing = {f.name for f in probe() if not f.available}

    def inside() -> None:
        if unshared:
            unshare(CLONE_NEWNS)
            mount.mount(None, b"/", None, MountFlag.MS_REC | MountFlag.MS_PRIVATE)
        before = {place: stat.statx(mount.AT_FDCWD, place).mnt_id for place in (b"/proc", b"/sys")}
        for place in before:
            for tree in (
                mount.clone_mount(mount.AT_FDCWD, place),
                mount.clone_mount(mount.AT_FDCWD, place, recursive=True),
                mount.new_mount(b"tmpfs", {}),
                mount.new_mount(b"proc" if place == b"/proc" else b"sysfs", {}),
            ):
                with tree:
                    beneath = functools.partial(mount.attach, tree, mount.AT_FDCWD, place, beneath=True)
                    assert errno_of_call(beneath) == errno.EINVAL
            os.mkdir(b"/tmp/away")
            move = functools.partial(mount.mount, place, b"/tmp/away", None, MountFlag.MS_MOVE)
            assert errno_of_call(move) == errno.EINVAL
            os.rmdir(b"/tmp/away")
        assert before == {place: stat.statx(mount.AT_FDCWD, place).mnt_id for place in before}
        # Elsewhere it is as ever.
        os.mkdir(b"/tmp/top")
        mount.mount(b"x", b"/tmp/top", b"tmpfs")
        with mount.clone_mount(mount.AT_FDCWD, b"/proc") as tree:
            beneath = functools.partial(mount.attach, tree, mount.AT_FDCWD, b"/tmp/top", beneath=True)
            if "MOVE_MOUNT_BENEATH" in missing:
                assert errno_of_call(beneath) == errno.EINVAL
                return
            beneath()
        mount.umount2(b"/tmp/top", 0)
        assert os.path.exists(b"/tmp/top/self")

    real_guarded.call(inside)


def test_what_is_to_be_moved_is_looked_up_before_what_it_goes_beneath(real_guarded: GuardedChild) -> None:
    def inside() -> None:
        for dirfd, source, error in ((-1, b"x", errno.EBADF), (mount.AT_FDCWD, b"/nowhere", errno.ENOENT)):
            call = functools.partial(mount.move_mount, dirfd, source, mount.AT_FDCWD, b"/proc", 0x200)
            assert errno_of_call(call) == error

    real_guarded.call(inside)


@pytest.mark.parametrize("place", [b"/proc", b"/sys"])
@pytest.mark.parametrize("flags", [0, UmountFlag.MNT_DETACH])
def test_what_propagates_beneath_an_original_does_not_take_its_place(
    real_guarded: GuardedChild, place: bytes, flags: int
) -> None:
    """The kernel puts a mount that arrives where something stands beneath that."""
    if not stat.statx(mount.AT_FDCWD, b"/").unique:
        return  # without unique IDs nothing tells which of the two was there first

    def inside() -> None:
        unshare(CLONE_NEWNS)
        mount.mount(None, b"/", None, MountFlag.MS_REC | MountFlag.MS_PRIVATE)
        mount.mount(None, b"/", None, MountFlag.MS_SHARED)
        before = stat.statx(mount.AT_FDCWD, place).mnt_id
        os.mkdir(b"/tmp/m")
        mount.mount(b"/", b"/tmp/m", None, MountFlag.MS_BIND)
        mount.mount(place, b"/tmp/m" + place, None, MountFlag.MS_BIND | MountFlag.MS_REC)
        mount.mount(None, b"/", None, MountFlag.MS_PRIVATE)
        assert len([m for m in mounts() if m.point == place]) == 2
        assert errno_of_call(functools.partial(mount.umount2, place, flags)) == errno.EBUSY
        assert stat.statx(mount.AT_FDCWD, place).mnt_id == before

    real_guarded.call(inside)


def test_a_detached_tree_ends_with_its_last_descriptor(real_guarded: GuardedChild) -> None:
    """More of them than a guard holds at once: those that were closed make room."""

    def inside() -> None:
        for _ in range(300):
            mount.new_mount(b"proc", {}).close()

    real_guarded.call(inside)


def test_a_context_that_the_guard_did_not_give_reveals_nothing(real_guarded: GuardedChild) -> None:
    def inside() -> None:
        with process.openat2(mount.AT_FDCWD, b"/proc", os.O_PATH) as fd:
            # A descriptor that is no context at all.
            assert errno_of_call(lambda: mount.fsmount(fd)) in (errno.EINVAL, errno.EBADF)

    real_guarded.call(inside)


def test_without_the_right_the_errno_is_the_kernels(real_guarded: GuardedChild) -> None:
    def inside() -> None:
        os.setresgid(1000, 1000, 1000)
        os.setresuid(1000, 1000, 1000)
        assert errno_of_call(lambda: mount.fsopen(b"proc")) == errno.EPERM
        assert errno_of_call(lambda: mount.clone_mount(mount.AT_FDCWD, b"/proc")) == errno.EPERM
        assert (
            errno_of_call(lambda: mount.move_mount(mount.AT_FDCWD, b"/proc", mount.AT_FDCWD, b"/tmp"))
            == errno.EPERM
        )

    real_guarded.call(inside)


def test_a_tree_that_could_not_be_attached_can_be_attached_elsewhere(real_guarded: GuardedChild) -> None:
    def inside() -> tuple[int, int, list[bytes]]:
        tree = mount.new_mount(b"proc", {})
        failed = errno_of_call(lambda: mount.attach(tree, mount.AT_FDCWD, b"/tmp/none"))
        done = errno_of_call(lambda: mount.attach(tree, mount.AT_FDCWD, place()))
        raw = raw_below(PLACE)
        mount.umount2(PLACE, 0)
        return failed, done, raw

    assert real_guarded.call(inside) == (errno.ENOENT, 0, [])
