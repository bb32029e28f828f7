"""What is reserved for a container between its creation and its deletion, in a file that outlives daemon and reboot.

A reservation is made before the runtime is called and released after the runtime has forgotten the container. Whoever
dies in between leaves a reservation that nobody needs: it goes as soon as it is seen that its maker has ended and that
the runtime knows no such container (`Reservations.reclaim`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from interceptor.errors import ContainerError
from interceptor.idshift.subid import Block, parse, require
from interceptor.kernel.process import start_time
from interceptor.oci.state import ContainerId


class Holder(msgspec.Struct, frozen=True):
    """A process that cannot be mistaken for another: ``start`` is field 22 of proc_pid_stat(5)."""

    pid: int
    start: int


class Decided(msgspec.Struct, frozen=True):
    """How the owners of one mount's files were given to the container's IDs, and why so."""

    path: str
    strategy: str
    reason: str


class Reservation(msgspec.Struct, frozen=True):
    """All that was reserved for one container."""

    id: ContainerId
    runtime_root: str
    """The runtime's directory of states: it has one of the container's name as long as the container exists."""
    holder: Holder
    bundle: str
    masked: list[str]
    readonly: list[str]
    """What goes into the weld, absolute paths; the runtime itself is told of none."""
    root_readonly: bool = False
    root: str | None = None
    """Where the container's root filesystem is when its hook runs, in its own mount namespace."""
    uids: Block | None = None
    gids: Block | None = None
    """None: the manager has mapped the container itself."""
    cgroup: str | None = None
    """A cgroup directory that was made for it."""
    scratch: list[str] = []
    """Directories that were made for its overlays beside a foreign upper one."""
    decisions: list[Decided] = []
    """Of its root filesystem and binds."""


def needed(reservation: Reservation) -> bool:
    """Whether its maker is still at work, or the runtime knows the container."""
    holder = reservation.holder
    if start_time(holder.pid) == holder.start:
        return True
    return os.path.isdir(os.path.join(reservation.runtime_root, reservation.id))


class Reservations:
    """The reservations, each change on disk before it is believed."""

    def __init__(self, path: str, sources: dict[str, str], user: str, size: int) -> None:
        """``sources``: the files of subuid(5) by ``uids`` and ``gids``. Raises `ContainerError` for a spoilt file."""
        self._path = path
        self._sources = sources
        self._user = user
        self._size = size
        self._held: dict[str, Reservation] = self._load()

    def get(self, cid: str) -> Reservation | None:
        """The reservation of a container."""
        return self._held.get(cid)

    def all(self) -> list[Reservation]:
        """Every reservation."""
        return list(self._held.values())

    def reserve(self, wanted: Reservation, map_ids: bool) -> Reservation:
        """Reserves, with ranges of IDs if ``map_ids``. Raises `ContainerError` where there are none left."""
        if wanted.id in self._held:
            raise ContainerError(f"container {wanted.id} exists already", "delete it first")
        if map_ids:
            taken = self._held.values()
            wanted = msgspec.structs.replace(
                wanted,
                uids=self._block("uids", [r.uids for r in taken if r.uids]),
                gids=self._block("gids", [r.gids for r in taken if r.gids]),
            )
        self._held[wanted.id] = wanted
        try:
            self._store()
        except OSError as error:
            del self._held[wanted.id]
            raise ContainerError(f"{self._path}: {error.strerror}") from None
        return wanted

    def amend(self, cid: str, root: str, scratch: list[str], decisions: list[Decided]) -> None:
        """Adds what is known only after the mapping. Raises `ContainerError`."""
        if cid not in self._held:
            raise ContainerError(f"container {cid} is not prepared")
        self._held[cid] = msgspec.structs.replace(
            self._held[cid], root=root, scratch=scratch, decisions=decisions
        )
        self._store()

    def release(self, cid: str) -> Reservation | None:
        """Forgets a reservation; returns what it was."""
        found = self._held.pop(cid, None)
        if found is not None:
            self._store()
        return found

    def reclaim(self, needed: Callable[[Reservation], bool] = needed) -> list[Reservation]:
        """Releases what nobody needs any more; returns it."""
        gone = [r for r in self._held.values() if not needed(r)]
        for reservation in gone:
            del self._held[reservation.id]
        if gone:
            self._store()
        return gone

    def _block(self, kind: str, taken: Iterable[Block]) -> Block:
        file = self._sources[kind]
        try:
            text = Path(file).read_text()
        except FileNotFoundError:
            text = ""
        except OSError as error:
            raise ContainerError(f"{file}: {error.strerror}") from None
        return require(file, self._user, parse(text, [self._user]), list(taken), self._size)

    def _load(self) -> dict[str, Reservation]:
        try:
            data = Path(self._path).read_bytes()
        except FileNotFoundError:
            return {}
        try:
            return {r.id: r for r in msgspec.json.decode(data, type=list[Reservation])}
        except msgspec.DecodeError as error:
            # Never started with nothing: ranges in use would be handed out again.
            raise ContainerError(
                f"{self._path}: {error}", "with no container left, remove the file"
            ) from None

    def _store(self) -> None:
        beside = f"{self._path}.new"
        with open(beside, "wb") as file:
            file.write(msgspec.json.encode(list(self._held.values())))
            file.flush()
            os.fsync(file.fileno())
        os.rename(beside, self._path)


def clean_up(reservation: Reservation) -> None:
    """Takes away what was made on disk for a container that is gone."""
    for path in [reservation.cgroup] if reservation.cgroup else []:
        _remove_tree(path)
    for path in reservation.scratch:
        _remove_tree(path)


def _remove_tree(path: str) -> None:
    """Removes directories that have nothing but directories in them; what is busy or not empty stays."""
    for directory, _, _ in os.walk(path, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(directory)
