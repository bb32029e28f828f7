"""Clones of root filesystems whose containers are gone: their changes go back to the manager.

The wrapper does that itself, before its manager looks (`interceptor.oci.runtime`), and needs no daemon for it. Here is
what is left for the daemon: containers that ended by a reboot, whose wrapper was killed, or that something else has
deleted.
"""

from __future__ import annotations

import asyncio
import os

from interceptor.errors import InterceptorError
from interceptor.idshift import giveback
from interceptor.observe.log import get_logger


class Clones:
    """By a directory of symbolic links, one a container."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._log = get_logger()

    def finish_all(self, running: set[str]) -> None:
        """Waits until it is done for every clone of a container that is not in ``running``."""
        for cid in sorted(indexed(self._directory)):
            directory = None if cid in running else self._find(cid)
            if directory is None:
                continue
            try:
                told, child = giveback.launch(directory, final=True)
                with open(told.take(), "rb") as pipe:
                    said = pipe.read()
                reap(asyncio.get_running_loop(), child)
                self._tell(cid, giveback.result(directory, said))
            except (InterceptorError, OSError) as error:
                self._failed(cid, error)

    def finish(self, cid: str) -> None:
        """Starts it for one container, if it has a clone."""
        directory = self._find(cid)
        if directory is None:
            return
        try:
            told, child = giveback.launch(directory, final=True)
        except FileNotFoundError:
            return
        except OSError as error:
            self._failed(cid, error)
            return
        loop = asyncio.get_running_loop()
        said = bytearray()

        def readable() -> None:
            chunk = os.read(told.fileno(), 4096)
            said.extend(chunk)
            if chunk:
                return
            loop.remove_reader(told.fileno())
            told.close()
            reap(loop, child)
            try:
                self._tell(cid, giveback.result(directory, bytes(said)))
            except InterceptorError as error:
                self._failed(cid, error)

        loop.add_reader(told.fileno(), readable)

    def _find(self, cid: str) -> str | None:
        """The clone; None where there is none any more."""
        link = f"{self._directory}/{cid}"
        try:
            directory = os.readlink(link)
        except OSError:
            return None
        if os.path.isdir(directory):
            return directory
        # The manager has removed it with all that it was a clone of; unless the disk is not mounted at all.
        if os.path.isdir(os.path.dirname(os.path.dirname(directory))):
            os.unlink(link)
        return None

    def _tell(self, cid: str, changes: int) -> None:
        self._log.info("changes given back", container=cid, changes=changes)

    def _failed(self, cid: str, error: Exception) -> None:
        self._log.error("changes could not be given back", container=cid, error=str(error))


def reap(loop: asyncio.AbstractEventLoop, child: int) -> None:
    """Waits for a child, in the background: one that is stuck in the kernel ends when it gets out."""
    pidfd = os.pidfd_open(child)

    def ended() -> None:
        loop.remove_reader(pidfd)
        os.close(pidfd)
        os.waitpid(child, 0)

    loop.add_reader(pidfd, ended)


def indexed(directory: str) -> list[str]:
    """The containers that have a clone."""
    try:
        return os.listdir(directory)
    except FileNotFoundError:
        return []
