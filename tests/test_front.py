"""``native/front.c``: what it does itself is what interceptor.oci.runtime does; the rest it hands over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from interceptor.control import start_control_server
from interceptor.errors import ContainerError
from interceptor.oci.commandline import parse
from interceptor.oci.runtime import CONFIG_VARIABLE, RUNTIME_VARIABLE
from interceptor.sockets import RootServer
from native.build import FRONT, SANITIZE, WARNINGS
from tests.conftest import Serve

ROOT = Path(__file__).resolve().parent.parent
#: Commands that it may not just pass on.
OURS = {"create", "run", "delete", "kill", "exec"}
STATE = {"ociVersion": "1.0.2", "id": "web1", "status": "creating", "pid": 4, "bundle": "/b"}

#: Stand for the stock runtime and for Python: each says who it is and what it was given.
STUB = '#!/bin/sh\nprintf "%s\\0" {name} "$@"\n'


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, with sanitizers, in a directory of its own with its neighbours."""
    directory = tmp_path_factory.mktemp("front")
    compiler = (sysconfig.get_config_var("CC") or "cc").split()
    argv = [*compiler, "-std=gnu11", *WARNINGS, *SANITIZE, "-o", str(directory / "interceptor-runc"), FRONT]
    subprocess.run(argv, cwd=ROOT, check=True)
    for name in ("stock", "python3"):
        (directory / name).write_text(STUB.format(name=name))
        (directory / name).chmod(0o755)
    return directory / "interceptor-runc"


def call(front: Path, *words: str | bytes, **environment: str) -> list[bytes]:
    """Who was reached, and with which words."""
    environment = {
        RUNTIME_VARIABLE: str(front.parent / "stock"),
        CONFIG_VARIABLE: str(front.parent / "none.toml"),
        **environment,
    }
    (front.parent / "none.toml").touch()
    done = subprocess.run([front, *words], env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout.split(b"\0")[:-1]


def handed_over(*words: str | bytes) -> list[bytes]:
    """What Python is called with for these words."""
    given = [b"-P", b"-m", b"interceptor.oci.runtime", *map(os.fsencode, words)]
    return [b"python3", *given]


WORDS = st.lists(
    st.one_of(
        st.sampled_from(
            [
                *(
                    "create",
                    "run",
                    "delete",
                    "pause",
                    "kill",
                    "exec",
                    "start",
                    "state",
                    "features",
                    "spec",
                    "-",
                    "--",
                    "",
                ),
                *(
                    "--root",
                    "--root=/r",
                    "--log",
                    "--log=/l",
                    "--bundle",
                    "--bundle=/b",
                    "-b",
                    "--debug",
                    "-h",
                ),
                *("--help", "--preserve-fds", "--pid-file", "--interceptor-config", "--interceptor-configs"),
                *("web1", "/r", "/b", "--force", "-a", "15"),
            ]
        ),
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=5),
    ),
    max_size=7,
)


@given(words=WORDS)
@example(words=["--root", "delete", "start", "delete"])
@example(words=["start", "--root", "/r", "kill"])
@example(words=["--interceptor-config="])
def test_words_are_passed_on_as_python_would_or_handed_over(front: Path, words: list[str]) -> None:
    reached = call(front, *words)
    line = parse(words)
    if reached[0] == b"python3":
        assert reached == handed_over(*words)
    else:
        assert reached == [b"stock", *map(os.fsencode, line.words)]
        # Without a daemon nothing is made; a `delete` says so to nobody.
        unmade = OURS - {"delete"}
        assert line.command not in unmade or line.container is None or {"-h", "--help"} & set(line.words)


@pytest.mark.parametrize(
    "words",
    [
        ["--version"],
        ["--root", "/r", "--log", "/l", "--log-format", "json", "start", "web1"],
        ["state", "web1"],
        ["features"],
        ["create", "--help"],
        ["--systemd-cgroup", "update", "--resources", "-", "web1"],
    ],
)
def test_what_is_plain_is_not_handed_over(front: Path, words: list[str]) -> None:
    assert call(front, *words) == [b"stock", *map(os.fsencode, words)]


