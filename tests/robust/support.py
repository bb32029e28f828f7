"""What these tests share: who belongs to a daemon, what all of them hold, and calls inside that check their effect."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from interceptor.kernel.process import pidfd_open
from interceptor.library import GuardedChild, Interceptor
from tests import guarded as inside

#: Seconds after which a call or a wait counts as hanging.
PATIENCE = 30.0


# ---- outside: processes and what they hold -----------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """The processes of one daemon."""

    daemon: int
    keeper: int
    welder: int
    nursery: int
    view: int
    guards: frozenset[int]
    envoys: frozenset[int]

    @property
    def standing(self) -> dict[str, int]:
        """Those that are there without any container."""
        return {
            "daemon": self.daemon,
            "keeper": self.keeper,
            "welder": self.welder,
            "nursery": self.nursery,
            "view": self.view,
        }

    @property
    def all(self) -> list[int]:
        return [*self.standing.values(), *self.guards, *self.envoys]


def _words(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def _status(pid: int, name: str) -> str:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return line.split(":", 1)[1].strip()
    return ""


def keepers_of(daemon: Interceptor) -> list[int]:
    """Every process that is, or was forked by, a keeper of this daemon; the keeper itself first."""
    run = daemon.config.runtime_dir
    found = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    ours = [pid for pid in found if "interceptor.guards.spawner" in (words := _words(pid)) and run in words]
    return sorted(ours, key=lambda pid: _status(pid, "PPid") in map(str, ours))


def view_of(daemon: Interceptor) -> list[int]:
    """The view's process, if it runs."""
    mountpoint = os.path.join(daemon.config.runtime_dir, "workshop", "view")
    found = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return [
        pid for pid in found if "interceptor.view.server" in (words := _words(pid)) and mountpoint in words
    ]


def family(daemon: Interceptor) -> Family:
    """All processes of a daemon."""
    keeper, *children = keepers_of(daemon)
    names = {pid: _status(pid, "Name") for pid in children}
    guards = frozenset(pid for pid, name in names.items() if name == "interceptor-grd")
    envoys = frozenset(pid for pid, name in names.items() if name == "interceptor-env")
    (nursery,) = [pid for pid, name in names.items() if name == "interceptor-nur"]
    (welder,) = [pid for pid in children if pid not in guards | envoys | {nursery}]
    (view,) = view_of(daemon)
    return Family(daemon.pid, keeper, welder, nursery, view, guards, envoys)


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def mount_count(pid: int | str = "self") -> int:
    return len(Path(f"/proc/{pid}/mountinfo").read_text().splitlines())


def after_the_others(daemon: Interceptor) -> None:
    """Wait until the daemon has closed the connections of clients that hung up before: a later one was closed."""
    if not daemon.is_running:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as control:
        control.settimeout(PATIENCE)
        control.connect(daemon.control_socket)
        control.sendall(b'{"op": "ps"}\n')
        control.shutdown(socket.SHUT_WR)
        while control.recv(1 << 16):
            pass


def holdings(daemon: Interceptor) -> dict[str, int]:
    """Descriptors and threads of everybody that stands, guards and envoys, mounts on the host and in the workshop."""
    after_the_others(daemon)
    who = family(daemon)
    # What was welded goes a moment later, but for what is kept to be had again (interceptor/mounts/weld.py).
    staged = f" {os.path.join(daemon.config.runtime_dir, 'workshop', 'weld')}/"
    table = Path(f"/proc/{who.keeper}/mountinfo")

    def racked() -> int:
        return table.read_text().count(f"{staged}rack/")

    eventually(
        lambda: table.read_text().count(staged) == 2 + racked(), "nothing but an empty tray and the rack"
    )
    if not who.guards:
        eventually(lambda: racked() == 0, "an empty rack, where there is no container")
    held = {f"descriptors of the {name}": descriptors(pid) for name, pid in who.standing.items()}
    held |= {f"threads of the {name}": threads(pid) for name, pid in who.standing.items() if name != "view"}
    return held | {
        "guards": len(who.guards),
        "envoys": len(who.envoys),
        "mounts on the host": mount_count(),
        "mounts in the workshop": mount_count(who.keeper) - racked(),
    }


def eventually(predicate: Callable[[], bool], what: str, patience: float = PATIENCE) -> None:
    """Wait for a state of other processes that no descriptor tells of."""
    deadline = time.monotonic() + patience
    while not predicate():
        assert time.monotonic() < deadline, f"after {patience:g} s still not: {what}"
        # A poll of nothing: 5 ms until the next look.
        select.select([], [], [], 0.005)


