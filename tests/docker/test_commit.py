"""The commit test: what a container did to its files is in the image, and nothing else is.

Docker's archives have times in seconds and no extended attributes but capabilities, and it makes /etc anew for each
container, whatever the runtime: that is left out of the comparison.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from integration.containers import daemon as daemons
from integration.docker.engine import IMAGE, Docker

pytestmark = [pytest.mark.root, pytest.mark.slow]

COMMITTED = "interceptor-test/commit"

#: What is done in the container. A package's files are among it: setuid, setgid, sticky, capabilities, conffiles.
EDITS = r"""
set -eu
cp /bin/true /usr/local/bin/capable; cp /bin/su /usr/local/bin/setuid; chmod 4755 /usr/local/bin/setuid
perl -e '
  my $v = pack("V5", 0x02000001, 1 << 13, 0, 0, 0);
  my $p = "/usr/local/bin/capable\0"; my $n = "security.capability\0";
  syscall(188, $p, $n, $v, 20, 0) == 0 or die "setxattr: $!"'
mkdir -p /srv/a /srv/b /srv/s; chmod 3777 /srv/s
echo data > /srv/a/hard; ln /srv/a/hard /srv/b/hard; ln /srv/a/hard /srv/a/other
chown 33:7 /srv/a/hard; chmod 2640 /srv/a/hard
mkfifo -m 600 /srv/fifo; ln -s ../nowhere /srv/link; chown -h 1:2 /srv/link
truncate -s 64M /srv/sparse; printf x | dd of=/srv/sparse bs=1 seek=32M conv=notrunc status=none
printf name > "$(printf '/srv/not\377utf8')"
touch -d '2001-02-03 04:05:06.123456789' /srv/a/hard
mv /etc/issue /srv/moved; rm /etc/issue.net; rm -r /usr/share/doc/dash
mkdir /usr/share/doc/dash; touch /usr/share/doc/dash/new
echo root:changed >> /etc/environment; sync
"""

#: What a container sees of a tree: every property by path, in an order of its own. How many links a directory has and
#: how long it is tells of the layers that an overlay merges, not of what is in it.
LOOK = r"""
cd /
find etc srv usr/local usr/share/doc/dash -xdev \( -type d -printf '%p|%y|%m|%U:%G|%Ts\n' \
  -o -printf '%p|%y|%m|%U:%G|%n|%s|%Ts|%l\n' \) |
  grep -avE '^etc(/(hosts|hostname|resolv.conf|mtab))?\|' | sort
perl -e 'my $b = "\0" x 64; my ($p, $k) = ("/usr/local/bin/capable\0", "security.capability\0");
  my $r = syscall(191, $p, $k, $b, 64); print "capability ", $r < 0 ? "none" : unpack("H*", substr($b, 0, $r)), "\n"'
stat -c '%n %i' /srv/a/hard /srv/b/hard /srv/a/other | awk '{print $2}' | uniq | wc -l
find srv -type f -exec md5sum {} +| sort
"""

LONG = os.environ.get("INTERCEPTOR_LONG") == "1"

#: Every ELF file: the kernel and the loader accept it. `ldd` would run what it looks at.
SMOKE = r"""
n=0; bad=0
for loader in /lib64/ld-linux-x86-64.so.2 /lib/ld-linux-aarch64.so.1; do [ -e $loader ] && break; done
for f in $(find /usr/bin /usr/sbin /usr/local/bin -type f -size +0); do
  [ "$(head -c 4 $f | od -An -tx1 | tr -d ' ')" = 7f454c46 ] || continue
  n=$((n+1)); $loader --verify $f; s=$?; [ $s = 0 ] || [ $s = 2 ] || { echo "BAD $f $s"; bad=$((bad+1)); }
