"""Rules that hold for every file: linters, types, the direction of imports, sizes, no sleeping, no mocks.

There is no list of exceptions. A rule that is wrong is changed here, for all.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

#: What may stand at the top besides dotfiles.
TOP_LEVEL = {
    *("interceptor", "native", "tests", "integration"),
    *("pyproject.toml", "setup.py", "README.md", "LICENSE", "CHANGELOG.md"),
}

#: Lines.
FUNCTION_MAX = 75
FILE_MAX = 600

#: The parts of the package, lowest first. A module imports from its own part and from parts on lower lines only.
LAYERS = (
    ("errors",),
    ("client", "config", "kernel", "packets"),
    ("observe", "idshift"),
    ("guards", "mounts", "oci", "sockets", "view"),
    ("containers", "control", "notify", "spawn"),
    ("ahead",),
    ("verdicts", "watch"),
    ("explain", "exporter"),
    ("lifecycle",),
    ("daemon", "library"),
    ("cli",),
    ("__main__",),
)

#: The only parts that see the compiled module.
NATIVE_USERS = {"kernel", "guards"}

#: Data in, decision out: modules that make no system call and know nobody who does.
PURE = {
    *("interceptor.mounts.explain", "interceptor.mounts.lineage", "interceptor.mounts.policy"),
    *("interceptor.observe.exposition", "interceptor.observe.feed", "interceptor.observe.latency"),
    *("interceptor.idshift.choose", "interceptor.idshift.overlay", "interceptor.idshift.subid"),
    *("interceptor.idshift.changes", "interceptor.idshift.owners"),
    *("interceptor.view.cgroup", "interceptor.view.resources"),
    *(
        "interceptor.oci.commandline",
        "interceptor.oci.profile",
        "interceptor.oci.rewrite",
        "interceptor.oci.settings",
    ),
}
IMPURE = {
    "os",
    "socket",
    "subprocess",
    "ctypes",
    "fcntl",
    "interceptor.kernel",
    "interceptor.guards",
    "interceptor._native",
}


@cache
def files() -> tuple[Path, ...]:
    """Every file of the project: tracked, or not yet but not ignored either."""
    # safe.directory: tests also run as a user who does not own the checkout.
    argv = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(argv, cwd=ROOT, check=True, capture_output=True).stdout.decode().split("\0")
    found = tuple(ROOT / name for name in sorted(set(names)) if name and (ROOT / name).is_file())
    assert ROOT / "tests/test_quality.py" in found
    return found


def is_python(path: Path) -> bool:
    """By name or by first line."""
    if path.suffix == ".py":
        return True
    return not path.suffix and path.read_bytes().startswith(
        (b"#!/usr/bin/env python3", b"#!/usr/bin/python3")
    )


@cache
def trees() -> tuple[tuple[Path, ast.Module], ...]:
    """The syntax tree of every Python file."""
    return tuple((path, ast.parse(path.read_bytes())) for path in files() if is_python(path))


def module_name(path: Path) -> str:
    """``interceptor.kernel.fd`` for interceptor/kernel/fd.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.Module) -> Iterator[str]:
    """Every module that ``tree`` imports, wherever the statement stands; for ``from a import b`` both a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def package_modules() -> Iterator[tuple[str, set[str]]]:
    """Each module of the package with what it imports."""
    for path, tree in trees():
        if path.is_relative_to(ROOT / "interceptor"):
            yield module_name(path), set(imports(tree))


def part(module: str) -> str:
    """``kernel`` for interceptor.kernel.fd; empty for the package itself."""
    return module.split(".")[1] if "." in module else ""


def run(*arguments: str) -> None:
    """Run a module of this interpreter on the checkout; its findings are the failure."""
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()


def test_ruff_finds_nothing() -> None:
    run("ruff", "check", "--no-cache", ".")


def test_formatting_is_ruffs() -> None:
    run("ruff", "format", "--no-cache", "--check", "--diff", ".")


def test_types_are_strict() -> None:
    cache_directory = ROOT / ".mypy_cache" if os.access(ROOT, os.W_OK) else Path(os.devnull)
    run("mypy", "--cache-dir", str(cache_directory))


def test_shell_scripts_parse() -> None:
    scripts = [
        path for path in files() if path.suffix == ".sh" or path.read_bytes().startswith(b"#!/bin/bash")
    ]
    assert ROOT / "integration/check" in scripts
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)


def test_top_level_is_fixed() -> None:
    names = {path.relative_to(ROOT).parts[0] for path in files()}
    assert {name for name in names if not name.startswith(".")} <= TOP_LEVEL


def test_every_part_of_the_package_has_a_layer() -> None:
    known = {name for layer in LAYERS for name in layer} | {"", "data", "_native"}
    assert {part(module) for module, _ in package_modules()} <= known


def test_imports_point_downwards() -> None:
    rank = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    wrong = [
        f"{module} imports {imported}"
        for module, names in package_modules()
        for imported in names
        if imported.startswith("interceptor.") and part(imported) in rank and part(module) in rank
        if part(imported) != part(module) and rank[part(imported)] >= rank[part(module)]
    ]
    assert not wrong


def test_kernel_knows_only_errors() -> None:
    for module, names in package_modules():
        if part(module) == "kernel":
            ours = {part(name) for name in names if name.startswith("interceptor.")}
            assert ours <= {"kernel", "errors", "_native"}, module


def test_only_kernel_and_guards_see_the_compiled_module() -> None:
    users = {module for module, names in package_modules() if "interceptor._native" in names}
    assert {part(module) for module in users} <= NATIVE_USERS
    assert users, "nobody uses it: has it moved?"


def test_decisions_are_pure() -> None:
    modules = dict(package_modules())
    for module in PURE & modules.keys():
        for name in modules[module]:
            assert not any(name == bad or name.startswith(f"{bad}.") for bad in IMPURE), (
                f"{module} imports {name}"
            )


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function in ``tree``."""
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def test_functions_are_short() -> None:
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {node.end_lineno - node.lineno + 1} lines"
        for path, tree in trees()
        for node in functions(tree)
        if node.end_lineno is not None and node.end_lineno - node.lineno >= FUNCTION_MAX
    ]
    assert not long


