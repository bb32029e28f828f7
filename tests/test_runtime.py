"""``interceptor-runc`` on bundles, without an engine: what it passes through, what it refuses, who may die when."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from integration.containers import daemon as daemons
from integration.containers import quickstart, rootfs
from integration.containers.daemon import Daemon, program
from interceptor.oci.capabilities import CAPABILITIES

pytestmark = [pytest.mark.root, pytest.mark.slow]

SECONDS = 60


@dataclass(frozen=True)
class Runtime:
    """The wrapper on a daemon of its own."""

    directory: Path
    daemon: Daemon

    def argv(self, *arguments: str) -> list[str]:
        options = ["--interceptor-config", str(self.daemon.config), "--root", str(self.directory / "runc")]
        return [program("interceptor-runc"), *options, *arguments]

    def __call__(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        # Files, not pipes: a container's process would keep a pipe open.
        with open(self.directory / "out", "w+") as out, open(self.directory / "err", "w+") as err:
            done = subprocess.run(
                self.argv(*arguments),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                check=False,
                timeout=SECONDS,
                env={**os.environ, **environment},
            )
            out.seek(0)
            err.seek(0)
            return subprocess.CompletedProcess(done.args, done.returncode, out.read(), err.read())

    def bundle(self, *argv: str, **changes: Any) -> str:
        """A bundle with the trixie tree, read-only, as its root filesystem."""
        path = self.directory / "bundle"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        subprocess.run(["runc", "spec", "--bundle", str(path)], check=True)
        config = json.loads((path / "config.json").read_text())
        cache = quickstart.parser().get_default("cache")
        config["root"] = {"path": str(cache / rootfs.SUITE), "readonly": True}
        config["process"] |= {"args": list(argv), "terminal": False}
        (path / "config.json").write_text(json.dumps(config | changes))
        return str(path)

    def reserved(self) -> list[str]:
        """The containers for which something is reserved, as the daemon left them on disk."""
        file = self.directory / "daemon/state/reservations.json"
        return [one["id"] for one in json.loads(file.read_text())] if file.exists() else []


@contextlib.contextmanager
def serving(containers: int, **options: object) -> Iterator[Runtime]:
    """The wrapper with ranges for so many containers, on a daemon with more keys of its configuration."""
    rootfs.ensure(quickstart.parser().get_default("cache"), 100000)
    directory = Path(tempfile.mkdtemp(prefix="interceptor-runtime-", dir="/run"))
    directory.chmod(0o755)
    (directory / "subuid").write_text(f"interceptor:1000000:{containers * 65536}\n")
    keys = {"subuid": f"{directory}/subuid", "subgid": f"{directory}/subuid", **options}
    try:
        with daemons.serving(directory / "daemon", keys) as daemon:
            yield Runtime(directory, daemon)
    finally:
        shutil.rmtree(directory)


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with serving(10) as found:
        yield found


def staged() -> list[str]:
    """Mounts on the host that only a wrapper's own mount namespace should have."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line for line in lines if "/stage" in line.split(" ")[4] and "interceptor-runtime-" in line]


def test_other_commands_and_unknown_flags_are_the_stock_runtime_s(runtime: Runtime) -> None:
    for arguments in (
        ["--version"],
        ["features"],
        ["--no-such-flag", "list"],
        ["no-such-command"],
        ["create", "--help"],
    ):
        ours = runtime(*arguments)
        argv = ["runc", "--root", str(runtime.directory / "runc"), *arguments]
        stock = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert (ours.returncode, ours.stdout) == (stock.returncode, stock.stdout)


def test_a_container_runs_mapped_and_guarded_and_leaves_nothing(runtime: Runtime) -> None:
    bundle = runtime.bundle(
        "sh", "-c", "stat -c %u /etc/passwd; id -u; cat /proc/self/uid_map; umount /proc/sys"
    )
    before = (Path(bundle) / "config.json").read_bytes()
    done = runtime("run", "--bundle", bundle, "plain")
    assert done.stdout.split() == ["0", "0", "0", "1000000", "65536"], done.stderr
    assert "umount: /proc/sys: not mounted" in done.stderr
    assert done.returncode == 32, "the container's exit status"
    assert (Path(bundle) / "config.json").read_bytes() == before
    assert not staged()
    assert runtime.reserved() == []
    assert runtime.daemon.ask("ps") == []


