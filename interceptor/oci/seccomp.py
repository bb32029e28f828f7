"""What is trapped: the notification rules as one table, for bundles (plain data) and for our own children (BPF).

A container's filter lets everything through and notifies for what may touch a view. The rules only have to be wide
enough: what they let through is held by the welds, and what they trap without need costs a few microseconds.

Sources: seccomp(2); path_mount() of the kernel's fs/namespace.c for the order in which mount(2) reads its flags; OCI
runtime specification, config-linux.md, "Seccomp".
"""

from __future__ import annotations

import functools
import os
import struct
from collections.abc import Mapping
from typing import NamedTuple

from interceptor.errors import InterceptorError

# mount(2), linux/mount.h.
MS_REMOUNT = 0x20
MS_BIND = 0x1000
MS_PROPAGATION = 1 << 17 | 1 << 18 | 1 << 19 | 1 << 20  # MS_UNBINDABLE, MS_PRIVATE, MS_SLAVE, MS_SHARED
MS_MGC_VAL = 0xC0ED0000
MS_MGC_MSK = 0xFFFF0000

OPEN_TREE_CLONE = 0x1
AT_RECURSIVE = 0x8000

_MOUNT_FLAGS = 3
_OPEN_TREE_FLAGS = 2


class Match(NamedTuple):
    """Argument number ``argument`` of the call, masked, equals ``value``."""

    argument: int
    mask: int
    value: int


class Rule(NamedTuple):
    """Calls to notify for: all of them, or those whose argument matches. Rules of one call are alternatives."""

    syscall: str
    match: Match | None = None
    #: Of a call that libseccomp before 2.6 cannot name: its number, the same on every architecture (since Linux 5.0).
    number: int | None = None


_PLAIN_CLONE = Match(_OPEN_TREE_FLAGS, OPEN_TREE_CLONE | AT_RECURSIVE, OPEN_TREE_CLONE)

RULES: tuple[Rule, ...] = (
    Rule("umount2"),
    # The old call of 32-bit architectures, number 22 of i386. It has no flags and follows symbolic links.
    Rule("umount"),
    # A change of propagation alone reveals nothing and is never trapped. Everything else has no propagation flag …
    Rule("mount", Match(_MOUNT_FLAGS, MS_PROPAGATION, 0)),
    # … or a flag that the kernel looks at before those …
    Rule("mount", Match(_MOUNT_FLAGS, MS_REMOUNT, MS_REMOUNT)),
    Rule("mount", Match(_MOUNT_FLAGS, MS_BIND, MS_BIND)),
    # … or the magic number of Linux before 2.4 in its upper half: the kernel then ignores that half, in which the
    # number looks like MS_PRIVATE and MS_SLAVE. Old libmount, busybox and klibc set it on every call.
    Rule("mount", Match(_MOUNT_FLAGS, MS_MGC_MSK, MS_MGC_VAL)),
    # The mount API of file descriptors. Recursive clones bring the welds along and are never trapped.
    Rule("fsopen"),
    Rule("fsmount"),
    Rule("move_mount"),
    Rule("open_tree", _PLAIN_CLONE),
    # 6.15+. A runtime passes over a name that its libseccomp does not know: the call is then the kernel's, which
    # refuses a clone of this kind where covers are below.
    Rule("open_tree_attr", _PLAIN_CLONE, number=467),
    # With RESOLVE_NO_XDEV a composite must be one filesystem; that flag is in memory, where no filter sees it.
    Rule("openat2"),
)

#: By ``uname -m``, the architectures whose calls such a kernel takes from a process; its own one first.
ARCHITECTURES: Mapping[str, tuple[str, ...]] = {
    "x86_64": ("SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"),
    "aarch64": ("SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"),
}


def architectures(machine: str | None = None) -> tuple[str, ...]:
    """OCI names for ``machine`` (default: this one).

    Raises `InterceptorError` for a machine without an entry: a filter that misses an architecture is none.
    """
    machine = machine or os.uname().machine
    try:
        return ARCHITECTURES[machine]
    except KeyError:
        raise InterceptorError(
            f"no seccomp architectures are known for {machine}; known: {', '.join(ARCHITECTURES)}"
        ) from None


def oci_fragment(listener_path: str, metadata: str = "", machine: str | None = None) -> dict[str, object]:
    """``linux.seccomp`` of a bundle's config.json. ``metadata`` comes back in each ContainerProcessState."""
    syscalls: list[dict[str, object]] = []
    for rule in RULES:
        entry: dict[str, object] = {"names": [rule.syscall], "action": "SCMP_ACT_NOTIFY"}
        if rule.match is not None:
            index, mask, value = rule.match
            entry["args"] = [{"index": index, "op": "SCMP_CMP_MASKED_EQ", "value": mask, "valueTwo": value}]
        syscalls.append(entry)
    fragment: dict[str, object] = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": list(architectures(machine)),
        "listenerPath": listener_path,
        "syscalls": syscalls,
    }
    if metadata:
        fragment["listenerMetadata"] = metadata
    return fragment


@functools.cache
def program(machine: str | None = None) -> bytes:
    """The rules as a classic BPF program for seccomp(2): 8-byte ``struct sock_filter``, native byte order."""
    # Loads libseccomp: not for those who only want the fragment.
    import pyseccomp

    rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    wanted = [getattr(pyseccomp.Arch, name.removeprefix("SCMP_ARCH_")) for name in architectures(machine)]
    # The native one is there from the start; for a foreign machine it must not be.
    for architecture in wanted:
        if architecture != pyseccomp.system_arch():
            rules.add_arch(architecture)
    if pyseccomp.system_arch() not in wanted:
        rules.remove_arch(pyseccomp.Arch.NATIVE)
    for rule in RULES:
        if rule.number is not None:
            continue
        arguments = []
        if rule.match is not None:
            index, mask, value = rule.match
            arguments = [pyseccomp.Arg(index, pyseccomp.MASKED_EQ, mask, value)]
        rules.add_rule(pyseccomp.NOTIFY, rule.syscall, *arguments)
    # libseccomp writes to descriptors only.
    with open(os.memfd_create("seccomp"), "w+b") as file:
        rules.export_bpf(file)
        file.seek(0)
        compiled = file.read()
    return b"".join(_by_number(rule) for rule in RULES if rule.number is not None) + compiled


# linux/bpf_common.h, linux/seccomp.h.
_LD_W_ABS, _ALU_AND_K, _JEQ_K, _RET_K = 0x20, 0x54, 0x15, 0x06
_NR, _ARGUMENTS = 0, 16
_RET_USER_NOTIF = 0x7FC00000
_X32_SYSCALL_BIT = 0x40000000


def _by_number(rule: Rule) -> bytes:
    """BPF that notifies for a rule, on whatever architecture, and else goes on with what comes after it."""
    number, match = rule.number, rule.match
    # Its flags are an int: the lower half of the argument is all of it, the first half on these machines.
    assert number is not None and match is not None and match.mask < 1 << 32
    code = (
        (_LD_W_ABS, 0, 0, _NR),
        (_ALU_AND_K, 0, 0, 0xFFFFFFFF ^ _X32_SYSCALL_BIT),
        (_JEQ_K, 0, 4, number),
        (_LD_W_ABS, 0, 0, _ARGUMENTS + 8 * match.argument),
        (_ALU_AND_K, 0, 0, match.mask),
        (_JEQ_K, 0, 1, match.value),
        (_RET_K, 0, 0, _RET_USER_NOTIF),
    )
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)
