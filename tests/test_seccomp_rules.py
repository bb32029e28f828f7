"""The notification rules: the compiled filter is run here instruction by instruction, on every architecture."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interceptor.errors import InterceptorError, SyscallError
from interceptor.oci import seccomp

ALLOW, NOTIFY = 0x7FFF0000, 0x7FC00000

X86_64, I386, AARCH64, ARM = 0xC000003E, 0x40000003, 0xC00000B7, 0x40000028
X32_BIT = 0x40000000

#: machine → (name, AUDIT_ARCH of struct seccomp_data, {call: number}); numbers from the kernel's syscall tables.
TABLES = {
    "x86_64": [
        ("x86_64", X86_64, {"mount": 165, "umount2": 166}),
        ("x32", X86_64, {"mount": X32_BIT | 165, "umount2": X32_BIT | 166}),
        ("i386", I386, {"mount": 21, "umount2": 52, "umount": 22}),
    ],
    "aarch64": [
        ("aarch64", AARCH64, {"mount": 40, "umount2": 39}),
        ("arm", ARM, {"mount": 21, "umount2": 52}),
    ],
}
ARCHES = [
    pytest.param(machine, arch, numbers, id=name)
    for machine, table in TABLES.items()
    for name, arch, numbers in table
]

#: The same on every architecture.
NEW_API = {
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsmount": 432,
    "open_tree_attr": 467,
    "openat2": 437,
}
MS_RDONLY, MS_NOSUID, MS_REMOUNT, MS_BIND, MS_MOVE, MS_REC = 1, 2, 0x20, 0x1000, 0x2000, 0x4000
MS_UNBINDABLE, MS_PRIVATE, MS_SLAVE, MS_SHARED = 1 << 17, 1 << 18, 1 << 19, 1 << 20
MGC = 0xC0ED0000


def run(program: bytes, arch: int, number: int, args: tuple[int, ...] = ()) -> int:
    """What the filter returns for a call (classic BPF as seccomp allows it, net/core/filter.c)."""
    data = struct.pack("<iIQ6Q", _signed(number), arch, 0, *(*args, *[0] * (6 - len(args))))
    code = list(struct.iter_unpack("<HBBI", program))
    pc = acc = 0
    while True:
        op, on_true, on_false, k = code[pc]
        pc += 1
        if op == 0x20:  # BPF_LD|BPF_W|BPF_ABS
            (acc,) = struct.unpack_from("<I", data, k)
        elif op == 0x54:  # BPF_ALU|BPF_AND|BPF_K
            acc &= k
        elif op == 0x05:  # BPF_JMP|BPF_JA
            pc += k
        elif op in JUMPS:
            pc += on_true if JUMPS[op](acc, k) else on_false
        elif op == 0x06:  # BPF_RET|BPF_K
            return int(k)
        else:
            raise AssertionError(f"an instruction that this interpreter does not know: {op:#x}")


JUMPS: dict[int, Callable[[int, int], bool]] = {
    0x15: lambda acc, k: acc == k,  # BPF_JEQ
    0x25: lambda acc, k: acc > k,  # BPF_JGT
    0x35: lambda acc, k: acc >= k,  # BPF_JGE
    0x45: lambda acc, k: bool(acc & k),  # BPF_JSET
}


def _signed(number: int) -> int:
    return number - (1 << 32) if number >= 1 << 31 else number


def only_propagation_changes(flags: int) -> bool:
    """path_mount() of fs/namespace.c: whether mount(2) with these flags comes to do_change_type()."""
    if flags & 0xFFFF0000 == MGC:
        flags &= 0xFFFF
    return not flags & (MS_REMOUNT | MS_BIND) and bool(
        flags & (MS_SHARED | MS_PRIVATE | MS_SLAVE | MS_UNBINDABLE)
    )


@pytest.mark.parametrize(("machine", "arch", "numbers"), ARCHES)
def test_every_umount_notifies(machine: str, arch: int, numbers: dict[str, int]) -> None:
    program = seccomp.program(machine)
    for name in numbers.keys() - {"mount"}:
        for flags in (0, 1, 2, 8, 10, 0xFFFFFFFF):
            assert run(program, arch, numbers[name], (0, flags)) == NOTIFY, name


@pytest.mark.parametrize(("machine", "arch", "numbers"), ARCHES)
@pytest.mark.parametrize(
    "flags",
    [
        0,
        MS_RDONLY | MS_NOSUID,
        MS_REMOUNT,
        MS_REMOUNT | MS_BIND | MS_RDONLY,
        MS_REMOUNT | MS_BIND | MS_PRIVATE,
        MS_REMOUNT | MS_SHARED,
        MS_BIND,
        MS_BIND | MS_REC,
        MS_BIND | MS_REC | MS_SLAVE,
        MS_MOVE,
        MGC,
        MGC | MS_BIND,
        MGC | MS_MOVE,
        MGC | MS_RDONLY | MS_NOSUID,
    ],
    ids=hex,
)
def test_every_mount_that_can_matter_notifies(
    machine: str, arch: int, numbers: dict[str, int], flags: int
) -> None:
    assert run(seccomp.program(machine), arch, numbers["mount"], (0, 0, 0, flags)) == NOTIFY


@pytest.mark.parametrize(("machine", "arch", "numbers"), ARCHES)
@pytest.mark.parametrize("flags", [MS_PRIVATE, MS_SLAVE, MS_SHARED, MS_UNBINDABLE], ids=hex)
def test_a_change_of_propagation_is_not_trapped(
    machine: str, arch: int, numbers: dict[str, int], flags: int
) -> None:
    program = seccomp.program(machine)
    assert run(program, arch, numbers["mount"], (0, 0, 0, flags)) == ALLOW
    assert run(program, arch, numbers["mount"], (0, 0, 0, flags | MS_REC)) == ALLOW


@pytest.mark.parametrize(("machine", "arch", "numbers"), ARCHES)
@settings(max_examples=300, deadline=None)
@given(
    flags=st.one_of(
        st.integers(0, (1 << 32) - 1),
        st.integers(0, 0xFFFF).map(lambda low: MGC | low),
        st.lists(st.integers(0, 31), max_size=4).map(lambda bits: sum({1 << b for b in bits})),
    )
)
def test_mount_is_let_through_exactly_where_the_kernel_only_changes_propagation(
    machine: str, arch: int, numbers: dict[str, int], flags: int
) -> None:
    expected = ALLOW if only_propagation_changes(flags) else NOTIFY
    assert run(seccomp.program(machine), arch, numbers["mount"], (1, 2, 3, flags, 4)) == expected


@pytest.mark.parametrize(("machine", "arch", "numbers"), ARCHES)
def test_of_the_new_api_only_what_makes_or_moves_a_mount_notifies(
    machine: str, arch: int, numbers: dict[str, int]
) -> None:
    program = seccomp.program(machine)
    base = X32_BIT if any(n & X32_BIT for n in numbers.values()) else 0
    for name in ("fsopen", "fsmount", "move_mount", "openat2"):
        assert run(program, arch, base + NEW_API[name]) == NOTIFY, name
    clone, recursive, cloexec = 1, 0x8000, 0x80000
    for flags, answer in {
        0: ALLOW,
        cloexec: ALLOW,
        clone | recursive: ALLOW,
        clone: NOTIFY,
        clone | cloexec | 0x1000: NOTIFY,
    }.items():
        for name in ("open_tree", "open_tree_attr"):
            assert run(program, arch, base + NEW_API[name], (0, 0, flags)) == answer, (name, hex(flags))


@pytest.mark.parametrize("machine", TABLES)
def test_nothing_else_is_trapped_or_refused(machine: str) -> None:
    program = seccomp.program(machine)
    for _, arch, numbers in TABLES[machine]:
        base = X32_BIT if any(n & X32_BIT for n in numbers.values()) else 0
        for number in range(base, base + 600):
            if number not in numbers.values() and number - base not in NEW_API.values():
                assert run(program, arch, number, (0, 0, 0, 0)) == ALLOW, (hex(arch), number)


def test_fragment_says_the_same_as_the_program() -> None:
    fragment = seccomp.oci_fragment("/run/interceptor/seccomp.sock", machine="x86_64")
    assert fragment["defaultAction"] == "SCMP_ACT_ALLOW"
    assert fragment["architectures"] == ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]
    assert fragment["listenerPath"] == "/run/interceptor/seccomp.sock"
    assert "listenerMetadata" not in fragment
    syscalls = fragment["syscalls"]
    assert isinstance(syscalls, list)
    old = {("mount",), ("umount",), ("umount2",)}
    new = {("fsopen",), ("fsmount",), ("move_mount",), ("open_tree",), ("open_tree_attr",), ("openat2",)}
    assert {tuple(entry["names"]) for entry in syscalls} == old | new
    assert {entry["action"] for entry in syscalls} == {"SCMP_ACT_NOTIFY"}
    masks = {(a["index"], a["value"], a["valueTwo"]) for e in syscalls for a in e.get("args", [])}
    assert masks == {tuple(rule.match) for rule in seccomp.RULES if rule.match}
    assert seccomp.oci_fragment("/x", "m", "aarch64")["listenerMetadata"] == "m"


def test_a_machine_whose_architectures_are_unknown_is_refused() -> None:
    with pytest.raises(InterceptorError, match="known for vax"):
        seccomp.program("vax")


# ---- the kernel itself -------------------------------------------------------------------------------------

#: mov eax, 22 (umount); mov ebx, 0; int 0x80; ret. A NULL path: EFAULT where nobody listens.
_I386_UMOUNT = bytes.fromhex("b816000000bb00000000cd80c3")

# Runs in a process of its own: a filter cannot be taken off again. It answers its own thread's calls.
_KERNEL_SCRIPT = """
import ctypes, fcntl, mmap, os, struct, sys, threading
import prctl
from interceptor.kernel.seccomp import install_listener
from interceptor.oci import seccomp
code = bytes.fromhex(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
prctl.set_no_new_privs(1)
got = []
ready, listener = threading.Event(), []
def agent():
    ready.wait()
    for _ in range(2):
        notification = bytearray(80)
        fcntl.ioctl(listener[0].fileno(), 0xC0502100, notification, True)
        number, arch = struct.unpack_from("=iI", notification, 16)
        got.append((hex(arch), number))
        (ident,) = struct.unpack_from("=Q", notification, 0)
        fcntl.ioctl(listener[0].fileno(), 0xC0182101, struct.pack("=QqiI", ident, 0, -75, 0))
thread = threading.Thread(target=agent)
thread.start()
listener.append(install_listener(seccomp.program()))
ready.set()
assert libc.umount2(b"/nowhere", 0) == -1 and ctypes.get_errno() == 75
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(code)
call = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
result = call()
assert result == -75, result
thread.join()
assert libc.mount(None, b"/nowhere", None, 1 << 18, None) == -1 and ctypes.get_errno() == 2
print(got)
os._exit(0)
"""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="int 0x80 is of x86")
def test_kernel_traps_umount2_and_the_i386_umount() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _KERNEL_SCRIPT, _I386_UMOUNT.hex()],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str([(hex(X86_64), 166), (hex(I386), 22)])


def test_a_program_that_the_kernel_refuses_is_an_error() -> None:
    from interceptor.kernel.seccomp import install_listener

    with pytest.raises(ValueError, match="not a BPF program"):
        install_listener(b"\0" * 7)
    # One instruction that is no return.
    with pytest.raises(SyscallError) as caught:
        install_listener(struct.pack("=HBBI", 0x20, 0, 0, 0))
    assert caught.value.errno in (errno.EINVAL, errno.EACCES)
