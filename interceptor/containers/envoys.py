"""The envoys of all containers: started with a container, replaced where they die, ended with it.

What an envoy is made of (its namespaces, the bare filesystems, the first process's pidfd) is kept by the keeper, so
that any daemon can make another one. The view's files of that container fail with EIO until then.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from interceptor.containers.registry import Container
from interceptor.containers.spec import mapped_ids
from interceptor.errors import InterceptorError
from interceptor.guards.keeper import Forked, Keeper
from interceptor.kernel.fd import FdLike, OwnedFd, is_ready
from interceptor.kernel.fd import fileno as number_of
from interceptor.kernel.stat import statx
from interceptor.observe.log import get_logger
from interceptor.view.client import ViewClient, add_order

#: An envoy that dies this often within `DEATH_WINDOW_S` is not started again, until the daemon is.
DEATHS_MAX = 20
DEATH_WINDOW_S = 10.0


class Envoys:
    """Starts, watches and replaces them."""

    def __init__(self, keeper: Keeper, view: ViewClient, replaced: Callable[[Container], None]) -> None:
        """``replaced`` is called when a container has another one."""
        self._keeper = keeper
        self._view = view
        self._replaced = replaced
        self._loop = asyncio.get_running_loop()
        self._deaths: dict[str, deque[float]] = {}
        self._log = get_logger()

    def start(
        self,
        cid: str,
        pid: int,
        *,
        ids: tuple[int, int],
        created_ns: int,
        pidfd: OwnedFd,
        namespaces: Sequence[OwnedFd],
        bare: Sequence[OwnedFd],
        cgroups: dict[str, Any] | None = None,
    ) -> Forked:
        """The envoy and the container's subtree of the view, which asks it. Raises `InterceptorError`.

        ``ids`` are what the container's root is on the host; ``namespaces``: user, network, IPC, UTS; ``bare``:
        procfs and sysfs. ``cgroups``: see `interceptor.view.protocol.Cgroups`.
        """
        userns, *others = (os.fstat(fd.fileno()).st_ino for fd in namespaces)
        order = add_order(
            cid,
            uid=ids[0],
            gid=ids[1],
            created_ns=created_ns,
            groups=mapped_ids(pid, "gid_map"),
            userns=userns,
            namespaces=others,
            proc_mount=statx(bare[0]).mnt_id,
            cgroups=cgroups,
        )
        parts = [pidfd, *bare, *namespaces]
        self._keeper.store(f"e/{cid}", order, [fd.fileno() for fd in parts])
        try:
            return self._fork(cid, order, parts)
        except InterceptorError:
            self._keeper.forget(f"e/{cid}")
            raise

    def _fork(self, cid: str, order: dict[str, Any], parts: Sequence[FdLike]) -> Forked:
        pidfd, proc, sys, *namespaces = (number_of(fd) for fd in parts)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            forked = self._keeper.fork_envoy(theirs.fileno(), proc, sys, pidfd, namespaces)
            theirs.close()
            try:
                # First with the keeper: a successor of the view's server must know all that this one does.
                self._keeper.store(f"v/{cid}", order, [ours.fileno()])
                self._view.add(order, ours.fileno())
            except InterceptorError:
                self._keeper.forget(f"v/{cid}")
                _kill(forked.pidfd)
                raise
        return forked

    def watch(self, container: Container) -> None:
        """Replace the container's envoy when it dies, or now if it has died while no daemon was there."""
        if container.envoy_pidfd is not None:
            self._loop.add_reader(container.envoy_pidfd.fileno(), self._died, container)

    def _died(self, container: Container) -> None:
        assert container.envoy_pidfd is not None
        self._loop.remove_reader(container.envoy_pidfd.fileno())
        if is_ready(container.pidfd):
            return  # with its container
        log = self._log.bind(container=container.cid, pid=container.envoy_pid)
        deaths = self._deaths.setdefault(container.cid, deque(maxlen=DEATHS_MAX))
        now = time.monotonic()
        if len(deaths) == DEATHS_MAX and now - deaths[0] < DEATH_WINDOW_S:
            log.error("the envoy dies again and again; the view's files fail from now on")
            return
        deaths.append(now)
        try:
            order, parts = self._keeper.fetch(f"e/{container.cid}")
            forked = self._fork(container.cid, order, parts)
        except (InterceptorError, OSError) as error:
            log.error("the envoy could not be replaced; the view's files fail", error=str(error))
            return
        log.warning("the envoy died; started another", successor=forked.pid)
        container.envoy_pidfd.close()
        container.envoy_pid, container.envoy_pidfd = forked.pid, forked.pidfd
        self.watch(container)
        self._replaced(container)

    def end(self, cid: str, pidfd: OwnedFd) -> None:
        """The container is gone, or does not come."""
        self._loop.remove_reader(pidfd.fileno())
        self._deaths.pop(cid, None)
        _kill(pidfd)
        self._keeper.forget(f"e/{cid}")
        self._keeper.forget(f"v/{cid}")
        try:
            self._view.remove(cid)
        except InterceptorError as error:
            self._log.warning("the view did not let a container go", container=cid, error=str(error))


def _kill(pidfd: OwnedFd) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd.fileno(), signal.SIGKILL)
