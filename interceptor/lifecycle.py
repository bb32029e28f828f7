"""A container from its creation to its end: set up, guarded, handed over to a successor, let go."""

from __future__ import annotations

import asyncio
import os
import time
from collections import OrderedDict
from typing import Any

from interceptor.ahead import Ahead
from interceptor.config import Config
from interceptor.containers.cgroups import cgroups_of
from interceptor.containers.envoys import Envoys
from interceptor.containers.prepared import Preparations
from interceptor.containers.registry import Container, Registry, baseline_of, facts_of, to_record
from interceptor.containers.renewal import Renewal
from interceptor.containers.setup import Builder, Site
from interceptor.containers.spec import Bundle, host_id_of_root, read_bundle
from interceptor.errors import ContainerError, InterceptorError
from interceptor.guards.journal import Journal
from interceptor.guards.keeper import Forked, Keeper
from interceptor.guards.link import Answer, Ask, Facts, ForNew, ForSwap, adopt
from interceptor.guards.supervise import HangUps, Supervisor
from interceptor.idshift.coherence import Coherence, Pair, open_pair
from interceptor.kernel import mount, stat
from interceptor.kernel.fd import OwnedFd, is_ready
from interceptor.kernel.namespaces import open_namespace, visiting
from interceptor.kernel.process import pidfd_open
from interceptor.mounts.composite import HARDENED, Composer, Material, Shields
from interceptor.mounts.managed import make_plan, viewed
from interceptor.mounts.weld import Bench, Janitor, Kept, Shelf, Welder
from interceptor.observe.log import get_logger
from interceptor.oci.state import ContainerProcessState, State
from interceptor.verdicts import Answerer
from interceptor.view.client import ViewClient
from interceptor.watch import Watch

_GUARD_MODES = {"real": 0, "continue": 1, "random": 2}


