"""One container's guard: started, watched, replaced when it dies, its questions passed on."""

from __future__ import annotations

import asyncio
import contextlib
import select
import signal
from collections import deque
from collections.abc import Callable, Mapping

from interceptor.errors import InterceptorError, ProtocolError
from interceptor.guards.journal import Journal
from interceptor.guards.keeper import Keeper
from interceptor.guards.link import Answer, Ask, Facts, GuardLink, Refused, Repeated, Taken, socket_pair
from interceptor.kernel.fd import OwnedFd
from interceptor.observe.log import get_logger

#: A guard that dies this often within `DEATH_WINDOW_S` is not started again: its callers get ENOSYS from the kernel
#: when their listener is closed, which is better than a machine that does nothing but fork.
DEATHS_MAX = 20
DEATH_WINDOW_S = 10.0
#: Messages of one guard that are answered before others have their turn.
MESSAGES_A_TURN = 4
#: A turn that takes longer than this (seconds) ends, and as long as it took the guard is not heard: whatever one
#: container has us look at, half of the time is for the others.
TURN_S = 0.02


class HangUps:
    """Tells of descriptors that hang up, and of nothing else: a listener is readable at every call that is trapped."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._epoll = select.epoll(flags=select.EPOLL_CLOEXEC)
        self._callbacks: dict[int, Callable[[], None]] = {}
        loop.add_reader(self._epoll.fileno(), self._tell)

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        """Calls back once ``fd`` hangs up; then it is watched no more."""
        self._callbacks[fd] = callback
        self._epoll.register(fd, select.EPOLLONESHOT)

    def forget(self, fd: int) -> None:
        """Must be called before ``fd`` is closed."""
        if self._callbacks.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def _tell(self) -> None:
        for fd, _events in self._epoll.poll(0):
            callback = self._callbacks.get(fd)
            self.forget(fd)
            if callback is not None:
                callback()


class Supervisor:
    """Keeps one guard running for a container."""

    def __init__(
        self,
        cid: str,
        keeper: Keeper,
        config: Mapping[str, int],
        userns: OwnedFd,
        journal: Journal,
        facts: Callable[[], Facts],
        answer: Callable[[Ask], Answer],
        taken: Callable[[int], None],
        listeners: Mapping[int, OwnedFd],
        changed: Callable[[], None],
        repeated: Callable[[Repeated], None],
        refuse: Callable[[int], None],
        give_up: Callable[[], None],
    ) -> None:
        self.journal = journal
        self.link: GuardLink | None = None
        self.pidfd: OwnedFd | None = None
        self.pid = 0
        self.deaths = 0
        """How many guards it has lost."""
        self._followed = False
        self._keeper = keeper
        self._config = dict(config)
        self._userns = userns
        self._facts = facts
        self._answer = answer
        self._taken = taken
        self._listeners = listeners
        self._changed = changed
        self._repeated = repeated
        self._refuse = refuse
        self._give_up = give_up
        self._deaths: deque[float] = deque(maxlen=DEATHS_MAX)
        self._loop = asyncio.get_running_loop()
        self._log = get_logger(container=cid)

    def start(self) -> None:
        """A new guard, which first answers what a predecessor had received. Raises `InterceptorError`."""
        link, theirs = socket_pair()
        with theirs:
            forked = self._keeper.fork_guard(
                self._config, self._userns.fileno(), theirs.fileno(), self.journal.fd.fileno()
            )
        self._take(link, forked.pid, forked.pidfd)
        # Kept before it is at work: two guards on one journal would be in each other's way.
        self._changed()
        link.send_facts(self._facts())
        if self._followed:
            link.follow(True)
        for index, listener in self._listeners.items():
            link.send_listener(index, listener.fileno())

    def adopt(self, link: GuardLink, pid: int, pidfd: OwnedFd) -> None:
        """The guard that a predecessor started."""
        self._take(link, pid, pidfd)
        # The configuration may have changed since its verdicts were given.
        link.flush()
        link.send_facts(self._facts())
        link.hello()
        # Whoever followed the predecessor is gone with it.
        link.follow(self._followed)
        # The predecessor may have died before it had sent them all; the guard passes over those that it has.
        for index, listener in self._listeners.items():
            link.send_listener(index, listener.fileno())

    def _take(self, link: GuardLink, pid: int, pidfd: OwnedFd) -> None:
        self.link, self.pid, self.pidfd = link, pid, pidfd
        self._loop.add_reader(link.fileno(), self._receive)
        self._loop.add_reader(pidfd.fileno(), self._died)

    def add_listener(self, index: int, listener: OwnedFd) -> None:
        """Has the guard serve one more listener; starts it if there is none."""
        if self.link is None:
            self.start()
        else:
            self.link.send_listener(index, listener.fileno())

    def drop_listener(self, index: int) -> None:
        """The listener has no caller left."""
        if self.link is not None:
            self.link.drop_listener(index)

    def follow(self, by_somebody: bool) -> None:
        """Whether the guard is to note each call in the journal (native/tally.c)."""
        if by_somebody != self._followed:
            self._followed = by_somebody
            if self.link is not None:
                self.link.follow(by_somebody)

    def _receive(self) -> None:
        link, begin = self.link, self._loop.time()
        # Not all that there is: a guard that asks without end must not keep others waiting.
        for _ in range(MESSAGES_A_TURN):
            if link is None or link is not self.link:
                return
            try:
                message = link.receive()
            except BlockingIOError:
                return
            except ProtocolError as error:
                self._log.error("a guard said what no guard says; it is replaced", error=str(error))
                self._kill()
                return
            if message is None:
                self._loop.remove_reader(link.fileno())
                return
            if isinstance(message, Ask):
                self._reply(link, message)
            elif isinstance(message, Repeated):
                self._repeated(message)
            elif isinstance(message, Taken):
                self._taken(message.number)
            elif isinstance(message, Refused):
                self._log.error(
                    "a guard has no room for a listener; its calls are refused", listener=message.index
                )
                self._refuse(message.index)
            else:
                self._log.debug("a listener is being served", listener=message.index)
            took = self._loop.time() - begin
            if took > TURN_S and link is self.link:
                self._loop.remove_reader(link.fileno())
                self._loop.call_later(took, self._hear_again, link)
                return

    def _hear_again(self, link: GuardLink) -> None:
        if link is self.link:
            self._loop.add_reader(link.fileno(), self._receive)

    def _reply(self, link: GuardLink, ask: Ask) -> None:
        answer = self._answer(ask)
        # Before the answer: a descriptor of ours on the mount would make the caller's umount fail with EBUSY.
        for fd in ask.fds:
            fd.close()
        if not link.answer(ask, answer):
            self._log.debug("an answer was not taken", op=ask.op.name)
        if answer.tree is not None:
            answer.tree.close()

    def _died(self) -> None:
        now = self._loop.time()
        self.deaths += 1
        self._release()
        self._deaths.append(now)
        if len(self._deaths) == DEATHS_MAX and now - self._deaths[0] < DEATH_WINDOW_S:
            self._log.error(
                "the guard dies again and again; calls are refused from now on", deaths=DEATHS_MAX
            )
            self._give_up()
            return
        open_calls = self.journal.open_calls()
        self._log.warning("the guard died; a successor answers what it had received", open_calls=open_calls)
        try:
            self.start()
        except InterceptorError as error:
            self._log.error("no guard could be started; calls wait", error=str(error))

    def _kill(self) -> None:
        if self.pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd.fileno(), signal.SIGKILL)

    def _release(self) -> None:
        if self.link is not None:
            self._loop.remove_reader(self.link.fileno())
            self.link.close()
        if self.pidfd is not None:
            self._loop.remove_reader(self.pidfd.fileno())
            self.pidfd.close()
        self.link = self.pidfd = None
        self.pid = 0

    def stop(self) -> None:
        """Ends the guard for good."""
        self._kill()
        self._release()
        self.journal.fd.close()

    def let_go(self) -> None:
        """Leaves the guard to a successor of this daemon."""
        self._release()
