"""The rest of the commit test: a package that dpkg installs inside, device nodes, attributes on disk, export."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.containers import quickstart, rootfs
from integration.docker.engine import IMAGE, Docker
from tests.docker.test_commit import EDITS, LOOK, SMOKE

pytestmark = [pytest.mark.root, pytest.mark.slow]

SAVED = "interceptor-test/package"
NODES = "interceptor-test/nodes"

CONTROL = """\
Package: thing
Version: 1
Architecture: all
Maintainer: nobody <nobody@localhost>
Description: files of every kind
"""

#: What packages' maintainer scripts do: a user, ownership, capabilities (as setcap(8), which the image lacks).
POSTINST = r"""#!/bin/sh
set -e
useradd --system thing
chown thing:thing /var/lib/thing; chmod 2750 /var/lib/thing
perl -e '
  my $v = pack("V5", 0x02000001, 1 << 13, 0, 0, 0);
  my $p = "/usr/bin/thing-ping\0"; my $n = "security.capability\0";
  syscall(188, $p, $n, $v, 20, 0) == 0 or die "setxattr: $!"'
"""

#: What dpkg and the container know of it. The last line counts the names of one file.
INSTALLED = r"""
dpkg -s thing | grep ^Status; dpkg -V thing && echo verified
stat -c '%n %A %u:%g %s' /usr/bin/thing* /etc/thing.conf /var/lib/thing
perl -e 'my $b = "\0" x 64; my ($p, $k) = ("/usr/bin/thing-ping\0", "security.capability\0");
  my $r = syscall(191, $p, $k, $b, 64); print unpack("H*", substr($b, 0, $r)), "\n"'
stat -c %i /usr/bin/thing-hard /usr/bin/thing-link | uniq | wc -l
su thing -s /bin/sh -c 'id -un; /usr/bin/thing-ping && echo runs'
"""

#: Version 2 of a list with an entry for user 33 (posix_acl_xattr.h), written as setfacl(1) would, and a user attribute.
ATTRIBUTES = r"""
touch /srv/acl
perl -e '
  my $none = 0xffffffff;
  my @entries = ([1, 6, $none], [2, 4, 33], [4, 4, $none], [0x10, 6, $none], [0x20, 0, $none]);
  my $v = pack("V", 2) . join("", map { pack("vvV", @$_) } @entries);
  my ($p, $a, $u, $w) = ("/srv/acl\0", "system.posix_acl_access\0", "user.note\0", "kept");
  syscall(188, $p, $a, $v, length $v, 0) == 0 or die "acl: $!";
  syscall(188, $p, $u, $w, length $w, 0) == 0 or die "user: $!"'
chattr +i /srv/acl 2>&1 || true
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package with programs of the image: setuid, to be given capabilities, hard links, a conffile."""
    tree = tmp_path / "thing"
    for name in ("DEBIAN", "usr/bin", "etc", "var/lib/thing"):
        (tree / name).mkdir(parents=True)
    programs = quickstart.parser().get_default("cache") / rootfs.SUITE / "usr/bin"
    for source, name, mode in (
        ("su", "thing-su", 0o4755),
        ("true", "thing-ping", 0o755),
        ("true", "thing-hard", 0o755),
    ):
        (tree / "usr/bin" / name).write_bytes((programs / source).read_bytes())
        (tree / "usr/bin" / name).chmod(mode)
    os.link(tree / "usr/bin/thing-hard", tree / "usr/bin/thing-link")
    (tree / "etc/thing.conf").write_text("as it came\n")
    (tree / "DEBIAN/control").write_text(CONTROL)
    (tree / "DEBIAN/conffiles").write_text("/etc/thing.conf\n")
    (tree / "DEBIAN/postinst").write_text(POSTINST)
    (tree / "DEBIAN/postinst").chmod(0o755)
    subprocess.run(["dpkg-deb", "--root-owner-group", "--build", tree], check=True, capture_output=True)
    return tmp_path / "thing.deb"


@pytest.fixture
def container(docker: Docker, request: pytest.FixtureRequest) -> Iterator[str]:
    """Under the strategy that a test names, or else that it gets."""
    wanted = f"INTERCEPTOR_OWNERSHIP={getattr(request, 'param', 'auto')}"
    docker.start("package", "-e", wanted, IMAGE, "sleep", "infinity")
    yield "package"
    docker("rm", "-f", "package")
    docker.try_("rmi", SAVED)


def upper(docker: Docker, container: str) -> Path:
    """Where the container's changes are on disk."""
    return Path(docker("inspect", "-f", "{{.GraphDriver.Data.UpperDir}}", container).strip())


