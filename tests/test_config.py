"""interceptor/config.py: every wrong configuration is told by file, key and what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interceptor import config
from interceptor.config import Config
from interceptor.errors import ConfigError


def test_defaults_are_the_paths_that_others_rely_on() -> None:
    defaults = Config()
    assert defaults.seccomp_socket == "/run/interceptor/seccomp.sock"
    assert defaults.control_socket == "/run/interceptor/control.sock"
    assert defaults.keeper_socket == "/run/interceptor/keeper.sock"
    assert defaults.state_dir == "/var/lib/interceptor"


def test_every_key_can_be_set(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(
        """
        runtime_dir = "/run/other"
        state_dir = "/srv/other"
        log_format = "json"
        log_level = "debug"
        protect_immutable_unmounts = true
        account_units = true
        question_timeout = 2
        agent_timeout = 0.5
        registered_timeout = 5
        runtime = "crun"
        id_user = "me"
        id_count = 100000
        subuid = "/a"
        subgid = "/b"
        ownership_strategies = ["clone"]
        honor_caps = true
        privileged = "system"
        apparmor = "keep"
        guard_mode = "real"
        """
    )
    loaded = config.load(str(file))
    assert loaded == Config(
        runtime_dir="/run/other",
        state_dir="/srv/other",
        log_format="json",
        log_level="debug",
        protect_immutable_unmounts=True,
        account_units=True,
        question_timeout=2.0,
        agent_timeout=0.5,
        registered_timeout=5.0,
        runtime="crun",
        id_user="me",
        id_count=100000,
        subuid="/a",
        subgid="/b",
        ownership_strategies=("clone",),
        honor_caps=True,
        privileged="system",
        apparmor="keep",
    )
    assert loaded.control_socket == "/run/other/control.sock"


def test_explicit_file_that_is_missing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml: no such file"):
        config.load(str(tmp_path / "absent.toml"))


def test_default_file_that_is_missing_means_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "DEFAULT_PATH", str(tmp_path / "absent.toml"))
    assert config.load() == Config()


def test_directory_in_place_of_the_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Is a directory"):
        config.load(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "key", "allowed"),
    [
        ("question_timeout = 61", "question_timeout", "seconds, 0.1 to 60"),
        ("question_timeout = 0", "question_timeout", "seconds, 0.1 to 60"),
        ("question_timeout = nan", "question_timeout", "seconds, 0.1 to 60"),
        ('question_timeout = "10"', "question_timeout", "seconds, 0.1 to 60"),
        ("account_units = 1", "account_units", "true or false"),
        ('log_level = "loud"', "log_level", '"debug", "info", "warning", "error"'),
        ('runtime_dir = "run"', "runtime_dir", "an absolute path"),
        ('guard_mode = "off"', "guard_mode", '"real"'),
        ("[state_dir]\nx = 1", "state_dir", "an absolute path"),
    ],
)
def test_wrong_value_names_file_key_and_what_is_allowed(text: str, key: str, allowed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.parse(text.encode(), "/etc/x.toml")
    assert str(caught.value).startswith(f"/etc/x.toml: {key}: ")
    assert f"allowed: {allowed}" in str(caught.value)


def test_unknown_key_suggests_the_near_one() -> None:
    with pytest.raises(ConfigError, match=r"log_levl: unknown key; allowed: .*log_level") as caught:
        config.parse(b'log_levl = "info"', "x.toml")
    assert caught.value.hint == "did you mean log_level?"


def test_runtime_dir_must_leave_room_for_a_socket_name() -> None:
    longest = "/" + "d" * (107 - len("/seccomp.sock") - 1)
    assert len(config.parse(f'runtime_dir = "{longest}"'.encode(), "x").seccomp_socket) == 107
    with pytest.raises(ConfigError, match="too long for a socket in it by 1 bytes"):
        config.parse(f'runtime_dir = "{longest}d"'.encode(), "x")


@pytest.mark.parametrize("mode", ["continue", "random"])
def test_guards_that_do_not_decide_are_for_tests_only(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f'guard_mode = "{mode}"'.encode()
    monkeypatch.delenv(config.TESTING_VARIABLE, raising=False)
    with pytest.raises(ConfigError, match="for tests only"):
        config.parse(text, "x.toml")
    monkeypatch.setenv(config.TESTING_VARIABLE, "1")
    assert config.parse(text, "x.toml").guard_mode == mode


@given(st.binary() | st.text().map(str.encode))
def test_any_bytes_give_a_configuration_or_a_configuration_error(data: bytes) -> None:
    try:
        config.parse(data, "x.toml")
    except ConfigError as error:
        assert str(error).startswith("x.toml: ")


_VALUES = st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats() | st.text(max_size=5)


@given(st.sampled_from(Config.__struct_fields__), _VALUES)
def test_any_value_of_a_key_is_taken_or_refused_by_its_name(key: str, value: object) -> None:
    if value is None:
        text = f"{key} = [{{}}]"
    elif isinstance(value, str):
        text = (
            f"{key} = "
            + '"'
            + "".join(f"\\U{ord(c):08x}" for c in value if not 0xD800 <= ord(c) < 0xE000)
            + '"'
        )
    else:
        text = f"{key} = {str(value).lower()}"
    try:
        config.parse(text.encode(), "x.toml")
    except ConfigError as error:
        assert str(error).startswith(f"x.toml: {key}: ")
