"""Podman, with runc and with crun: more than its page of README.md shows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SECONDS = 300

#: The wrapper reads its configuration at each call, so that the runtime can be another one for the next container.
BEGIN = r"""
set +x
echo interceptor:1000000:6553600 | tee -a /etc/subuid /etc/subgid >/dev/null
mkdir -p /etc/containers/containers.conf.d
printf '[engine]\nruntime = "interceptor"\n[engine.runtimes]\ninterceptor = ["/usr/local/bin/interceptor-runc"]\n' \
    >/etc/containers/containers.conf.d/interceptor.conf
"""

LIFE = r"""
printf 'runtime = "%s"\n' RUNTIME >/etc/interceptor/config.toml
# crun takes no machine that has controllers in both versions of control groups; here it sees the first one alone.
if [ RUNTIME = crun ] && mountpoint -q /sys/fs/cgroup/unified; then umount /sys/fs/cgroup/unified; fi
echo "== RUNTIME life"
interceptor-runc --version | head -n 1
podman run -d --name life -v kept:/v IMAGE sleep infinity >/dev/null
# One pipe for both outputs: two are read in any order.
podman exec life sh -c 'exec 2>&1; echo $(cat /proc/self/uid_map)
    stat -c %u /etc/passwd /v; umount /proc/sys || echo stays
    mount -t proc proc /mnt && umount /mnt/sys && ls -A /mnt/sys | wc -l
    echo new >/srv/new; chown 33:7 /srv/new; chmod 4711 /srv/new; rm /etc/issue.net'
podman diff life | grep -v '/mnt\|/v$' | sort
podman cp life:/srv/new /tmp/taken; cat /tmp/taken
# Into a running container Podman copies as the host's root in the container's mounts, which know no such user.
podman cp /tmp/taken life:/srv/given 2>&1 | grep -o 'value too large for defined data type' || true
podman stop -t 0 life >/dev/null; podman cp /tmp/taken life:/srv/given; podman start life >/dev/null
podman exec life stat -c 'given to %u' /srv/given
podman pause life >/dev/null; podman unpause life >/dev/null
podman commit -q life saved >/dev/null
podman restart -t 0 life >/dev/null; podman exec life cat /srv/new
podman rm -f -t 0 life >/dev/null
for runtime in runc interceptor; do
    podman run --rm --runtime=$runtime saved sh -c 'stat -c "%a %u:%g" /srv/new; test -e /etc/issue.net || echo gone'
done
podman volume rm kept >/dev/null
echo "== RUNTIME left"
interceptor ps --json
stat -c 'null of %u, %a' /dev/null
"""

BOOT = r"""
echo "== runc boot"
podman run -d --name machine IMAGE /sbin/init >/dev/null
podman exec machine sh -c 'until [ -S /run/systemd/private ]; do sleep 0.1; done
    systemctl is-system-running --wait; systemctl is-active systemd-logind dbus systemd-journald'
podman stop -t 30 machine >/dev/null
podman inspect -f 'ended with {{.State.ExitCode}}' machine
podman rm machine >/dev/null
"""


@pytest.fixture(scope="module")
def said() -> dict[str, list[str]]:
    """The lines that each part of the script prints."""
    # systemd gets no hierarchy of its own in control groups of version 1 alone, as which crun sees them here.
    script = BEGIN + LIFE.replace("RUNTIME", "runc") + BOOT + LIFE.replace("RUNTIME", "crun")
    argv = [sys.executable, "-m", "integration.pages", "podman", "--script"]
    done = subprocess.run(
        argv, cwd=ROOT, capture_output=True, text=True, check=False, timeout=SECONDS, input=script
    )
    assert done.returncode == 0, done.stdout + done.stderr
    parts: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        if line.startswith("== "):
            part = parts[line.removeprefix("== ")] = []
        elif parts and line:
            part.append(line)
    print(parts)
    return parts


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["runc", "crun"])
def test_a_container_s_life(said: dict[str, list[str]], runtime: str) -> None:
    version, mapping, *lines = said[f"{runtime} life"]
    assert version.startswith(f"{runtime} version")
    assert mapping == "0 1000000 65536"
    assert lines == [
        # Owners of the image and of a volume; the original stays, the copy goes.
        *("0", "0", "umount: /proc/sys: not mounted.", "stays", "0"),
        *("A /srv/new", "C /etc", "C /srv", "D /etc/issue.net"),
        *("new", "value too large for defined data type", "given to 0", "new"),
        # The committed image, under the stock runtime and under this one.
        *("4711 33:7", "gone") * 2,
    ]
    # crun 1.8 gives its standard input away.
    assert said[f"{runtime} left"] == ["[]", "null of 0, 666"]


@pytest.mark.root
@pytest.mark.slow
def test_systemd_boots_and_stops_when_asked(said: dict[str, list[str]]) -> None:
    state, *lines = said["runc boot"]
    assert state in ("running", "degraded")
    # Killed would be 137.
    assert lines == ["active", "active", "active", "ended with 130"]
