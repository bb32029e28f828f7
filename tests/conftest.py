"""What all tests share: the markers' meaning, a check for leaks, and a server in a thread."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Protocol

import pytest
from hypothesis import settings

# A deadline per example would measure what else this machine does; --long of integration/check runs more of them.
settings.register_profile("normal", deadline=None)
settings.register_profile("long", deadline=None, max_examples=5000)
settings.load_profile("long" if os.environ.get("INTERCEPTOR_LONG") == "1" else "normal")

ROOT_REASON = "need root and were deselected: run integration/check with sudo"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without root, deselect what needs it: it could only fail for a reason that is not its own."""
    if os.geteuid() == 0:
        return
    deselected = [item for item in items if item.get_closest_marker("root")]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if not item.get_closest_marker("root")]
        config.stash[_DESELECTED] = len(deselected)


_DESELECTED = pytest.StashKey[int]()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say why tests were deselected."""
    if count := config.stash.get(_DESELECTED, 0):
        terminalreporter.write_line(f"{count} tests {ROOT_REASON}")


def open_descriptors() -> Counter[str]:
    """What the descriptors of this process refer to."""
    targets: Counter[str] = Counter()
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the descriptor of the listing itself
            targets[os.readlink(f"/proc/self/fd/{name}")] += 1
    return targets


def host_mounts() -> Counter[str]:
    """The mounts of this process's mount namespace, by ID, root and mount point."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return Counter(" ".join(line.split()[i] for i in (0, 3, 4)) for line in lines)


@pytest.fixture
def leak_check() -> Iterator[None]:
    """Fail the test if it leaves open a descriptor, or on the host a mount, that was not there before."""
    descriptors, mounts = open_descriptors(), host_mounts()
    yield
    assert not open_descriptors() - descriptors, "descriptors leaked"
    assert not host_mounts() - mounts, "mounts leaked"


class Server(Protocol):
    """What servers of this project have in common."""

    def close(self) -> None:
        """Begin to stop."""

    async def wait_closed(self) -> None:
        """Wait for the end."""


Serve = Callable[[Callable[[], Awaitable[Server]]], None]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """A function that starts a server in a thread with an event loop of its own; it is stopped after the test."""
    with ExitStack() as running:
        yield lambda make: running.enter_context(_running(make))


@contextmanager
def _running(make: Callable[[], Awaitable[Server]]) -> Iterator[None]:
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def body() -> None:
        stop = asyncio.Event()
        try:
            server = await make()
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result((asyncio.get_running_loop(), stop))
        await stop.wait()
        server.close()
        await server.wait_closed()

    thread = threading.Thread(target=lambda: asyncio.run(body()))
    thread.start()
    try:
        loop, stop = started.result(timeout=30)
        yield
        loop.call_soon_threadsafe(stop.set)
    finally:
        thread.join()
