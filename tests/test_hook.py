"""``interceptor-hook`` as a runtime calls it: a process with the container's state on standard input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from interceptor.control import start_control_server
from interceptor.errors import ContainerError
from interceptor.sockets import RootServer
from tests.conftest import Serve

STATE = {"ociVersion": "1.0.2", "id": "web1", "status": "creating", "pid": 4, "bundle": "/b"}


def run_hook(*arguments: str, stdin: bytes = json.dumps(STATE).encode()) -> subprocess.CompletedProcess[str]:
    """Run the hook; its output as text."""
    argv = [sys.executable, "-m", "interceptor.oci.hook", *arguments]
    done = subprocess.run(argv, input=stdin, capture_output=True, check=False)
    return subprocess.CompletedProcess(argv, done.returncode, done.stdout.decode(), done.stderr.decode())


@pytest.fixture
def requests(serve: Serve, tmp_path: Path) -> list[dict[str, object]]:
    """What a control server at ``tmp_path``/control.sock was asked."""
    seen: list[dict[str, object]] = []

    async def handler(message: dict[str, object]) -> object:
        seen.append(message)
        state = message["state"]
        if isinstance(state, dict) and state.get("id") == "bad":
            raise ContainerError("container bad has no /proc", "mount one")
        return None

    async def make() -> RootServer:
        return await start_control_server(str(tmp_path / "control.sock"), handler)

    serve(make)
    return seen


@pytest.mark.parametrize(("hook", "op"), [("createRuntime", "create"), ("poststop", "poststop")])
def test_state_is_passed_on(requests: list[dict[str, object]], tmp_path: Path, hook: str, op: str) -> None:
    done = run_hook("--socket", str(tmp_path / "control.sock"), hook)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert requests == [{"op": op, "state": STATE}]


def test_refusal_fails_the_hook_with_the_daemons_words(
    requests: list[dict[str, object]], tmp_path: Path
) -> None:
    stdin = json.dumps(STATE | {"id": "bad"}).encode()
    done = run_hook("createRuntime", "--socket", str(tmp_path / "control.sock"), stdin=stdin)
    assert done.returncode == 1
    assert done.stderr == "interceptor-hook createRuntime: container bad has no /proc (mount one)\n"
    assert len(requests) == 1


def test_missing_daemon_fails_with_what_to_start(tmp_path: Path) -> None:
    done = run_hook("--socket", str(tmp_path / "none.sock"), "createRuntime")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "no daemon listens there (start it: systemctl start interceptor" in done.stderr


@pytest.mark.parametrize("stdin", [b"", b"[]", b"{", b"\xff", b'"' + b"x" * (1 << 20) + b'"'])
def test_bad_state_fails_with_one_line(tmp_path: Path, stdin: bytes) -> None:
    done = run_hook("--socket", str(tmp_path / "none.sock"), "createRuntime", stdin=stdin)
    assert done.returncode == 1
    assert done.stderr.startswith("interceptor-hook createRuntime: standard input ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["prestart"], ["createRuntime", "--timeout", "soon"]])
def test_wrong_use_exits_with_2(arguments: list[str]) -> None:
    assert run_hook(*arguments).returncode == 2


def test_hook_imports_nothing_slow() -> None:
    # -S: without site, so that a development install's own import hook is not counted.
    code = "import sys; sys.path.insert(0, sys.argv[1]); import interceptor.oci.hook; print(*sys.modules)"
    root = str(Path(__file__).resolve().parent.parent)
    done = subprocess.run([sys.executable, "-S", "-c", code, root], check=True, capture_output=True)
    slow = {
        "asyncio",
        "msgspec",
        "structlog",
        "click",
        "rich",
        "typing",
        "pathlib",
        "importlib.metadata",
        "ctypes",
    }
    slow |= {"interceptor._native", "interceptor.config", "subprocess", "dataclasses", "logging"}
    loaded = set(done.stdout.decode().split())
    assert "interceptor.client" in loaded
    assert not loaded & slow