def needs_no_question(daemon: Interceptor, child: GuardedChild, body: Callable[[], object]) -> None:
    """Does it until the guard needs no question for it, once what was made ahead has had the time to arrive."""

    def asked() -> int:
        return int(daemon.request("stats", id=child.cid)["asked"])

    def unasked() -> bool:
        before = asked()
        child.call(body)
        return asked() == before

    eventually(unasked, "an answer without a question")


def settles_at(daemon: Interceptor, expected: dict[str, int]) -> None:
    """Everybody holds what is expected, once those that were killed are gone."""
    deadline = time.monotonic() + PATIENCE / 3
    while (now := holdings(daemon)) != expected:
        different = {k: (expected[k], now[k]) for k in expected if expected[k] != now[k]}
        assert time.monotonic() < deadline, f"(before, after) differ: {different}"
        select.select([], [], [], 0.02)


def has_ended(pid: int, patience: float = PATIENCE) -> bool:
    """Whether a process ends within ``patience`` seconds."""
    try:
        with pidfd_open(pid) as pidfd:
            return bool(select.select([pidfd], [], [], patience)[0])
    except OSError:
        return True


def pid_is(pid: int, name: str) -> bool:
    """Whether the process lives and is called so."""
    return _status(pid, "Name") == name and not _status(pid, "State").startswith(("Z", "X"))


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Kill a process of the daemon under test, and wait for its end."""
    with pidfd_open(pid) as pidfd:
        signal.pidfd_send_signal(pidfd.fileno(), number)
        assert select.select([pidfd], [], [], PATIENCE)[0], f"process {pid} survives signal {number}"


def end(pid: int) -> None:
    """Kill a process of the daemon under test if it still runs."""
    with contextlib.suppress(OSError):
        kill(pid)


def guard_pid(daemon: Interceptor, cid: str) -> int:
    """The process ID of a container's guard; 0 where it has none."""
    (pid,) = [c["guard_pid"] for c in daemon.request("ps") if c["id"] == cid]
    return int(pid)


@contextlib.contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    """Both ends; closed at the end where they are still open."""
    ends = os.pipe()
    ours = os.fstat(ends[0])
    try:
        yield ends
    finally:
        for end in ends:
            with contextlib.suppress(OSError):
                # The test may have closed it, and the number be somebody else's by now.
                if os.path.samestat(os.fstat(end), ours):
                    os.close(end)


# ---- inside: calls whose effect is compared with their result ----------------------------------------------

MS_REMOUNT = 0x20
MS_BIND = 0x1000
MS_REC = 0x4000
MNT_DETACH = 2

FROM, TO, NEW, COPY = b"/tmp/from", b"/tmp/to", b"/tmp/new", b"/tmp/copy"


def nothing() -> None:
    """Stands for a lambda in what is pickled."""


