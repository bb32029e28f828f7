"""The manager's seccomp profile with our notification rules in it. Pure: profile in, profile out, idempotent.

What the manager refuses stays refused, with two exceptions, each a table here: the mount family, which is ours to
answer, and what profiles such as Docker's let through or not by the capabilities that a container gets: a system
container gets more of them than the manager knew when it made the profile.

Sources: OCI runtime specification, config-linux.md, "Seccomp"; seccomp_rule_add(3) for what overlapping rules mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from interceptor.errors import ContainerError
from interceptor.oci.seccomp import RULES, oci_fragment

Json = dict[str, Any]

#: Trapped, whatever their arguments: see `merge`.
TRAPPED = tuple(dict.fromkeys(rule.syscall for rule in RULES))

#: The rest of the mount family. The welds hold against all of it, so a container may call it.
_FAMILY = ("fsconfig", "fspick", "mount_setattr", "open_tree_attr", "pivot_root", "statmount", "listmount")
MOUNT_FAMILY = tuple(name for name in _FAMILY if name not in TRAPPED)

#: What the capabilities of a system container let it do in its own namespaces, and what engines inside it need.
#: Docker's default profile has the same calls under CAP_SYS_ADMIN and so on; keyrings belong to a user namespace (5.2).
SYSTEM_CALLS = (
    *("clone", "clone3", "setns", "unshare", "sethostname", "setdomainname"),  # CAP_SYS_ADMIN
    *("bpf", "perf_event_open", "fanotify_init", "quotactl", "quotactl_fd"),
    *("name_to_handle_at", "open_by_handle_at"),  # CAP_DAC_READ_SEARCH
    *(
        "chroot",
        "reboot",
        "acct",
        "syslog",
        "vhangup",
    ),  # CAP_SYS_CHROOT, _BOOT, _PACCT, CAP_SYSLOG, _TTY_CONFIG
    *("get_mempolicy", "mbind", "set_mempolicy"),  # CAP_SYS_NICE
    *(
        "kcmp",
        "pidfd_getfd",
        "process_madvise",
        "process_vm_readv",
        "process_vm_writev",
        "ptrace",
    ),  # CAP_SYS_PTRACE
    *("add_key", "keyctl", "request_key"),
)

WAIT_KILLABLE_RECV = "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"
_OPEN_ACTIONS = ("SCMP_ACT_ALLOW",)


def merge(
    profile: Mapping[str, Any] | None, listener: str, *, system: bool, wait_killable: bool = False
) -> Json:
    """``linux.seccomp`` with the rules in it; ``system``: the container gets the capabilities of a system container.

    With a profile that lets through what it does not name, the rules are those of `oci_fragment`. With one that
    refuses, a call that is trapped for some arguments only would be refused for the others, and rules for the others
    would overlap, which libseccomp leaves undefined: so these calls are trapped for all arguments. The guard lets the
    kernel run what it does not care for. Raises `ContainerError` for a profile with a listener of its own.
    """
    merged: Json = _merged(profile, listener, system) if profile else oci_fragment(listener)
    if wait_killable:
        flags = [flag for flag in merged.get("flags") or [] if flag != WAIT_KILLABLE_RECV]
        merged["flags"] = [*flags, WAIT_KILLABLE_RECV]
    return merged


def _merged(profile: Mapping[str, Any], listener: str, system: bool) -> Json:
    _require_no_listener(profile, listener)
    ours = oci_fragment(listener)["syscalls"]
    assert isinstance(ours, list)
    ruled = {*TRAPPED, *MOUNT_FAMILY, *(SYSTEM_CALLS if system else ())}
    kept = _without(profile.get("syscalls") or [], ruled)
    if profile.get("defaultAction") in _OPEN_ACTIONS:
        added = ours
    else:
        added = [{"names": [name], "action": "SCMP_ACT_NOTIFY"} for name in TRAPPED]
        allowed = [*MOUNT_FAMILY, *(SYSTEM_CALLS if system else ())]
        added.append({"names": allowed, "action": "SCMP_ACT_ALLOW"})
    return {**profile, "listenerPath": listener, "syscalls": [*kept, *added]}


def _require_no_listener(profile: Mapping[str, Any], listener: str) -> None:
    path = profile.get("listenerPath")
    notifies = any(
        rule.get("action") == "SCMP_ACT_NOTIFY" and not set(rule.get("names") or ()) <= set(TRAPPED)
        for rule in profile.get("syscalls") or ()
    )
    if profile.get("defaultAction") == "SCMP_ACT_NOTIFY" or notifies or path not in (None, "", listener):
        raise ContainerError(
            "the container's seccomp profile has a listener of its own "
            f"({path or 'SCMP_ACT_NOTIFY'}): a process can have only one",
            "take SCMP_ACT_NOTIFY and listenerPath out of the profile",
        )


def _without(rules: list[Json], names: set[str]) -> list[Json]:
    """The rules, less what they say of ``names``."""
    kept = []
    for rule in rules:
        left = [name for name in rule.get("names") or () if name not in names]
        if left:
            kept.append({**rule, "names": left})
    return kept
