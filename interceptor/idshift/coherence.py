"""Two overlays over the same layers, each told when the other has changed something.

The manager's own overlay stays mounted where it was: `docker cp`, `docker export` and `docker exec --user` go there.
The container writes through the mapped one. Contents are the same files, but each overlay remembers names and which
layer they came from. So what the kernel remembers of one is dropped after the other was worked with:
shrink_dcache_sb(), which a reconfiguration that changes nothing calls (reconfigure_super() of fs/super.c).

* Docker and Podman wait for it before they look into a container's files and after they have changed them:
  `interceptor.idshift.gatekeeper`.
* ``exec`` of `interceptor-runc` has it dropped before its process starts (`Coherence.refresh`): what a manager has
  looked for before cannot hide what that process makes, nor hides from it what the manager has made.
  Of names by which processes are to be started (``--user``) managers look without waiting anywhere.
* All else is heard, which is a matter of time. The container's changes are heard on the filesystem that has the upper
  directory, since not each copy-up is an event in an overlay. What the manager's overlay remembers is dropped at the
  first, and then at most once in `PAUSE` while there are more.
* The work of managers who do not wait is heard in their overlay, which is rare; then the container's is dropped.

Nobody is woken while nothing is written.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from interceptor.errors import SyscallError
from interceptor.idshift.gatekeeper import LOWER, Gatekeeper
from interceptor.kernel.fanotify import Watched, watch_filesystem
from interceptor.kernel.fd import OwnedFd, is_ready
from interceptor.kernel.mount import reconfigure

#: Where the wrapper leaves them in its stage: the manager's overlay, and the directory that has the upper one.
MANAGER, DISK = "manager", "disk"

#: Seconds for which a filesystem in use is not listened to.
PAUSE = 0.2


class Loop(Protocol):
    """What is used of an event loop."""

    def add_reader(self, fd: int, callback: Callable[[], object]) -> None:
        """Calls back when the descriptor is readable."""

    def remove_reader(self, fd: int) -> bool:
        """Stops that."""

    def call_later(self, delay: float, callback: Callable[[], object]) -> Any:
        """Calls back later; the result has ``cancel``."""


@dataclass
class Pair:
    """The manager's overlay, the mapped one, and a directory of the filesystem that has the upper directory."""

    manager: OwnedFd
    mapped: OwnedFd
    disk: OwnedFd

    def close(self) -> None:
        """Lets go of both."""
        for fd in (self.manager, self.mapped, self.disk):
            fd.close()


def open_pair(stage: str) -> Pair | None:
    """The two overlays of the container in whose mount namespace the calling thread is, before its pivot_root; None
    where there is only one."""
    try:
        manager = OwnedFd(os.open(f"{stage}/{MANAGER}", os.O_PATH | os.O_CLOEXEC | os.O_DIRECTORY))
    except FileNotFoundError:
        return None
    mapped = OwnedFd(os.open(f"{stage}/rootfs", os.O_PATH | os.O_CLOEXEC | os.O_DIRECTORY))
    return Pair(
        manager, mapped, OwnedFd(os.open(f"{stage}/{DISK}", os.O_PATH | os.O_CLOEXEC | os.O_DIRECTORY))
    )


