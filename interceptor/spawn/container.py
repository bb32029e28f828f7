"""A container made by hand: the steps of an OCI runtime, with an agent told where a runtime would call its hooks."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import ParamSpec, Protocol, TypeVar, Unpack

from interceptor.errors import ContainerError
from interceptor.kernel.fd import OwnedFd
from interceptor.oci import seccomp
from interceptor.spawn import child, layout
from interceptor.spawn.channel import Channel
from interceptor.spawn.process import (
    STEP_SECONDS,
    Command,
    Completed,
    JobOptions,
    Outputs,
    Process,
    launch,
    make_job,
)

P = ParamSpec("P")
T = TypeVar("T")

OCI_VERSION = "1.0.2"

State = dict[str, object]


class Agent(Protocol):
    """Who is told of a container what a runtime tells its hooks and its seccomp agent."""

    def create(self, state: State) -> None:
        """createRuntime: namespaces and mounts are made, nothing is pivoted yet."""

    def hand_over(self, process_state: State, listener: OwnedFd) -> None:
        """A ContainerProcessState and its listener."""

    def poststop(self, state: State) -> None:
        """The last process has ended."""


class GuardedChild:
    """A container without a runtime. Close it, or use it as a context manager.

    ``pid`` and ``pidfd`` are those of its process 1 on the host, ``cid`` is the container's ID, ``bundle`` the
    directory of its config.json.
    """

    def __init__(
        self, cid: str, agent: Agent | None, user_namespace: bool, wait_killable: bool, trapped: bool = True
    ) -> None:
        self.cid = cid
        self.bundle = Path(tempfile.mkdtemp(prefix=f"interceptor-{cid}-"))
        self.user_namespace = user_namespace
        self._agent = agent
        self._wait_killable = wait_killable
        self._trapped = trapped
        self._first: Process | None = None
        self._others: list[Process] = []
        self._created = False
        self._closed = False

    # ---- the main process ----

    @property
    def is_closed(self) -> bool:
        return self._closed

    @property
    def main(self) -> Process:
        """The process that was spawned; with none given, process 1 idles and this ends with it."""
        if self._first is None:
            raise ContainerError(f"{self.cid}: not running")
        return self._first

    @property
    def pid(self) -> int:
        return self.main.pid

    @property
    def pidfd(self) -> int:
        return self.main.pidfd.fileno()

    @property
    def stdout(self) -> bytes:
        """What the main process has written so far."""
        return self.main.stdout

    @property
    def stderr(self) -> bytes:
        """What the main process has written so far."""
        return self.main.stderr

    def wait(self, timeout: float | None = 60.0) -> int:
        """Wait for the end of the main process, with which the container ends; its exit status. As `Process.wait`."""
        return self.main.wait(timeout).returncode

    # ---- further processes ----

    def start(self, command: Command, *arguments: object, **options: Unpack[JobOptions]) -> Process:
        """Start a program or function inside, as ``runc exec`` does, under a filter and listener of its own.

        A function runs in a forked copy of this process and sees its memory; it can be read by other processes of
        the container, and what it returns is unpickled here: functions are for containers that are trusted.
        Modules must have been imported before: their files are not in the container. Raises `ContainerError`.
        """
        outputs = Outputs.make(options)
        try:
            job = make_job(command, arguments, outputs, options)
            flags = layout.namespace_flags(self.user_namespace)
            filter_ = self.filter()
            process = launch(
                lambda channel: child.entering_helper(
                    self.pidfd, flags, self.user_namespace, filter_, job, channel
                ),
                (self.pidfd, *job.fds),
                outputs,
                lambda process, channel: self.go(process, channel, "running", filter_),
            )
        except BaseException:
            outputs.close()
            raise
        self._others = [p for p in self._others if not p.pidfd.closed]
        self._others.append(process)
        return process

    def run(
        self,
        command: Command,
        *arguments: object,
        timeout: float | None = 60.0,
        **options: Unpack[JobOptions],
    ) -> Completed:
        """`start`, then wait for the end; what is still running after ``timeout`` seconds is killed.

        Raises like `start` and `Process.wait`.
        """
        with self.start(command, *arguments, **options) as process:
            return process.wait(timeout)

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What ``function`` returns when it is run inside. Raises what it raises, and `ContainerError` if it ends its
        process instead."""
        done = self.run(lambda: function(*args, **kwargs))
        if done.returncode:
            raise ContainerError(f"the process ended with status {done.returncode} and returned nothing")
        return done.value  # type: ignore[return-value]

    # ---- the end ----

    def close(self) -> None:
        """Kill everything in the container, wait for it, tell the agent. May be called again."""
        if self._closed:
            return
        self._closed = True
        try:
            with contextlib.ExitStack() as stack:
                if self._first is not None:
                    # All others die with process 1, and before it: their helpers have something to reap.
                    self._first.kill()
                    stack.callback(self._first.close)
                for process in self._others:
                    stack.callback(process.close)
        finally:
            try:
                if self._agent is not None and self._created:
                    self._agent.poststop(self.state("stopped"))
            finally:
                shutil.rmtree(self.bundle, ignore_errors=True)

    def __enter__(self) -> GuardedChild:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- what the agent is told ----

    def state(self, status: str, pid: int | None = None) -> State:
        """The container's state as the OCI specification has it (runtime.md, "State")."""
        return {
            "ociVersion": OCI_VERSION,
            "id": self.cid,
            "status": status,
            "pid": self._first.pid if self._first is not None else pid or 0,
            "bundle": str(self.bundle),
        }

    def filter(self) -> child.Filter | None:
        """What its processes are put under; nothing where no agent would answer, or none is wanted."""
        if self._agent is None or not self._trapped:
            return None
        return child.Filter(seccomp.program(), self._wait_killable)

    def go(self, process: Process, channel: Channel, status: str, filter_: child.Filter | None) -> None:
        """The end of both set-ups: the listener goes to the agent, then the process may begin."""
        if filter_ is not None and self._agent is not None:
            (listener,) = channel.receive("listener", STEP_SECONDS).fds
            with listener:
                self._agent.hand_over(
                    {
                        "ociVersion": OCI_VERSION,
                        "fds": ["seccompFd"],
                        "pid": process.pid,
                        "metadata": "",
                        "state": self.state(status, process.pid),
                    },
                    listener,
                )
        channel.receive("ready", STEP_SECONDS)
        channel.send("go")

    def bring_up(
        self, plan: child.Plan, outputs: Outputs | None, before: Callable[[int, Channel], None]
    ) -> None:
        """Make the container that ``plan`` describes, once; ``before`` is `launch`'s. Raises `ContainerError`."""

        def steps(process: Process, channel: Channel) -> None:
            channel.receive("mounted", STEP_SECONDS)
            if self._agent is not None:
                self._agent.create(self.state("creating", process.pid))
                self._created = True
            channel.send("created")
            self.go(process, channel, "creating", plan.filter)

        self._first = launch(
            lambda channel: child.container_helper(plan, channel), plan.fds, outputs, steps, before
        )
