"""What pyproject.toml cannot say: the native module and the native command, the wheel's tag, headers in the sdist."""

from __future__ import annotations

import runpy
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Command, setup
from setuptools.command.sdist import sdist

HERE = Path(__file__).resolve().parent
#: The frontend of a build has no sys.path to import this by.
BUILD = runpy.run_path(str(HERE / "native/build.py"))


class CompiledScripts(Command):
    """``interceptor-runc`` is a program among the scripts: Python takes longer to start than it takes to run."""

    user_options = ()

    def initialize_options(self) -> None:
        self.build_dir: str | None = None
        self.force = False

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_scripts", "build_dir"), ("force", "force"))

    def get_source_files(self) -> list[str]:
        return [BUILD["FRONT"]]

    def run(self) -> None:
        assert self.build_dir is not None
        directory = Path(self.build_dir).resolve()
        directory.mkdir(parents=True, exist_ok=True)
        compiler = (sysconfig.get_config_var("CC") or "cc").split()
        argv = [*compiler, *BUILD["FRONT_FLAGS"], "-o", str(directory / "interceptor-runc"), BUILD["FRONT"]]
        subprocess.run(argv, cwd=HERE, check=True)


class SdistWithNative(sdist):
    """setuptools takes the C files from the extension, but not the headers nor the build description."""

    def make_distribution(self) -> None:
        native = [p for p in (HERE / "native").iterdir() if p.suffix in {".c", ".h", ".py", ".md"}]
        self.filelist.extend(sorted(f"native/{p.name}" for p in native))
        super().make_distribution()


setup(
    cffi_modules=["native/build.py:ffibuilder"],
    scripts=[BUILD["FRONT"]],
    cmdclass={"build_scripts": CompiledScripts, "sdist": SdistWithNative},
    # cffi's generated code keeps to the limited API, so one wheel serves 3.11 and all later versions.
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