@dataclass
class Truth:
    """Makes calls and writes down every result that is not the truth."""

    note: Callable[[], object] = field(default=nothing)
    wrong: list[str] = field(default_factory=list)
    #: Calls that took effect and got the result of being made again, where the kernel may throw replies away: of a
    #: listener without WAIT_KILLABLE_RECV. None: then they are wrong.
    twice: list[str] | None = None
    calls: int = 0
    interrupted: int = 0

    def prepare(self) -> None:
        for directory in (FROM, TO, NEW, COPY):
            os.makedirs(directory, exist_ok=True)

    def _say(self, what: str) -> None:
        self.wrong.append(f"call {self.calls}: {what}")

    def _say_twice(self, what: str) -> None:
        if self.twice is None:
            self._say(what)
        else:
            self.twice.append(f"call {self.calls}: {what}")

    def _made(self, call: Callable[[], int]) -> int:
        """The result of a call that is made again while a signal breaks it off."""
        self.note()
        self.calls += 1
        while (result := call()) == errno.EINTR:
            self.interrupted += 1
        return result

    def expect(self, what: str, expected: int, call: Callable[[], int]) -> None:
        """A call without effect."""
        if (result := self._made(call)) != expected:
            self._say(f"{what}: {result}, not {expected}")

    def comes(self, what: str, point: bytes, call: Callable[[], int]) -> None:
        """A call after which exactly one more mount stands at ``point``."""
        before = stack_at(point)
        result = self._made(call)
        after = stack_at(point)
        told = f"{what}: {result}; mounts there: {len(before)} before, {len(after)} after"
        if result == 0 and len(after) == len(before) + 2:
            self._say_twice(told)
            while self.twice is not None and len(stack_at(point)) > len(before) + 1:
                inside.try_umount(point, MNT_DETACH)
        elif result == errno.ELOOP and len(after) == len(before) + 1:
            # What was moved there already cannot be moved onto itself.
            self._say_twice(told)
        elif result != 0 or len(after) != len(before) + 1:
            self._say(told)

    def goes(self, what: str, point: bytes, call: Callable[[], int]) -> None:
        """A call after which exactly the top one of the mounts at ``point`` is gone."""
        before = stack_at(point)
        result = self._made(call)
        after = stack_at(point)
        told = f"{what}: {result}; mounts there: {len(before)} before, {len(after)} after"
        if result == errno.EINVAL and after == before[:-1]:
            self._say_twice(told)
        elif result != 0 or after != before[:-1]:
            self._say(told)

    def shielded(self, what: str, point: bytes, call: Callable[[], int]) -> None:
        """A call after which a shield stands where a copied submount was."""
        result = self._made(call)
        root = [m.root for m in inside.mounts() if m.point == point]
        if result != 0 or root != [b"/shield"] or os.listdir(point):
            self._say(f"{what}: {result}; there: {root}")

    # ---- what people do ----

    def denied(self) -> None:
        self.expect("umount /proc/sys", errno.EINVAL, lambda: inside.try_umount(b"/proc/sys"))
        self.expect("umount -l /proc", errno.EBUSY, lambda: inside.try_umount(b"/proc", MNT_DETACH))

    def free(self) -> None:
        self.comes("bind", TO, lambda: inside.try_mount(FROM, TO, None, MS_BIND))
        self.goes("umount of a bind", TO, lambda: inside.try_umount(TO))

    def new(self, fstype: bytes = b"proc") -> None:
        self.comes(f"new {fstype!r}", NEW, lambda: inside.try_mount(b"x", NEW, fstype))
        self.wrong += [f"call {self.calls}: raw: {node!r}" for node in inside.raw_below(NEW)]
        self.goes(f"umount of a new {fstype!r}", NEW, lambda: inside.try_umount(NEW))

    def copy(self) -> None:
        # Recursive, so that only the two umounts are the interceptor's.
        self.expect("rbind", 0, lambda: inside.try_mount(b"/sys", COPY, None, MS_BIND | MS_REC))
        point = COPY + b"/devices/virtual"
        self.shielded("umount of a copied submount", point, lambda: inside.try_umount(point))
        self.wrong += [f"call {self.calls}: raw: {node!r}" for node in inside.raw_below(COPY)]
        self.goes("umount of a copied base", COPY, lambda: inside.try_umount(COPY))

    def bind(self) -> None:
        """Not recursive, of a base: handled, for the welded submounts have to come along."""
        self.comes("bind of a base", COPY, lambda: inside.try_mount(b"/proc", COPY, None, MS_BIND))
        self.goes("umount -l of a copied base", COPY, lambda: inside.try_umount(COPY, MNT_DETACH))

    def round(self) -> None:
        for deed in (self.denied, self.free, self.new, self.copy, self.bind):
            deed()


def stack_at(point: bytes) -> list[int]:
    """The unique IDs of the mounts at one mount point, the top one last."""
    by_parent = {m.parent_id: m for m in inside.mounts() if m.point == point}
    ids = {m.mnt_id for m in by_parent.values()}
    at = next((m for parent, m in by_parent.items() if parent not in ids), None)
    stack = []
    while at is not None:
        stack.append(at.mnt_id)
        at = by_parent.get(at.mnt_id)
    return stack


def table() -> list[tuple[bytes, bytes, bytes]]:
    """The mount table without what changes when a base is replaced by its like: point, root, type of each."""
    return sorted((m.point, m.root, m.fstype) for m in inside.mounts())


def rounds_until_eof(progress: int) -> Truth:
    """Rounds until nobody reads ``progress``, to which a byte is written before every call."""
    truth = Truth(note=lambda: os.write(progress, b"."))
    truth.prepare()
    before, originals = table(), inside.originals()
    try:
        while True:
            truth.round()
    except BrokenPipeError:
        pass
    # The round was broken off before a call: what it had mounted is still there.
    truth.note = nothing
    for point in (TO, NEW, COPY):
        while stack_at(point):
            truth.goes("the last umount", point, lambda point=point: inside.try_umount(point, MNT_DETACH))  # type: ignore[misc]
    if table() != before:
        truth.wrong.append(f"the mount table differs: {set(table()) ^ set(before)}")
    if inside.originals() != originals:
        truth.wrong.append("the originals are not the same")
    truth.wrong += [f"raw: {node!r}" for node in inside.raw_nodes()]
    return truth


def children(pid: int) -> list[int]:
    """Of a process with one thread (proc(5))."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def gatekeepers(pid: int) -> list[int]:
    """Children of a process that have a fanotify group with permission events (proc(5), fdinfo)."""
    found = []
    for child in children(pid):
        # Others end meanwhile.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for info in Path(f"/proc/{child}/fdinfo").iterdir():
                if "mask:10000 " in info.read_text():
                    found.append(child)
    return found
