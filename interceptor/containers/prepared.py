"""The daemon's part in what `interceptor-runc` does: reserving before a container is created, releasing at its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import stat
import sys
import sysconfig
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from interceptor.config import Config
from interceptor.containers.clones import Clones, reap
from interceptor.containers.reserved import Decided, Holder, Reservation, Reservations, clean_up
from interceptor.containers.spec import Bundle
from interceptor.errors import ContainerError, ProtocolError
from interceptor.idshift.choose import STRATEGIES
from interceptor.kernel.process import start_time
from interceptor.observe.log import get_logger
from interceptor.oci.prepare import Job, Wanted, fork_child, read_answer, read_wanted
from interceptor.oci.profile import WAIT_KILLABLE_RECV
from interceptor.oci.rewrite import asks_for_user_namespace, kept_paths
from interceptor.oci.state import ContainerId

#: A child that says nothing for longer hangs on the source of a bind. Runtimes' managers wait longer.
CHILD_SECONDS = 20.0

_T = TypeVar("_T")
_Absolute = Annotated[str, Meta(pattern="^/")]


class _Request(msgspec.Struct, frozen=True):
    id: ContainerId
    pid: Annotated[int, Meta(ge=1)]
    runtime_root: _Absolute
    bundle: _Absolute
    runtime: str | None = None
    """The stock runtime, where the wrapper's environment names another than the configuration."""


class _Made(msgspec.Struct, frozen=True):
    root: _Absolute
    stdio_owner: int
    decisions: list[Decided]
    scratch: list[_Absolute]
    clone: _Absolute | None


class Preparations:
    """Containers from before their creation until after their deletion."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._log = get_logger()
        self._clones = Clones(config.clones)
        self._features: dict[tuple[str, int, int], bool] = {}
        self._reservations = Reservations(
            os.path.join(config.state_dir, "reservations.json"),
            {"uids": config.subuid, "gids": config.subgid},
            config.id_user,
            config.id_count,
        )
        # The same path is a directory on the host, always empty, for runtimes that look for a container's root there.
        os.makedirs(os.path.join(config.stage, "rootfs"), 0o755, exist_ok=True)

    async def prepare(self, request: dict[str, object]) -> dict[str, Any]:
        """Reserves for a container that is about to be created, and has everything put together in the mount namespace
        of the process that asks. Raises `InterceptorError`."""
        asked = _convert(request, _Request)
        _require_searchable(self._config.stage)
        wait_killable = await self._wait_killable(asked.runtime or self._config.runtime)
        start = start_time(asked.pid)
        if start is None or _same_namespace(asked.pid):
            raise ProtocolError("prepare: for a process in a mount namespace of its own")
        wanted = read_wanted(asked.bundle, asked.pid)
        self.reclaim()
        made = self._reserve(asked, start, wanted)
        try:
            done = _convert(
                read_answer(await _child(self._job(made, wanted, wait_killable), asked.pid)), _Made
            )
            self._reservations.amend(made.id, done.root, done.scratch, done.decisions)
        except BaseException:
            self.release(made.id)
            raise
        self._log.info("prepared", container=made.id, uids=made.uids, gids=made.gids)
        self._tell(made.id, done.decisions)
        return {"stdio_owner": done.stdio_owner}

    def _reserve(self, asked: _Request, start: int, wanted: Wanted) -> Reservation:
        masked, readonly = kept_paths(wanted.spec)
        reservation = Reservation(
            id=asked.id,
            runtime_root=asked.runtime_root,
            holder=Holder(asked.pid, start),
            bundle=asked.bundle,
            masked=masked,
            readonly=readonly,
            root_readonly=bool((wanted.spec.get("root") or {}).get("readonly")),
            cgroup=wanted.cgroup,
        )
        return self._reservations.reserve(reservation, not asks_for_user_namespace(wanted.spec))

    def _job(self, made: Reservation, wanted: Wanted, wait_killable: bool) -> Job:
        config = self._config
        return Job(
            cid=made.id,
            wanted=wanted,
            uids=made.uids,
            gids=made.gids,
            stage=config.stage,
            note=self._note(made.id),
            listener=config.seccomp_socket,
            hooks=_hooks(config.control_socket),
            wait_killable=wait_killable,
            config={
                "honor_caps": config.honor_caps,
                "privileged": config.privileged,
                "apparmor": config.apparmor,
                "ownership_strategies": config.ownership_strategies,
            },
            runtime=config.runtime,
            runtime_root=made.runtime_root,
            clones=config.clones,
        )

    def _note(self, cid: str) -> str:
        return os.path.join(self._config.runtime_dir, "wrapped", cid)

    def _tell(self, cid: str, decisions: list[Decided]) -> None:
        for one in decisions:
            # Of exceptions that people asked for, or that nobody minds, `interceptor ownership` tells.
            if one.strategy == "none" and one.reason.startswith(f"{STRATEGIES[0]}:"):
                self._log.warning("owners are not mapped", container=cid, path=one.path, reason=one.reason)

    def explain(self, cid: str) -> list[dict[str, object]]:
        """How each of a container's mounts was mapped, and why. Raises `ContainerError`."""
        found = self._reservations.get(cid)
        if found is None:
            raise ContainerError(f"nothing is known of how {cid} is mapped", "see `interceptor ps`")
        return [msgspec.to_builtins(one) for one in found.decisions]

    def owners(self, cid: str, path: str) -> str | None:
        """The same of one mount that the container was created with, in words; None: nothing was decided for it."""
        found = self._reservations.get(cid)
        for one in found.decisions if found is not None else ():
            if os.path.normpath(one.path) == path:
                how = "not mapped" if one.strategy == "none" else f"mapped, {one.strategy}"
                return f"{how}: {one.reason}"
        return None

    def bundle(self, cid: str) -> Bundle | None:
        """What of the manager's configuration goes into the weld; None for a container of somebody else's making."""
        found = self._reservations.get(cid)
        if found is None or found.root is None:
            return None
        return Bundle(
            root=os.fsencode(found.root),
            root_readonly=found.root_readonly,
            masked=tuple(os.fsencode(path) for path in found.masked),
            readonly=tuple(os.fsencode(path) for path in found.readonly),
        )

    def release(self, cid: str) -> None:
        """The container is gone, or was never made."""
        self._forget(self._reservations.release(cid))

    def reclaim(self) -> None:
        """Releases what was left behind by those who died on the way."""
        for gone in self._reservations.reclaim():
            self._log.info("released what was left behind", container=gone.id)
            self._forget(gone)

    def finish_clones(self) -> None:
        """Before anybody is served: gives back what containers have changed that ended while no daemon was there."""
        self._clones.finish_all({one.id for one in self._reservations.all()})

    def _forget(self, gone: Reservation | None) -> None:
        if gone is None:
            return
        self._clones.finish(gone.id)
        clean_up(gone)
        Path(self._note(gone.id)).unlink(missing_ok=True)

    async def _wait_killable(self, runtime: str) -> bool:
        """Whether the runtime says that it knows the flag (``features``, OCI runtime specification 1.1)."""
        key = _identity(runtime)
        if key is None:
            return False
        if key not in self._features:
            self._features[key] = await _has_wait_killable(key[0])
        return self._features[key]


