"""Whether a caller may: the kernel's own rules, applied to the nodes as the view shows them. Pure.

FUSE's default_permissions knows one rule, that of files. sysctls have others: no capability overrides a mode there, and
for the network's it is CAP_NET_ADMIN that counts and not who owns them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

from interceptor.view.host import Credentials, Within
from interceptor.view.nodes import Capability, Owner, Rights
from interceptor.view.protocol import Attr

READ, WRITE, EXECUTE = 4, 2, 1
_FOR_CHECKPOINT = (Capability.CHECKPOINT_RESTORE, Capability.SYS_ADMIN)


class Caller:
    """Who made a request. What is not in the request itself is looked up when a rule asks for it."""

    def __init__(
        self,
        uid: int,
        gid: int,
        look_up: Callable[[], Credentials],
        owner: Owner | None,
        within: Within | None = None,
    ) -> None:
        """``within``: the namespace that it asks for a node of, if that is not the container's own."""
        self.uid = uid
        self.gid = gid
        self._look_up = look_up
        self._owner = owner
        self._over = within.owners if within is not None else (owner.userns,) if owner is not None else ()
        """The user namespaces in which a capability counts."""

    @cached_property
    def _credentials(self) -> Credentials:
        return self._look_up()

    def give_up_capabilities(self) -> None:
        """From here on it has its ids and groups only."""
        look_up = self._look_up
        self._look_up = lambda: look_up()._replace(capabilities=0)

    @property
    def is_host_root(self) -> bool:
        """The initial root. Nothing in a container is."""
        return self.uid == 0

    @property
    def is_root(self) -> bool:
        """The container's root, or the initial one."""
        return self.uid == 0 or (self._owner is not None and self.uid == self._owner.uid)

    def in_group(self, gid: int) -> bool:
        """in_egroup_p(): its own group or one of its supplementary ones."""
        return self.gid == gid or gid in self._credentials.groups

    def has(self, capability: Capability) -> bool:
        """Whether it has a capability over what the node belongs to. One of a user namespace further in is none."""
        if self.is_host_root:
            return True
        if not any(self._over) or self._credentials.userns not in self._over:
            return False
        return self._credentials.has(capability)


def may(rights: Rights, attr: Attr, caller: Caller, mask: int, owner: Owner | None) -> bool:
    """Whether the caller may do all of ``mask`` (`READ`, `WRITE`, `EXECUTE`)."""
    if attr.mode & mask == mask and attr.mode >> 3 & mask == mask and attr.mode >> 6 & mask == mask:
        return True  # everybody may, by every rule
    if rights is Rights.NETWORK:
        return _by_capability(attr, caller, mask, Capability.NET_ADMIN)
    if rights is Rights.LIMITS:
        return _by_capability(attr, caller, mask, Capability.SYS_RESOURCE)
    if rights is Rights.CHECKPOINT and not mask & EXECUTE and any(caller.has(c) for c in _FOR_CHECKPOINT):
        return True
    if _bits(attr, caller) & mask == mask:
        return True
    return rights is Rights.FILE and _overrides(attr, caller, mask, owner)


def _bits(attr: Attr, caller: Caller) -> int:
    if caller.uid == attr.uid:
        return attr.mode >> 6 & 7
    # Supplementary groups are looked up only where they would make a difference.
    if attr.mode >> 3 & 7 != attr.mode & 7 and caller.in_group(attr.gid):
        return attr.mode >> 3 & 7
    return attr.mode & 7


def _by_capability(attr: Attr, caller: Caller, mask: int, capability: Capability) -> bool:
    if attr.mode & mask == mask:
        return True
    return attr.mode >> 6 & mask == mask and caller.has(capability)


def _overrides(attr: Attr, caller: Caller, mask: int, owner: Owner | None) -> bool:
    """capable_wrt_inode_uidgid(): a capability reaches what belongs to ids of the container only."""
    if not caller.is_host_root:
        if owner is None or not 0 <= attr.uid - owner.uid < owner.groups:
            return False
        if not 0 <= attr.gid - owner.gid < owner.groups:
            return False
    is_directory = attr.mode & 0o170000 == 0o040000
    if mask & EXECUTE and not is_directory and not attr.mode & 0o111:
        return False
    if caller.has(Capability.DAC_OVERRIDE):
        return True
    harmless = mask == READ or (is_directory and not mask & WRITE)
    return harmless and caller.has(Capability.DAC_READ_SEARCH)