def test_the_runtime_is_chosen_by_the_environment(runtime: Runtime) -> None:
    done = runtime("--version", INTERCEPTOR_RUNTIME="/bin/echo")
    assert done.stdout.split()[-1] == "--version"
    done = runtime("--version", INTERCEPTOR_RUNTIME="no-such-runtime")
    assert done.returncode == 1
    assert "the runtime 'no-such-runtime' is not installed" in done.stderr


def test_a_manager_s_own_user_namespace_is_kept(runtime: Runtime) -> None:
    """As with userns-remap: its mapping, and its files' owners."""
    cache = quickstart.parser().get_default("cache")
    bundle = runtime.bundle("sh", "-c", "cat /proc/self/uid_map; stat -c %u /etc/passwd; umount /proc/sys")
    file = Path(bundle) / "config.json"
    config = json.loads(file.read_text())
    config["root"]["path"] = str(cache / f"{rootfs.SUITE}-100000")
    config["linux"]["namespaces"].append({"type": "user"})
    for table in ("uidMappings", "gidMappings"):
        config["linux"][table] = [{"containerID": 0, "hostID": 100000, "size": 65536}]
    file.write_text(json.dumps(config))
    done = runtime("run", "--bundle", bundle, "remapped")
    assert done.stdout.split() == ["0", "100000", "65536", "0"], done.stderr
    assert "not mounted" in done.stderr
    assert runtime.reserved() == []


def test_settings_and_refusals_reach_the_log_of_the_manager(runtime: Runtime) -> None:
    bundle = runtime.bundle("true", annotations={"io.interceptor.magic": "1"})
    log = runtime.directory / "log.json"
    done = runtime("--log", str(log), "--log-format", "json", "create", "--bundle", bundle, "refused")
    assert done.returncode == 1
    assert "io.interceptor.magic: unknown setting; known: honor_caps" in json.loads(log.read_text())["msg"]
    assert runtime.reserved() == []


def test_a_forbidden_strategy_is_an_error_not_a_silent_fallback(runtime: Runtime) -> None:
    bundle = runtime.bundle("true", annotations={"io.interceptor.ownership": "shiftfs"})
    done = runtime("run", "--bundle", bundle, "forced")
    assert done.returncode == 1
    assert (
        "its owners cannot be mapped to the container's IDs: idmapped: the container asks for shiftfs; "
        "shiftfs: this kernel has no shiftfs" in done.stderr
    )
    assert runtime.reserved() == []


def test_exhausted_ranges_and_privileged_as_configured() -> None:
    with serving(1, privileged="system") as runtime:
        bundle = runtime.bundle("sleep", "infinity")
        file = Path(bundle) / "config.json"
        config = json.loads(file.read_text())
        # As managers have it for --privileged.
        for path in ("maskedPaths", "readonlyPaths"):
            config["linux"][path] = None
        config["linux"]["devices"] = [{"type": "c", "path": "/dev/mem", "major": 1, "minor": 1}]
        config["linux"]["resources"] = {"devices": [{"allow": True, "access": "rwm"}]}
        sets = ("bounding", "effective", "permitted")
        config["process"]["capabilities"] = {name: list(CAPABILITIES) for name in sets}
        file.write_text(json.dumps(config))
        assert runtime("run", "--detach", "--bundle", bundle, "only").returncode == 0
        done = runtime("exec", "only", "sh", "-c", "cat /proc/self/uid_map; ls /dev/mem; umount /proc/sys")
        assert done.stdout.split() == ["0", "1000000", "65536"]
        assert "/dev/mem" in done.stderr
        assert "umount: /proc/sys: not mounted" in done.stderr
        done = runtime("run", "--bundle", bundle, "more")
        assert done.returncode == 1
        assert "exhausted: 1 containers hold 65536 IDs each" in done.stderr
        assert runtime.reserved() == ["only"]
        assert runtime("delete", "--force", "only").returncode == 0
        assert runtime("run", "--bundle", runtime.bundle("true"), "more").returncode == 0


# ---- who may die when ----