class Lifecycle:
    """All containers of this daemon."""

    def __init__(self, config: Config, keeper: Keeper, registry: Registry, prepared: Preparations) -> None:
        self._config = config
        self._prepared = prepared
        self._keeper = keeper
        self._registry = registry
        self._loop = asyncio.get_running_loop()
        self._hang_ups = HangUps(self._loop)
        self._log = get_logger()
        root = keeper.workshop_root
        self._view_device = stat.statx(mount.AT_FDCWD, os.path.join(root, "view")).dev
        view = ViewClient(keeper.view)
        self._envoys = Envoys(keeper, view, self._persist)
        self._renewal = Renewal(view, self._loop)
        self._janitor = Janitor()
        staging = os.path.join(root, "weld")
        welder = Welder(keeper.welder, staging, keeper.namespace, self._loop.call_later, self._janitor)
        bench = Bench(os.path.join(root, "bench"))
        self._composer = Composer(Shields(root), welder, bench)
        self._ahead = Ahead(self._composer, self._loop.call_soon, self._hand_over)
        self._answerer = Answerer(self._composer, self._ahead, config.protect_immutable_unmounts)
        self._supervisors: dict[str, Supervisor] = {}
        self.watch = Watch(self._supervisors)
        self._awaited: dict[str, asyncio.TimerHandle] = {}
        """Containers without a listener so far, by ID."""
        self._coherence = Coherence(self._loop, self._janitor.take_tree, self._not_gated)

    # ---- creation ----------------------------------------------------------------------------------------------

    def create(self, state: State) -> None:
        """The createRuntime hook: mounts are in place, pivot_root is still to come. Raises `InterceptorError`."""
        if self._registry.get(state.id) is not None:
            raise ContainerError(f"container {state.id} is registered already", "run its poststop hook first")
        if not state.pid:
            raise ContainerError(
                f"container {state.id} has no process yet", "use createRuntime, not prestart"
            )
        prepared = self._prepared.bundle(state.id)
        pair = None if prepared is None else self._overlays(state)
        try:
            self._set_up(state, prepared or read_bundle(state.bundle), late=False)
        except BaseException:
            if pair is not None:
                pair.close()
            raise
        if pair is not None:
            fds = [pair.manager.fileno(), pair.mapped.fileno(), pair.disk.fileno()]
            self._keeper.store(f"o/{state.id}", {}, fds)
            self._keep_in_step(state.id, pair)

    def _overlays(self, state: State) -> Pair | None:
        """The manager's overlay and the mapped one, as the wrapper left them in the container's mount namespace."""
        with open_namespace(state.pid, "mnt") as namespace, visiting(namespace, self._keeper.namespace):
            return open_pair(self._config.stage)

    def _keep_in_step(self, cid: str, pair: Pair) -> None:
        try:
            self._coherence.add(cid, pair)
        except OSError as error:
            self._log.warning(
                "changes are not heard: docker cp and the like may see what was before",
                container=cid,
                error=str(error),
            )

    def _not_gated(self, cid: str, error: OSError) -> None:
        self._log.warning(
            "docker cp and the like do not wait: they may see what was before",
            container=cid,
            error=str(error),
        )

    def refresh(self, cid: str) -> None:
        """A manager is about to work with a container: see `interceptor.idshift.coherence`."""
        self._coherence.refresh(cid)

    def _set_up(self, state: State, bundle: Bundle, late: bool) -> Container:
        started = time.monotonic_ns()
        try:
            container = self._build(state, bundle, late)
        except OSError as error:
            if isinstance(error, InterceptorError):
                raise
            raise ContainerError(f"process {state.pid} of container {state.id} is gone: {error}") from None
        self._registry.add(container)
        self._start_supervisor(container, Journal.create(container.cid))
        self.watch.registered(container.cid)
        self._loop.add_reader(container.pidfd.fileno(), self.remove, container.cid, "its first process ended")
        self._envoys.watch(container)
        self._persist(container)
        if not late:
            self._await_listener(container)
        self._log.info(
            "container set up",
            container=container.cid,
            pid=container.pid,
            mounts=len(container.baseline.mounts),
            late=late,
            microseconds=(time.monotonic_ns() - started) // 1000,
        )
        return container

    def _build(self, state: State, bundle: Bundle, late: bool) -> Container:
        pidfd = pidfd_open(state.pid)
        userns, netns, mntns = (open_namespace(state.pid, n) for n in ("user", "net", "mnt"))
        _require_user_namespace(state, userns)
        uid, gid = host_id_of_root(state.pid, "uid_map"), host_id_of_root(state.pid, "gid_map")
        created_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        site = Site(
            mntns, stat.mount_namespace_id(mntns), self._keeper.namespace, b"/" if late else bundle.root
        )
        plan = make_plan(bundle.masked, bundle.readonly, cgroup_aware=self._config.cgroup_aware)
        material = Material(
            plan, Shelf.create(self._shelf_path(state.id), self._janitor), self._composer.made
        )
        builder = Builder(self._composer, material, site, netns)
        envoy: Forked | None = None
        try:
            tree = builder.survey()
            bare = builder.take_bare_clones(tree)
            envoy = self._start_envoy(state, pidfd, userns, netns, bare, material, uid, gid, created_ns)
            self._keep_view(state.id, material)
            if late:
                builder.rebuild_in_place(tree)
            else:
                builder.rebuild_whole(tree, bundle.root_readonly)
            _require_alive(pidfd, state)
            baseline = builder.record(self._composer.shields.dev)
        except BaseException:
            if envoy is not None:
                self._envoys.end(state.id, envoy.pidfd)
            material.close()
            raise
        finally:
            mntns.close()
        return Container(
            cid=state.id,
            pid=state.pid,
            bundle=state.bundle,
            created_ns=created_ns,
            uid=uid,
            gid=gid,
            pidfd=pidfd,
            userns=userns,
            netns=netns,
            material=material,
            baseline=baseline,
            settled=late,
            envoy_pid=envoy.pid,
            envoy_pidfd=envoy.pidfd,
        )

    def _start_envoy(
        self,
        state: State,
        pidfd: OwnedFd,
        userns: OwnedFd,
        netns: OwnedFd,
        bare: dict[bytes, Kept],
        material: Material,
        uid: int,
        gid: int,
        created_ns: int,
    ) -> Forked:
        """The envoy and the container's subtree of the view, which asks it."""
        if b"proc" not in bare:
            with open_namespace(state.pid, "pid") as pid_namespace:
                bare[b"proc"] = material.shelf.put(
                    mount.fresh_mount(b"proc", {}, pid_namespace=pid_namespace)
                )
        if b"sysfs" not in bare:
            bare[b"sysfs"] = material.shelf.put(mount.fresh_mount(b"sysfs", {}, network_namespace=netns))
        with (
            open_namespace(state.pid, "ipc") as ipc,
            open_namespace(state.pid, "uts") as uts,
            bare[b"proc"].open() as proc,
            bare[b"sysfs"].open() as sys_,
        ):
            return self._envoys.start(
                state.id,
                state.pid,
                ids=(uid, gid),
                created_ns=created_ns,
                pidfd=pidfd,
                namespaces=(userns, netns, ipc, uts),
                bare=(proc, sys_),
                cgroups=cgroups_of(state.pid) if self._config.cgroup_aware else None,
            )

    def _shelf_path(self, cid: str) -> str:
        return os.path.join(self._keeper.workshop_root, "shelf", cid)

    def _keep_view(self, cid: str, material: Material) -> None:
        proc, sys = viewed(self._config.cgroup_aware)
        places = {f"{cid}/proc/{os.fsdecode(path)}": (b"proc", path) for path in proc}
        places |= {f"{cid}/sys/{os.fsdecode(path)}": (b"sysfs", path) for path in sys}
        # What is left out the machine does not have: /sys/module/nf_conntrack without the module.
        for place, part in self._keeper.view_parts(list(places)).items():
            mount.mount_setattr(part, set_=HARDENED)
            material.view[places[place]] = material.shelf.put(part)

    # ---- guarding ----------------------------------------------------------------------------------------------

    def add_listener(self, process: ContainerProcessState, listener: OwnedFd) -> None:
        """A listener for the container's first process, or one more for an exec. Raises `InterceptorError`."""
        container = self._registry.get(process.state.id)
        if container is None:
            container = self._late(process)
        elif not container.settled:
            self._settle(container)
        index = container.next_listener
        container.next_listener += 1
        kept = listener.dup()
        try:
            self._keeper.store(f"l/{container.cid}/{index}", {"index": index}, [kept.fileno()])
        except InterceptorError:
            # A listener that nobody serves would make its callers wait for ever; closed, their calls fail.
            kept.close()
            raise
        container.listeners[index] = kept
        self._stop_awaiting(container.cid)
        self._watch(container, index, kept)
        supervisor = self._supervisors[container.cid]
        if supervisor.link is None:
            supervisor.start()
        else:
            supervisor.add_listener(index, kept)
        self._log.info("listening", container=container.cid, process=process.pid, listener=index)

    def _late(self, process: ContainerProcessState) -> Container:
        """The hook never ran: the container is set up now, before its guard answers anything."""
        state = process.state
        pid = state.pid or process.pid
        try:
            bundle = read_bundle(state.bundle)
        except ContainerError as error:
            self._log.warning("no bundle to read: nothing is masked but the managed paths", error=str(error))
            bundle = Bundle(b"/", False, (), ())
        self._log.warning(
            "the createRuntime hook did not run; setting the container up now",
            container=state.id,
            hint="add interceptor-hook to the bundle's hooks.createRuntime",
        )
        found = State(
            oci_version=state.oci_version, id=state.id, status=state.status, bundle=state.bundle, pid=pid
        )
        return self._set_up(found, bundle, late=True)

    def _await_listener(self, container: Container) -> None:
        self._awaited[container.cid] = self._loop.call_later(
            self._config.registered_timeout, self._no_listener, container
        )

    def _stop_awaiting(self, cid: str) -> None:
        timer = self._awaited.pop(cid, None)
        if timer is not None:
            timer.cancel()

    def _no_listener(self, container: Container) -> None:
        """It stands on its view and its welds all the same, so it is kept until its first process ends."""
        self._awaited.pop(container.cid, None)
        self._log.warning(
            "no listener has come: copies cannot be removed, new procfs and sysfs mounts are refused",
            container=container.cid,
            pid=container.pid,
            hint=f"linux.seccomp.listenerPath of its bundle should be {self._config.seccomp_socket}",
        )

    def _settle(self, container: Container) -> None:
        """What the runtime has mounted since the hook, before the guard answers anything."""
        container.settled = True
        with open_namespace(container.pid, "mnt") as namespace:
            number = stat.mount_namespace_id(namespace)
            if number != container.baseline.namespace:
                return  # a first process that has left it already: a runtime that sends listeners late
            site = Site(namespace, number, self._keeper.namespace, b"/")
            builder = Builder(self._composer, container.material, site, container.netns)
            try:
                builder.settle(container.baseline)
            except InterceptorError as error:
                self._log.warning(
                    "what the runtime mounted after the hook stays as it is",
                    container=container.cid,
                    error=str(error),
                )
            container.baseline = builder.record(self._composer.shields.dev)
        self._persist(container)

    def _listener_ended(self, container: Container, index: int) -> None:
        listener = container.listeners.pop(index, None)
        if listener is None:
            return
        listener.close()
        supervisor = self._supervisors.get(container.cid)
        if supervisor is not None:
            supervisor.drop_listener(index)
        self._keeper.forget(f"l/{container.cid}/{index}")

    def _refuse_all(self, container: Container) -> None:
        """Closes every listener: the kernel then fails what is trapped with ENOSYS instead of letting it wait."""
        for index in list(container.listeners):
            self._refuse(container, index)

    def _refuse(self, container: Container, index: int) -> None:
        """Closes a listener. One that a guard made up is none of its container's."""
        listener = container.listeners.get(index)
        if listener is not None:
            self._hang_ups.forget(listener.fileno())
            self._listener_ended(container, index)

    def _start_supervisor(self, container: Container, journal: Journal) -> Supervisor:
        def answer(ask: Ask) -> Answer:
            return self._answerer.answer(container, ask)

        def facts() -> Facts:
            self._ahead.forget(container)  # a guard that is told them has nothing yet
            return facts_of(container.baseline)

        view = self._view_device
        shield = self._composer.shields.dev
        supervisor = Supervisor(
            container.cid,
            self._keeper,
            {
                "view_major": view[0],
                "view_minor": view[1],
                "shield_major": shield[0],
                "shield_minor": shield[1],
                "mode": _GUARD_MODES[self._config.guard_mode],
                "account_units": int(self._config.account_units),
                "protect_immutable": int(self._config.protect_immutable_unmounts),
                "question_timeout_ms": int(self._config.question_timeout * 1000),
            },
            container.userns,
            journal,
            facts,
            answer,
            lambda number: self._ahead.taken(container, number),
            container.listeners,
            lambda: self._persist(container),
            lambda repeated: self.watch.repeated(container, repeated),
            lambda index: self._refuse(container, index),
            lambda: self._refuse_all(container),
        )
        self._supervisors[container.cid] = supervisor
        self.watch.started(supervisor)
        return supervisor

    def _hand_over(
        self, container: Container, number: int, tree: OwnedFd, there_id: int, purpose: ForNew | ForSwap
    ) -> bool:
        supervisor = self._supervisors.get(container.cid)
        link = None if supervisor is None else supervisor.link
        return link is not None and link.hand_over(number, tree, there_id, purpose)

    # ---- what a successor needs --------------------------------------------------------------------------------

    def _persist(self, container: Container) -> None:
        """Leaves everything about a container with the keeper."""
        supervisor = self._supervisors[container.cid]
        container.guard_pid = supervisor.pid
        material = container.material
        fds = [container.pidfd, container.userns, container.netns, supervisor.journal.fd]
        record = to_record(container) | {
            "views": [[*(k.decode() for k in key), kept.name] for key, kept in material.view.items()],
            "bares": [[*dev, kept.name] for dev, kept in material.bare.items()],
            "envoy": container.envoy_pidfd is not None,
            "guard": supervisor.link is not None,
        }
        numbers = [fd.fileno() for fd in fds]
        if container.envoy_pidfd is not None:
            numbers.append(container.envoy_pidfd.fileno())
        if supervisor.link is not None and supervisor.pidfd is not None:
            numbers += [supervisor.link.fileno(), supervisor.pidfd.fileno()]
        self._keeper.store(f"c/{container.cid}", record, numbers)

    def adopt_all(self) -> None:
        """Takes over what a predecessor left with the keeper."""
        for key in self._keeper.keys:
            if key.startswith("c/"):
                try:
                    self._adopt(*self._keeper.fetch(key))
                except (InterceptorError, OSError, KeyError, ValueError) as error:
                    self._log.error("a container could not be taken over", key=key, error=repr(error))
        for key in self._keeper.keys:
            if key.startswith("o/") and self._registry.get(key[2:]) is not None:
                _, fds = self._keeper.fetch(key)
                self._keep_in_step(key[2:], Pair(*fds))
        self._renewal.begin()
        # What ended while no daemon was there left its material behind.
        shelves = os.path.join(self._keeper.workshop_root, "shelf")
        for name in os.listdir(shelves):
            if self._registry.get(name) is None:
                Shelf(os.path.join(shelves, name), self._janitor).clear()

    def _adopt(self, record: dict[str, Any], fds: list[OwnedFd]) -> None:
        queue = list(fds)
        pidfd, userns, netns, journal = (queue.pop(0) for _ in range(4))
        baseline = baseline_of(record)
        material = Material(
            baseline.plan, Shelf(self._shelf_path(record["cid"]), self._janitor), self._composer.made
        )
        material.view = {(a.encode(), b.encode()): material.shelf.get(name) for a, b, name in record["views"]}
        material.bare = OrderedDict(((a, b), material.shelf.get(name)) for a, b, name in record["bares"])
        material.find_bare()
        container = Container(
            cid=record["cid"],
            pid=record["pid"],
            bundle=record["bundle"],
            created_ns=record["created_ns"],
            settled=record["settled"],
            uid=record["uid"],
            gid=record["gid"],
            pidfd=pidfd,
            userns=userns,
            netns=netns,
            material=material,
            baseline=baseline,
            envoy_pid=record["envoy_pid"],
            envoy_pidfd=queue.pop(0) if record["envoy"] else None,
        )
        self._registry.add(container)
        self._adopt_listeners(container)
        supervisor = self._start_supervisor(container, Journal(journal))
        self._loop.add_reader(pidfd.fileno(), self.remove, container.cid, "its first process ended")
        if record["guard"]:
            supervisor.adopt(adopt(queue.pop(0)), record["guard_pid"], queue.pop(0))
        elif container.listeners:
            # The predecessor died between taking the listener and starting the guard.
            supervisor.start()
        else:
            self._await_listener(container)
        self._envoys.watch(container)
        self._log.info("container taken over", container=container.cid, listeners=len(container.listeners))

    def _adopt_listeners(self, container: Container) -> None:
        prefix = f"l/{container.cid}/"
        for key in self._keeper.keys:
            if key.startswith(prefix) and "/" not in key[len(prefix) :]:
                record, (listener,) = self._keeper.fetch(key)
                index = int(record["index"])
                container.listeners[index] = listener
                container.next_listener = max(container.next_listener, index + 1)
                self._watch(container, index, listener)

    def _watch(self, container: Container, index: int, listener: OwnedFd) -> None:
        self._hang_ups.watch(listener.fileno(), lambda: self._listener_ended(container, index))

    # ---- the end -----------------------------------------------------------------------------------------------

    def remove(self, cid: str, reason: str) -> None:
        """Unregisters a container; unknown ones are no error (poststop may come after the last process's death)."""
        container = self._registry.remove(cid)
        if container is None:
            return
        self._loop.remove_reader(container.pidfd.fileno())
        self._stop_awaiting(cid)
        for listener in container.listeners.values():
            self._hang_ups.forget(listener.fileno())
        supervisor = self._supervisors.pop(cid)
        self.watch.gone(cid, supervisor, reason)
        supervisor.stop()
        self._ahead.forget(container)
        if container.envoy_pidfd is not None:
            self._envoys.end(cid, container.envoy_pidfd)
        self._coherence.remove(cid)
        self._keeper.forget(f"o/{cid}")
        self._keeper.forget(f"c/{cid}")
        self._keeper.forget(f"l/{cid}/")
        container.close()
        self._log.info("container let go", container=cid, reason=reason)

    def shut_down(self) -> None:
        """Leaves the containers to their guards and to the next daemon; with none left, everything ends."""
        for supervisor in self._supervisors.values():
            supervisor.let_go()
        self._coherence.close()
        self._janitor.close()
        if not len(self._registry):
            self._keeper.quit()

    # ---- what others may know ----------------------------------------------------------------------------------

    def _known(self, cid: str) -> Container:
        container = self._registry.get(cid)
        if container is None:
            raise ContainerError(f"no container {cid} is registered", "see `interceptor ps`")
        return container

    def containers(self) -> list[dict[str, object]]:
        """The registered containers."""
        now = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        return [
            {
                "id": c.cid,
                "pid": c.pid,
                "guard_pid": self._supervisors[c.cid].pid,
                "envoy_pid": c.envoy_pid,
                "listeners": len(c.listeners),
                "mounts": len(c.baseline.mounts),
                "age_s": round((now - c.created_ns) / 1e9, 3),
                "bundle": c.bundle,
            }
            for c in self._registry.all()
        ]

    def stats(self, cid: str) -> dict[str, object]:
        """Counts and latencies of a container's calls."""
        return self._supervisors[self._known(cid).cid].journal.stats()

    def mounts(self, cid: str) -> list[dict[str, object]]:
        """The baseline, and whether each of its mounts is still there."""
        baseline = self._known(cid).baseline
        present = stat.present(baseline.mounts, baseline.namespace)
        return [
            {
                "id": m.mnt_id,
                "class": m.kind.value,
                "path": os.fsdecode(m.point),
                "root": os.fsdecode(m.root),
                "present": m.mnt_id in present,
            }
            for m in baseline.mounts.values()
        ]

    def about(self, cid: str) -> tuple[Container, Answerer]:
        """A container and who answers for it. Raises `ContainerError` where it is not known."""
        return self._known(cid), self._answerer


def _require_user_namespace(state: State, userns: OwnedFd) -> None:
    ours, theirs = os.stat("/proc/self/ns/user"), os.fstat(userns.fileno())
    if (ours.st_dev, ours.st_ino) == (theirs.st_dev, theirs.st_ino):
        raise ContainerError(
            f"container {state.id} has no user namespace: its root is the host's, nothing can be welded against it",
            'add {"type": "user"} to linux.namespaces, with uidMappings and gidMappings',
        )


def _require_alive(pidfd: OwnedFd, state: State) -> None:
    """Afterwards everything that was opened by PID is known to be this process's."""
    if is_ready(pidfd):
        raise ContainerError(f"process {state.pid} of container {state.id} ended while it was set up")