def _identity(program: str) -> tuple[str, int, int] | None:
    """Path, time of change and size of a program; None where it is not installed."""
    path = shutil.which(program)
    if path is None:
        return None
    status = os.stat(path)
    return os.path.realpath(path), status.st_mtime_ns, status.st_size


async def _has_wait_killable(path: str) -> bool:
    null = asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(
        path, "features", stdin=null, stdout=asyncio.subprocess.PIPE, stderr=null
    )
    try:
        output, _ = await asyncio.wait_for(process.communicate(), 5)
        features = msgspec.json.decode(output, type=dict[str, Any])
        return WAIT_KILLABLE_RECV in features["linux"]["seccomp"]["supportedFlags"]
    except (TimeoutError, msgspec.DecodeError, KeyError, TypeError):
        return False
    finally:
        if process.returncode is None:
            process.kill()


async def _child(job: Job, pid: int) -> bytes:
    """What the child says, up to its end; killed if whoever waits for it leaves, or after `CHILD_SECONDS` in
    silence."""
    answer, child = fork_child(job, pid)
    loop = asyncio.get_running_loop()
    said = bytearray()
    ended = loop.create_future()

    def silent() -> None:
        if not ended.done():
            ended.set_exception(TimeoutError())

    timer = loop.call_later(CHILD_SECONDS, silent)

    def readable() -> None:
        nonlocal timer
        chunk = os.read(answer.fileno(), 1 << 16)
        said.extend(chunk)
        timer.cancel()
        timer = loop.call_later(CHILD_SECONDS, silent)
        if not chunk and not ended.done():
            ended.set_result(None)

    loop.add_reader(answer.fileno(), readable)
    try:
        await ended
    except TimeoutError:
        raise ContainerError(
            f"its mounts were not put together within {CHILD_SECONDS:g} s", "does the source of a bind hang?"
        ) from None
    finally:
        timer.cancel()
        loop.remove_reader(answer.fileno())
        answer.close()
        os.kill(child, signal.SIGKILL)
        reap(loop, child)
    return bytes(said)


def _same_namespace(pid: int) -> bool:
    """Whether a process shares its mount namespace with its parent or with us: then nothing may be mounted in it."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            parent = file.read().rpartition(")")[2].split()[1]
        own, *others = (os.stat(f"/proc/{one}/ns/mnt").st_ino for one in (str(pid), "self", parent))
    except FileNotFoundError:
        return True
    return own in others


def _hooks(control: str) -> dict[str, list[str]]:
    """Command lines of the hooks of a container made by the wrapper."""
    front = os.path.join(sysconfig.get_path("scripts"), "interceptor-runc")
    with contextlib.suppress(FileNotFoundError), open(front, "rb") as file:
        # The native command is the hook, too: a runtime waits for it at every start and end of a container.
        if file.read(4) == b"\x7fELF":
            common = [front, "--interceptor-hook", control]
            return {"createRuntime": [*common, "create"], "poststop": [*common, "poststop"]}
    common = [sys.executable, "-P", "-m", "interceptor.oci.hook", "--socket", control]
    return {
        "createRuntime": [*common, "createRuntime"],
        "poststop": [*common, "--daemon-may-be-away", "poststop"],
    }


def _require_searchable(path: str) -> None:
    """The container's root, who is nobody here, has to get to its root filesystem."""
    while True:
        if not os.stat(path).st_mode & stat.S_IXOTH:
            raise ContainerError(
                f"{path}: not searchable for everybody, so containers cannot have their root filesystem below it",
                "chmod o+x, or another runtime_dir",
            )
        if path == "/":
            return
        path = os.path.dirname(path)


def _convert(request: dict[str, Any], kind: type[_T]) -> _T:
    try:
        return msgspec.convert(request, kind)
    except msgspec.ValidationError as error:
        raise ProtocolError(f"{request.get('op')}: {error}") from None
