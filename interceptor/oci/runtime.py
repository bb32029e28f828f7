"""``interceptor-runc``: an OCI runtime that makes guarded system containers by means of a stock one.

It looks at its command line, does what is needed beforehand, and becomes the stock runtime by execve(2): what that
prints, how it exits and how it is killed is its own. A manager calls it several times for each container and waits, so
nothing is imported at the top that takes time, and ``create`` and ``run`` leave the work to the daemon, which is warm:
see `interceptor.oci.prepare`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import sys

from interceptor.errors import InterceptorError
from interceptor.oci.commandline import CommandLine, parse

# As in typing.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, NoReturn

DEFAULT_CONFIG = "/etc/interceptor/config.toml"
RUNTIME_VARIABLE = "INTERCEPTOR_RUNTIME"
CONFIG_VARIABLE = "INTERCEPTOR_CONFIG"
#: What runc and crun use without ``--root``.
DEFAULT_ROOTS = {"crun": "/run/crun"}

#: Seconds that the daemon may take for an answer while a manager waits.
TIMEOUT = 30.0
#: The same where it can go on without.
SHORT_TIMEOUT = 10.0
#: The same for a container to be made: its root filesystem may have to be cloned. One that hangs is noticed there.
CREATE_TIMEOUT = 600.0

_CLONE_NEWNS = 0x20000
_SIGTERM = ("15", "TERM", "SIGTERM")
#: What systemd as process 1 takes for "power off" (systemd(1), "Signals"): SIGRTMIN+3.
_SIGRTMIN_3 = "37"


class Local:
    """What the wrapper needs of the configuration; the daemon checks all of it."""

    def __init__(self, file: str | None) -> None:
        self.file = file or os.environ.get(CONFIG_VARIABLE)
        values = _toml(self.file or DEFAULT_CONFIG, needed=self.file is not None)
        self.runtime_dir = str(values.get("runtime_dir", "/run/interceptor"))
        self.runtime = os.environ.get(RUNTIME_VARIABLE) or str(values.get("runtime", "runc"))
        self.control = os.path.join(self.runtime_dir, "control.sock")

    def ask(self, message: dict[str, object], timeout: float = TIMEOUT) -> Any:
        """The daemon's answer. Raises `InterceptorError`."""
        from interceptor.client import request

        return request(self.control, message, timeout)

    def root(self, line: CommandLine) -> str:
        """The directory in which the stock runtime keeps states."""
        given = line.value("--root")
        return os.path.abspath(given or DEFAULT_ROOTS.get(os.path.basename(self.runtime), "/run/runc"))

    def note(self, cid: str) -> str:
        """The file in which ``create`` leaves for later commands what they need to know."""
        return os.path.join(self.runtime_dir, "wrapped", cid)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Exit status: the stock runtime's; 1 with one line of explanation if it was not called."""
    line = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        local = Local(line.config)
        words = _COMMANDS.get(line.command or "", _pass_through)(line, local)
        _become(local.runtime, words)
    except InterceptorError as error:
        hint = f" ({error.hint})" if error.hint else ""
        _complain(line, f"interceptor-runc {line.command or ''}: {error}{hint}")
    except OSError as error:
        _complain(line, f"interceptor-runc {line.command or ''}: {error}")
    return 1


def _become(runtime: str, words: Sequence[str]) -> NoReturn:
    try:
        os.execvp(runtime, [runtime, *words])
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        raise InterceptorError(
            f"the runtime {runtime!r} is not installed",
            f"set runtime in the configuration, or {RUNTIME_VARIABLE}",
        ) from None


def _complain(line: CommandLine, message: str) -> None:
    """As runtimes do: managers show what the log file says, people see standard error."""
    path = line.value("--log")
    if path is not None:
        import json
        import time

        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        entry = json.dumps({"level": "error", "msg": message, "time": stamp})
        if line.value("--log-format") != "json":
            entry = f'time="{stamp}" level=error msg={json.dumps(message)}'
        try:
            with open(path, "a") as log:
                log.write(entry + "\n")
        except OSError:
            pass  # it is said on standard error in any case
    print(message, file=sys.stderr)


