"""A path of a container, resolved with the container's own rights: which mount it leads to."""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
from typing import NoReturn

from interceptor.errors import ContainerError, InterceptorError
from interceptor.kernel import process, stat
from interceptor.kernel.fd import OwnedFd
from interceptor.kernel.flags import CLONE_NEWUSER, ResolveFlag
from interceptor.kernel.namespaces import open_namespace, setns
from interceptor.kernel.process import pidfd_open

#: A filesystem of the container may never answer.
SECONDS = 5.0

# ioctl_nsfs(2).
_NS_GET_USERNS, _NS_GET_PARENT = 0xB701, 0xB702


def namespace_of(pid: int, whereabouts: object) -> int:
    """The ID of the mount namespace of process ``pid``, which must be the container's: owned by its user namespace or
    by one below that. Raises `ContainerError`.
    """
    assert isinstance(whereabouts, dict)
    try:
        with open_namespace(pid, "mnt") as mntns:
            if not _is_below(mntns, int(whereabouts["userns"])):
                raise ContainerError(f"process {pid} is in a mount namespace of somebody else")
            return stat.mount_namespace_id(mntns)
    except OSError as error:
        raise ContainerError(f"process {pid}: {error}") from None


def _is_below(namespace: OwnedFd, userns: int) -> bool:
    above = OwnedFd(fcntl.ioctl(namespace, _NS_GET_USERNS))
    while True:
        with above:
            if os.fstat(above.fileno()).st_ino == userns:
                return True
            try:
                parent = OwnedFd(fcntl.ioctl(above, _NS_GET_PARENT))
            except PermissionError:  # above is the host's
                return False
        above = parent


def mount_at(pid: int, path: bytes, whereabouts: object) -> tuple[int, bool]:
    """The unique ID of the mount that ``path`` leads to in the root of process ``pid``, and whether it is its root.

    A child does it that has left the host's rights behind; nobody waits for it for ever. Raises `InterceptorError`.
    """
    assert isinstance(whereabouts, dict)
    with pidfd_open(pid) as pidfd, open_namespace(pid, "user") as userns:
        root = OwnedFd(os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        # Whatever was opened by number is this process's, if it still lives.
        signal.pidfd_send_signal(pidfd.fileno(), 0)
        if not _is_below_or_same(userns, int(whereabouts["userns"])):
            raise ContainerError(f"process {pid} is in a user namespace of somebody else")
        ours, theirs = os.pipe()
        with OwnedFd(ours) as answer:
            child = os.fork()
            if child == 0:
                _resolve(theirs, root, userns, path)
            os.close(theirs)
            root.close()
            ready, _, _ = select.select([answer], [], [], SECONDS)
            said = os.read(answer.fileno(), 65536) if ready else b""
    os.kill(child, signal.SIGKILL)
    if not ready:
        # It is not waited for: it may be stuck in the container's filesystem, and will be reaped when that answers.
        raise InterceptorError(f"{os.fsdecode(path)}: a filesystem on the way does not answer")
    os.waitpid(child, 0)
    result = json.loads(said or b'{"error": "the resolver died"}')
    if "error" in result:
        raise InterceptorError(f"{os.fsdecode(path)}: {result['error']}")
    return int(result["mount"]), bool(result["mount_root"])


def _is_below_or_same(userns: OwnedFd, wanted: int) -> bool:
    if os.fstat(userns.fileno()).st_ino == wanted:
        return True
    try:
        return _is_below(OwnedFd(fcntl.ioctl(userns, _NS_GET_PARENT)), wanted)
    except PermissionError:
        return False


def _resolve(answer: int, root: OwnedFd, userns: OwnedFd, path: bytes) -> NoReturn:
    """In the child: as root of the container's user namespace, which is nothing on the host."""
    said: dict[str, object]
    try:
        setns(userns, CLONE_NEWUSER)
        os.setgroups([])
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
        resolve = ResolveFlag.RESOLVE_IN_ROOT | ResolveFlag.RESOLVE_NO_MAGICLINKS
        with process.openat2(root, path, os.O_PATH, resolve) as fd:
            found = stat.statx(fd)
        said = {"mount": found.mnt_id, "mount_root": found.mount_root}
    except OSError as error:
        said = {"error": os.strerror(error.errno or 0)}
    except BaseException as error:
        said = {"error": repr(error)}
    os.write(answer, json.dumps(said).encode())
    os._exit(0)