class Coherence:
    """All pairs of this daemon."""

    def __init__(
        self, loop: Loop, closing: Callable[[OwnedFd], None], not_gated: Callable[[str, OSError], None]
    ) -> None:
        """``closing``: closes a descriptor elsewhere, where nobody minds that it takes time. ``not_gated`` is told of
        containers whose manager could not be made to wait, and why."""
        self._loop = loop
        self._closing = closing
        self._not_gated = not_gated
        self._pairs: dict[str, Pair] = {}
        self._uses: dict[str, _Watch] = {}
        self._disks: dict[int, _Watch] = {}
        self._gatekeeper: Gatekeeper | None = None
        self._gated: set[str] = set()

    def add(self, cid: str, pair: Pair) -> None:
        """Keeps the two overlays of a container in step; owns the descriptors. Raises `SyscallError`, `OSError`."""
        try:
            self._add(cid, pair)
        except OSError:
            self.remove(cid)
            raise

    def _add(self, cid: str, pair: Pair) -> None:
        self._pairs[cid] = pair
        forget(pair.manager)
        self._attend(cid, pair)
        device = _device(pair)
        if device not in self._disks:
            self._disks[device] = _Watch(
                self._loop, self._closing, pair.disk.dup(), Watched.NAMES, lambda: self._changed(device)
            )

    def refresh(self, cid: str) -> None:
        """Each side sees what the other one has done until now; nothing to do for a container without two."""
        if cid in self._pairs and not self._look(cid):
            self._used(cid)

    def remove(self, cid: str) -> None:
        """The container has ended."""
        pair = self._pairs.pop(cid, None)
        if pair is None:
            return
        if cid in self._gated and self._gatekeeper is not None:
            self._gated.remove(cid)
            with contextlib.suppress(OSError):
                self._gatekeeper.remove(cid)
        watch = self._uses.pop(cid, None)
        if watch is not None:
            watch.close()
        device = _device(pair)
        pair.close()
        if device not in map(_device, self._pairs.values()):
            watch = self._disks.pop(device, None)
            if watch is not None:
                watch.close()
                watch.root.close()

    def close(self) -> None:
        """Lets go of everything."""
        for cid in list(self._pairs):
            self.remove(cid)
        self._end_gatekeeper()

    def _attend(self, cid: str, pair: Pair) -> None:
        """Has the manager wait, or else hears it. Raises `SyscallError`."""
        if not self._put_at_gate(cid, pair):
            self._gated.discard(cid)
            # Closed at once: events that nobody has read hold on to what they are about, with its name.
            self._uses[cid] = _Watch(
                self._loop, OwnedFd.close, pair.manager, Watched.USE, lambda: self._used(cid)
            )

    def _put_at_gate(self, cid: str, pair: Pair) -> bool:
        """Has the manager wait; False where it has no such file, or the kernel no such events."""
        try:
            if not stat.S_ISREG(os.stat(LOWER, dir_fd=pair.disk.fileno(), follow_symlinks=False).st_mode):
                return False
            if self._gatekeeper is None:
                self._gatekeeper = Gatekeeper(forget)
                self._loop.add_reader(self._gatekeeper.fileno(), self._gatekeeper_lost)
            self._gatekeeper.add(cid, pair.manager, pair.mapped, pair.disk)
        except FileNotFoundError:
            return False  # another kind of manager
        except OSError as error:
            self._not_gated(cid, error)
            return False
        self._gated.add(cid)
        return True

    def _end_gatekeeper(self) -> None:
        if self._gatekeeper is not None:
            self._loop.remove_reader(self._gatekeeper.fileno())
            self._gatekeeper.close()
            self._gatekeeper = None

    def _gatekeeper_lost(self) -> None:
        """Killed. Nobody waits, until there is another one."""
        self._end_gatekeeper()
        self._loop.call_later(PAUSE, self._start_again)

    def _start_again(self) -> None:
        for cid in sorted(self._gated & self._pairs.keys()):
            self._attend(cid, self._pairs[cid])
            self._used(cid)

    def _look(self, cid: str) -> bool:
        return cid in self._uses and self._uses[cid].look()

    def _used(self, cid: str) -> None:
        pair = self._pairs[cid]
        forget(pair.mapped)
        forget(pair.manager)

    def _changed(self, device: int) -> None:
        for cid, pair in self._pairs.items():
            if _device(pair) == device and not self._look(cid):
                forget(pair.manager)


@dataclass
class _Watch:
    """Acts on the first event, pauses, acts again for what happened meanwhile, and listens anew."""

    loop: Loop
    closing: Callable[[OwnedFd], None]
    root: OwnedFd
    what: Watched
    act: Callable[[], None]
    group: OwnedFd | None = None
    timer: Any = field(default=None)

    def __post_init__(self) -> None:
        self.listen()

    def listen(self) -> None:
        self.timer = None
        self.group = watch_filesystem(self.root, self.what)
        self.loop.add_reader(self.group.fileno(), self._heard)

    def close(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
        if self.group is not None:
            self.loop.remove_reader(self.group.fileno())
            self.closing(self.group)
            self.group = None

    def look(self) -> bool:
        """Does at once what the loop would do for what has been heard; whether there was anything."""
        if self.group is None or not is_ready(self.group):
            return False
        self._heard()
        return True

    def _heard(self) -> None:
        self.close()
        self.timer = self.loop.call_later(PAUSE, self._again)
        self.act()

    def _again(self) -> None:
        # Listening first: what happens from here on is heard.
        try:
            self.listen()
        except SyscallError:
            # Too many groups of the machine's, or no memory: as if there was always something.
            self.timer = self.loop.call_later(PAUSE, self._again)
        self.act()


def forget(root: OwnedFd) -> None:
    """Drops what the kernel remembers of names in a filesystem, given the root of one of its mounts."""
    # EBUSY and the like: frozen, or being taken down, with nothing to keep in step.
    with contextlib.suppress(SyscallError):
        reconfigure(root, {})


def _device(pair: Pair) -> int:
    return os.fstat(pair.disk.fileno()).st_dev
