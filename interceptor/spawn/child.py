"""What runs in a child between fork and the caller's own program. Nothing here may be imported lazily.

Who is who, for a container::

    parent ── helper ── process 1 ── main        spawn(): the helper makes the namespaces, the others live in them
           └─ helper ── process                  run(): the helper joins them

A helper is there because a PID namespace is entered by fork alone. It stays, asleep, and tells of the end. Every child
has only the descriptors it needs, so that the parent's death is an end of file for process 1, with which all ends.
"""

from __future__ import annotations

import errno
import gc
import os
import select
import signal
import socket
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import prctl

from interceptor.errors import SyscallError
from interceptor.kernel.fd import OwnedFd
from interceptor.kernel.flags import AT_FDCWD, MountFlag, ResolveFlag, UmountFlag
from interceptor.kernel.mount import attach, mount, pivot_root, umount2
from interceptor.kernel.namespaces import setns, unshare
from interceptor.kernel.process import close_all_but, openat2
from interceptor.kernel.seccomp import SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV, install_listener
from interceptor.spawn.channel import Channel
from interceptor.spawn.job import NOT_STARTED, Job, become
from interceptor.spawn.layout import LINKS, ROOTFS, STAGE, Mount, Skeleton
from interceptor.spawn.network import Network, configure_inside


@dataclass(frozen=True)
class Filter:
    """The notification filter of a process, and how it is put on."""

    program: bytes
    wait_killable: bool


@dataclass(frozen=True)
class Bind:
    """A detached copy of something of the host's, and whether it is a directory."""

    tree: int
    is_directory: bool


@dataclass(frozen=True)
class Plan:
    """A container as its process 1 needs it."""

    namespaces: int
    user_namespace: bool
    hostname: str
    network: Network
    rootfs: Bind | None
    skeleton: Skeleton | None
    mounts: Sequence[tuple[Mount, Bind | None]]
    filter: Filter | None
    job: Job | None

    @property
    def fds(self) -> tuple[int, ...]:
        trees = [bind.tree for bind in (self.rootfs, *(b for _, b in self.mounts)) if bind is not None]
        return (*trees, *(self.job.fds if self.job else ()))


# ---- fork --------------------------------------------------------------------------------------------------


def fork(body: Callable[[], int], keep: Iterable[int], channel: Channel) -> int:
    """Run ``body`` in a child that keeps standard output and error, ``keep`` and the channel; return its process ID.

    The child never returns: it exits with what ``body`` does. What it raises is told over the channel.
    """
    pid = os.fork()
    if pid:
        return pid
    status = NOT_STARTED
    try:
        _forget_parent({0, 1, 2, channel.fileno(), *keep})
        status = body()
    except BaseException as error:
        text = str(error) if isinstance(error, OSError) else "".join(traceback.format_exception(error))
        channel.fail(text)
    finally:
        os._exit(status)


def _forget_parent(keep: set[int]) -> None:
    """Finalizers of the parent's objects must not run here, nor its signal handlers, nor may its descriptors stay."""
    gc.disable()
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.umask(0o022)
    close_all_but(keep)


def wait_for(pid: int) -> int:
    """The exit status of a child as subprocess counts: negative for a signal."""
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


# ---- spawn(): the container --------------------------------------------------------------------------------


def container_helper(plan: Plan, channel: Channel) -> int:
    """The helper of spawn(): makes the namespaces and process 1, and waits for its end."""
    unshare(plan.namespaces)
    channel.send("unshared")
    channel.receive("mapped")
    if plan.user_namespace:
        become_root()
    configure_inside(plan.network)
    first = fork(lambda: container_init(plan, channel), plan.fds, channel)
    channel.send("forked", first)
    # Process 1 has its own: an end of file must mean that it is gone.
    channel.close()
    close_all_but({0, 1, 2})
    wait_for(first)
    return 0


def container_init(plan: Plan, channel: Channel) -> int:
    """Process 1: makes the filesystem as a runtime would, pivots, puts on the filter, starts the main process."""
    prctl.set_pdeathsig(signal.SIGKILL)
    channel.receive("known")
    os.setsid()
    socket.sethostname(plan.hostname)
    build_root(plan)
    channel.send("mounted")
    channel.receive("created")
    # By path: the daemon has put a welded tree over the one that was made here.
    os.chdir(ROOTFS)
    pivot_root(b".", b".")
    umount2(b".", UmountFlag.MNT_DETACH)
    os.chdir("/")
    if plan.filter is not None:
        put_on(plan.filter, channel)
    channel.send("ready")
    channel.receive("go")
    return reap_until_main_ends(plan.job, channel)


def become_root() -> None:
    """The root of the user namespace that this process is in."""
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


def put_on(filter_: Filter, channel: Channel) -> None:
    """Install the filter on this process and send its listener to the parent.

    Being root in its user namespace it may do so without no_new_privs, which is the job's choice.
    """
    flags = SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV if filter_.wait_killable else 0
    try:
        listener = install_listener(filter_.program, flags)
    except SyscallError as error:
        if error.errno != errno.EINVAL or not flags:
            raise
        listener = install_listener(filter_.program)
    with listener:
        channel.send("listener", fds=(listener.fileno(),))


