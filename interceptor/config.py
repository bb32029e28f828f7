"""The daemon's configuration: ``/etc/interceptor/config.toml``, checked key by key.

Every key has a default, so no file is needed.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Literal, get_args, get_type_hints

import msgspec
from msgspec import Meta

from interceptor.errors import ConfigError

DEFAULT_PATH = "/etc/interceptor/config.toml"

#: Guards that do not decide exist to prove that protection does not depend on decisions; never in production.
TESTING_VARIABLE = "INTERCEPTOR_TESTING"

#: ``sun_path`` has 108 bytes with the final NUL (unix(7)).
_SOCKET_PATH_MAX = 107
_LONGEST_SOCKET = "seccomp.sock"

LogFormat = Literal["auto", "console", "json", "journald"]
LogLevel = Literal["debug", "info", "warning", "error"]
OwnershipStrategy = Literal["idmapped", "shiftfs", "clone"]
Privileged = Literal["refuse", "system"]
AppArmor = Literal["relax", "keep"]
GuardMode = Literal["real", "continue", "random"]

# Types of keys. The description completes "allowed: ".
_Directory = Annotated[str, Meta(pattern="^/", description="an absolute path")]
_Flag = Annotated[bool, Meta(description="true or false")]


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that can be configured. Times are in seconds."""

    #: Sockets, and everything else that a reboot may take.
    runtime_dir: _Directory = "/run/interceptor"
    #: What must outlive a reboot.
    state_dir: _Directory = "/var/lib/interceptor"

    #: ``auto``: console on a terminal, journald when standard error is the journal, else JSON lines.
    log_format: Annotated[LogFormat, Meta(description='"auto", "console", "json", "journald"')] = "auto"
    log_level: Annotated[LogLevel, Meta(description='"debug", "info", "warning", "error"')] = "info"

    #: Refuse with EPERM to unmount any mount that the container was created with.
    protect_immutable_unmounts: _Flag = False
    #: Count trapped calls for each systemd unit that makes them.
    account_units: _Flag = False

    #: Where Prometheus may scrape: a socket's path, for root, or an address; nowhere if empty.
    metrics: Annotated[
        str,
        Meta(
            pattern=r"^(/[^\0]{1,106}|\[[0-9A-Fa-f:.]+\]:[0-9]{1,5}|[^\s/:\[\]]+:[0-9]{1,5})?$",
            description='"" (off), an absolute path, or "HOST:PORT"',
        ),
    ] = ""

    #: Raise values of the host where the view's tables say so and a container asks for more.
    host_writes: _Flag = True

    #: /proc/meminfo, cpuinfo, stat, loadavg, diskstats and the list of processors show the container's cgroup.
    cgroup_aware: _Flag = False

    #: How long a guard waits for the daemon's verdict before it lets the kernel decide.
    question_timeout: Annotated[float, Meta(ge=0.1, le=60, description="seconds, 0.1 to 60")] = 10.0
    #: How long a runtime that has connected may take to send its listener.
    agent_timeout: Annotated[float, Meta(ge=0.1, le=600, description="seconds, 0.1 to 600")] = 10.0
    #: How long a container that its hook has set up may be without a listener before the log says so.
    registered_timeout: Annotated[float, Meta(ge=1, le=3600, description="seconds, 1 to 3600")] = 60.0

    #: The stock OCI runtime that interceptor-runc becomes.
    runtime: Annotated[str, Meta(min_length=1, description="a program's name or path")] = "runc"
    #: Whose ranges of the files of subuid(5) containers get, each `id_count` IDs.
    id_user: Annotated[str, Meta(min_length=1, description="a user's name")] = "interceptor"
    id_count: Annotated[int, Meta(ge=1000, le=2**24, description="1000 to 16777216")] = 65536
    subuid: _Directory = "/etc/subuid"
    subgid: _Directory = "/etc/subgid"
    #: What may be used to give files to the container's IDs (`interceptor.idshift.choose`).
    ownership_strategies: Annotated[
        tuple[OwnershipStrategy, ...],
        Meta(min_length=1, description='a list of "idmapped", "shiftfs", "clone"'),
    ] = ("idmapped", "shiftfs", "clone")
    #: Keep the manager's capability sets.
    honor_caps: _Flag = False
    #: What becomes of privileged containers.
    privileged: Annotated[Privileged, Meta(description='"refuse", "system"')] = "refuse"
    #: Whether managers' AppArmor profiles that refuse every mount are replaced by ``unconfined``.
    apparmor: Annotated[AppArmor, Meta(description='"relax", "keep"')] = "relax"

    #: Guards that do not decide, but answer CONTINUE to everything or at random: see `TESTING_VARIABLE`.
    guard_mode: Annotated[
        GuardMode, Meta(description=f'"real"; in tests, with {TESTING_VARIABLE}=1 set, "continue", "random"')
    ] = "real"

    @property
    def control_socket(self) -> str:
        """Where the hook, the wrapper and the command line talk to the daemon."""
        return os.path.join(self.runtime_dir, "control.sock")

    @property
    def seccomp_socket(self) -> str:
        """The OCI seccomp agent socket: ``linux.seccomp.listenerPath`` of a bundle."""
        return os.path.join(self.runtime_dir, "seccomp.sock")

    @property
    def stage(self) -> str:
        """Where a container's root filesystem and binds are put together, in mount namespaces of the wrapper's."""
        return os.path.join(self.runtime_dir, "stage")

    @property
    def clones(self) -> str:
        """Symbolic links to clones of root filesystems, by container: they outlive a reboot."""
        return os.path.join(self.state_dir, "clones")

    @property
    def keeper_socket(self) -> str:
        """Where a starting daemon gets back the descriptors of its predecessor."""
        return os.path.join(self.runtime_dir, "keeper.sock")


