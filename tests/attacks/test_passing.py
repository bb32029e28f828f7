"""Detached trees handed from process to process, and mount namespaces with no base left to be compared with."""

from __future__ import annotations

import os
import socket

from interceptor.kernel import mount as km
from interceptor.kernel.fd import OwnedFd
from interceptor.kernel.flags import AT_FDCWD, CLONE_NEWNS, CLONE_NEWUSER, UmountFlag
from interceptor.kernel.namespaces import unshare
from tests.attacks.conftest import Box
from tests.attacks.contexts import Where, apart, become_root, rbind, tmpfs
from tests.guarded import errno_of, raw_below, raw_nodes, try_mount, try_umount

SUBMOUNTS = {b"proc": b"sys", b"sys": b"kernel"}


def take_apart(tree: OwnedFd, place: bytes, submount: bytes) -> list[bytes]:
    """What shows of a tree that came from elsewhere, whatever is done to it."""
    found = raw_below(b".", tree.fileno())
    errno_of(km.clone_mount, tree)
    errno_of(km.move_mount, tree, submount, AT_FDCWD, place)
    found += raw_below(place)
    if errno_of(km.attach, tree, AT_FDCWD, place) == 0:
        for flags in (0, UmountFlag.MNT_DETACH):
            try_umount(place + b"/" + submount, flags)
            found += raw_below(place)
        try_umount(place, UmountFlag.MNT_DETACH)
    return found + raw_below(b".", tree.fileno())


def test_a_detached_tree_is_passed_to_another_namespace(box: Box, context: str) -> None:
    """By SCM_RIGHTS, to a process in a user and mount namespace of its own making."""

    def attack(where: Where) -> list[bytes]:
        ours, theirs = socket.socketpair()
        for name in SUBMOUNTS:
            with km.clone_mount(AT_FDCWD, where.path(name), recursive=True) as tree:
                socket.send_fds(ours, [name], [tree.fileno()])

        def receiver() -> list[bytes]:
            found = []
            if context != "chroot":  # the kernel makes no user namespace for somebody in one
                unshare(CLONE_NEWUSER | CLONE_NEWNS)
                become_root()
            for _ in SUBMOUNTS:
                name, (number,), _, _ = socket.recv_fds(theirs, 16, 1)
                with OwnedFd(number) as tree:
                    found += take_apart(tree, where.work(b"passed"), SUBMOUNTS[name])
            return found

        return apart(receiver)

    assert box.attack(context, attack) == []


def test_a_namespace_without_any_base_gets_no_raw_one(box: Box) -> None:
    """mnt_already_visible() looks for one that shows everything; where there is none at all, the answer is no too."""

    def attack(_where: Where) -> tuple[list[bytes], list[str]]:
        unshare(CLONE_NEWNS)
        root = b"/run/bare"
        os.makedirs(root, exist_ok=True)
        tmpfs(root)
        os.makedirs(root + b"/old")
        os.makedirs(root + b"/new")
        km.pivot_root(root, root + b"/old")
        os.chdir("/")
        held = [os.open(b"/old/" + name, os.O_PATH | os.O_CLOEXEC) for name in SUBMOUNTS]
        for _ in range(50):
            if try_umount(b"/old", UmountFlag.MNT_DETACH) == 0:
                break
        found = [node for fd in held for node in raw_below(b".", fd)]
        made = []
        for kind in (b"proc", b"sysfs"):
            if try_mount(kind, b"/new", kind) == 0:
                made.append(kind.decode())
            if errno_of(km.new_mount, kind, {}) == 0:
                made.append(kind.decode())
            found += raw_below(b"/new")
            try_umount(b"/new", UmountFlag.MNT_DETACH)
        return found + raw_nodes(), made

    raw, made = box.attack("plain", attack)
    assert raw == []
    if box.decides:
        assert made == ["proc", "proc", "sysfs", "sysfs"]
    if box.mode == "continue":
        assert made == []


def test_a_copy_of_what_was_passed_back_keeps_its_welds(box: Box) -> None:
    """A tree that a nested namespace made, welded there anew, attached in the first one."""

    def attack(where: Where) -> list[bytes]:
        ours, theirs = socket.socketpair()

        def sender() -> None:
            unshare(CLONE_NEWUSER | CLONE_NEWNS)
            become_root()
            rbind(b"/proc", where.work(b"inner"))
            with km.clone_mount(AT_FDCWD, where.work(b"inner"), recursive=True) as tree:
                socket.send_fds(theirs, [b"x"], [tree.fileno()])

        apart(sender)
        _, (number,), _, _ = socket.recv_fds(ours, 16, 1)
        with OwnedFd(number) as tree:
            return take_apart(tree, where.work(b"back"), b"sys")

    assert box.attack("plain", attack) == []
