"""What the documentation says is held against what the code is; what it shows is run."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import click
import pytest

from integration.containers import quickstart, rootfs
from interceptor.cli import COMMANDS, cli
from interceptor.config import TESTING_VARIABLE, Config
from interceptor.kernel.features import OLDEST, probe
from interceptor.library import Interceptor
from interceptor.oci.hook import DEFAULT_SOCKET, OPERATIONS
from interceptor.oci.seccomp import oci_fragment

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
ARCHITECTURE = ROOT / "interceptor/README.md"
NATIVE = ROOT / "native/README.md"
PAGES = (README, ARCHITECTURE, NATIVE, ROOT / "CHANGELOG.md")
WIDTH = 120

#: Messages that the troubleshooting page starts from, each with the file that says them.
MESSAGES = (
    ("interceptor/lifecycle.py", "has no user namespace: its root is the host's, nothing can be welded against it"),
    ("interceptor/lifecycle.py", "is registered already"),
    ("interceptor/lifecycle.py", "run its poststop hook first"),
    ("interceptor/client.py", "no daemon listens there"),
    ("interceptor/client.py", "start it: systemctl start interceptor, or: interceptor serve"),
    ("interceptor/sockets.py", "another daemon listens there"),
    ("interceptor/idshift/choose.py", "its owners cannot be mapped to the container's IDs"),
    ("interceptor/idshift/subid.py", "no range of IDs for the user"),
    ("interceptor/oci/rewrite.py", "privileged containers are refused"),
    ("interceptor/containers/prepared.py", "not searchable for everybody, so containers cannot have their root"),
)  # fmt: skip

#: ``file.py:Class.method`` or ``native/file.c:function``.
REFERENCE = re.compile(r"([\w./-]+\.(?:py|c|h)):([A-Za-z_][\w.]*)")
FILE_NAME = re.compile(r"[\w-]+(?:/[\w-]+)*\.(?:pyi?|c|h|md|toml)(?![\w.])")


def fenced(page: Path, language: str) -> list[str]:
    """The code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def spans(page: Path) -> list[str]:
    """Every piece of text in code font, code blocks apart."""
    prose = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", prose)


def section(page: Path, heading: str) -> str:
    """What stands under a heading of the second level."""
    found = re.search(
        rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", page.read_text(), re.MULTILINE | re.DOTALL
    )
    assert found, heading
    return found.group(1)


def rows(text: str) -> list[list[str]]:
    """The cells of every table row but heads and rules."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    bodies = [
        line for i, line in enumerate(lines) if i + 1 == len(lines) or not lines[i + 1].startswith("|---")
    ]
    return [re.split(r"(?<!\\)\|", line)[1:-1] for line in bodies if not line.startswith("|---")]


def fragment() -> dict[str, Any]:
    """What README.md has readers merge into their config.json."""
    (text,) = fenced(README, "json")
    found = json.loads(text)
    assert isinstance(found, dict)
    return found


def merged(old: object, new: object) -> object:
    """jq's ``*``: objects are merged, anything else is replaced."""
    if isinstance(old, dict) and isinstance(new, dict):
        return old | {key: merged(old.get(key), value) for key, value in new.items()}
    return new


# ---- the bundle by hand ----


def test_the_fragment_traps_what_the_code_traps() -> None:
    made = oci_fragment(Config().seccomp_socket, machine="x86_64")
    assert fragment()["linux"]["seccomp"] == made, f"README.md should have {json.dumps(made, indent=2)}"
    assert json.dumps(oci_fragment("/s", machine="aarch64")["architectures"]) in README.read_text()


def test_the_fragment_has_the_hooks_and_a_mapped_user_namespace() -> None:
    found = fragment()
    assert set(found["hooks"]) == set(OPERATIONS)
    for name, hooks in found["hooks"].items():
        assert hooks == [{"path": "/usr/local/bin/interceptor-hook", "args": ["interceptor-hook", name]}]
    # The hooks have no --socket, so the daemon has to listen where they ask by default.
    assert Config().control_socket == DEFAULT_SOCKET
    kinds = [namespace["type"] for namespace in found["linux"]["namespaces"]]
    assert {"user", "mount", "pid"} <= set(kinds)
    assert len(kinds) == len(set(kinds))
    assert all(found["linux"][table][0]["containerID"] == 0 for table in ("uidMappings", "gidMappings"))


