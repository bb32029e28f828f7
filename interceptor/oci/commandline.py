"""The command line of an OCI runtime, as far as it matters here: everything else passes through. Pure.

Source: ``runc --help`` and ``crun --help``; both take global options, a command, its options, and the container's ID.
"""

from __future__ import annotations

# As in typing and collections.abc, which take longer to import than this takes to run.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Options whose value is the next word, before the command and after it. All others are taken for flags, or have their
#: value behind an equals sign.
GLOBAL_VALUES = {"--log", "--log-format", "--root", "--criu", "--rootless", "--cgroup-manager", "--log-level"}
COMMAND_VALUES = {
    "create": {"--bundle", "-b", "--console-socket", "--pid-file", "--preserve-fds", "--config", "-f"},
    "exec": {
        *("--console-socket", "--cwd", "--env", "-e", "--user", "-u", "--additional-gids", "-g", "--process"),
        *("-p", "--pid-file", "--process-label", "--apparmor", "--cap", "-c", "--preserve-fds", "--cgroup"),
    },
}
COMMAND_VALUES["run"] = COMMAND_VALUES["create"]

OUR_CONFIG = "--interceptor-config"


class CommandLine:
    """The words, and where in them the parts stand.

    ``words`` are without our own option, whose value is ``config``. ``options`` has the position of the word with the
    value, and the value, by option; ``arguments`` what follows the command and is no option, with positions.
    """

    def __init__(self) -> None:
        self.words: list[str] = []
        self.config: str | None = None
        self.command_at: int | None = None
        self.options: dict[str, tuple[int, str]] = {}
        self.arguments: list[tuple[int, str]] = []

    @property
    def command(self) -> str | None:
        """``create`` and so on; None without one, as in ``--version``."""
        return None if self.command_at is None else self.words[self.command_at]

    @property
    def container(self) -> str | None:
        """The container's ID."""
        return self.arguments[0][1] if self.arguments else None

    def value(self, *names: str) -> str | None:
        """The value of an option by any of its names."""
        return next((self.options[name][1] for name in names if name in self.options), None)

    def replaced(self, name: str, value: str) -> list[str]:
        """The words with another value for an option that is there."""
        position, _ = self.options[name]
        words = list(self.words)
        words[position] = f"{name}={value}" if words[position].startswith(f"{name}=") else value
        return words


def parse(words: Sequence[str]) -> CommandLine:
    """Takes ``words`` (without the program's name) apart; never fails."""
    line = CommandLine()
    queue = list(words)
    values = GLOBAL_VALUES
    plain = False
    while queue:
        word = queue.pop(0)
        if line.command_at is None and word.split("=")[0] == OUR_CONFIG:
            line.config = word.partition("=")[2] if "=" in word else (queue.pop(0) if queue else "")
            continue
        line.words.append(word)
        at = len(line.words) - 1
        if plain or not word.startswith("-") or word == "-":
            if line.command_at is None:
                line.command_at = at
                values = COMMAND_VALUES.get(word, set())
            else:
                line.arguments.append((at, word))
                # What follows the ID of an exec is the container's own command line.
                plain = plain or line.command == "exec"
        elif word == "--":
            plain = True
        elif "=" in word:
            name, _, value = word.partition("=")
            line.options[name] = (at, value)
        elif word in values and queue:
            line.words.append(queue.pop(0))
            line.options[word] = (at + 1, line.words[-1])
    return line
