"""What is built and installed: a source distribution, a wheel from it, and an installation of that wheel that works."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.test_quality import ROOT, files


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution of this checkout, built in a copy, so that nothing is left here."""
    copy = tmp_path_factory.mktemp("copy")
    for path in files():
        target = copy / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    argv = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(copy / "out")]
    subprocess.run(argv, cwd=copy, check=True, capture_output=True)
    (archive,) = (copy / "out").iterdir()
    return archive


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel built from the source distribution, as pip does it, but with the build tools that are here."""
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-cache-dir"]
    subprocess.run([*pip, "-w", str(out), str(sdist)], check=True)
    (archive,) = out.iterdir()
    return archive


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an installation of the wheel."""
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*pip, str(wheel)], check=True)
    return target


def test_source_distribution_has_all_that_the_build_reads(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    native = {
        f"native/{path.name}" for path in (ROOT / "native").iterdir() if path.suffix in {".c", ".h", ".py"}
    }
    assert len(native) > 5
    assert native <= names
    assert {"pyproject.toml", "setup.py", "LICENSE", "README.md"} <= names
    assert "interceptor/data/interceptor.service" in names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]


def test_one_wheel_serves_all_versions_of_python(wheel: Path) -> None:
    assert "-cp311-abi3-linux_" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        assert "interceptor/_native.abi3.so" in archive.namelist()


def test_wheel_has_every_module_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = {str(path.relative_to(ROOT)) for path in files() if path.is_relative_to(ROOT / "interceptor")}
    modules = {name for name in package if name.endswith((".py", ".pyi", "py.typed", ".service", ".json"))}
    assert modules <= names
    others = {name.partition(".data/")[2] or name for name in names - package}
    assert others == {"interceptor/_native.abi3.so", "scripts/interceptor-runc"}


def test_commands_are_those_that_others_rely_on(installed: Path) -> None:
    (metadata,) = installed.glob("interceptor-*.dist-info")
    entry_points = configparser.ConfigParser()
    entry_points.read(metadata / "entry_points.txt")
    assert dict(entry_points["console_scripts"]) == {
        "interceptor": "interceptor.cli:main",
        "interceptor-hook": "interceptor.oci.hook:main",
    }
    argv = [str(installed / "bin/interceptor-runc"), "list"]
    done = subprocess.run(argv, env={"INTERCEPTOR_RUNTIME": "/bin/echo"}, check=True, capture_output=True)
    assert done.stdout == b"list\n"


def test_installed_native_module_works(installed: Path, tmp_path: Path) -> None:
    code = (
        "from interceptor import _native as n; "
        "s = n.ffi.new('struct ix_stat *'); print(n.__file__, n.lib.ix_statx(-1, b'/', 0, s))"
    )
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == [str(installed / "interceptor/_native.abi3.so"), "0"]


@pytest.mark.parametrize(("command", "status"), [("interceptor", 0), ("interceptor-hook", 0)])
def test_installed_commands_start(installed: Path, tmp_path: Path, command: str, status: int) -> None:
    environment = os.environ | {"PYTHONPATH": str(installed)}
    argv = [sys.executable, str(installed / "bin" / command), "--help"]
    done = subprocess.run(argv, cwd=tmp_path, env=environment, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (status, "")
    assert done.stdout.lower().startswith("usage: ")


def test_every_dependency_has_a_range_and_a_reason() -> None:
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    project = tomllib.loads("\n".join(lines))["project"]
    dependencies = project["dependencies"]
    assert len(dependencies) > 5
    for dependency in dependencies:
        assert ">=" in dependency, dependency
        assert ",<" in dependency, dependency
        (place,) = (number for number, line in enumerate(lines) if line.strip() == f'"{dependency}",')
        assert lines[place - 1].strip().startswith("# "), dependency


def test_dependencies_are_all_used() -> None:
    modules = {"python-prctl": "prctl", "prometheus-client": "prometheus_client"}
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    sources = "\n".join(
        path.read_text() for path in files() if path.suffix == ".py" and "tests" not in path.parts
    )
    for dependency in dependencies:
        name = dependency.partition(">")[0]
        module = modules.get(name, name)
        assert f"import {module}" in sources or f"from {module}" in sources, f"{name} is not used"