def test_without_a_daemon_nothing_starts_and_everything_can_be_deleted(runtime: Runtime) -> None:
    bundle = runtime.bundle("sleep", "infinity")
    assert runtime("run", "--detach", "--bundle", bundle, "survivor").returncode == 0
    daemons.stop(runtime.daemon.processes[-1])
    try:
        done = runtime("run", "--bundle", bundle, "unguarded")
        assert done.returncode == 1
        assert (
            "no daemon listens there (start it: systemctl start interceptor, or: interceptor serve)"
            in done.stderr
        )
        assert runtime("delete", "--force", "survivor").returncode == 0
        assert runtime("delete", "--force", "unguarded").returncode == 0
        assert runtime.reserved() == ["survivor"]
    finally:
        daemons.start(runtime.daemon)
    assert runtime.reserved() == [], "the next daemon finds out"
    assert runtime.daemon.ask("ps") == []


def test_a_killed_daemon_s_successor_hands_out_no_range_twice(runtime: Runtime) -> None:
    bundle = runtime.bundle("sleep", "infinity")
    assert runtime("run", "--detach", "--bundle", bundle, "one").returncode == 0
    runtime.daemon.processes[-1].kill()
    runtime.daemon.processes[-1].wait()
    daemons.start(runtime.daemon)
    assert runtime("run", "--detach", "--bundle", bundle, "two").returncode == 0
    maps = [runtime("exec", name, "cat", "/proc/self/uid_map").stdout.split()[1] for name in ("one", "two")]
    assert maps == ["1000000", "1065536"]
    for name in ("one", "two"):
        assert runtime("delete", "--force", name).returncode == 0
    assert runtime.reserved() == []


@pytest.mark.parametrize("command", ["run", "create"])
def test_killed_before_the_runtime_nothing_is_left(runtime: Runtime, command: str) -> None:
    """The stock runtime is one that says that it was reached, and waits: everything has been made by then."""
    stub, reached = runtime.directory / "stub", runtime.directory / "reached"
    # The daemon asks a runtime what it can do, before anything is made.
    stub.write_text(
        f'#!/bin/sh\n[ "$1" != features ] || exit 1\necho reached > {reached}\nexec sleep infinity\n'
    )
    stub.chmod(0o755)
    reached.unlink(missing_ok=True)
    os.mkfifo(reached)
    bundle = runtime.bundle("true")
    environment = {**os.environ, "INTERCEPTOR_RUNTIME": str(stub)}
    wrapper = subprocess.Popen(runtime.argv(command, "--bundle", bundle, "half"), env=environment)
    with open(reached) as said:
        assert said.read() == "reached\n"
    assert runtime.reserved() == ["half"]
    wrapper.kill()
    assert wrapper.wait() == -signal.SIGKILL
    assert not staged()
    # What managers do after a create that failed.
    runtime("delete", "--force", "half")
    assert runtime.reserved() == []
    # And without that, whoever comes next cleans up.
    wrapper = subprocess.Popen(runtime.argv(command, "--bundle", bundle, "half"), env=environment)
    with open(reached) as said:
        said.read()
    wrapper.kill()
    wrapper.wait()
    assert runtime("run", "--bundle", bundle, "next").returncode == 0
    assert runtime.reserved() == []


def test_killed_while_it_asks_the_daemon(runtime: Runtime) -> None:
    """The daemon answers somebody who is not there any more."""
    daemon = runtime.daemon.processes[-1]
    bundle = runtime.bundle("true")
    daemon.send_signal(signal.SIGSTOP)
    try:
        wrapper = asking(runtime, "run", "--bundle", bundle, "asking")
        wrapper.kill()
        wrapper.wait()
    finally:
        daemon.send_signal(signal.SIGCONT)
    assert runtime("run", "--bundle", bundle, "next").returncode == 0
    assert runtime.reserved() == []


def asking(runtime: Runtime, *arguments: str) -> subprocess.Popen[bytes]:
    """The wrapper from when it has asked the daemon: strace(1), as a grandchild of it (-D), tells of that."""
    told = runtime.directory / "told"
    os.mkfifo(told)
    strace = [
        "strace",
        "-D",
        "-f",
        "-qq",
        "-s",
        "64",
        "-e",
        "trace=sendto",
        "-e",
        "signal=none",
        "-o",
        str(told),
    ]
    wrapper = subprocess.Popen([*strace, *runtime.argv(*arguments)])
    with open(told) as lines:
        assert any("prepare" in line for line in lines)
    return wrapper
