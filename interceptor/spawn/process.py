"""A process in a container, as the parent sees it."""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TypedDict

from interceptor.errors import ContainerError
from interceptor.kernel.fd import OwnedFd
from interceptor.kernel.process import pidfd_open
from interceptor.spawn.channel import Channel, reap, wait_readable
from interceptor.spawn.child import fork
from interceptor.spawn.job import Job

#: A program with its arguments, or a function that is run in a forked copy of this process.
Command = Sequence[str] | Callable[..., object]

ENVIRONMENT: Mapping[str, str] = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "container": "interceptor",
}

#: Seconds to wait for what the kernel does without delay once a process has been killed.
REAP_SECONDS = 30.0

#: Seconds that one step of a set-up may take.
STEP_SECONDS = 60.0


class JobOptions(TypedDict, total=False):
    """What can be said of a process. All is optional."""

    #: What it reads from standard input. Default: nothing.
    stdin: bytes
    #: False: it writes where this process does, and nothing of that is kept.
    capture: bool
    #: All of its environment. Default: `ENVIRONMENT`.
    environment: Mapping[str, str]
    #: Its working directory.
    directory: str
    #: Default: True.
    no_new_privs: bool
    #: Descriptors that it inherits, by their numbers.
    pass_fds: Sequence[int]
    #: Names as prctl(2) has them without ``CAP_``, in small letters: they are gone for ever.
    drop_capabilities: Sequence[str]


@dataclass(frozen=True)
class Completed:
    """How a process ended. ``returncode`` is negative for a signal; ``value`` is what a function returned."""

    returncode: int
    stdout: bytes
    stderr: bytes
    value: object = None


@dataclass
class Outputs:
    """The files of a process: memfds, so that nobody has to read while it writes, however much that is."""

    stdin: OwnedFd
    stdout: OwnedFd
    stderr: OwnedFd
    outcome: OwnedFd = field(default_factory=lambda: _memfd("outcome"))

    @staticmethod
    def make(options: JobOptions) -> Outputs:
        stdin = options.get("stdin")
        if stdin is None:
            source = OwnedFd(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
        else:
            source = _memfd("stdin")
            with open(source.fileno(), "wb", closefd=False) as file:
                file.write(stdin)
            os.lseek(source.fileno(), 0, os.SEEK_SET)
        if options.get("capture", True):
            return Outputs(source, _memfd("stdout"), _memfd("stderr"))
        return Outputs(source, OwnedFd(os.dup(1)), OwnedFd(os.dup(2)))

    def close(self) -> None:
        for fd in (self.stdin, self.stdout, self.stderr, self.outcome):
            fd.close()


def _memfd(name: str) -> OwnedFd:
    return OwnedFd(os.memfd_create(name, os.MFD_CLOEXEC))


def contents(file: OwnedFd) -> bytes:
    """All that is in a memfd so far; nothing where it is a terminal or pipe of this process."""
    try:
        return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0)
    except OSError:
        return b""


def make_job(command: Command, arguments: tuple[object, ...], outputs: Outputs, options: JobOptions) -> Job:
    """Raises `TypeError` for arguments beside a program that has its own."""
    function = None
    argv = None
    if callable(command):
        function = functools.partial(command, *arguments)
    elif arguments:
        raise TypeError("arguments are for functions; a program's are in its sequence")
    else:
        argv = [os.fsdecode(word) for word in command]
    return Job(
        argv=argv,
        function=function,
        environment=options.get("environment", ENVIRONMENT),
        directory=options.get("directory", "/"),
        stdio=(outputs.stdin.fileno(), outputs.stdout.fileno(), outputs.stderr.fileno()),
        outcome=outputs.outcome.fileno(),
        no_new_privs=options.get("no_new_privs", True),
        pass_fds=tuple(options.get("pass_fds", ())),
        drop_capabilities=tuple(options.get("drop_capabilities", ())),
    )


