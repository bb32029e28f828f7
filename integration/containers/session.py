"""One run of the quickstart, from the root filesystem to the table; everything it makes is gone at the end."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from integration.containers import bug, facts, kernel_calls, processes, rootfs
from integration.containers.cgroups import NoCgroup2
from integration.containers.daemon import Daemon, DaemonError, serving
from integration.containers.notify import NotReady
from integration.containers.runtime import CommandFailed
from integration.containers.steps import INSIDE, PRIVATE_SERVICE, Steps
from integration.containers.systemd import FIRST_ID, Booting, Plan, started

#: What may fail for reasons that the message explains; anything else is a defect and shows its traceback.
EXPLAINED = (CommandFailed, DaemonError, NoCgroup2, NotReady, subprocess.CalledProcessError, OSError)

#: How long guards may take to follow their container, and the daemon's other processes the daemon.
END_SECONDS = 5.0
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Options:
    """The command line."""

    cache: Path
    json: Path | None
    keep: bool
    show_the_bug: bool


def run(options: Options) -> int:
    """Perform the whole quickstart; return the exit status."""
    # A pipe has no width; what a log is read with has more than the 80 columns that rich assumes.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    for number in _ENDING:
        signal.signal(number, _interrupt)
    found = facts.Facts()
    try:
        with work_directory() as directory:
            _perform(options, directory, found, console)
    except KeyboardInterrupt:
        console.print("[yellow]Interrupted; everything is cleaned up.[/]")
        return 130
    except EXPLAINED as error:
        console.print(f"[red]Failed:[/] {escape(str(error))}")
        return 1
    table = facts.lines(found)
    console.print(render(table))
    if options.json is not None:
        options.json.write_text(json.dumps(facts.as_json(found), indent=2) + "\n")
    return 0 if all(line.good for line in table) else 1


@contextlib.contextmanager
def work_directory() -> Iterator[Path]:
    """Make a directory that the host sees too (`runc exec` has to find the sockets), in our own mount namespace."""
    kernel_calls.unshare_mounts()
    # Mounts of the host still arrive here; ours do not go there, and end with the last process in here.
    subprocess.run(["mount", "--make-rslave", "/"], check=True)
    directory = Path(tempfile.mkdtemp(prefix="interceptor-quickstart-", dir="/run"))
    directory.chmod(0o755)
    try:
        yield directory
    finally:
        processes.end_all(directory, 0)
        shutil.rmtree(directory, ignore_errors=True)


def _perform(options: Options, directory: Path, found: facts.Facts, console: Console) -> None:
    def say(text: str) -> None:
        console.print(f"  {escape(text)}")

    console.rule("The root filesystem", align="left")
    if not rootfs.cached(options.cache, FIRST_ID):
        say(f"debootstrap {rootfs.SUITE} into {options.cache}, once; this takes a minute or two")
    lower = rootfs.ensure(options.cache, FIRST_ID)
    say(f"{lower}")
    name = f"quickstart-{os.getpid()}"
    if options.show_the_bug:
        console.rule("The bug: an agent that fakes success", align="left")
        found.bug = bug.show(f"{name}-bug", lower, directory, say)
    console.rule("The daemon", align="left")
    with serving(directory / "interceptor") as daemon:
        say(f"{daemon.command} serve --config {daemon.config}")
        with _logs_on_failure(daemon, console):
            console.rule("The container, guarded", align="left")
            with started(guarded_plan(name, lower, directory, daemon)) as booting:
                say(f"{booting.container.id}: first process {booting.pid}, user namespace 0→{FIRST_ID}")
                Steps(booting, daemon, found, say).run()
                if options.keep:
                    _keep(booting, daemon, console)
    found.left_processes = processes.end_all(directory, END_SECONDS)


def guarded_plan(name: str, lower: Path, directory: Path, daemon: Daemon) -> Plan:
    """Return the plan of the container that the daemon guards."""
    return Plan(
        name,
        lower,
        directory / name,
        daemon.listener,
        create_runtime=[daemon.hook_command("createRuntime")],
        poststop=[daemon.hook_command("poststop")],
        units={PRIVATE_SERVICE: (INSIDE / "private.service").read_text()},
    )


def render(table: list[facts.Line]) -> Table:
    """Return the table as the terminal shows it."""
    result = Table(title="quickstart", title_justify="left", show_lines=False)
    result.add_column("")
    result.add_column("what", overflow="fold")
    result.add_column("result", overflow="fold")
    for line in table:
        mark = "[green]ok[/]" if line.good else "[red]BAD[/]"
        result.add_row(mark, escape(line.what), escape(line.value))
    return result


def _keep(booting: Booting, daemon: Daemon, console: Console) -> None:
    console.rule("Kept running", align="left")
    console.print("  enter it:   " + escape(shlex.join(booting.container.enter_command())))
    console.print(
        "  watch it:   " + escape(shlex.join([daemon.command, "ps", "--config", str(daemon.config)]))
    )
    console.print("  its log:    " + escape(str(daemon.log)))
    console.print("  Ctrl-C ends the container and cleans up; the table follows.")
    with contextlib.suppress(KeyboardInterrupt):
        signal.pause()


@contextlib.contextmanager
def _logs_on_failure(daemon: Daemon, console: Console) -> Iterator[None]:
    """Show the end of the daemon's log when a step fails."""
    try:
        yield
    except EXPLAINED:
        console.print(f"[red]A step failed.[/] The end of {daemon.log}:\n{escape(daemon.log_tail())}")
        raise


def _interrupt(number: int, frame: object) -> None:
    """End the run, once: a second Ctrl-C must not stop the clean-up half-way."""
    for ending in _ENDING:
        signal.signal(ending, signal.SIG_IGN)
    raise KeyboardInterrupt