CONFIG_LINES = st.lists(
    st.one_of(
        st.sampled_from(
            [
                *(
                    'runtime = "{stock}"',
                    "runtime = '{stock}'",
                    ' runtime="{stock}" ',
                    'runtime = "{stock}" # why',
                ),
                *(
                    '"runtime" = "{stock}"',
                    'runtime_dir = "/r"',
                    "id_count = 65536",
                    "# runtime",
                    'runtime = """',
                ),
                *('runtimes = "x"', "runtime = 1", 'runtime = ""', '"runt\\u0069me" = "{stock}"', "=", '"'),
                'runtime = "/nowhere/\\u0041"',
            ]
        ),
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12),
    ),
    max_size=5,
)


@given(lines=CONFIG_LINES)
@example(lines=['runtime = "{stock}"'])
@example(lines=['runtime = """', 'x"""', 'runtime = "{stock}"'])
def test_a_configuration_is_read_as_toml_says_or_handed_over(front: Path, lines: list[str]) -> None:
    text = "\n".join(lines).replace("{stock}", str(front.parent / "stock"))
    file = front.parent / "config.toml"
    file.write_text(text)
    words = ["--interceptor-config", str(file), "state", "web1"]
    environment = {"PATH": str(front.parent), RUNTIME_VARIABLE: ""}
    if lines == ['runtime = "{stock}"']:
        assert call(front, *words, **environment) == [b"stock", b"state", b"web1"]
    try:
        whole = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return  # the daemon, which reads the same file, refuses it
    if call(front, *words, **environment)[0] == b"stock":
        assert whole["runtime"] == str(front.parent / "stock")


def test_no_configuration_where_one_is_named_is_handed_over(front: Path) -> None:
    words = ["--interceptor-config=/nowhere", "state", "web1"]
    assert call(front, *words) == handed_over(*words)


@pytest.mark.parametrize("command", ["pause", "delete"])
@pytest.mark.parametrize(
    ("note", "goes_to"),
    [
        (None, "stock"),
        ('{"systemd": true, "clone": null}', "stock"),
        ('{"systemd": true, "clone": "/var/lib/clone"}', "python3"),
        ("{", "python3"),
    ],
)
def test_what_a_clone_has_to_give_back_is_handed_over(
    front: Path, tmp_path: Path, command: str, note: str | None, goes_to: str
) -> None:
    config = tmp_path / "config.toml"
    config.write_text(f'runtime_dir = "{tmp_path}"\n')
    if note is not None:
        (tmp_path / "wrapped").mkdir()
        (tmp_path / "wrapped" / "web1").write_text(note)
    words = ["--interceptor-config", str(config), "--root", str(tmp_path), command, "web1"]
    assert call(front, *words)[0] == goes_to.encode()


# ---- with a daemon ----


class Daemon:
    """A control server, what it was asked, and where."""

    def __init__(self, serve: Serve) -> None:
        # Sockets' paths are short, and pytest's directories need not be.
        self.directory = tempfile.mkdtemp(prefix="front-")
        self.config = os.path.join(self.directory, "config.toml")
        self.socket = os.path.join(self.directory, "control.sock")
        self.asked: list[dict[str, object]] = []
        Path(self.config).write_text(f'runtime_dir = "{self.directory}"\n')

        async def handler(message: dict[str, object]) -> object:
            self.asked.append(message)
            if message.get("id") == "bad":
                raise ContainerError("refused")
            return {"stdio_owner": 1000000}

        async def make() -> RootServer:
            return await start_control_server(self.socket, handler)

        serve(make)


@pytest.fixture
def daemon(serve: Serve) -> Daemon:
    return Daemon(serve)


@pytest.mark.root
@pytest.mark.parametrize("command", ["create", "run"])
def test_the_daemon_is_asked_to_prepare_what_is_created(front: Path, daemon: Daemon, command: str) -> None:
    words = ["--root", "/r/moby", command, "--bundle", "/b/web1", "--pid-file", "/b/pid", "web1"]
    assert call(front, *words, INTERCEPTOR_CONFIG=daemon.config) == [b"stock", *map(os.fsencode, words)]
    [asked] = daemon.asked
    assert isinstance(asked.pop("pid"), int)
    assert asked.pop("runtime") == str(front.parent / "stock")
    assert asked == {"op": "prepare", "id": "web1", "runtime_root": "/r/moby", "bundle": "/b/web1"}


