"""interceptor/control.py, interceptor/client.py and interceptor/sockets.py over real sockets."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from interceptor.client import MESSAGE_MAX
from interceptor.control import request, start_control_server
from interceptor.errors import ContainerError, InterceptorError, ProtocolError
from interceptor.sockets import RootServer
from tests.conftest import Serve

pytestmark = pytest.mark.usefixtures("leak_check")


async def answer(message: dict[str, object]) -> object:
    """The handler of these tests."""
    match message["op"]:
        case "echo":
            return message.get("value")
        case "unknown":
            raise ContainerError("container web1 is not known", "interceptor ps lists them")
        case "unprintable":
            return object()
    raise RuntimeError("a bug")


def control(path: str) -> Callable[[], Awaitable[RootServer]]:
    """What `serve` starts."""

    async def make() -> RootServer:
        return await start_control_server(path, answer)

    return make


@pytest.fixture
def path(serve: Serve, tmp_path: Path) -> str:
    """The socket of a running control server."""
    socket_path = str(tmp_path / "control.sock")
    serve(control(socket_path))
    return socket_path


def raw(path: str, data: bytes, replies: int = 1) -> list[dict[str, object]]:
    """Send ``data`` as it is; the replies up to that number, or fewer if the server hangs up."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(30)
        connection.connect(path)
        connection.sendall(data)
        if replies == 0 or not data.endswith(b"\n"):
            connection.shutdown(socket.SHUT_WR)
        with connection.makefile("rb") as lines:
            return [json.loads(line) for _, line in zip(range(replies), lines, strict=False)]


@pytest.mark.parametrize("value", [None, 7, "é\n", [], {"a": [1, None]}, "x" * 500_000])
def test_result_of_the_handler_reaches_the_client(path: str, value: object) -> None:
    assert request(path, {"op": "echo", "value": value}, 30) == value


def test_refusal_reaches_the_client_with_its_hint(path: str) -> None:
    with pytest.raises(InterceptorError, match="web1 is not known") as caught:
        request(path, {"op": "unknown"}, 30)
    assert caught.value.hint == "interceptor ps lists them"


@pytest.mark.parametrize("op", ["bug", "unprintable"])
def test_unexpected_exception_is_logged_and_told_as_internal_error(path: str, op: str) -> None:
    with capture_logs() as logs, pytest.raises(InterceptorError, match=r"^internal error$"):
        request(path, {"op": op}, 30)
    assert [(entry["event"], entry["op"]) for entry in logs] == [("internal error in a control request", op)]


def test_connection_carries_several_requests_in_turn(path: str) -> None:
    lines = b"".join(b'{"op": "echo", "value": %d}\n' % i for i in range(5))
    assert [reply["result"] for reply in raw(path, lines, replies=5)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "line", [b"\n", b"{}\n", b"[]\n", b'{"op": 1}\n', b'{"op": "echo"', b"\xff\xfe\n", b"null\n"]
)
def test_bad_request_gets_an_error_and_the_next_connection_works(path: str, line: bytes) -> None:
    (reply,) = raw(path, line)
    assert reply["ok"] is False
    assert str(reply["error"]).startswith("the request ")
    assert request(path, {"op": "echo", "value": 1}, 30) == 1


def test_bad_request_does_not_end_the_connection(path: str) -> None:
    replies = raw(path, b'nonsense\n{"op": "echo", "value": 3}\n', replies=2)
    assert [reply["ok"] for reply in replies] == [False, True]


def test_request_of_exactly_the_limit_is_served(path: str) -> None:
    frame = len(b'{"op": "echo", "value": ""}\n')
    line = b'{"op": "echo", "value": "%s"}\n' % (b"x" * (MESSAGE_MAX - frame))
    assert len(line) == MESSAGE_MAX
    assert [reply["ok"] for reply in raw(path, line)] == [True]


def test_request_beyond_the_limit_is_refused_by_both_sides(path: str) -> None:
    with pytest.raises(ProtocolError, match="allowed: 1048576"):
        request(path, {"op": "echo", "value": "x" * MESSAGE_MAX}, 30)
    assert "longer than" in str(raw(path, b"x" * (MESSAGE_MAX + 10))[0]["error"])


