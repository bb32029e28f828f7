"""interceptor/notify/handshake.py over real sockets, with real descriptors: whatever comes, nothing is leaked."""

from __future__ import annotations

import array
import asyncio
import json
import os
import resource
import socket
import stat
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from interceptor.config import Config
from interceptor.errors import ContainerError, ProtocolError
from interceptor.notify.handshake import FDS_MAX, STATE_MAX, ReceivedFds, parse_state, start_agent_server
from interceptor.observe import log
from interceptor.oci.state import ContainerProcessState
from interceptor.sockets import RootServer
from tests.conftest import Serve, open_descriptors

pytestmark = pytest.mark.usefixtures("leak_check")

#: As runc 1.1 sends it.
MESSAGE: dict[str, Any] = {
    "ociVersion": "0.2.0",
    "fds": ["seccompFd"],
    "pid": 4711,
    "metadata": "web",
    "state": {
        "ociVersion": "1.0.2-dev",
        "id": "web1",
        "status": "creating",
        "pid": 4711,
        "bundle": "/b/web1",
    },
}


class Agent:
    """A running agent server, and what its handler got."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.got: list[tuple[ContainerProcessState, os.stat_result]] = []
        self.arrived = threading.Semaphore(0)
        self.patience = 10.0

    async def start(self) -> RootServer:
        return await start_agent_server(self.path, self.handle, self.patience)

    async def handle(self, state: ContainerProcessState, listener: int) -> None:
        assert not os.get_inheritable(listener)
        self.got.append((state, os.fstat(listener)))
        os.close(listener)
        self.arrived.release()
        if state.state.id == "refused":
            raise ContainerError("container refused is not one of ours")

    def send(self, *pieces: bytes, fds: list[int] | None = None, finish: bool = True) -> None:
        """Send ``pieces`` as one message each, ``fds`` on the first; with ``finish`` wait until the server hangs up."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(30)
            connection.connect(self.path)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds or []))] if fds else []
            for piece in pieces:
                connection.sendmsg([piece], rights)
                rights = []
            if finish:
                connection.shutdown(socket.SHUT_WR)
            hang_up(connection)


def hang_up(connection: socket.socket) -> None:
    """Wait until the peer has closed. It may do so with bytes unread, which unix(7) reports as ECONNRESET."""
    with suppress(ConnectionResetError):
        assert connection.recv(1) == b""


@pytest.fixture
def agent(serve: Serve, tmp_path: Path) -> Agent:
    agent = Agent(str(tmp_path / "seccomp.sock"))
    log.configure(Config(log_format="json", log_level="debug"))
    serve(agent.start)
    return agent


@pytest.fixture
def pipe() -> Iterator[int]:
    """The reading end of a pipe: a descriptor to send."""
    reading, writing = os.pipe()
    yield reading
    os.close(reading)
    os.close(writing)


def encode(**changes: object) -> bytes:
    """`MESSAGE` with ``changes``; a value of `...` removes its key."""
    return json.dumps({key: value for key, value in (MESSAGE | changes).items() if value is not ...}).encode()


def test_state_and_listener_arrive(agent: Agent, pipe: int) -> None:
    agent.send(encode(), fds=[pipe])
    assert agent.arrived.acquire(timeout=30)
    ((state, status),) = agent.got
    assert (state.pid, state.metadata, state.state.id, state.state.bundle) == (4711, "web", "web1", "/b/web1")
    assert (status.st_dev, status.st_ino) == (os.fstat(pipe).st_dev, os.fstat(pipe).st_ino)


def test_a_process_that_the_runtime_does_not_tell_is_taken(agent: Agent, pipe: int) -> None:
    """crun 1.8 has 0 for the process of an exec; the container is found by its ID."""
    agent.send(encode(pid=0), fds=[pipe])
    assert agent.arrived.acquire(timeout=30)


def test_runtime_need_not_close_its_end(agent: Agent, pipe: int) -> None:
    agent.send(encode(), fds=[pipe], finish=False)
    assert agent.arrived.acquire(timeout=30)


