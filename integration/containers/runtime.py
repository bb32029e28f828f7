"""A container's life by a stock OCI runtime: run, exec, delete. Only documented runc commands are used."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from integration.containers.bundle import Json

#: Nothing that is run in the container takes long; what takes this long hangs.
EXEC_SECONDS = 60.0


class CommandFailed(Exception):
    """A command ended with another status than 0; the message has its output."""


@dataclass(frozen=True)
class Container:
    """One container of ``runtime`` (a program such as ``runc``) with its state below ``root``."""

    id: str
    bundle: Path
    root: Path
    runtime: str = "runc"

    def run(self, config: Json, console: Path) -> int:
        """Create and start the container, its output to ``console``; return its first process as the host sees it."""
        (self.bundle / "config.json").write_text(json.dumps(config, indent=2))
        log = self.bundle / "runtime.log"
        with open(console, "wb") as output:
            argv = [
                *self._command,
                "--log",
                str(log),
                "run",
                "--detach",
                "--bundle",
                str(self.bundle),
                self.id,
            ]
            status = subprocess.run(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                check=False,
            ).returncode
        if status != 0:
            raise CommandFailed(f"{' '.join(argv)}: exit status {status}\n{_tail(log)}{_tail(console)}")
        state = json.loads(self._capture("state", self.id))
        return int(state["pid"])

    def exec(self, *argv: str, stdin: str = "", check: bool = True) -> str:
        """Run a command in the container, under its seccomp filter, and return what it printed."""
        try:
            done = subprocess.run(
                [*self._command, "exec", self.id, *argv],
                input=stdin,
                capture_output=True,
                text=True,
                errors="replace",
                start_new_session=True,
                check=False,
                timeout=EXEC_SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            raise CommandFailed(
                f"in the container: {' '.join(argv)}: no end after {EXEC_SECONDS:.0f} s"
            ) from error
        if check and done.returncode != 0:
            raise CommandFailed(
                f"in the container: {' '.join(argv)}: exit status {done.returncode}\n{done.stdout}{done.stderr}"
            )
        return done.stdout

    def delete(self) -> None:
        """Kill whatever runs in it and remove it; nothing happens when there is no such container."""
        subprocess.run([*self._command, "delete", "--force", self.id], capture_output=True, check=False)

    def enter_command(self) -> Sequence[str]:
        """Return the command line that opens a shell in the container."""
        return [*self._command, "exec", "--tty", self.id, "bash"]

    @property
    def _command(self) -> list[str]:
        return [self.runtime, "--root", str(self.root)]

    def _capture(self, *arguments: str) -> str:
        done = subprocess.run([*self._command, *arguments], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise CommandFailed(f"{' '.join([*self._command, *arguments])}: {done.stderr}")
        return done.stdout


def _tail(path: Path, lines: int = 20) -> str:
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return ""
    return "".join(line + "\n" for line in text.splitlines()[-lines:])
