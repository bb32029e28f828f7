"""The daemon: who is told what, in which order. What each step does is elsewhere.

One thread, on purpose: every step takes microseconds to a few milliseconds, nothing waits for a container, and a thread
alone may visit other mount namespaces. (The janitor of mounts/weld.py is native and runs none of this.)
"""

from __future__ import annotations

import asyncio
import os
import resource
import signal
from typing import TYPE_CHECKING

import msgspec

from interceptor import explain
from interceptor.config import Config
from interceptor.containers.prepared import Preparations
from interceptor.containers.registry import Registry
from interceptor.control import Stream, start_control_server
from interceptor.errors import InterceptorError, ProtocolError
from interceptor.guards import keeper as keepers
from interceptor.guards.keeper import Keeper
from interceptor.guards.link import is_listener
from interceptor.kernel.fd import OwnedFd
from interceptor.kernel.flags import CLONE_NEWNS
from interceptor.kernel.namespaces import setns
from interceptor.lifecycle import Lifecycle
from interceptor.mounts.lineage import MountClass
from interceptor.notify.handshake import start_agent_server
from interceptor.observe import systemd
from interceptor.observe.log import get_logger
from interceptor.oci.state import ContainerProcessState, State
from interceptor.sockets import RootServer

if TYPE_CHECKING:
    from interceptor.exporter import Exporter


def serve(config: Config) -> int:
    """Runs until SIGTERM or SIGINT; returns the exit status. Raises `InterceptorError` if it cannot start."""
    os.makedirs(config.runtime_dir, 0o711, exist_ok=True)
    # Containers' roots have to find their root filesystems below it; everything else in it is for root only.
    os.chmod(config.runtime_dir, 0o711)
    os.makedirs(config.state_dir, 0o700, exist_ok=True)
    # A dozen descriptors for each container; what it starts has as many.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    keeper, fresh = keepers.connect(config)
    # The workshop is the keeper's mount namespace; a successor joins the same one.
    setns(keeper.namespace, CLONE_NEWNS)
    return asyncio.run(Daemon(config, keeper, fresh).run())


class Daemon:
    """The two sockets and what comes in by them."""

    def __init__(self, config: Config, keeper: Keeper, fresh: bool) -> None:
        self._config = config
        self._keeper = keeper
        self._fresh = fresh
        self._registry = Registry()
        self._log = get_logger()
        self._prepared = Preparations(config)
        self._lifecycle: Lifecycle | None = None
        self._exporter: Exporter | None = None

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        self._lifecycle = Lifecycle(self._config, self._keeper, self._registry, self._prepared)
        if not self._fresh:
            self._lifecycle.adopt_all()
        self._prepared.reclaim()
        self._prepared.finish_clones()
        servers: list[RootServer] = []
        try:
            servers.append(await start_control_server(self._config.control_socket, self.control))
            servers.append(
                await start_agent_server(
                    self._config.seccomp_socket, self.listener_arrived, self._config.agent_timeout
                )
            )
            await self._export()
            self._log.info("ready", seccomp=self._config.seccomp_socket, control=self._config.control_socket)
            systemd.ready(f"guarding {len(self._registry)} containers")
            await stop.wait()
        finally:
            systemd.stopping()
            if self._exporter is not None:
                await self._exporter.close()
            for server in servers:
                server.close()
            for server in servers:
                await server.wait_closed()
            self._lifecycle.shut_down()
        self._log.info("stopped", containers_left_guarded=len(self._registry))
        return 0

    @property
    def _life(self) -> Lifecycle:
        assert self._lifecycle is not None
        return self._lifecycle

    async def _export(self) -> None:
        if self._config.metrics:
            # Here, so that only a daemon with metrics loads the client library.
            from interceptor.exporter import Exporter

            self._exporter = Exporter(self._life.watch)
            await self._exporter.start(self._config.metrics)

    async def listener_arrived(self, state: ContainerProcessState, fd: int) -> None:
        """A runtime hands over a listener."""
        log = self._log.bind(container=state.state.id, pid=state.pid, status=state.state.status)
        with OwnedFd(fd) as listener:
            if not is_listener(listener.fileno()):
                log.warning("refused a seccomp listener", reason="the descriptor is no seccomp listener")
                return
            try:
                self._life.add_listener(state, listener)
            except (InterceptorError, OSError) as error:
                # The listener is closed: trapped calls fail with ENOSYS, they are never let through.
                log.error("a container is not guarded; its mounts and unmounts are refused", error=str(error))

    async def control(self, request: dict[str, object]) -> object:
        """One request of the control socket."""
        op = request.get("op")
        if op == "create":
            self._life.create(_state(request))
            return {}
        if op == "poststop":
            self._life.remove(_state(request).id, "poststop")
            self._prepared.release(_state(request).id)
            return {}
        if op == "prepare":
            return await self._prepared.prepare(request)
        if op == "ownership":
            return self._prepared.explain(_text(request, "id"))
        if op == "release":
            self._life.remove(_text(request, "id"), "released")
            self._prepared.release(_text(request, "id"))
            return {}
        if op == "refresh":
            self._life.refresh(_text(request, "id"))
            return {}
        if op == "ps":
            return self._life.containers()
        if op == "stats":
            return self._life.stats(_text(request, "id"))
        if op == "readings":
            return self._life.watch.page(str(request.get("after", "")))
        if op == "events":
            return Stream(self._life.watch.follow())
        if op == "mounts":
            return self._life.mounts(_text(request, "id"))
        return self._about_mounts(op, request)

    def _about_mounts(self, op: object, request: dict[str, object]) -> object:
        """What ``interceptor mounts`` and ``interceptor explain`` ask."""
        if op == "tree":
            return explain.tree(self._life.about(_text(request, "id"))[0], _number(request, "namespace"))
        if op == "whereabouts":
            return explain.whereabouts(self._life.about(_text(request, "id"))[0])
        if op == "lineage":
            container, answerer = self._life.about(_text(request, "id"))
            found = explain.mount(
                container, answerer, _number(request, "mount"), _number(request, "namespace")
            )
            created = found["class"] == MountClass.IMMUTABLE.value
            owners = self._prepared.owners(container.cid, str(found["path"])) if created else None
            return {**found, "owners": owners}
        raise ProtocolError(f"unknown operation {op!r}")


def _state(request: dict[str, object]) -> State:
    try:
        return msgspec.convert(request.get("state"), State)
    except msgspec.ValidationError as error:
        raise ProtocolError(f"not an OCI state: {error}") from None


def _text(request: dict[str, object], key: str) -> str:
    value = request.get(key)
    if not isinstance(value, str):
        raise ProtocolError(f"{key!r} is missing")
    return value


def _number(request: dict[str, object], key: str) -> int:
    """An unsigned 64-bit number; 0 where it is missing."""
    value = request.get(key, 0)
    if not isinstance(value, int) or not 0 <= value < 1 << 64:
        raise ProtocolError(f"{key!r} is no number of 64 bits")
    return value