def _toml(path: str, needed: bool) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            data = file.read()
    except FileNotFoundError:
        if needed:
            raise InterceptorError(f"{path}: no such file") from None
        return {}
    except OSError as error:
        raise InterceptorError(f"{path}: {error.strerror}") from None
    plain = plain_values(data)
    if plain is not None:
        return plain
    import tomllib

    try:
        return tomllib.loads(data.decode())
    except ValueError as error:
        raise InterceptorError(f"{path}: not TOML: {error}") from None


def plain_values(data: bytes) -> dict[str, Any] | None:
    """What is needed here of a configuration that says it plainly; None for one that takes a parser, which takes as
    long to import as all the rest."""
    if b'"""' in data or b"'''" in data or b"\r" in data:
        return None
    found: dict[str, Any] = {}
    for line in data.split(b"\n"):
        name, equals, value = (part.strip() for part in line.partition(b"="))
        if name[:1] in (b'"', b"'"):
            return None  # a quoted key can have escapes
        if name not in (b"runtime", b"runtime_dir"):
            continue
        text = value[1:-1]
        quoted = len(value) > 1 and value[:1] == value[-1:] == b'"'
        if (
            not (equals and quoted and text.isascii())
            or b'"' in text
            or b"\\" in text
            or name.decode() in found
        ):
            return None
        found[name.decode()] = text.decode()
    return found


# ---- commands ----------------------------------------------------------------------------------------------


def _pass_through(line: CommandLine, local: Local) -> list[str]:
    return line.words


def _create(line: CommandLine, local: Local) -> list[str]:
    """A mount namespace of this process's own, in which the daemon puts together what the runtime will find."""
    if line.container is None or {"-h", "--help"} & set(line.words):
        return line.words
    _unshare_mounts()
    reply = local.ask(
        {
            "op": "prepare",
            "id": line.container,
            "pid": os.getpid(),
            "runtime_root": local.root(line),
            "bundle": os.path.abspath(line.value("--bundle", "-b") or "."),
            "runtime": local.runtime,
        },
        CREATE_TIMEOUT,
    )
    give_pipes(int(reply["stdio_owner"]))
    keep_null()
    return line.words


def _unshare_mounts() -> None:
    if hasattr(os, "unshare"):  # Python 3.12
        os.unshare(_CLONE_NEWNS)
        return
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"unshare(CLONE_NEWNS): {os.strerror(code)}")


def _delete(line: CommandLine, local: Local) -> list[str]:
    """Where the runtime knows the container its poststop hook tells the daemon; where it does not nobody else would."""
    directory = _clone(line, local)
    if directory is not None:
        _delete_clone(line, local, directory)
    if line.container and not _exists(line, local):
        release(local, line.container)
    return line.words


def _delete_clone(line: CommandLine, local: Local, directory: str) -> NoReturn:
    """What the container has changed goes back to the manager before that hears of the end. Where it cannot, the clone
    stays for the next to try: the daemon, ``interceptor sync``, the next container of the same tree."""
    status = _call(local, line.words)
    if not _exists(line, local):
        release(local, line.container or "")
        from interceptor.idshift.giveback import in_child

        try:
            in_child(directory, final=True)
        except InterceptorError as error:
            _complain(line, f"interceptor-runc delete: {error} ({error.hint})")
    sys.exit(status)


def _pause(line: CommandLine, local: Local) -> list[str]:
    """A manager pauses a container to look at its files, so what that has changed goes there now."""
    directory = _clone(line, local)
    if directory is None:
        return line.words
    status = _call(local, line.words)
    if status == 0:
        from interceptor.idshift.giveback import in_child

        try:
            in_child(directory, final=False)
        except (InterceptorError, OSError):
            _call(local, ["resume" if word == "pause" else word for word in line.words])
            raise
    sys.exit(status)


def _clone(line: CommandLine, local: Local) -> str | None:
    """Where the container's root filesystem was cloned to, if it was."""
    try:
        with open(local.note(line.container or ""), "rb") as file:
            if b'"clone": null' in file.read():
                return None  # without the time that a parser takes to be imported
    except OSError:
        return None
    found = _known(line, local).get("clone")
    return found if isinstance(found, str) else None


def _call(local: Local, words: Sequence[str]) -> int:
    """The exit status of the stock runtime, where something is to be done after it."""
    status = os.spawnvp(os.P_WAIT, local.runtime, [local.runtime, *words])
    return status if status >= 0 else 128 - status


