"""What systemd 257 calls to start a service with PrivateNetwork=yes and ProtectSystem=strict: a recording.

Taken by ``strace -f -p 1`` in the quickstart's container, where ``systemd-run`` started such a service: the calls of
the process that became it, from its first unshare(2) to its execve(2), that change namespaces and mounts, each with the
openat(2) of its target. Left out are the directories that it opens on its way to a path (chase() of systemd), mkdir(2),
and what it reads. ``200`` stands for the descriptor that it got.
"""

from __future__ import annotations

from collections.abc import Iterator

#: Where systemd puts a service's root together.
ROOT = "/run/systemd/mount-rootfs"
#: Of the recorded names: whatever was random in them is not here.
STAGED, PROPAGATED, INACCESSIBLE = (
    "/run/systemd/namespace",
    "/run/systemd/propagate/service",
    "/run/systemd/inaccessible/dir",
)
#: Directories that a machine with systemd has.
DIRECTORIES = (
    *(ROOT, STAGED, PROPAGATED, INACCESSIBLE, "/run/systemd/incoming", "/run/user", "/run/credentials"),
    *("/run/lock", "/home", "/root"),
)

_FD = "/proc/self/fd/200"
_UNMOUNTED = ("kernel", "devices/virtual", "module/nf_conntrack/parameters", "fs/cgroup")
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT = 1, 2, 4, 8, 32
_BIND, _MOVE, _REC, _SLAVE, _SHARED = 0x1000, 0x2000, 0x4000, 1 << 19, 1 << 20
_REMOUNTED = (
    ("/run", _RDONLY | _NOSUID | _NODEV),
    ("/tmp", _RDONLY | _NOSUID | _NODEV),
    ("", _RDONLY),
    ("/run/lock", _RDONLY | _NOSUID | _NODEV | _NOEXEC),
    ("/run/credentials", _RDONLY | _NOSUID | _NODEV),
    ("/run/systemd/incoming", _RDONLY | _NOSUID | _NODEV),
    ("/run/credentials", _RDONLY | _NOSUID | _NODEV | _NOEXEC),
    ("/sys", _NOSUID | _NODEV | _NOEXEC),
    ("/sys/kernel", _NOSUID | _NODEV | _NOEXEC),
    ("/sys/module/nf_conntrack/parameters", _NOSUID | _NODEV | _NOEXEC),
    ("/sys/devices/virtual", _NOSUID | _NODEV | _NOEXEC),
    ("/sys/fs/cgroup", _NOSUID | _NODEV | _NOEXEC),
)
_ANY = -1


def _mount(source: str, target: str, flags: int, fstype: str = "-", expected: int = 0) -> str:
    return f"mount {source} {target} {fstype} {flags} {expected}"


def _onto(path: str, source: str, flags: int, fstype: str = "-", expected: int = 0) -> tuple[str, str]:
    return f"open {path} 200 {expected}", _mount(source, _FD, flags, fstype, expected)


def service() -> Iterator[str]:
    """The calls in their order, as lines of `calls.h`; in the end back to where they began."""
    yield from ("unshare_net", "unshare", _mount("-", "/", _REC | _SLAVE))
    yield from _onto(ROOT, "/", _BIND | _REC)
    for path in ("/home", "/root"):
        yield from _onto(ROOT + path, ROOT + path, _BIND | _REC)
    yield from _onto(f"{ROOT}/run/credentials", INACCESSIBLE, _BIND | _REC)
    yield from _onto(f"{ROOT}/run/systemd/incoming", PROPAGATED, _BIND)
    yield from _onto(f"{ROOT}/run/user", f"{ROOT}/run/user", _BIND | _REC)
    yield from _onto(STAGED, "sysfs", _NOSUID | _NODEV | _NOEXEC, "sysfs")
    yield f"open {ROOT}/sys/fs/cgroup 207 {_ANY}"
    # umount_recursive(): from the top again after each one that went.
    for gone in (1, 2, 3, 4, 0):
        for path in ("", *_UNMOUNTED[:gone]):
            yield f"umount2 {f'{ROOT}/sys/{path}'.rstrip('/')} 8 {_ANY}"
    yield from _onto(f"{ROOT}/sys", STAGED, _MOVE)
    yield _mount("/proc/self/fd/207", f"{ROOT}/sys/fs/cgroup", _BIND | _REC, expected=_ANY)
    for path, flags in _REMOUNTED:
        yield from _onto(ROOT + path, "-", flags | _REMOUNT | _BIND, expected=_ANY)
    yield from (f"pivot {ROOT} 0", "umount2 . 2 0", _mount("-", "/", _REC | _SHARED))
    yield from (_mount("-", "/run/systemd/incoming", _SLAVE), "home")
