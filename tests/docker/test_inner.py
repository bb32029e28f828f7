"""An engine inside the container, with overlay2 on a volume, and a container of its own."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from integration.containers.notify import NotifySocket
from integration.docker.engine import IMAGE, READY_SECONDS, Docker

pytestmark = [pytest.mark.root, pytest.mark.slow]

#: The host's engine, lent to the container: its image has none.
PROGRAMS = ("dockerd", "containerd", "containerd-shim-runc-v2", "runc", "docker")

#: A root filesystem for the inner container from the outer one's files.
INNER = r"""
set -eu
for lib in /lent/*.so*; do [ -e "$1/${lib##*/}" ] || cp "$lib" /usr/local/lib/; done; ldconfig
dockerd --iptables=false --bridge=none >/tmp/dockerd.log 2>&1 &
"""
RUN = r"""
set -eu
docker info -f '{{.Driver}}'
for path in /usr/bin/dash /usr/bin/cat $(ldd /usr/bin/dash /usr/bin/cat | grep -o '/[^ :]*'); do
  # The libraries' directories are links to others.
  directory=$(realpath "$(dirname "$path")"); mkdir -p "/tmp/inner$directory"; cp -L "$path" "/tmp/inner$directory/"
done
cp -a /bin /lib /lib64 /tmp/inner/
tar -C /tmp/inner -c . | docker import - inner >/dev/null
docker run --rm --network=none -v kept:/v inner dash -c 'echo inside >/v/file; cat /v/file /proc/1/uid_map'
"""


def libraries(program: str) -> set[str]:
    """The shared libraries that a program of the host is linked with."""
    done = subprocess.run(["ldd", program], capture_output=True, text=True, check=False)
    return set(re.findall(r"=> (/\S+)", done.stdout))


def test_docker_in_docker(docker: Docker, tmp_path: Path) -> None:
    lent = tmp_path / "lent"
    lent.mkdir()
    binds: list[str] = [f"-v={lent}:/lent:ro", "-v=inner-data:/var/lib/docker"]
    found = {name: shutil.which(name) for name in PROGRAMS}
    for name, path in found.items():
        assert path is not None, name
        binds.append(f"-v={path}:/usr/bin/{name}:ro")
        for library in libraries(path):
            shutil.copy(library, lent)
    where = str(Path(next(iter(libraries("/usr/bin/env")))).parent)
    with NotifySocket(tmp_path / "notify") as ready:
        docker.start("outer", *binds, f"-v={ready.path}:/notify", IMAGE, "sleep", "infinity")
        try:
            docker("exec", "-e", "NOTIFY_SOCKET=/notify", "outer", "sh", "-c", INNER, "sh", where)
            ready.wait_ready(int(docker("inspect", "-f", "{{.State.Pid}}", "outer")), READY_SECONDS)
            driver, said, mapping = docker("exec", "outer", "sh", "-c", RUN).splitlines()
        finally:
            log = docker.try_("exec", "outer", "tail", "-n", "20", "/tmp/dockerd.log").stdout.decode()
            print(log)
            docker("rm", "-f", "outer")
            docker("volume", "rm", "inner-data")
    assert driver == "overlay2"
    assert said == "inside"
    assert mapping.split()[0] == "0"