def release(local: Local, cid: str) -> None:
    """Tells the daemon that a container is gone. Without a daemon the next one finds out."""
    try:
        local.ask({"op": "release", "id": cid})
    except InterceptorError:
        return


def _exists(line: CommandLine, local: Local) -> bool:
    """Whether the stock runtime knows the container."""
    return os.path.isdir(os.path.join(local.root(line), line.container or ""))


def _known(line: CommandLine, local: Local) -> dict[str, Any]:
    """What ``create`` left about the container; nothing for one that it did not make."""
    try:
        with open(local.note(line.container or "")) as file:
            import json

            found = json.load(file)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _kill(line: CommandLine, local: Local) -> list[str]:
    """systemd as the first process is stopped by another signal than managers send (see `_SIGRTMIN_3`)."""
    signals = line.arguments[1:]
    if not _known(line, local).get("systemd") or {"-a", "--all"} & set(line.words):
        return line.words
    if not signals:
        return [*line.words, _SIGRTMIN_3]
    if signals[0][1] not in _SIGTERM:
        return line.words
    words = list(line.words)
    words[signals[0][0]] = _SIGRTMIN_3
    return words


def _exec(line: CommandLine, local: Local) -> list[str]:
    """Processes that a manager adds get the capabilities that the first one got."""
    known = _known(line, local)
    path = line.value("--process", "-p")
    if not known or line.container is None:
        return line.words
    # Names that the manager has looked for must not hide what this process is about to make (idshift/coherence.py).
    with contextlib.suppress(InterceptorError):
        local.ask({"op": "refresh", "id": line.container}, SHORT_TIMEOUT)
    import json

    process: dict[str, Any] = {}
    if path is not None:
        with open(path) as file:
            process = json.load(file)
    give_pipes(known["first_uid"] + int((process.get("user") or {}).get("uid") or 0))
    if known["honor_caps"]:
        return line.words
    if path is None:
        at = next(i for i, word in line.arguments if word == line.container)
        extra = [f"--cap={name}" for name in known["capabilities"]]
        return [*line.words[:at], *extra, *line.words[at:]]
    from interceptor.oci.rewrite import rewrite_process

    process = rewrite_process(process, False, known["capabilities"], known["apparmor"])
    name = "--process" if line.value("--process") is not None else "-p"
    return line.replaced(name, private_file(json.dumps(process)))


def give_pipes(owner: int) -> None:
    """Gives the pipes of standard input and output to the process that will have them: it may open them again, as
    ``/dev/stdout``. A runtime, which does so in the container's user namespace, may not give away what is root's."""
    for fd in (0, 1, 2):
        try:
            if stat.S_ISFIFO(os.fstat(fd).st_mode):
                os.fchown(fd, owner, -1)
        except OSError:
            continue  # closed, or not ours to give: the runtime then says what it cannot open


def keep_null() -> None:
    """Has standard input and output that are /dev/null be so by a mount that is read-only: crun 1.8 gives them to the
    container's root, and with them the host's node, whose mode that could then change for everybody."""
    for fd in (0, 1, 2):
        try:
            status = os.fstat(fd)
            if not stat.S_ISCHR(status.st_mode) or status.st_rdev != os.makedev(1, 3):
                continue
            from interceptor.kernel import mount
            from interceptor.kernel.flags import MountAttr

            with mount.clone_mount(mount.AT_FDCWD, "/dev/null") as tree:
                mount.mount_setattr(tree, set_=MountAttr.MOUNT_ATTR_RDONLY)
                mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
                null = os.open(f"/proc/self/fd/{tree.fileno()}", mode | os.O_CLOEXEC)
            os.dup2(null, fd)
            os.close(null)
        except OSError:
            continue  # closed, or there is none here


def private_file(text: str) -> str:
    """A path to a file with that text which only this process and those that it becomes have."""
    fd = os.memfd_create("interceptor", 0)
    os.write(fd, text.encode())
    return f"/proc/self/fd/{fd}"


_COMMANDS: dict[str, Callable[[CommandLine, Local], list[str]]] = {
    "create": _create,
    "run": _create,
    "delete": _delete,
    "pause": _pause,
    "kill": _kill,
    "exec": _exec,
}

if __name__ == "__main__":
    sys.exit(main())