@pytest.mark.root
@pytest.mark.parametrize(
    "words",
    [
        ["create", "--bundle", "/b", "bad"],
        ["create", "--bundle", "/b/../c", "web1"],
        ["create", "--bundle", "b", "web1"],
        ["create", "web1"],
        ["--root", "r", "create", "--bundle", "/b", "web1"],
        ["create", "--bundle", "/b", 'web"1'],
        ["create", "--bundle", "/" + "b" * 5000, "web1"],
        ["kill", "web1"],
        ["exec", "web1", "true"],
    ],
)
def test_what_is_refused_or_not_plain_is_handed_over(front: Path, daemon: Daemon, words: list[str]) -> None:
    assert call(front, *words, INTERCEPTOR_CONFIG=daemon.config) == handed_over(*words)
    assert daemon.asked == [] or words[-1] == "bad"


@pytest.mark.root
def test_pipes_are_given_to_the_container_s_user(front: Path, daemon: Daemon) -> None:
    read, write = os.pipe()
    try:
        environment = {RUNTIME_VARIABLE: "/bin/true", CONFIG_VARIABLE: daemon.config}
        argv = [str(front), "run", "--bundle", "/b", "web1"]
        subprocess.run(argv, env=environment, check=True, stderr=write)
        assert os.fstat(read).st_uid == 1000000
    finally:
        os.close(read)
        os.close(write)


#: Says whether it can give its standard input away, as crun does, and whether that is what it was.
GIVES_AWAY = "#!/bin/sh\nstat -Lc %t:%T /proc/self/fd/0; LC_ALL=C chown 0:0 /proc/self/fd/0 2>&1 || true\n"


@pytest.mark.root
@pytest.mark.parametrize("by", ["front", "python"])
def test_the_host_s_null_device_cannot_be_given_to_the_container_s_user(
    front: Path, daemon: Daemon, tmp_path: Path, by: str
) -> None:
    (tmp_path / "gives").write_text(GIVES_AWAY)
    (tmp_path / "gives").chmod(0o755)
    environment = {**os.environ, RUNTIME_VARIABLE: str(tmp_path / "gives"), CONFIG_VARIABLE: daemon.config}
    program = [str(front)] if by == "front" else [sys.executable, "-m", "interceptor.oci.runtime"]
    done = subprocess.run(
        [*program, "run", "--bundle", "/b", "web1"],
        env=environment,
        check=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert done.stdout.startswith("1:3\n")
    assert "Read-only file system" in done.stdout
    assert [asked["op"] for asked in daemon.asked] == ["prepare"]


def test_a_delete_of_what_the_runtime_does_not_know_is_told(
    front: Path, daemon: Daemon, tmp_path: Path
) -> None:
    (tmp_path / "known").mkdir()
    for name in ("known", "unknown"):
        words = ["--root", str(tmp_path), "delete", "--force", name]
        assert call(front, *words, INTERCEPTOR_CONFIG=daemon.config) == [b"stock", *map(os.fsencode, words)]
    assert daemon.asked == [{"op": "release", "id": "unknown"}]


@pytest.mark.parametrize("op", ["create", "poststop"])
def test_the_hook_passes_the_state_on(front: Path, daemon: Daemon, op: str) -> None:
    state = json.dumps(STATE, indent=1).encode() + b"\n"
    subprocess.run([str(front), "--interceptor-hook", daemon.socket, op], input=state, check=True)
    assert daemon.asked == [{"op": op, "state": STATE}]


@pytest.mark.parametrize(("op", "status"), [("create", 1), ("poststop", 0)])
def test_the_hook_without_a_daemon_lets_containers_end_but_not_start(
    front: Path, op: str, status: int
) -> None:
    argv = [str(front), "--interceptor-hook", "/nowhere", op]
    done = subprocess.run(argv, input=b"{}", capture_output=True, check=False)
    assert done.returncode == status
    assert (b"start it: systemctl start interceptor" in done.stderr) == bool(status)


@pytest.mark.parametrize("state", [b"", b"\n", b"{", b"x" * (1 << 21)])
def test_the_hook_refuses_what_is_no_state(front: Path, daemon: Daemon, state: bytes) -> None:
    argv = [str(front), "--interceptor-hook", daemon.socket, "create"]
    done = subprocess.run(argv, input=state, capture_output=True, check=False)
    assert done.returncode == 1
    assert b"interceptor create: " in done.stderr
    assert b"Sanitizer" not in done.stderr
    assert daemon.asked == []
