"""``python -m tests.without MECHANISM… [-- COMMAND…]``: fallbacks, forced on a kernel that has what they stand in for.

A seccomp filter on this process, and so on the daemon, guards and containers that it starts, has the kernel refuse the
mechanism with the errno of a kernel that does not know it. Then the calls of tests/fidelity that need the interceptor
are compared with what the kernel alone answers: with the fallback they differ no more than without. Or a command is run
under the filter. As root.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Mapping
from typing import NamedTuple

import pyseccomp

from interceptor.kernel.features import probe
from interceptor.library import Interceptor
from tests.fidelity.tables import survey


class Refused(NamedTuple):
    """Calls whose argument, masked, has a value; all, where there is no mask."""

    syscall: str | int
    argument: int
    mask: int
    value: int
    error: int = errno.EINVAL


_WORD = 0xFFFFFFFF


def _any(syscall: int) -> Refused:
    """All calls, as of a kernel that does not have them: by number, which is the same everywhere."""
    return Refused(syscall, 0, 0, 0, errno.ENOSYS)


#: By the names of interceptor/kernel/features.py: every mechanism that has a fallback.
REFUSALS: Mapping[str, tuple[Refused, ...]] = {
    "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV": (Refused("seccomp", 1, 1 << 5, 1 << 5),),
    "SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP": (Refused("ioctl", 1, _WORD, 0x40082104),),
    "STATX_MNT_ID_UNIQUE": (Refused("statx", 3, 0x4000, 0x4000),),
    "statmount, listmount": (_any(457), _any(458)),
    # The IDs that it takes, and what lists these.
    "statmount in another namespace": (
        Refused("ioctl", 1, _WORD, 0x8008B705, errno.ENOTTY),
        Refused("ioctl", 1, _WORD, 0x8010B70B, errno.ENOTTY),
        Refused("ioctl", 1, _WORD, 0x8010B70C, errno.ENOTTY),
    ),
    "mount_setattr": (_any(442),),
    "SECCOMP_ADDFD_FLAG_SEND": (Refused("ioctl", 1, _WORD, 0x40182103),),
    "MOVE_MOUNT_SET_GROUP": (Refused("move_mount", 4, 0x100, 0x100),),
    "MOVE_MOUNT_BENEATH": (Refused("move_mount", 4, 0x200, 0x200),),
    "PIDFD_THREAD": (Refused("pidfd_open", 1, 0x80, 0x80),),
    "F_DUPFD_QUERY": (Refused("fcntl", 1, _WORD, 1024 + 3),),
    "fsconfig pidns": (Refused("fsconfig", 1, _WORD, 5),),
}

#: What no kernel has without the other.
TOGETHER = ("STATX_MNT_ID_UNIQUE", "statmount, listmount", "statmount in another namespace")

#: Tables that make, copy, replace and remove composites.
TABLES = ("umounts", "lives", "contexts", "fresh")


def refuse(names: list[str]) -> None:
    """Put this process, and all that it starts, under the filter for good."""
    rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    rules.set_attr(pyseccomp.Attr.CTL_NNP, 0)
    # By int 0x80 goes what has no part in this.
    rules.set_attr(pyseccomp.Attr.ACT_BADARCH, pyseccomp.ALLOW)
    for name in names:
        for syscall, argument, mask, value, error in REFUSALS[name]:
            args = [pyseccomp.Arg(argument, pyseccomp.MASKED_EQ, mask, value)] if mask else []
            rules.add_rule(pyseccomp.ERRNO(error), syscall, *args)
    rules.load()


def main(arguments: list[str]) -> int:
    """Exit status 0 if the mechanisms are gone and everything works without them; else the command's."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    names, command = arguments[:end], arguments[end + 1 :]
    if set(TOGETHER[:2]) & set(names):
        names += [name for name in TOGETHER if name not in names]
    refuse(names)
    still = [f.name for f in probe() if f.available == (f.name in names)]
    if still:
        print(f"not as they should be after the filter: {still}")
        return 1
    if command:
        os.execvp(command[0], command)
    with Interceptor() as daemon:
        found = survey(daemon, "root", TABLES)
    for difference in found.defects[:10]:
        print(difference)
    print(f"{found.scripts} scripts, {len(found.defects)} defects")
    return bool(found.defects)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