def test_message_in_pieces_is_put_together(agent: Agent, pipe: int) -> None:
    data = encode(metadata="x" * 3000)
    agent.send(*(data[i : i + 100] for i in range(0, len(data), 100)), fds=[pipe], finish=False)
    assert agent.arrived.acquire(timeout=30)
    assert len(agent.got[0][0].metadata) == 3000


def test_large_message_arrives_whole(agent: Agent, pipe: int) -> None:
    data = encode(metadata="x" * (STATE_MAX - 1000))
    agent.send(*(data[i : i + 50_000] for i in range(0, len(data), 50_000)), fds=[pipe])
    assert agent.arrived.acquire(timeout=30)


def test_listener_is_found_by_its_name_and_the_rest_is_closed(agent: Agent, pipe: int) -> None:
    with open("/dev/null", "rb") as null:
        agent.send(encode(fds=["a", "seccompFd", "b"]), fds=[null.fileno(), pipe, null.fileno()])
    assert agent.arrived.acquire(timeout=30)
    assert stat.S_ISFIFO(agent.got[0][1].st_mode)


def test_later_fields_of_the_specification_are_ignored(agent: Agent, pipe: int) -> None:
    agent.send(encode(future={"a": 1}), fds=[pipe])
    assert agent.arrived.acquire(timeout=30)


def test_handlers_refusal_is_logged_with_the_container(agent: Agent, pipe: int) -> None:
    with capture_logs() as logs:
        agent.send(encode(state=MESSAGE["state"] | {"id": "refused"}), fds=[pipe])
        assert agent.arrived.acquire(timeout=30)
        agent.send(encode(), fds=[pipe])  # by its end the first has been logged
        assert agent.arrived.acquire(timeout=30)
    assert [(e["log_level"], e["container"], e["error"]) for e in logs] == [
        ("error", "refused", "container refused is not one of ours")
    ]


def test_empty_connection_is_no_warning(agent: Agent) -> None:
    with capture_logs() as logs:
        agent.send()
    assert [entry["log_level"] for entry in logs] == ["debug"]


NO_STATE = {"ociVersion": "1", "id": "x", "status": "creating"}