class Process:
    """A running or ended process. ``pid`` and ``pidfd`` are of the host; of process 1 for a container's main process.

    Close it, or use it as a context manager: that kills it if it still runs.
    """

    def __init__(
        self, pid: int, pidfd: OwnedFd, helper: int, channel: Channel, outputs: Outputs | None
    ) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self._helper = helper
        self._channel = channel
        self._outputs = outputs
        self._returncode: int | None = None
        self._completed: Completed | None = None

    @property
    def stdout(self) -> bytes:
        """What it has written to standard output so far."""
        return self._output("stdout")

    @property
    def stderr(self) -> bytes:
        """What it has written to standard error so far."""
        return self._output("stderr")

    @property
    def returncode(self) -> int | None:
        """None until `wait` has seen the end."""
        return self._returncode

    def wait(self, timeout: float | None = 60.0) -> Completed:
        """Wait for its end, at most ``timeout`` seconds (None: for ever).

        Raises what the function raised, with the traceback in the container as a note; `TimeoutError`, after which it
        still runs; `OSError` where the program could not be executed.
        """
        self._wait(timeout)
        value = self._outcome()
        assert self._returncode is not None
        return Completed(self._returncode, self.stdout, self.stderr, value)

    def send_signal(self, number: int) -> None:
        """pidfd_send_signal(2); nothing where it has ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd.fileno(), number)

    def kill(self) -> None:
        """SIGKILL."""
        if not self.pidfd.closed:
            self.send_signal(signal.SIGKILL)

    def close(self) -> None:
        """Kill it, reap it, close its descriptors; its output so far stays readable. May be called again."""
        if self.pidfd.closed:
            return
        if self._returncode is None:
            self.kill()
            self._wait(REAP_SECONDS)
        # Read before the files go.
        self._completed = Completed(self._returncode or 0, self.stdout, self.stderr)
        if self._outputs is not None:
            self._outputs.close()
        self.pidfd.close()

    def _wait(self, timeout: float | None) -> None:
        if self._returncode is not None:
            return
        try:
            # Where the set-up was broken off, something older may still be queued.
            while (message := self._channel.next(timeout)) is not None and message.kind != "exited":
                pass
        except TimeoutError:
            raise TimeoutError(f"process {self.pid} still runs after {timeout:g} s") from None
        # No message: process 1 was killed, and could not say so.
        self._returncode = message.number if message is not None else -signal.SIGKILL
        self._channel.close()
        if not wait_readable(self.pidfd, REAP_SECONDS):
            raise ContainerError(f"process {self.pid} does not die")
        reap(self._helper)

    def _outcome(self) -> object:
        data = b"" if self._outputs is None or self.pidfd.closed else contents(self._outputs.outcome)
        if not data:
            return None
        good, value = pickle.loads(data)
        if good:
            return value
        assert isinstance(value, BaseException)
        raise value

    def _output(self, name: str) -> bytes:
        if self._completed is not None:
            return bytes(getattr(self._completed, name))
        return contents(getattr(self._outputs, name)) if self._outputs is not None else b""

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def launch(
    helper_body: Callable[[Channel], int],
    keep: Sequence[int],
    outputs: Outputs | None,
    bring_up: Callable[[Process, Channel], None],
    before: Callable[[int, Channel], None] | None = None,
) -> Process:
    """Fork a helper, learn which process it starts, bring that up.

    ``before`` is given the helper's process ID before the process exists. Nothing is left where a step fails, and what
    it raised is raised; `ContainerError` is what the child says of a failure of its own.
    """
    ours, theirs = Channel.pair()
    helper = fork(lambda: helper_body(theirs), keep, theirs)
    theirs.close()
    process = None
    try:
        if before is not None:
            before(helper, ours)
        # It waits to be known, so the number is still its own.
        pid = ours.receive("forked", STEP_SECONDS).number
        process = Process(pid, pidfd_open(pid), helper, ours, outputs)
        ours.send("known")
        bring_up(process, ours)
        return process
    except BaseException:
        if process is not None:
            process.close()
        else:
            # The helper sees an end of file, and gives up.
            ours.close()
            reap(helper)
        raise
