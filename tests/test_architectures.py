"""Both ABIs on both machines: the guard's table of calls is the one that the filter is made from, and it compiles.

Nothing here runs as AArch64: user-mode emulation has no seccomp notification, so that takes such a machine.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pyseccomp
import pytest

from interceptor.oci import seccomp
from native.build import WARNINGS
from tests.test_quality import ROOT

CROSS = "aarch64-linux-gnu-gcc"

#: machine → its own architecture and the one of its 32-bit programs, as libseccomp calls them.
ARCHITECTURES = {
    "x86_64": (pyseccomp.Arch.X86_64, pyseccomp.Arch.X86),
    "aarch64": (pyseccomp.Arch.AARCH64, pyseccomp.Arch.ARM),
}
TRAPPED = sorted({rule.syscall for rule in seccomp.RULES})


def number(architecture: int, name: str) -> int | None:
    """Of a call by its name; None where the architecture has none."""
    found = int(pyseccomp.resolve_syscall(architecture, name))
    return found if found >= 0 else None


def own_numbers(compiler: str) -> dict[str, int]:
    """The numbers that the headers of a compiler's target have for the calls that are trapped."""
    source = "#include <sys/syscall.h>\n" + "".join(f"{name}=SYS_{name};\n" for name in TRAPPED)
    argv = [compiler, "-E", "-P", "-x", "c", "-"]
    text = subprocess.run(argv, input=source, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"^(\w+)=(\d+);", text, re.MULTILINE)}


def compat_numbers(machine: str) -> dict[str, int]:
    """The numbers that native/handle.c has for 32-bit programs on a machine."""
    text = (ROOT / "native/handle.c").read_text()
    found = re.search(rf"__{machine}__\)\n.*\nenum \{{ (COMPAT_[^}}]*) \}};", text)
    assert found, machine
    return {name.lower(): int(value) for name, value in re.findall(r"COMPAT_(\w+) = (-?\d+)", found[1])}


@pytest.mark.parametrize(("machine", "compiler"), [("x86_64", "gcc"), ("aarch64", CROSS)])
def test_the_guard_s_own_numbers_are_those_of_the_filter(machine: str, compiler: str) -> None:
    own, _ = ARCHITECTURES[machine]
    assert own_numbers(compiler) == {
        name: found for name in TRAPPED if (found := number(own, name)) is not None
    }


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_the_guard_s_numbers_for_32_bit_programs_are_those_of_the_filter(machine: str) -> None:
    _, compat = ARCHITECTURES[machine]
    ours = compat_numbers(machine)
    assert {name: number(compat, name) for name in ours} == {
        n: v if v >= 0 else None for n, v in ours.items()
    }
    for name in set(TRAPPED) - set(ours):
        # From 403 on they are the same everywhere, and handle.c has them by the machine's own names.
        assert number(compat, name) == number(ARCHITECTURES[machine][0], name), name


def test_every_rule_has_its_rows_in_the_guard() -> None:
    text = (ROOT / "native/handle.c").read_text()
    rows = re.findall(r"\{ARCH_(\w+), (?:SYS|COMPAT)_(\w+), FAMILY", text)
    for name in TRAPPED:
        # Only 32-bit architectures have the old umount.
        wanted = {"COMPAT"} if name == "umount" else {"NATIVE", "COMPAT"}
        assert {arch for arch, call in rows if call.lower() == name} == wanted, name


def test_the_fragment_for_aarch64_differs_in_its_architectures_only() -> None:
    here, there = (seccomp.oci_fragment("/s", machine=machine) for machine in ("x86_64", "aarch64"))
    assert there.pop("architectures") == ["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"]
    here.pop("architectures")
    assert here == there


@pytest.mark.parametrize("path", sorted((ROOT / "native").glob("*.c")), ids=lambda path: path.name)
def test_native_code_compiles_for_aarch64(path: Path) -> None:
    argv = [CROSS, "-fsyntax-only", "-std=gnu11", "-O2", "-Wno-unused-parameter", *WARNINGS, str(path)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
