"""The daemon's part in what `interceptor-runc` does: reserving before a container is created, releasing at its end."""

from __future__ import annotations

import asyncio
import os
import shutil
import stat
import sys
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from interceptor.config import Config
from interceptor.containers.reserved import Holder, Reservation, Reservations, clean_up
from interceptor.containers.spec import Bundle
from interceptor.errors import ContainerError, ProtocolError
from interceptor.observe.log import get_logger
from interceptor.oci.profile import WAIT_KILLABLE_RECV
from interceptor.oci.state import ContainerId

_T = TypeVar("_T")
_Absolute = Annotated[str, Meta(pattern="^/")]


class _Request(msgspec.Struct, frozen=True):
    id: ContainerId
    runtime_root: _Absolute
    holder: tuple[int, int]
    bundle: _Absolute
    masked: list[str]
    readonly: list[str]
    root_readonly: bool
    cgroup: _Absolute | None
    map_ids: bool


class _Decided(msgspec.Struct, frozen=True):
    path: str
    strategy: str
    reason: str


class _Ownership(msgspec.Struct, frozen=True):
    id: ContainerId
    root: _Absolute
    decisions: list[_Decided]
    scratch: list[_Absolute]


class Preparations:
    """Containers from before their creation until after their deletion."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._log = get_logger()
        self._ownership: dict[str, list[_Decided]] = {}
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
        """Reserves for a container that is about to be created; returns what the wrapper needs to know. Raises
        `InterceptorError`."""
        asked = _convert(request, _Request)
        config = self._config
        _require_searchable(config.stage)
        wait_killable = await self._wait_killable()
        self.reclaim()
        wanted = Reservation(
            id=asked.id,
            runtime_root=asked.runtime_root,
            holder=Holder(*asked.holder),
            bundle=asked.bundle,
            masked=asked.masked,
            readonly=asked.readonly,
            root_readonly=asked.root_readonly,
            cgroup=asked.cgroup,
        )
        made = self._reservations.reserve(wanted, asked.map_ids)
        self._log.info("prepared", container=made.id, uids=made.uids, gids=made.gids)
        return {
            "uids": made.uids,
            "gids": made.gids,
            "listener": config.seccomp_socket,
            "hooks": _hooks(config.control_socket),
            "stage": config.stage,
            "wait_killable": wait_killable,
            "config": {
                "honor_caps": config.honor_caps,
                "privileged": config.privileged,
                "apparmor": config.apparmor,
                "ownership_strategies": config.ownership_strategies,
            },
        }

    def ownership(self, request: dict[str, object]) -> dict[str, Any]:
        """The wrapper tells how a container's files were mapped. Raises `InterceptorError`."""
        told = _convert(request, _Ownership)
        self._reservations.amend(told.id, root=told.root, scratch=told.scratch)
        self._ownership[told.id] = told.decisions
        for one in told.decisions:
            # Of exceptions that people asked for, or that nobody minds, `interceptor ownership` tells.
            if one.strategy == "none" and one.reason.startswith("idmapped:"):
                self._log.warning(
                    "owners are not mapped", container=told.id, path=one.path, reason=one.reason
                )
        return {}

    def explain(self, cid: str) -> list[dict[str, object]]:
        """How each of a container's mounts was mapped, and why. Raises `ContainerError`."""
        if cid not in self._ownership:
            raise ContainerError(f"nothing is known of how {cid} is mapped", "see `interceptor ps`")
        return [msgspec.to_builtins(one) for one in self._ownership[cid]]

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

    def _forget(self, gone: Reservation | None) -> None:
        if gone is None:
            return
        self._ownership.pop(gone.id, None)
        clean_up(gone)
        Path(self._config.runtime_dir, "wrapped", gone.id).unlink(missing_ok=True)

    async def _wait_killable(self) -> bool:
        """Whether the runtime says that it knows the flag (``features``, OCI runtime specification 1.1)."""
        key = _identity(self._config.runtime)
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


def _hooks(control: str) -> dict[str, list[str]]:
    """Command lines of the hooks of a container made by the wrapper."""
    path = os.path.join(os.path.dirname(sys.executable), "interceptor-hook")
    if not os.path.exists(path):
        path = shutil.which("interceptor-hook") or path
    common = [path, "--socket", control]
    # A container has to be deletable while no daemon is there; the next one finds what is to be released.
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


def _convert(request: dict[str, object], kind: type[_T]) -> _T:
    try:
        return msgspec.convert(request, kind)
    except msgspec.ValidationError as error:
        raise ProtocolError(f"{request.get('op')}: {error}") from None
