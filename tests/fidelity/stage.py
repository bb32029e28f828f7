"""Where scripts run: the same files, mounts and descriptors for each, made anew whenever one had an effect."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass

import prctl

from interceptor.kernel.flags import CLONE_NEWNS, CLONE_NEWUSER
from interceptor.kernel.namespaces import setns, unshare
from tests.fidelity import mountinfo
from tests.fidelity.calls import AT_FDCWD, AT_RECURSIVE, OPENERS, Call, Memory, answer

F = b"/tmp/f"

#: Numbers of the descriptors that scripts start with.
DIR, MNT, DETACHED, DELETED, FILE, OPEN_FILE, LINK, PROC, CONTEXT, MADE, PROC_TREE, CLOSED = range(100, 112)
_FIRST_FREE = 112

MS_BIND, MS_REC, MS_PRIVATE, MS_SLAVE, MS_SHARED, MS_UNBINDABLE = (
    0x1000,
    0x4000,
    1 << 18,
    1 << 19,
    1 << 20,
    1 << 17,
)
MS_RDONLY, MS_REMOUNT, MS_MOVE = 1, 0x20, 0x2000
MNT_DETACH = 2


def in_f(name: str) -> bytes:
    """A path on the stage."""
    return F + b"/" + name.encode()


#: Directories and files that scripts find.
DIRECTORIES = (
    *("dir", "dir/sub", "mnt", "stack", "shared", "slave", "unbind", "ro", "new", "new2", "tmp", "old"),
    *("lower", "upper", "work", "proc", "sys", "pc", "sc", "cover"),
    *(f"low{i}" for i in range(40)),
    *("a,b", "a:b", "a b", "a\\b"),
)
FILES = ("file", "filemnt", "other")
LINKS = {
    "link": "dir",
    "filelink": "file",
    "dangling": "nowhere",
    "loop": "loop",
    "mntlink": "mnt",
    "proclink": "/proc",
    "tmp/f": "/",
}


@dataclass(frozen=True)
class Context:
    """Who calls, and from where."""

    name: str
    #: What the process does once, in the container's first mount namespace.
    enter: Callable[[], None]
    #: What it does on each new stage; True if its rights are gone then, so that there can be no other.
    last: Callable[[], None] | None = None
    final: bool = False


def _own_namespace() -> None:
    unshare(CLONE_NEWNS)


def _nested() -> None:
    uid, gid = os.geteuid(), os.getegid()
    unshare(CLONE_NEWUSER | CLONE_NEWNS)
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"0 {uid} 1")
    _write("/proc/self/gid_map", f"0 {gid} 1")


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _chroot() -> None:
    os.chroot(F)
    os.chdir("/")


def _drop_admin() -> None:
    for kind in (prctl.cap_effective, prctl.cap_permitted):
        kind.drop("sys_admin")
    prctl.set_dumpable(1)


def _become_user() -> None:
    os.setgroups([])
    os.setresgid(1000, 1000, 1000)
    os.setresuid(1000, 1000, 1000)
    prctl.set_dumpable(1)


def _user_namespace_alone() -> None:
    uid = os.geteuid()
    unshare(CLONE_NEWUSER)
    prctl.set_dumpable(1)
    _write("/proc/self/uid_map", f"0 {uid} 1")


def _nothing() -> None:
    pass


CONTEXTS = {
    context.name: context
    for context in (
        Context("root", _own_namespace),
        Context("first", _nothing),
        Context("nested", _nested),
        Context("chroot", _own_namespace, last=_chroot),
        Context("no-admin", _own_namespace, last=_drop_admin, final=True),
        Context("user", _own_namespace, last=_become_user, final=True),
        Context("user-namespace", _own_namespace, last=_user_namespace_alone, final=True),
    )
}


class Stage:
    """One process on its stage."""

    def __init__(self, context: Context) -> None:
        context.enter()
        self._context = context
        self.memory = Memory()
        self._clean = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        self._made = False
        #: Of the procfs that the container was made with, whatever covers it later.
        self._proc = os.open("/proc", os.O_PATH | os.O_CLOEXEC)
        self.again()

    def _do(self, name: str, *arguments: int | bytes | None) -> int:
        result = self.memory.make(Call(name, arguments))
        if result < 0:
            raise OSError(-result, f"{Call(name, arguments)}: {os.strerror(-result)}")
        return result

    def again(self) -> None:
        """A new stage, the first or another."""
        if self._made and self._context.final:
            raise RuntimeError(f"an effect in the context {self._context.name}, which has one stage only")
        if self._context.name == "first":
            self.strike()
            self._bare = self.mounts()
        else:
            if self._made:
                setns(self._clean, CLONE_NEWNS)
            unshare(CLONE_NEWNS)
            self._do("mount", b"none", b"/", None, MS_PRIVATE | MS_REC, None)
        self._files()
        self._mounts()
        self._descriptors()
        if self._context.last is not None:
            self._context.last()
        self._made = True

    def strike(self) -> None:
        """Takes the stage down where it cannot be left behind, in the container's first mount namespace."""
        if self._made and self._context.name == "first":
            os.chdir("/")
            self._do("umount2", F, MNT_DETACH)
            for number in range(DIR, CLOSED):
                os.close(number)
            if self.mounts() != self._bare:
                raise RuntimeError("an effect outside the stage in the container's first mount namespace")

    def _files(self) -> None:
        os.makedirs(F, exist_ok=True)
        self._do("mount", b"stage", F, b"tmpfs", 0, b"mode=755")
        for name in DIRECTORIES:
            os.mkdir(in_f(name))
        for name in FILES:
            os.close(os.open(in_f(name), os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))
        for name, target in LINKS.items():
            os.symlink(target, in_f(name))
        os.chdir(in_f("dir"))

    def _mounts(self) -> None:
        do = self._do
        do("mount", b"mnt", in_f("mnt"), b"tmpfs", 0, None)
        os.mkdir(in_f("mnt/in"))
        do("mount", b"low", in_f("mnt/in"), b"tmpfs", 0, None)
        for number in (b"1", b"2"):
            do("mount", b"stack" + number, in_f("stack"), b"tmpfs", 0, None)
        do("mount", in_f("other"), in_f("filemnt"), None, MS_BIND, None)
        do("mount", b"shared", in_f("shared"), b"tmpfs", 0, None)
        do("mount", None, in_f("shared"), None, MS_SHARED, None)
        os.mkdir(in_f("shared/in"))
        do("mount", in_f("shared"), in_f("slave"), None, MS_BIND, None)
        do("mount", None, in_f("slave"), None, MS_SLAVE, None)
        do("mount", b"unbind", in_f("unbind"), b"tmpfs", 0, None)
        do("mount", None, in_f("unbind"), None, MS_UNBINDABLE, None)
        do("mount", b"ro", in_f("ro"), b"tmpfs", MS_RDONLY, None)
        # A chroot's own, and copies of what is ours.
        for source, name in ((b"/proc", "proc"), (b"/sys", "sys")):
            do("mount", source, in_f(name), None, MS_BIND | MS_REC, None)

    def _descriptors(self) -> None:
        os.mkdir(in_f("gone"))
        fds = {
            DIR: os.open(in_f("dir"), os.O_PATH),
            MNT: os.open(in_f("mnt"), os.O_PATH),
            DETACHED: self._do("open_tree", AT_FDCWD, in_f("mnt"), 1 | AT_RECURSIVE),
            DELETED: os.open(in_f("gone"), os.O_PATH),
            FILE: os.open(in_f("file"), os.O_PATH),
            OPEN_FILE: os.open(in_f("file"), os.O_RDONLY),
            LINK: os.open(in_f("link"), os.O_PATH | os.O_NOFOLLOW),
            PROC: os.open(b"/proc", os.O_PATH),
            CONTEXT: self._do("fsopen", b"tmpfs", 0),
            MADE: self._do("fsopen", b"tmpfs", 0),
            PROC_TREE: self._do("open_tree", AT_FDCWD, b"/proc", 0),
        }
        self._do("fsconfig", fds[MADE], 6, None, None, 0)
        os.rmdir(in_f("gone"))
        for number, fd in fds.items():
            if fd != number:
                os.dup2(fd, number)
                os.close(fd)

    def mounts(self) -> str:
        """This thread's mountinfo."""
        fd = os.open("thread-self/mountinfo", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._proc)
        with open(fd, encoding="utf-8", errors="backslashreplace") as file:
            return file.read()

    def run(self, script: tuple[Call, ...], strip: bool) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
        """What each call answers, and the mounts thereafter (None: as before). The stage is as new then."""
        before = self.mounts()
        opened: list[int] = []
        answers = []
        for call in script:
            result = self.memory.make(call, opened)
            answers.append(answer(call, result))
            if result >= 0 and call.name in OPENERS:
                opened.append(result)
        after = self.mounts()
        changed = after != before
        state: tuple[str, ...] | None = None
        if changed:
            found = mountinfo.parse(after)
            state = mountinfo.normal(mountinfo.without_covers(found) if strip else found)
        for fd in opened:
            with contextlib.suppress(OSError):  # the script has closed it
                os.close(fd)
        # What changed nothing but the process or files counts as well.
        if changed or (not self._context.final and _leaves_traces(script, answers)):
            self.again()
        os.chdir(in_f("dir"))
        with contextlib.suppress(OSError):
            os.close(CLOSED)
        return tuple(answers), state


def _leaves_traces(script: tuple[Call, ...], answers: list[str]) -> bool:
    """Whether the process, a file, a context or a detached tree of the stage's may not be what it was."""
    # EAGAIN: a mount is marked, and expires the next time.
    return "EAGAIN" in answers or any(
        call.name in _TRACES and not said.startswith("E") for call, said in zip(script, answers, strict=True)
    )


_TRACES = frozenset(
    {
        "mount",
        "umount2",
        "umount",
        "fsconfig",
        "fsmount",
        "move_mount",
        "mount_setattr",
        "chroot",
        "mkdir",
        "rmdir",
        "rename",
        "unshare",
        "pivot_root",
    }
)