def test_files_are_short() -> None:
    sources = [path for path in files() if is_python(path) or path.suffix in {".c", ".h", ".sh"}]
    lengths = {str(path.relative_to(ROOT)): path.read_bytes().count(b"\n") for path in sources}
    assert {name: lines for name, lines in lengths.items() if lines >= FILE_MAX} == {}


def calls(tree: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    """Every call in ``tree`` with the name that is called, without what stands before its last dot."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func).split(".")[-1], node


def test_nobody_sleeps_without_a_reason() -> None:
    """Wait on descriptors, pidfds and events. A sleep that must be has its reason on its line: ``# sleep: why``."""
    wrong = []
    for path, tree in trees():
        lines = path.read_text().splitlines()
        sleeps = [call for name, call in calls(tree) if name in {"sleep", "usleep", "nanosleep"}]
        ends = [call.end_lineno or call.lineno for call in sleeps]
        wrong += [f"{path.relative_to(ROOT)}:{end}" for end in ends if "# sleep: " not in lines[end - 1]]
    assert not wrong


def test_nothing_is_mocked() -> None:
    mockers = {"unittest.mock", "mock", "pytest_mock"}
    assert not [path for path, tree in trees() if mockers & set(imports(tree))]


def test_every_module_and_public_function_says_what_it_is() -> None:
    silent = []
    for path, tree in trees():
        if not path.is_relative_to(ROOT / "interceptor"):
            continue
        public = [
            node
            for node in tree.body
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        ]
        named = [node for node in public if not node.name.startswith("_")]
        silent += [f"{path.relative_to(ROOT)}: {n.name}" for n in named if ast.get_docstring(n) is None]
        if ast.get_docstring(tree) is None:
            silent.append(str(path.relative_to(ROOT)))
    assert not silent


def test_no_test_is_skipped_for_want_of_a_program() -> None:
    """integration/check installs what tests need. A skip may depend on the processor's architecture only."""
    wrong = [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for path, tree in trees()
        for name, call in calls(tree)
        if name == "importorskip" or (name == "skipif" and "machine" not in ast.unparse(call.args[0]))
    ]
    assert not wrong


@pytest.mark.parametrize("name", ["integration/check", "integration/quickstart", ".ci/run"])
def test_commands_are_executable(name: str) -> None:
    assert os.access(ROOT / name, os.X_OK)
