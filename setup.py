"""What pyproject.toml cannot say: the native module, its wheel tag, and its headers in the sdist."""

from __future__ import annotations

from pathlib import Path

from setuptools import setup
from setuptools.command.sdist import sdist

HERE = Path(__file__).resolve().parent


class SdistWithNative(sdist):
    """setuptools takes the C files from the extension, but not the headers nor the build description."""

    def make_distribution(self) -> None:
        native = [p for p in (HERE / "native").iterdir() if p.suffix in {".c", ".h", ".py", ".md"}]
        self.filelist.extend(sorted(f"native/{p.name}" for p in native))
        super().make_distribution()


setup(
    cffi_modules=["native/build.py:ffibuilder"],
    cmdclass={"sdist": SdistWithNative},
    # cffi's generated code keeps to the limited API, so one wheel serves 3.11 and all later versions.
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