def guarded_bundle(daemon: Interceptor, bundle: Path, argv: list[str]) -> None:
    """``runc spec`` merged with the fragment as README.md says, for this checkout and a daemon on private sockets."""
    subprocess.run(["runc", "spec", "--bundle", str(bundle)], check=True)
    text = json.dumps(fragment()).replace(Config().seccomp_socket, daemon.seccomp_socket)
    new = json.loads(text)
    for hooks in new["hooks"].values():
        hooks[0]["path"] = str(bundle / "interceptor-hook")
        hooks[0]["args"] += ["--socket", daemon.control_socket]
    config: Any = merged(json.loads((bundle / "config.json").read_text()), new)
    for names in config["process"]["capabilities"].values():
        names.append("CAP_SYS_ADMIN")
    config["process"] |= {"args": argv, "terminal": False}
    config["root"]["path"] = str(rootfs.ensure(quickstart.parser().get_default("cache"), 100000))
    (bundle / "config.json").write_text(json.dumps(config))


@pytest.mark.root
@pytest.mark.slow
def test_a_container_made_by_hand_behaves_as_shown(tmp_path: Path) -> None:
    (session,) = fenced(README, "console")
    commands = [line[2:] for line in session.splitlines() if line.startswith("# ")]
    script = "".join(f"{command} 2>&1 | sed 's/^/> /'\n" for command in commands)
    hook = tmp_path / "interceptor-hook"
    hook.symlink_to(Path(sys.executable).parent / "interceptor-hook")
    with Interceptor() as daemon:
        guarded_bundle(daemon, tmp_path, ["sh", "-c", script])
        argv = ["runc", "--root", str(tmp_path / "state"), "run", "--bundle", str(tmp_path), "by-hand"]
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr + daemon.log_path.read_text()
    shown = [line for line in session.splitlines() if line and not line.startswith("#")]
    assert [line[2:] for line in done.stdout.splitlines()] == shown


@pytest.mark.root
def test_the_kernel_named_is_the_oldest_that_has_what_is_needed() -> None:
    versions = [OLDEST, *(feature.minimum for feature in probe() if feature.needed)]
    needed = [tuple(map(int, version.split("."))) for version in versions]
    named = {
        tuple(map(int, found)) for found in re.findall(r"Linux (\d+)\.(\d+) or newer", README.read_text())
    }
    assert named == {max(needed)}


# ---- commands, keys, events, messages ----


def commands_shown() -> Iterator[list[str]]:
    """The words of every command of ours in README.md, in blocks and in code font."""
    lines = [line for block in fenced(README, "sh") for line in block.splitlines()]
    for text in lines + spans(README):
        plain = text.split(" #")[0].split(" | ")[0].replace("\\|", "/").translate(str.maketrans("", "", "[]"))
        words = shlex.split(plain) if "'" not in plain else []
        while words and words[0] in ("sudo",):
            words = words[1:]
        if words:
            yield words


def long_options(words: list[str]) -> set[str]:
    return {word.split("=")[0] for word in words if word.startswith("--")}


def options_of(command: str) -> set[str]:
    """The options of a subcommand of ``interceptor``."""
    found = cli.get_command(click.Context(cli), command)
    assert found is not None, command
    return {o for p in found.params if isinstance(p, click.Option) for o in p.opts}


def test_every_command_shown_exists_with_its_options() -> None:
    seen: set[str] = set()
    for words in commands_shown():
        name, rest = words[0], words[1:]
        if name == "interceptor" and rest:
            assert rest[0] in COMMANDS, words
            assert long_options(rest) <= options_of(rest[0]), words
            seen.add(f"interceptor {rest[0]}")
        elif name == "interceptor-hook" and rest:
            assert set(rest[0].split("/")) <= set(OPERATIONS), words
            seen.add(name)
        elif name == "./integration/quickstart":
            grammar = quickstart.parser().format_help()
            assert all(option in grammar for option in long_options(rest)), words
            seen.add(name)
        elif name.startswith("./"):
            assert os.access(ROOT / name, os.X_OK), words
            assert all(option in (ROOT / name).read_text() for option in long_options(rest)), words
            seen.add(name)
    wanted = {f"interceptor {name}" for name in COMMANDS}
    assert seen >= wanted | {"interceptor-hook", "./integration/quickstart", "./integration/check"}


