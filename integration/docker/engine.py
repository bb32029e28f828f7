"""dockerd on private directories, in a mount namespace of its own, without networks; and the daemon that it needs."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from integration.containers import cgroups
from integration.containers import daemon as daemons
from integration.containers.daemon import Daemon, program
from integration.containers.notify import NotifySocket
from interceptor.oci.runtime import CONFIG_VARIABLE

READY_SECONDS = 60.0
#: For one command of the client; what takes this long hangs.
COMMAND_SECONDS = 120.0
#: Of the image that tests start from.
IMAGE = "interceptor-test/trixie:base"
#: Rows for ten containers; the files of subuid(5) of the machine are not touched.
SUBIDS = "interceptor:1000000:655360\n"

#: Puts a file over those of subuid(5), in the engine's own mount namespace.
SUBIDS_OVER = 'mount --bind "$0" /etc/subuid; mount --bind "$0" /etc/subgid; exec "$@"'


@dataclass(frozen=True)
class Docker:
    """A running engine and its client."""

    socket: Path
    pid: int
    """Of dockerd."""
    directory: Path
    daemon: Daemon

    def try_(self, *arguments: str, stdin: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
        """``docker ARGUMENTS``, whatever its exit status."""
        given: dict[str, Any] = {"input": stdin} if stdin is not None else {"stdin": subprocess.DEVNULL}
        return subprocess.run(
            ["docker", "-H", f"unix://{self.socket}", *arguments],
            capture_output=True,
            check=False,
            timeout=COMMAND_SECONDS,
            **given,
        )

    def __call__(self, *arguments: str, stdin: bytes | None = None) -> str:
        """``docker ARGUMENTS``: its output; fails with what it said."""
        done = self.try_(*arguments, stdin=stdin)
        assert done.returncode == 0, f"docker {' '.join(arguments)}: {done.stderr.decode()}"
        return done.stdout.decode(errors="surrogateescape")

    def run(self, *arguments: str) -> str:
        """``docker run --rm`` under our runtime, without a network."""
        return self("run", "--rm", "--network=none", "--runtime=interceptor", *arguments)

    def start(self, name: str, *arguments: str, runtime: str = "interceptor") -> str:
        """``docker run -d``; returns the container's ID."""
        argv = ["run", "-d", "--name", name, "--network=none", f"--runtime={runtime}", *arguments]
        return self(*argv).strip()

    def mounts(self) -> list[str]:
        """Mount points in the engine's mount namespace."""
        text = Path(f"/proc/{self.pid}/mountinfo").read_text()
        return [line.split(" ")[4] for line in text.splitlines()]


@contextlib.contextmanager
def serving(runtime_options: Mapping[str, object] | None = None) -> Iterator[Docker]:
    """The daemon and the engine, from nothing to nothing. ``runtime_options``: keys of the daemon's configuration."""
    # Where every ID may search: containers' roots find their root filesystems there.
    run = Path(tempfile.mkdtemp(prefix="interceptor-docker-", dir="/run"))
    run.chmod(0o755)
    data = Path(tempfile.mkdtemp(prefix="interceptor-docker-", dir="/var/tmp"))
    try:
        (run / "subuid").write_text(SUBIDS)
        keys = {"subuid": f"{run}/subuid", "subgid": f"{run}/subuid", "log_level": "debug"}
        options = {**keys, **(runtime_options or {})}
        with daemons.serving(run / "daemon", options) as daemon, engine(run, data, daemon) as docker:
            yield docker
    finally:
        shutil.rmtree(data, ignore_errors=True)
        shutil.rmtree(run, ignore_errors=True)


@contextlib.contextmanager
def engine(run: Path, data: Path, daemon: Daemon, *more: str, subids: Path | None = None) -> Iterator[Docker]:
    """dockerd alone; ``more`` are options of it, and ``subids`` what it has as /etc/subuid and /etc/subgid."""
    # Its configuration comes by the environment: for runtimeArgs, dockerd would start a shell each time.
    runtime = {"path": program("interceptor-runc")}
    (run / "daemon.json").write_text(json.dumps({"runtimes": {"interceptor": runtime}}))
    parent = f"/{run.name}"
    argv = [
        # A mount namespace of its own: nothing that it or a killed shim leaves mounted stays on the host.
        *("unshare", "--mount", "--propagation", "slave"),
        *(["sh", "-euc", SUBIDS_OVER, str(subids)] if subids is not None else []),
        *("setpriv", "--pdeathsig", "TERM"),
        *("dockerd", f"--config-file={run}/daemon.json", "--iptables=false", "--bridge=none"),
        *(f"--host=unix://{run}/docker.sock", f"--data-root={data}", f"--exec-root={run}/exec"),
        *(f"--pidfile={run}/docker.pid", f"--cgroup-parent={parent}", "--storage-driver=overlay2"),
        *more,
    ]
    with NotifySocket(run / "notify") as ready, open(run / "dockerd.log", "wb") as log:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "NOTIFY_SOCKET": str(ready.path), CONFIG_VARIABLE: str(daemon.config)},
            cwd="/",
            start_new_session=True,
        )
        try:
            ready.wait_ready(process.pid, READY_SECONDS)
            yield Docker(run / "docker.sock", process.pid, data, daemon)
        finally:
            daemons.stop(process)
            for hierarchy in Path("/sys/fs/cgroup").glob("*"):
                cgroups.remove(hierarchy / parent.strip("/"))


def import_image(docker: Docker, tree: Path, name: str = IMAGE) -> None:
    """Makes an image of a directory, with owners and extended attributes as they are there."""
    tar = ["tar", "--create", "--numeric-owner", "--xattrs", "--xattrs-include=*", f"--directory={tree}", "."]
    with subprocess.Popen(tar, stdout=subprocess.PIPE) as archive:
        argv = [
            "docker",
            "-H",
            f"unix://{docker.socket}",
            "import",
            "--change",
            'CMD ["/bin/bash"]',
            "-",
            name,
        ]
        subprocess.run(
            argv, stdin=archive.stdout, check=True, stdout=subprocess.DEVNULL, timeout=COMMAND_SECONDS
        )
    assert archive.returncode == 0