def test_client_that_leaves_without_a_word_does_no_harm(path: str) -> None:
    assert raw(path, b"", replies=0) == []
    assert request(path, {"op": "echo"}, 30) is None


def test_socket_is_for_its_owner_only(path: str) -> None:
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_second_daemon_on_the_same_socket_is_refused(path: str, serve: Serve) -> None:
    with pytest.raises(InterceptorError, match="another daemon listens there"):
        serve(control(path))
    assert request(path, {"op": "echo", "value": "still here"}, 30) == "still here"


def test_socket_that_a_killed_daemon_left_is_replaced(serve: Serve, tmp_path: Path) -> None:
    stale = str(tmp_path / "control.sock")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(stale)
    serve(control(stale))
    assert request(stale, {"op": "echo", "value": 2}, 30) == 2


def test_other_file_in_the_sockets_place_is_left_alone(serve: Serve, tmp_path: Path) -> None:
    file = tmp_path / "control.sock"
    file.write_text("precious")
    with pytest.raises(InterceptorError):
        serve(control(str(file)))
    assert file.read_text() == "precious"


def test_no_daemon_is_told_with_what_to_start(tmp_path: Path) -> None:
    with pytest.raises(InterceptorError, match="no daemon listens there") as caught:
        request(str(tmp_path / "none.sock"), {"op": "ps"}, 30)
    assert "interceptor serve" in str(caught.value.hint)


def test_daemon_that_does_not_answer_is_given_up_in_time(tmp_path: Path) -> None:
    path = str(tmp_path / "mute.sock")
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(path)
        mute.listen()
        with pytest.raises(InterceptorError, match=r"not answered within 0\.2 s"):
            request(path, {"op": "ps"}, 0.2)


@pytest.mark.parametrize(
    "reply", [b"", b"x\n", b"{}\n", b'{"ok": true}\n', b'{"ok": false}\n', b'{"ok": true, "result"']
)
def test_client_refuses_what_is_no_reply(tmp_path: Path, reply: bytes) -> None:
    ours, theirs = socket.socketpair()
    path = str(tmp_path / "odd.sock")
    code = (
        "import socket, sys\n"
        "listener = socket.socket(fileno=int(sys.argv[1]))\n"
        "connection = listener.accept()[0]\n"
        "connection.recv(1 << 16)\n"
        "connection.sendall(bytes.fromhex(sys.argv[2]))\n"
    )
    with ours, theirs, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        argv = [sys.executable, "-c", code, str(listener.fileno()), reply.hex()]
        with subprocess.Popen(argv, pass_fds=[listener.fileno()]), pytest.raises(ProtocolError):
            request(path, {"op": "ps"}, 30)


@pytest.fixture
def public_directory() -> Iterator[Path]:
    """A directory that other users can enter; pytest's own is private."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


CONNECT = (
    "import socket, sys\n"
    "s = socket.socket(socket.AF_UNIX)\n"
    "try:\n"
    '    s.connect(sys.argv[1]); s.sendall(b\'{"op": "echo"}\\n\'); print(s.recv(100))\n'
    "except OSError as error:\n"
    "    print(type(error).__name__)\n"
)


@pytest.mark.root
def test_other_users_are_refused_by_mode_and_by_credentials(serve: Serve, public_directory: Path) -> None:
    path = str(public_directory / "control.sock")
    serve(control(path))

    def as_nobody() -> str:
        argv = ["/usr/bin/python3", "-c", CONNECT, path]
        return subprocess.run(
            argv, user=65534, group=65534, extra_groups=[], check=True, capture_output=True
        ).stdout.decode()

    assert as_nobody() == "PermissionError\n"
    os.chmod(path, 0o666)
    with capture_logs() as logs:
        assert as_nobody() in ("b''\n", "ConnectionResetError\n", "BrokenPipeError\n")
    assert [entry["peer_uid"] for entry in logs] == [65534]
    assert request(path, {"op": "echo", "value": "root"}, 30) == "root"