def test_options_of_the_command_table_are_complete() -> None:
    shown = [
        row[0].strip(" `").translate(str.maketrans("", "", "[]"))
        for row in rows(section(README, "Command line"))
    ]
    table = {words[1]: long_options(words) for words in map(str.split, shown) if words[0] == "interceptor"}
    assert table == {name: options_of(name) for name in COMMANDS}


def test_configuration_table_has_every_key_with_its_default() -> None:
    table = {row[0].strip(" `"): row[1].strip(" `") for row in rows(section(README, "Configuration"))}
    defaults = Config()
    assert table == {key: json.dumps(getattr(defaults, key)) for key in Config.__struct_fields__}
    assert TESTING_VARIABLE in section(README, "Configuration")


@cache
def events() -> dict[str, str]:
    """Every event that the package logs, with its level."""
    levels = {"debug", "info", "warning", "error", "exception"}
    found: dict[str, str] = {}
    for path in (ROOT / "interceptor").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in levels
                and "log" in ast.unparse(node.func.value)
                and node.args
                and isinstance(node.args[0], ast.Constant)
            ):
                level = node.func.attr
                found[str(node.args[0].value)] = "error" if level == "exception" else level
    return found


def test_log_table_has_every_event_at_its_level() -> None:
    text = re.sub(r"\]\([^)]*\)", "]", section(README, "Reading the log"))
    table = {event: row[0].strip() for row in rows(text) for event in re.findall(r"`([^`]+)`", row[1])}
    assert table == events()


@pytest.mark.parametrize(("file", "message"), MESSAGES)
def test_messages_that_readers_search_for_are_those_of_the_code(file: str, message: str) -> None:
    assert message in " ".join(README.read_text().split())
    assert message in (ROOT / file).read_text()


def test_the_library_s_lines_are_those_that_are_run() -> None:
    """tests/test_library.py runs the lines of the docstring."""
    (lines,) = fenced(README, "python")
    doc = ast.get_docstring(ast.parse((ROOT / "interceptor/library.py").read_text()), clean=True)
    assert doc is not None
    assert textwrap.indent(lines, "    ") in doc + "\n"


# ---- names and links ----


def defined_in_python(path: Path) -> set[str]:
    """Functions and classes of a module, methods as ``Class.method``."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {
                f"{node.name}.{n.name}"
                for n in node.body
                if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
            }
    return names


def defined_in_c(path: Path) -> set[str]:
    """Functions whose definition starts a line, as all of ours do."""
    return set(re.findall(r"^\w[\w \t*]*?\b(\w+)\([^;]*?\)\s*\{", path.read_text(), re.MULTILINE))


@pytest.mark.parametrize("page", (ARCHITECTURE, NATIVE), ids=lambda page: page.parent.name)
def test_every_file_and_function_named_exists(page: Path) -> None:
    text = "\n".join(spans(page))
    for name in FILE_NAME.findall(text):
        places = [directory / name for directory in (ROOT, page.parent, ROOT / "interceptor")]
        assert any(place.is_file() for place in places), name
    for file, name in REFERENCE.findall(text):
        path = next(p for p in (ROOT / file, ROOT / "interceptor" / file) if p.is_file())
        names = defined_in_python(path) if path.suffix == ".py" else defined_in_c(path)
        assert name in names, f"{file}:{name}"


def test_the_architecture_names_its_functions() -> None:
    """Were the notation another, the test above would look at nothing."""
    assert len(set(REFERENCE.findall("\n".join(spans(ARCHITECTURE))))) > 80


def test_every_native_file_has_its_row() -> None:
    listed = {row[0].strip(" `") for row in rows(section(NATIVE, "Files"))}
    assert listed == {path.name for path in (ROOT / "native").iterdir() if path.suffix in (".c", ".h", ".py")}


def anchors(page: Path) -> set[str]:
    """The fragments of a page's headings, as GitHub and GitLab make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        where = (page.parent / path).resolve() if path else page
        assert where.exists(), target
        assert not anchor or anchor in anchors(where), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_are_of_no_machine_and_no_wider_than_the_code(page: Path) -> None:
    text = page.read_text()
    assert not re.findall(r"(?<![\w.])/(?:work|home|root|tmp)/", text)
    wide = [line for line in text.splitlines() if len(line) > WIDTH and not line.startswith("|")]
    assert not wide