@pytest.mark.parametrize(
    ("data", "sent", "reason"),
    [
        (b"{", 1, "not a ContainerProcessState"),
        (b"{}", 1, "ociVersion"),
        (b"\xff\xff", 1, "not a ContainerProcessState"),
        (encode(pid=-1), 1, "$.pid"),
        (encode(pid="4711"), 1, "$.pid"),
        (encode(pid=2**31), 1, "$.pid"),
        (encode(pid=...), 1, "pid"),
        (encode(state=...), 1, "state"),
        (encode(state=NO_STATE), 1, "bundle"),
        (encode(state=MESSAGE["state"] | {"id": ""}), 1, "$.state.id"),
        (encode(state=MESSAGE["state"] | {"id": ".."}), 1, "$.state.id"),
        (encode(state=MESSAGE["state"] | {"id": "a/b"}), 1, "$.state.id"),
        (encode(state=MESSAGE["state"] | {"id": "a\n"}), 1, "$.state.id"),
        (encode(state=MESSAGE["state"] | {"id": "x" * 256}), 1, "$.state.id"),
        (encode(state=MESSAGE["state"] | {"annotations": {"a": 1}}), 1, "annotations"),
        (encode(fds="seccompFd"), 1, "$.fds"),
        (encode(fds=...), 0, "seccompFd named 0 times"),
        (encode(), 0, "1 descriptors named, 0 received"),
        (encode(), 2, "1 descriptors named, 2 received"),
        (encode(fds=[]), 1, "0 descriptors named, 1 received"),
        (encode(fds=["seccompfd"]), 1, "seccompFd named 0 times"),
        (encode(fds=["seccompFd", "seccompFd"]), 2, "seccompFd named 2 times"),
        (encode(fds=["seccompFd"] * 16), FDS_MAX, "seccompFd named 16 times"),
        (encode(fds=["seccompFd"] * 17), FDS_MAX + 1, "descriptors lost: more than 16"),
        (b" ", 1, "not a ContainerProcessState"),
        (encode() + encode(), 1, "not a ContainerProcessState"),
        (b"[" * 200_000, 1, "not a ContainerProcessState"),
        (b" " * (STATE_MAX + 1), 1, "more than 1048576 bytes"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_malformed_message_is_one_warning_and_no_leak(
    agent: Agent, pipe: int, data: bytes, sent: int, reason: str
) -> None:
    before = open_descriptors()
    with capture_logs() as logs:
        pieces = [data[i : i + 60_000] for i in range(0, len(data), 60_000)]
        with suppress(BrokenPipeError, ConnectionResetError):  # it may have heard enough before the end
            agent.send(*pieces, fds=[pipe] * sent)
        agent.send(encode(), fds=[pipe])
        assert agent.arrived.acquire(timeout=30)
    (entry,) = logs
    assert (entry["log_level"], entry["event"]) == ("warning", "refused a seccomp listener")
    assert reason in entry["reason"]
    assert len(agent.got) == 1
    assert not open_descriptors() - before


def test_connection_that_sends_nothing_is_dropped(serve: Serve, tmp_path: Path, pipe: int) -> None:
    agent = Agent(str(tmp_path / "seccomp.sock"))
    agent.patience = 0.2
    serve(agent.start)
    with capture_logs() as logs:
        agent.send(encode()[:50], fds=[pipe], finish=False)
    assert [entry["reason"] for entry in logs] == ["no whole message after 0.2 s"]


def test_silent_connections_delay_nobody(agent: Agent, pipe: int) -> None:
    silent = []
    for _ in range(50):
        silent.append(socket.socket(socket.AF_UNIX))
        silent[-1].connect(agent.path)
    agent.send(encode(), fds=[pipe])
    assert agent.arrived.acquire(timeout=5)
    for connection in silent:
        connection.close()


def test_descriptors_that_do_not_fit_into_the_process_are_told(agent: Agent, pipe: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket(socket.AF_UNIX) as connection, capture_logs() as logs:
        connection.settimeout(30)
        connection.connect(agent.path)
        # Its end of this connection is accepted once the server has answered another, later one.
        agent.send()
        highest = max(int(name) for name in os.listdir("/proc/self/fd"))
        fill = [os.dup(pipe) for _ in range(highest)]
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(fill) + 1, hard))
            while True:
                try:
                    fill.append(os.dup(pipe))
                except OSError:
                    break
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [pipe]))]
            connection.sendmsg([encode()], rights)
            hang_up(connection)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in fill:
                os.close(fd)
    assert "descriptors lost" in logs[-1]["reason"]


def test_closing_the_server_drops_waiting_connections_and_the_socket(tmp_path: Path) -> None:
    path = str(tmp_path / "seccomp.sock")

    async def body() -> None:
        server = await start_agent_server(path, Agent(path).handle)
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(b"{")
        await writer.drain()
        # A second connection is served only after the first was accepted.
        _, second = await asyncio.open_unix_connection(path)
        second.write_eof()
        server.close()
        await server.wait_closed()
        with suppress(ConnectionResetError):
            assert await reader.read() == b""
        for stream in (writer, second):
            stream.close()

    asyncio.run(body())
    assert not os.path.exists(path)


def test_received_descriptor_is_taken_once() -> None:
    reading, writing = os.pipe()
    fds = ReceivedFds([reading, writing])
    assert fds.take(0) == reading
    with pytest.raises(ValueError, match="taken before"):
        fds.take(0)
    fds.close()
    os.fstat(reading)  # still the taker's
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(writing)
    os.close(reading)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["ociVersion", "fds", "pid", "metadata", "state"]), _JSON)
def test_any_value_of_any_field_is_taken_or_refused(field: str, value: object) -> None:
    try:
        parse_state(json.dumps(MESSAGE | {field: value}).encode())
    except ProtocolError as error:
        assert "ContainerProcessState" in str(error)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.lists(st.binary(min_size=1, max_size=200), max_size=4), count=st.integers(0, 20))
def test_no_bytes_and_descriptors_leak_or_stop_the_server(
    agent: Agent, pipe: int, pieces: list[bytes], count: int
) -> None:
    before = open_descriptors()
    with suppress(BrokenPipeError, ConnectionResetError):
        agent.send(*pieces, fds=[pipe] * count)
    agent.send(encode(), fds=[pipe])
    assert agent.arrived.acquire(timeout=30)
    assert not open_descriptors() - before
