"""The ``interceptor`` command as people type it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from interceptor.cli import COMMANDS
from interceptor.cli.unit import PACKAGED_PATH, unit_for
from interceptor.control import start_control_server
from interceptor.errors import ContainerError
from interceptor.sockets import RootServer
from tests.conftest import Serve

FACTS: dict[str, object] = {
    "ps": [{"id": "web1", "pid": 4711, "listeners": 2}, {"id": "db", "pid": 5, "unit": "x" * 150}],
    "tree": [],
    "stats": {"continued": 7, "denied": {"EINVAL": 2}, "guarded": True},
}


def interceptor(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command, without a terminal."""
    argv = [sys.executable, "-m", "interceptor", *arguments]
    return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)


@pytest.fixture
def config(serve: Serve, tmp_path: Path) -> str:
    """The configuration file of a daemon that answers with `FACTS`."""

    async def handler(message: dict[str, object]) -> object:
        if message.get("id", "web1") != "web1":
            raise ContainerError(f"container {message['id']} is not known", "interceptor ps lists them")
        return FACTS[str(message["op"])]

    async def make() -> RootServer:
        return await start_control_server(str(tmp_path / "control.sock"), handler)

    serve(make)
    file = tmp_path / "config.toml"
    file.write_text(f"runtime_dir = {json.dumps(str(tmp_path))}\n")
    return str(file)


def test_help_names_every_command() -> None:
    done = interceptor("--help")
    assert done.returncode == 0
    assert all(f"\n  {name} " in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str) -> None:
    done = interceptor(name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) > 5


def test_version_is_the_packages() -> None:
    pyproject = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    version = interceptor("--version").stdout.split()[-1]
    assert f'\nversion = "{version}"\n' in pyproject


@pytest.mark.parametrize("arguments", [["nonsense"], ["ps", "--nonsense"], ["mounts"], ["stats", "a", "b"]])
def test_wrong_use_exits_with_2(arguments: list[str]) -> None:
    done = interceptor(*arguments)
    assert done.returncode == 2
    assert "Error: " in done.stderr


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, atexit; atexit.register(lambda: print('\\nMODULES', *sys.modules)); sys.argv[0] = 'interceptor'\n"
        "from interceptor.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.rpartition("MODULES")[2].split())
    assert "click" in loaded
    assert not loaded & {
        "rich",
        "structlog",
        "msgspec",
        "pyroute2",
        "interceptor.view",
        "interceptor._native",
        "interceptor.daemon",
    }


@pytest.mark.parametrize("op", ["ps", "mounts", "stats"])
def test_json_is_what_the_daemon_said(config: str, op: str) -> None:
    arguments = [op] if op == "ps" else [op, "web1"]
    done = interceptor(*arguments, "--config", config, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == FACTS["tree" if op == "mounts" else op]


def test_table_has_a_line_a_record_and_cuts_nothing(config: str) -> None:
    lines = interceptor("ps", "--config", config).stdout.splitlines()
    assert [line.split() for line in lines] == [
        ["id", "pid", "listeners", "unit"],
        ["web1", "4711", "2", "-"],
        ["db", "5", "-", "x" * 150],
    ]


def test_one_record_is_names_and_values(config: str) -> None:
    lines = interceptor("stats", "web1", "--config", config).stdout.splitlines()
    assert [line.split() for line in lines] == [
        ["continued", "7"],
        ["denied", "EINVAL", "2"],
        ["guarded", "yes"],
    ]


def test_empty_list_says_so(config: str) -> None:
    assert interceptor("mounts", "web1", "--config", config).stdout == "no mounts\n"


def test_refusal_is_one_line_with_a_hint(config: str) -> None:
    done = interceptor("stats", "web2", "--config", config)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "interceptor: container web2 is not known (interceptor ps lists them)\n"


def test_missing_daemon_is_one_line_with_what_to_start(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(f"runtime_dir = {json.dumps(str(tmp_path))}\n")
    done = interceptor("ps", "--config", str(file))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "interceptor serve" in done.stderr


@pytest.mark.parametrize("command", ["ps", "serve"])
def test_bad_configuration_is_one_line(tmp_path: Path, command: str) -> None:
    file = tmp_path / "config.toml"
    file.write_text("question_timeout = 1000\n")
    done = interceptor(command, "--config", str(file))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"interceptor: {file}: question_timeout: 1000 cannot be used; allowed: seconds, 0.1 to 60\n"
    )


def test_doctor_exits_with_what_it_says() -> None:
    done = interceptor("doctor", "--json")
    answer = json.loads(done.stdout)
    names = {fact["feature"]: fact for fact in answer["features"]}
    assert names["root"]["available"] is (os.geteuid() == 0)
    missing = [fact for fact in answer["features"] if fact["needed"] and not fact["available"]]
    assert answer["ok"] is not bool(missing)
    assert done.returncode == (1 if missing else 0)


@pytest.mark.root
def test_doctor_finds_this_machine_fit() -> None:
    done = interceptor("doctor")
    assert done.returncode == 0, done.stdout
    assert done.stdout.endswith("The daemon can work here.\n")
    assert len(done.stdout.splitlines()) > 6


def test_unit_is_accepted_by_systemd(tmp_path: Path) -> None:
    unit = tmp_path / "interceptor.service"
    # Beside this interpreter is the installed command, which systemd-analyze looks for.
    done = interceptor("unit")
    assert (done.returncode, done.stderr) == (0, "")
    unit.write_text(done.stdout)
    verified = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False
    )
    assert (verified.returncode, verified.stdout + verified.stderr) == (0, "")


def test_unit_does_what_restarts_rely_on() -> None:
    lines = set(unit_for("/opt/x/bin/interceptor").splitlines())
    assert "ExecStart=/opt/x/bin/interceptor serve" in lines
    assert {"Type=notify", "KillMode=process", "RuntimeDirectoryPreserve=yes", "Restart=on-failure"} <= lines
    forbidden = (
        "PrivateMounts",
        "ProtectSystem",
        "PrivateTmp",
        "ProtectHome",
        "PrivateDevices",
        "MountFlags",
    )
    assert not [line for line in lines if line.startswith(forbidden)]


def test_unit_quotes_an_odd_path() -> None:
    assert 'ExecStart="/opt/a b/100%%/interceptor" serve' in unit_for("/opt/a b/100%/interceptor")
    assert PACKAGED_PATH not in unit_for("/opt/a b/100%/interceptor")