def load(path: str | None = None) -> Config:
    """The configuration in ``path``; without one that of `DEFAULT_PATH`, if it exists.

    Raises `ConfigError`.
    """
    name = path or DEFAULT_PATH
    try:
        data = Path(name).read_bytes()
    except FileNotFoundError:
        if path is None:
            return Config()
        raise ConfigError(f"{name}: no such file", "leave out --config to use the defaults") from None
    except OSError as error:
        raise ConfigError(f"{name}: {error.strerror}") from None
    return parse(data, name)


def parse(data: bytes, name: str) -> Config:
    """The configuration in the TOML text ``data``; ``name`` is for messages. Raises `ConfigError`."""
    try:
        values = tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name}: not TOML: {error}") from None
    for key in values:
        if key not in Config.__struct_fields__:
            raise _unknown_key(name, key)
    try:
        config = msgspec.convert(values, Config)
    except msgspec.ValidationError as error:
        raise _wrong_value(name, str(error), values) from None
    return _checked(config, name)


def _checked(config: Config, name: str) -> Config:
    """What the types alone cannot say."""
    longest = len(os.fsencode(os.path.join(config.runtime_dir, _LONGEST_SOCKET)))
    if longest > _SOCKET_PATH_MAX:
        raise ConfigError(
            f"{name}: runtime_dir: too long for a socket in it by {longest - _SOCKET_PATH_MAX} bytes; "
            f"allowed: {_SOCKET_PATH_MAX - len(_LONGEST_SOCKET) - 1} bytes"
        )
    if config.guard_mode != "real" and os.environ.get(TESTING_VARIABLE) != "1":
        raise ConfigError(
            f"{name}: guard_mode: {config.guard_mode!r} is for tests only; allowed: {_allowed('guard_mode')}",
            "remove the key",
        )
    return config


def _unknown_key(name: str, key: str) -> ConfigError:
    near = difflib.get_close_matches(key, Config.__struct_fields__, n=1)
    hint = f"did you mean {near[0]}?" if near else None
    return ConfigError(f"{name}: {key}: unknown key; allowed: {', '.join(Config.__struct_fields__)}", hint)


def _wrong_value(name: str, problem: str, values: dict[str, object]) -> ConfigError:
    """``problem`` is msgspec's and ends in the place: "Expected `bool`, got `int` - at `$.account_units`"."""
    match = re.search(r"`\$\.(\w+)", problem)
    if match is None:
        return ConfigError(f"{name}: {problem}")
    key = match.group(1)
    return ConfigError(f"{name}: {key}: {values.get(key)!r} cannot be used; allowed: {_allowed(key)}")


def _allowed(key: str) -> str:
    hint = get_type_hints(Config, include_extras=True)[key]
    meta = next(extra for extra in get_args(hint) if isinstance(extra, Meta))
    return str(meta.description)
