"""What a process becomes once it stands where it should: a program, or a function of the parent's memory."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, NoReturn

import prctl

from interceptor.kernel.process import close_all_but

#: Exit status of a process that never became what it should have; the parent learns why by other ways.
NOT_STARTED = 127


@dataclass(frozen=True)
class Job:
    """One of ``argv`` and ``function`` is given. Descriptors are those of the parent, inherited."""

    argv: Sequence[str] | None
    function: Callable[[], object] | None
    environment: Mapping[str, str]
    directory: str
    #: Standard input, output, error.
    stdio: tuple[int, int, int]
    #: A file for the pickled outcome: ``(True, value)`` or ``(False, exception)``.
    outcome: int
    no_new_privs: bool
    pass_fds: Sequence[int]
    drop_capabilities: Sequence[str]

    @property
    def fds(self) -> tuple[int, ...]:
        return (*self.stdio, self.outcome, *self.pass_fds)


def become(job: Job | None) -> NoReturn:
    """Turn this process into what was asked for. What goes wrong from here on is the job's outcome."""
    assert job is not None
    status = NOT_STARTED
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        for number, fd in enumerate(job.stdio):
            os.dup2(fd, number)
        close_all_but({0, 1, 2, job.outcome, *job.pass_fds})
        for fd in job.pass_fds:
            os.set_inheritable(fd, True)
        os.chdir(job.directory)
        drop_capabilities(job.drop_capabilities)
        if job.no_new_privs:
            prctl.set_no_new_privs(1)
        if job.argv is not None:
            # Python ignores it, and exec hands that on.
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            os.execvpe(job.argv[0], list(job.argv), dict(job.environment))
        status = _call(job)
    except BaseException as error:
        _report(job.outcome, False, _with_traceback(error))
    finally:
        os._exit(status)


def _call(job: Job) -> int:
    assert job.function is not None
    # A change of credentials made this process undumpable, and then nobody without capabilities on the host may read
    # its memory: neither other processes of the container nor the guard. It has to be as any of them.
    prctl.set_dumpable(1)
    # The parent's may be files that are closed here (pytest's capture).
    sys.stdin, sys.stdout, sys.stderr = _stream(0, "r"), _stream(1, "w"), _stream(2, "w")
    os.environ.clear()
    os.environ.update(job.environment)
    try:
        value = job.function()
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    sys.stdout.flush()
    sys.stderr.flush()
    _report(job.outcome, True, value)
    return 0


def _stream(fd: int, mode: str) -> IO[str]:
    return os.fdopen(fd, mode, buffering=1, closefd=False)


def drop_capabilities(names: Sequence[str]) -> None:
    """For ever: from the bounding set, so that no exec brings them back, and from what the process has now."""
    if not names:
        return
    prctl.capbset.drop(*names)
    for kind in (prctl.cap_inheritable, prctl.cap_effective, prctl.cap_permitted):
        kind.drop(*names)


def _with_traceback(error: BaseException) -> BaseException:
    """The traceback itself cannot leave this process; its text can, as a note."""
    error.add_note("in the container:\n" + "".join(traceback.format_exception(error)).rstrip())
    return error


def _report(outcome: int, good: bool, value: object) -> None:
    try:
        data = pickle.dumps((good, value))
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        if not good:
            text = (
                "".join(traceback.format_exception(value))
                if isinstance(value, BaseException)
                else repr(value)
            )
        data = pickle.dumps((False, RuntimeError(f"the outcome cannot be pickled: {text}")))
    with open(outcome, "wb", closefd=False) as file:
        file.write(data)