done
dash -c true && /usr/local/bin/capable && /usr/local/bin/setuid --version >/dev/null
echo $n $bad
"""


@pytest.fixture(params=["idmapped", "clone"])
def edited(docker: Docker, request: pytest.FixtureRequest) -> Iterator[str]:
    """A running container with all the edits, under each strategy."""
    docker.start("edited", "-e", f"INTERCEPTOR_OWNERSHIP={request.param}", IMAGE, "sleep", "infinity")
    docker("exec", "edited", "sh", "-c", EDITS)
    yield "edited"
    docker("rm", "-f", "edited")
    docker.try_("rmi", COMMITTED)


@pytest.mark.parametrize("state", ["paused by commit", "stopped", "daemon killed"])
def test_a_committed_image_is_what_the_container_saw(docker: Docker, edited: str, state: str) -> None:
    seen = docker("exec", edited, "sh", "-c", LOOK)
    assert "capability 01000002" in seen
    if state == "stopped":
        docker("stop", "-t", "0", edited)
    elif state == "daemon killed":
        docker.daemon.processes[-1].kill()
        docker.daemon.processes[-1].wait()
    try:
        docker("commit", edited, COMMITTED)
    finally:
        if state == "daemon killed":
            daemons.start(docker.daemon)
    for runtime in ("runc", "interceptor"):
        argv = ["run", "--rm", "--network=none", f"--runtime={runtime}", COMMITTED, "sh", "-c"]
        assert docker(*argv, LOOK).splitlines() == seen.splitlines(), runtime
        if LONG or state == "daemon killed":
            # Every file of the tree, which takes a while: else for the state in which most could have gone wrong.
            count, bad = docker(*argv, SMOKE).split()[-2:]
            assert int(count) > 200
            assert bad == "0"
    grown = int(docker("inspect", "-f", "{{.Size}}", COMMITTED)) - int(
        docker("inspect", "-f", "{{.Size}}", IMAGE)
    )
    # The sparse file counts with its length; the tree has 240 MB.
    assert grown - (64 << 20) < 2 << 20


def test_save_and_load_keep_it(docker: Docker, edited: str, tmp_path: Path) -> None:
    seen = docker("exec", edited, "sh", "-c", LOOK)
    docker("commit", edited, COMMITTED)
    docker("save", "-o", str(tmp_path / "image.tar"), COMMITTED)
    docker("rmi", COMMITTED)
    docker("load", "-i", str(tmp_path / "image.tar"))
    assert docker.run(COMMITTED, "sh", "-c", LOOK).splitlines() == seen.splitlines()


def test_diff_lists_just_the_changes(docker: Docker, edited: str) -> None:
    # A clone's changes are seen from then on.
    docker("pause", edited)
    docker("unpause", edited)
    lines = docker("diff", edited).splitlines()
    changed = {line[2:] for line in lines}
    tops = {"/etc", "/srv", "/usr"}
    assert all(
        path in tops or path.startswith(("/etc/", "/srv/", "/usr/local", "/usr/share")) for path in changed
    )
    assert {"D /etc/issue", "D /etc/issue.net", "C /etc/environment", "A /srv/moved", "A /srv/a/hard"} <= set(
        lines
    )


def test_a_clone_that_is_started_again_has_what_it_did(docker: Docker) -> None:
    """And what `docker cp` brought when it was stopped; what is copied from it is what was given back."""
    docker.start("again", "-e", "INTERCEPTOR_OWNERSHIP=clone", IMAGE, "sleep", "infinity")
    try:
        docker("exec", "again", "sh", "-c", "echo first > /srv/file; chown 33 /srv/file; rm /etc/issue")
        docker("stop", "-t", "0", "again")
        copied = docker.try_("cp", "again:/srv/file", "-").stdout
        with tarfile.open(fileobj=io.BytesIO(copied)) as archive:
            assert required(archive, "file").read() == b"first\n"
            assert archive.getmember("file").uid == 33
        brought = io.BytesIO()
        with tarfile.open(fileobj=brought, mode="w") as archive:
            put(archive, "brought", b"brought")
        docker("cp", "-", "again:/srv", stdin=brought.getvalue())
        docker("start", "again")
        script = "cat /srv/file /srv/brought; stat -c ' %u' /srv/file /srv/brought; ls /etc/issue || true"
        assert docker("exec", "again", "sh", "-c", script).split() == ["first", "brought", "33", "0"]
    finally:
        docker("rm", "-f", "again")


#: With the base image's layer 125, the most that Docker takes: it needs half a minute for them. More are mapped in
#: tests/test_idmapped.py.
LAYERS = 124 if LONG else 12


@pytest.mark.parametrize("ownership", ["idmapped", "clone"])
def test_an_image_of_many_layers(docker: Docker, tmp_path: Path, ownership: str) -> None:
    """Made of one archive, as committing that often would take a minute."""
    add_layers(docker, tmp_path, LAYERS, "interceptor-test/many")
    script = "ls /layer | wc -l; echo new > /layer/new; stat -c %u /layer/0 /layer/new"
    wanted = f"INTERCEPTOR_OWNERSHIP={ownership}"
    shown = docker.run("-e", wanted, "interceptor-test/many", "sh", "-c", script)
    assert shown.split() == [str(LAYERS), "0", "0"]
    docker("rmi", "interceptor-test/many")


def add_layers(docker: Docker, directory: Path, count: int, name: str) -> None:
    """An image with ``count`` small layers on top of the base image's (Docker image specification 1.2)."""
    docker("save", "-o", str(directory / "base.tar"), IMAGE)
    with tarfile.open(directory / "base.tar") as archive:
        [manifest] = json.load(required(archive, "manifest.json"))
        config = json.load(required(archive, manifest["Config"]))
    with tarfile.open(directory / "base.tar", "a") as archive:
        for number in range(count):
            data = io.BytesIO()
            with tarfile.open(fileobj=data, mode="w") as layer:
                layer.addfile(tarfile.TarInfo(f"layer/{number}"))
            put(archive, f"added{number}/layer.tar", data.getvalue())
            manifest["Layers"].append(f"added{number}/layer.tar")
            config["rootfs"]["diff_ids"].append(f"sha256:{hashlib.sha256(data.getvalue()).hexdigest()}")
            config["history"].append({"created": "2026-01-01T00:00:00Z"})
        put(archive, "many.json", json.dumps(config).encode())
        manifest |= {"Config": "many.json", "RepoTags": [f"{name}:latest"]}
        put(archive, "manifest.json", json.dumps([manifest]).encode())
    docker("load", "-i", str(directory / "base.tar"))


def required(archive: tarfile.TarFile, name: str) -> IO[bytes]:
    """A file of an archive."""
    file = archive.extractfile(name)
    assert file is not None
    return file


def put(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """Adds a file; a later one of the same name counts."""
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    archive.addfile(entry, io.BytesIO(data))
