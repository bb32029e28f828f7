"""Executes the page for Docker of README.md, command by command, with the paths that it names.

    sudo python -m integration.docker.page

It runs in a mount namespace of its own in which /etc/docker, /etc/subuid, /etc/subgid, /run/interceptor,
/var/lib/interceptor and /usr/local/bin are private and empty. The engine is started where the page has
``systemctl restart docker``, without networks, and given the image that a registry would have given.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from integration.containers import cgroups, quickstart, rootfs
from integration.containers.daemon import program, stop
from integration.containers.kernel_calls import unshare_mounts
from integration.containers.notify import NotifySocket
from integration.docker.engine import IMAGE, READY_SECONDS

README = Path(__file__).resolve().parents[2] / "README.md"
INSIDE = ("/etc/docker", "/run/interceptor", "/var/lib/interceptor", "/usr/local/bin")
COMMANDS = ("interceptor", "interceptor-hook", "interceptor-runc")


def commands() -> list[str]:
    """The lines of the page."""
    found = re.search(r"executes this page\. -->\n```sh\n(.*?)```", README.read_text(), re.DOTALL)
    assert found, "README.md has no such page"
    return found.group(1).splitlines()


def execute(say: bool = True) -> str:
    """Runs the page; returns what it printed, with each command before its output. Raises where a command fails.

    The caller has to be in a mount namespace of its own.
    """
    directory = Path(tempfile.mkdtemp(prefix="interceptor-page-", dir="/run"))
    data = Path(tempfile.mkdtemp(prefix="interceptor-page-", dir="/var/tmp"))
    try:
        _make_private(directory)
        (directory / "bin").mkdir()
        for name, text in (
            ("sudo", '#!/bin/sh\nexec "$@"\n'),
            ("systemctl", "#!/bin/sh\necho restart >&3\nread done <&4\n"),
        ):
            (directory / "bin" / name).write_text(text)
            (directory / "bin" / name).chmod(0o755)
        with _started([program("interceptor"), "serve"], directory / "daemon"):
            return _run(directory, data, say)
    finally:
        shutil.rmtree(data, ignore_errors=True)
        shutil.rmtree(directory, ignore_errors=True)


def _make_private(directory: Path) -> None:
    for path in INSIDE:
        os.makedirs(path, exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=0755", "page", path], check=True)
    for name in ("subuid", "subgid"):
        (directory / name).touch()
        subprocess.run(["mount", "--bind", str(directory / name), f"/etc/{name}"], check=True)
    for name in COMMANDS:
        os.symlink(program(name), f"/usr/local/bin/{name}")


@contextlib.contextmanager
def _started(argv: list[str], place: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A service that says when it is ready, its output in ``place``.log."""
    with NotifySocket(place.with_suffix(".notify")) as ready, open(place.with_suffix(".log"), "wb") as log:
        environment = {**os.environ, "NOTIFY_SOCKET": str(ready.path)}
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )
        try:
            ready.wait_ready(process.pid, READY_SECONDS)
            yield process
        finally:
            stop(process)


def _run(directory: Path, data: Path, say: bool) -> str:
    """The page in one shell. ``systemctl`` asks by one pipe, and waits at another until the engine is up."""
    asks, asked = os.pipe()
    waits, done = os.pipe()
    environment = {
        **os.environ,
        "DOCKER_HOST": f"unix://{directory}/docker.sock",
        "PATH": f"{directory}/bin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    }
    script = "\n".join(commands()).replace("IMAGE", IMAGE)
    argv = ["bash", "-euxc", f"exec 3>&{asked} 4<&{waits}\n{script}"]
    output = directory / "output"
    with contextlib.ExitStack() as stack, open(output, "wb") as log:
        shell = subprocess.Popen(argv, env=environment, pass_fds=(asked, waits), stdout=log, stderr=log)
        for fd in (asked, waits):
            os.close(fd)
        # End of file: the shell has ended before it came to that.
        if os.read(asks, 64):
            stack.enter_context(_engine(directory, data))
            os.write(done, b"done\n")
        status = shell.wait()
        for fd in (asks, done):
            os.close(fd)
        text = output.read_text(errors="replace")
        if say:
            print(text)
        if status:
            logs = [path.read_text(errors="replace")[-3000:] for path in sorted(directory.glob("*.log"))]
            raise SystemExit(f"the page fails, status {status}:\n{text}\n" + "\n".join(logs))
        subprocess.run(["docker", "rm", "-f", "web1"], env=environment, check=True, capture_output=True)
    return text


@contextlib.contextmanager
def _engine(directory: Path, data: Path) -> Iterator[None]:
    parent = f"/{directory.name}"
    argv = [
        *("dockerd", "--iptables=false", "--bridge=none", f"--host=unix://{directory}/docker.sock"),
        *(f"--data-root={data}", f"--exec-root={directory}/exec", f"--pidfile={directory}/docker.pid"),
        f"--cgroup-parent={parent}",
    ]
    cache = quickstart.parser().get_default("cache")
    rootfs.ensure(cache, 100000)
    try:
        with _started(argv, directory / "dockerd"):
            tar = ["tar", "--create", "--numeric-owner", f"--directory={cache / rootfs.SUITE}", "."]
            load = ["docker", "-H", f"unix://{directory}/docker.sock", "import", "-", IMAGE]
            with subprocess.Popen(tar, stdout=subprocess.PIPE) as archive:
                subprocess.run(load, stdin=archive.stdout, check=True, stdout=subprocess.DEVNULL)
            yield
    finally:
        for hierarchy in Path("/sys/fs/cgroup").glob("*"):
            cgroups.remove(hierarchy / parent.strip("/"))


def main() -> int:
    """The command."""
    unshare_mounts()
    execute()
    return 0


if __name__ == "__main__":
    sys.exit(main())