def reap_until_main_ends(job: Job | None, channel: Channel) -> int:
    """What is left of an init: wait for children and for the parent's end. Without a job it idles until killed."""
    read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(write)
    keep = job.fds if job else ()
    close_all_but({0, 1, 2, read, write, channel.fileno(), *keep})
    main = fork(lambda: become(job), keep, channel) if job else 0
    if job:
        # The main process is the only one that holds them now: its output ends when it does.
        close_all_but({0, 1, 2, read, write, channel.fileno()})
    poller = select.poll()
    poller.register(read, select.POLLIN)
    poller.register(channel.fileno(), select.POLLIN)
    while True:
        ready = {fd for fd, _ in poller.poll()}
        if channel.fileno() in ready:
            # The parent says no more: this is its end.
            return 0
        os.read(read, 4096)
        for pid, status in _ended_children():
            if pid == main:
                channel.send("exited", os.waitstatus_to_exitcode(status))
                return 0


def _ended_children() -> Iterable[tuple[int, int]]:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        yield pid, status


# ---- spawn(): its filesystem -------------------------------------------------------------------------------


def build_root(plan: Plan) -> None:
    """All mounts, at `ROOTFS`. procfs comes from process 1 itself: it shows the PID namespace of its mounter."""
    mount(None, b"/", None, MountFlag.MS_REC | MountFlag.MS_PRIVATE)
    mount(b"tmpfs", STAGE, b"tmpfs", 0, b"mode=755")
    os.mkdir(ROOTFS)
    if plan.rootfs is not None:
        attach(plan.rootfs.tree, AT_FDCWD, os.fsencode(ROOTFS))
    else:
        mount(b"tmpfs", ROOTFS, b"tmpfs", 0, b"mode=755")
    if plan.skeleton is not None:
        make_skeleton(plan.skeleton)
    with OwnedFd(os.open(ROOTFS, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) as root:
        for entry, bind in plan.mounts:
            make_mount(root, entry, bind)
        for path, target in LINKS.items():
            with place(root, os.path.dirname(path), directory=True) as parent:
                if not exists(parent, os.path.basename(path)):
                    os.symlink(target, os.path.basename(path), dir_fd=parent.fileno())


def make_skeleton(skeleton: Skeleton) -> None:
    """The directories, links and files of a root filesystem without an image."""
    for directory in skeleton.directories:
        os.makedirs(ROOTFS + directory, exist_ok=True)
    for path, target in skeleton.links.items():
        os.symlink(target, ROOTFS + path)
    for path, content in skeleton.files.items():
        with open(ROOTFS + path, "wb") as file:
            file.write(content)


def make_mount(root: OwnedFd, entry: Mount, bind: Bind | None) -> None:
    """One mount below ``root``."""
    with place(root, entry.destination, directory=bind is None or bind.is_directory) as target:
        if bind is not None:
            attach(bind.tree, target)
        else:
            data = entry.data.encode() or None
            mount(
                entry.source.encode(),
                f"/proc/self/fd/{target.fileno()}",
                entry.type.encode(),
                entry.flags,
                data,
            )
    for propagation in entry.propagation:
        with place(root, entry.destination, directory=True) as mounted:
            mount(None, f"/proc/self/fd/{mounted.fileno()}", None, propagation)


def place(root: OwnedFd, path: str, *, directory: bool) -> OwnedFd:
    """An O_PATH descriptor of ``path`` within ``root``, made if it is not there. Links cannot lead out of the root."""
    try:
        return openat2(root, path, os.O_PATH, ResolveFlag.RESOLVE_IN_ROOT)
    except SyscallError as error:
        if error.errno != errno.ENOENT:
            raise
    parent_path, name = os.path.split(path.rstrip("/"))
    with place(root, parent_path or "/", directory=True) as parent:
        if directory:
            os.mkdir(name, 0o755, dir_fd=parent.fileno())
        else:
            os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644, dir_fd=parent.fileno()))
        return openat2(parent, name, os.O_PATH, ResolveFlag.RESOLVE_IN_ROOT)


def exists(directory: OwnedFd, name: str) -> bool:
    """Whether the directory has an entry of that name, be it a dangling link."""
    try:
        os.lstat(name, dir_fd=directory.fileno())
    except FileNotFoundError:
        return False
    return True


# ---- run(): one more process -------------------------------------------------------------------------------


def entering_helper(
    pidfd: int, namespaces: int, user_namespace: bool, filter_: Filter | None, job: Job, channel: Channel
) -> int:
    """The helper of run(): joins all namespaces of process 1, starts the process, tells of its end."""
    setns(pidfd, namespaces)
    os.close(pidfd)
    if user_namespace:
        become_root()
    inner = fork(lambda: entered(filter_, job, channel), job.fds, channel)
    channel.send("forked", inner)
    close_all_but({0, 1, 2, channel.fileno()})
    channel.send("exited", wait_for(inner))
    return 0


def entered(filter_: Filter | None, job: Job, channel: Channel) -> NoReturn:
    """The process of run()."""
    prctl.set_pdeathsig(signal.SIGKILL)
    channel.receive("known")
    if filter_ is not None:
        put_on(filter_, channel)
    channel.send("ready")
    channel.receive("go")
    become(job)
