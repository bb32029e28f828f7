"""One shell for a page: where it runs, what it is given, what it said.

It runs in a mount namespace of its own in which /etc/subuid, /etc/subgid, /etc/interceptor, /run/interceptor,
/var/lib/interceptor, /usr/local/bin and the manager's own directories are private and empty. Where a page has
``systemctl restart`` the manager is started, without networks, and given the image that a registry would have given.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from integration.containers import quickstart, rootfs
from integration.containers.daemon import program, stop
from integration.containers.notify import NotifySocket
from integration.docker.engine import IMAGE, READY_SECONDS

README = Path(__file__).resolve().parents[2] / "README.md"
INSIDE = ("/etc/interceptor", "/run/interceptor", "/var/lib/interceptor", "/usr/local/bin")
COMMANDS = ("interceptor", "interceptor-hook", "interceptor-runc")


@dataclass(frozen=True)
class Place:
    """Where everything of one run is; removed at its end."""

    directory: Path
    """Short-lived, for sockets and state."""
    data: Path
    """On disk, for images and containers."""
    tree: Path
    """The root filesystem that becomes ``IMAGE``."""


@dataclass(frozen=True)
class Manager:
    """What a page needs besides itself."""

    name: str
    private: Sequence[str]
    """Directories that are made private and empty."""
    running: Callable[[Place], AbstractContextManager[None]]
    """The manager with the image, from nothing to nothing."""
    restarted: bool = False
    """Whether the page says when it is to start; else it runs before."""
    environment: Callable[[Place], Mapping[str, str]] = lambda place: {}
    image: str = IMAGE
    """What the manager calls it."""
    clean: Sequence[Sequence[str]] = field(default=())
    """Commands for what a page leaves."""


def commands(name: str) -> list[str]:
    """The lines of a manager's page."""
    marker = rf"<!-- tests/docker/test_pages\.py executes the page for {name}\. -->"
    found = re.search(rf"{marker}\n```sh\n(.*?)```", README.read_text(), re.DOTALL)
    assert found, f"README.md has no page for {name}"
    return found.group(1).splitlines()


def execute(manager: Manager, script: str | None = None) -> None:
    """Runs the page, or another script in its place; prints each command before its output. Raises where one fails.

    The caller has to be in a mount namespace of its own.
    """
    cache = quickstart.parser().get_default("cache")
    rootfs.ensure(cache, 100000)
    directory = Path(tempfile.mkdtemp(prefix="interceptor-page-", dir="/run"))
    data = Path(tempfile.mkdtemp(prefix="interceptor-page-", dir="/var/tmp"))
    place = Place(directory, data, cache / rootfs.SUITE)
    try:
        for path in (directory, data):
            path.chmod(0o755)
        _make_private(place, manager)
        (directory / "bin").mkdir()
        for name, text in (
            ("sudo", '#!/bin/sh\nexec "$@"\n'),
            ("systemctl", "#!/bin/sh\necho restart >&3\nread done <&4\n"),
        ):
            (directory / "bin" / name).write_text(text)
            (directory / "bin" / name).chmod(0o755)
        with started([program("interceptor"), "serve"], directory / "daemon"):
            _run(manager, place, script or "\n".join(commands(manager.name)))
    finally:
        shutil.rmtree(data, ignore_errors=True)
        shutil.rmtree(directory, ignore_errors=True)


def _make_private(place: Place, manager: Manager) -> None:
    for path in (*INSIDE, *manager.private):
        os.makedirs(path, exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=0755", "page", path], check=True)
    for name in ("subuid", "subgid"):
        (place.directory / name).touch()
        subprocess.run(["mount", "--bind", str(place.directory / name), f"/etc/{name}"], check=True)
    for name in COMMANDS:
        os.symlink(program(name), f"/usr/local/bin/{name}")


@contextlib.contextmanager
def started(argv: Sequence[str], log_as: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A service that says when it is ready, its output in ``log_as``.log."""
    with NotifySocket(log_as.with_suffix(".notify")) as ready, open(log_as.with_suffix(".log"), "wb") as log:
        environment = {**os.environ, "NOTIFY_SOCKET": str(ready.path)}
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )
        try:
            ready.wait_ready(process.pid, READY_SECONDS)
            yield process
        finally:
            stop(process)


def import_tree(tree: Path, command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Gives an archive of ``tree`` to a command that makes an image of it."""
    tar = ["tar", "--create", "--numeric-owner", f"--directory={tree}", "."]
    with subprocess.Popen(tar, stdout=subprocess.PIPE) as archive:
        subprocess.run(
            command,
            stdin=archive.stdout,
            check=True,
            stdout=subprocess.DEVNULL,
            env={**os.environ, **environment},
        )
    assert archive.returncode == 0


def _run(manager: Manager, place: Place, script: str) -> None:
    environment = {
        **os.environ,
        **manager.environment(place),
        "PATH": f"{place.directory}/bin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    }
    script = "set -eux\n" + script.replace("IMAGE", manager.image)
    output = place.directory / "output"
    with contextlib.ExitStack() as stack, open(output, "wb") as log:
        if manager.restarted:
            shell, waits = _waiting_shell(script, environment, log)
            # End of file: the shell has ended before it came to that.
            if waits.recv(64):
                stack.enter_context(manager.running(place))
                waits.send(b"done\n")
            waits.close()
        else:
            stack.enter_context(manager.running(place))
            shell = subprocess.Popen(["bash", "-c", script], env=environment, stdout=log, stderr=log)
        status = shell.wait()
        print(output.read_text(errors="replace"))
        for argv in map(list, manager.clean):
            subprocess.run(argv, env=environment, check=status == 0, capture_output=True)
        if status:
            logs = [
                path.read_text(errors="replace")[-3000:] for path in sorted(place.directory.glob("*.log"))
            ]
            raise SystemExit(f"the page fails, status {status}\n" + "\n".join(logs))


def _waiting_shell(
    script: str, environment: Mapping[str, str], log: IO[bytes]
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """A shell whose ``systemctl`` says by a socket that it was called, and waits there until that is done."""
    ours, its = socket.socketpair()
    with its:
        argv = ["bash", "-c", f"exec 3>&{its.fileno()} 4<&{its.fileno()}\n{script}"]
        shell = subprocess.Popen(argv, env=environment, pass_fds=[its.fileno()], stdout=log, stderr=log)
    return shell, ours
