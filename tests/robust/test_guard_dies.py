"""Guard and daemon are killed at each system call that they make for a handled call, one after the other."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
from collections.abc import Iterator

import pytest

from interceptor.errors import InterceptorError
from interceptor.library import GuardedChild, Interceptor, Process
from tests import guarded as inside
from tests.robust import support
from tests.robust.support import COPY, PATIENCE, Truth, eventually, guard_pid, pipe

pytestmark = [pytest.mark.root, pytest.mark.slow]

#: System calls of a guard during the deeds below (those that strace 6.1 has names for).
CALLS: tuple[str, ...] = (
    "ioctl",
    "process_vm_readv",
    "sendmsg",
    "unshare",
    "setns",
    "openat2",
    "open_tree",
    "move_mount",
    "umount2",
)
CALLS += ("fchdir", "chdir", "close")

DEEDS = ("new", "copy", "bind", "own_mount_on_a_copy")

#: Kills of one container's guards, fewer than what makes the daemon give up.
KILLS_A_CONTAINER = 16


def own_mount_on_a_copy(truth: Truth) -> None:
    """A copied submount goes while the container has mounts of its own on the copy: those stay."""
    truth.expect("rbind", 0, lambda: inside.try_mount(b"/sys", COPY, None, 0x5000))
    own = [COPY + b"/fs", COPY + b"/module", COPY + b"/power"]
    own = [point for point in own if os.path.isdir(point)]
    for point in own:
        truth.expect("an own mount", 0, lambda point=point: inside.try_mount(b"t", point, b"tmpfs"))  # type: ignore[misc]
        os.mkdir(point + b"/mark")
    point = COPY + b"/devices/virtual"
    truth.shielded("umount of a copied submount below own mounts", point, lambda: inside.try_umount(point))
    truth.wrong += [f"lost: {own_point!r}" for own_point in own if not os.path.isdir(own_point + b"/mark")]
    truth.goes("umount -l", COPY, lambda: inside.try_umount(COPY, 2))
    while support.stack_at(COPY):
        inside.try_umount(COPY, 2)


def perform(orders: int, answers: int) -> None:
    """Each byte read is a deed to do; what went wrong is written back."""
    truth = Truth()
    truth.prepare()
    before = support.table()
    while order := os.read(orders, 1):
        deed = DEEDS[order[0]]
        if deed == "own_mount_on_a_copy":
            own_mount_on_a_copy(truth)
        else:
            getattr(truth, deed)()
        if (after := support.table()) != before:
            truth.wrong.append(f"the table differs: {sorted(set(after) ^ set(before))}")
        for point in (support.TO, support.NEW, COPY):
            while support.stack_at(point) and inside.try_umount(point, 2) == 0:
                pass
        os.write(answers, repr(truth.wrong).encode()[:4000])
        truth.wrong.clear()


class Performer:
    """A process in a container that does deeds when told."""

    def __init__(self, child: GuardedChild) -> None:
        self._child = child
        self._stack = contextlib.ExitStack()
        orders, self._orders = self._stack.enter_context(pipe())
        self._answers, answers = self._stack.enter_context(pipe())
        self._process: Process = child.start(perform, orders, answers, pass_fds=[orders, answers])
        os.close(orders)
        os.close(answers)

    def begin(self, deed: str) -> None:
        os.write(self._orders, bytes([DEEDS.index(deed)]))

    def answers_within(self, seconds: float) -> bool:
        return bool(select.select([self._answers], [], [], seconds)[0])

    def wrong(self) -> str:
        """What went wrong; hangs are told by what has been asked."""
        if not self.answers_within(PATIENCE):
            return "it hangs"
        return os.read(self._answers, 4096).decode() or "the process ended"

    def close(self) -> None:
        self._stack.close()
        self._process.close()


@contextlib.contextmanager
def killing(pid: int, call: str, number: int) -> Iterator[None]:
    """Process ``pid`` is killed when it enters ``call`` for the ``number``-th time in one of its threads."""
    argv = ["strace", "-f", "-o", "/dev/null", "-e", f"trace={call}"]
    argv += ["-e", f"inject={call}:signal=KILL:when={number}", "-p", str(pid)]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL) as tracer:
        assert tracer.stderr is not None
        while b"attached" not in (line := tracer.stderr.readline()):
            assert line, "strace ended"
        try:
            yield
        finally:
            tracer.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                tracer.wait(5)
            # It can miss the end of a thread that it has just killed.
            tracer.kill()


@pytest.mark.parametrize("deed", DEEDS)
def test_at_each_of_its_system_calls(daemon: Interceptor, deed: str) -> None:
    wrong: dict[str, str] = {}
    kills = 0
    for call in CALLS:
        with daemon.spawn() as child:
            performer = Performer(child)
            try:
                for number in range(1, KILLS_A_CONTAINER):
                    old = guard_pid(daemon, child.cid)
                    with killing(old, call, number):
                        performer.begin(deed)
                        said = performer.wrong()
                    if said != "[]":
                        wrong[f"{call} {number}"] = said
                    if support.pid_is(old, "interceptor-grd"):
                        break
                    kills += 1
                    eventually(lambda old=old: guard_pid(daemon, child.cid) not in (0, old), "a new guard")  # type: ignore[misc]
            finally:
                performer.close()
    print(f"{deed}: {kills} kills")
    assert kills > 10
    assert not wrong, "\n".join(f"killed at {at}: {said}" for at, said in wrong.items())


def _replies(daemon: Interceptor) -> bool:
    try:
        daemon.request("ps")
    except InterceptorError:
        return False
    return True


#: System calls of a daemon that answers a question. Each death costs a start: only those that do or tell something.
DAEMON_CALLS = (
    "sendto",
    "sendmsg",
    "recvmsg",
    "move_mount",
    "umount2",
    "open_tree",
    "setns",
    "mount_setattr",
)


@pytest.mark.parametrize("call", DAEMON_CALLS)
def test_the_daemon_at_each_of_its_system_calls(daemon: Interceptor, call: str) -> None:
    """The question is answered by the next one, and what comes after it is not answered with what was left over."""
    wrong: dict[str, str] = {}
    deeds = ("copy", "new")
    with daemon.spawn() as child:
        performer = Performer(child)
        try:
            for deed in deeds:
                performer.begin(deed)
                assert performer.wrong() == "[]"
            before = support.mount_count(support.family(daemon).keeper)
            kept = 0
            for number in range(1, 7):
                with killing(daemon.pid, call, number):
                    performer.begin(deeds[number % 2])
                    # Either it dies, or the deed is done without a call of that number.
                    survived = performer.answers_within(0.5)
                # It may also die after its answer, of the last call that it was watched at, or be about to.
                survived = survived and _replies(daemon)
                if not survived:
                    daemon.kill()
                    daemon.start()
                said = [performer.wrong()]
                for deed in deeds:
                    performer.begin(deed)
                    said.append(performer.wrong())
                if said != ["[]"] * 3:
                    wrong[f"{call} {number}"] = "; ".join(said)
                kept = support.mount_count(support.family(daemon).keeper) - before
                if survived:
                    break
        finally:
            performer.close()
        # Of every base that the container makes itself a bare clone is kept.
        print(f"{call}: {number} kills; {kept} more mounts in the workshop")
    assert not wrong, "\n".join(f"killed at {at}: {said}" for at, said in wrong.items())