@pytest.mark.parametrize("container", ["idmapped", "clone"], indirect=True)
def test_an_installed_package_is_committed_whole(docker: Docker, container: str, package: Path) -> None:
    docker("cp", str(package), f"{container}:/root/thing.deb")
    docker("exec", container, "dpkg", "-i", "/root/thing.deb")
    seen = docker("exec", container, "sh", "-c", INSTALLED)
    for line in ("Status: install ok installed", "verified", "1", "thing", "runs"):
        assert line in seen.splitlines()
    assert "/usr/bin/thing-su -rwsr-xr-x 0:0" in seen
    assert "010000020020000000000000000000000000000" in seen
    # From then on a clone's changes are there.
    docker("pause", container)
    docker("unpause", container)
    # On disk as if there were no mapping: version 2, no owner of the namespace in it.
    capability = os.getxattr(upper(docker, container) / "usr/bin/thing-ping", "security.capability")
    assert struct.unpack("<I", capability[:4])[0] >> 24 == 2
    changed = [line[2:] for line in docker("diff", container).splitlines()]
    known = ("/etc", "/root", "/usr", "/var")
    assert all(path in known or path.startswith(tuple(f"{top}/" for top in known)) for path in changed)
    assert {line for line in changed if line.startswith("/usr/bin/")} == {
        f"/usr/bin/thing-{name}" for name in ("hard", "link", "ping", "su")
    }
    docker("commit", container, SAVED)
    for runtime in ("runc", "interceptor"):
        argv = ["run", "--rm", "--network=none", f"--runtime={runtime}", SAVED, "sh", "-c"]
        assert docker(*argv, INSTALLED).splitlines() == seen.splitlines(), runtime
    docker.run(SAVED, "dpkg", "--purge", "thing")


def test_every_program_of_the_committed_image_runs(docker: Docker, container: str) -> None:
    docker("exec", container, "sh", "-c", EDITS)
    docker("commit", container, SAVED)
    for runtime in ("runc", "interceptor"):
        argv = ["run", "--rm", "--network=none", f"--runtime={runtime}", SAVED, "sh", "-c", SMOKE]
        count, bad = docker(*argv).split()[-2:]
        assert int(count) > 200
        assert bad == "0", runtime


def test_device_nodes_of_an_image_stay_device_nodes(docker: Docker) -> None:
    """Made by a runtime that may; a container of ours may not make any, but move and chown those that are there."""
    made = "mknod /srv/null c 1 3; mknod /srv/loop b 7 200; mkfifo /srv/fifo; chmod 604 /srv/*"
    docker("run", "--name=nodes", "--network=none", "--runtime=runc", IMAGE, "sh", "-c", made)
    docker("commit", "nodes", NODES)
    docker("rm", "nodes")
    change = "chown 33:7 /srv/null; chmod 640 /srv/loop; mv /srv/loop /srv/moved; chown 1:2 /srv/fifo"
    look = "cd /srv; stat -c '%n %F %t:%T %a %u:%g' *"
    docker.start("nodes", NODES, "sh", "-ec", f"{change}; {look}; mknod /srv/new c 1 3 || echo refused")
    assert docker("wait", "nodes").strip() == "0"
    *lines, refused = docker("logs", "nodes").splitlines()
    assert lines == [
        "fifo fifo 0:0 604 1:2",
        "moved block special file 7:c8 640 0:0",
        "null character special file 1:3 604 33:7",
    ]
    assert refused == "refused"
    docker("commit", "nodes", SAVED)
    for runtime in ("runc", "interceptor"):
        argv = ["run", "--rm", "--network=none", f"--runtime={runtime}", SAVED, "sh", "-c", look]
        assert docker(*argv).splitlines() == lines
    docker("rm", "nodes")
    docker("rmi", SAVED, NODES)


def test_attributes_are_on_disk_as_the_container_set_them(docker: Docker, container: str) -> None:
    """Docker's archives have none of these, whatever the runtime; its upper directory has."""
    said = docker("exec", container, "sh", "-c", ATTRIBUTES)
    # As for the root of any user namespace: CAP_LINUX_IMMUTABLE counts in the first one only.
    assert "Operation not permitted" in said
    file = upper(docker, container) / "srv/acl"
    assert os.getxattr(file, "user.note") == b"kept"
    version, *rest = struct.unpack("<I" + "HHI" * 5, os.getxattr(file, "system.posix_acl_access"))
    entries = [tuple(rest[at : at + 3]) for at in range(0, 15, 3)]
    assert version == 2
    assert (2, 4, 33) in entries, "the user's ID is the container's, not one of its range"
    assert not [path for path in (file, *file.parents[:2]) if path.lstat().st_uid]


@pytest.mark.parametrize("container", ["idmapped", "clone"], indirect=True)
def test_an_export_has_what_the_container_saw(docker: Docker, container: str) -> None:
    docker("exec", container, "sh", "-c", EDITS)
    seen = set()
    for line in docker("exec", container, "sh", "-c", LOOK).splitlines():
        path, *fields = line.split("|")
        if path.startswith("srv/"):
            kind, mode, owner, *rest = fields
            _, size, mtime, link = rest if kind != "d" else ("", "0", *rest, "")
            seen.add((path, kind, int(mode, 8), owner, int(size) if kind == "f" else 0, int(mtime), link))
    docker("pause", container)
    data = docker.try_("export", container).stdout
    docker("unpause", container)
    exported = set()
    inodes: dict[str, tarfile.TarInfo] = {}
    with tarfile.open(fileobj=io.BytesIO(data), errors="surrogateescape") as archive:
        for member in archive:
            if not member.name.startswith("srv/"):
                continue
            file = inodes[member.linkname] if member.islnk() else member
            inodes[member.name] = file
            kind = "f" if file.isfile() else "d" if file.isdir() else "l" if file.issym() else "p"
            owner = f"{file.uid}:{file.gid}"
            link = file.linkname if kind == "l" else ""
            exported.add((member.name, kind, file.mode & 0o7777, owner, file.size, int(file.mtime), link))
    assert exported == seen
    assert len(seen) > 9
