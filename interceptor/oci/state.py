"""The container's state as OCI runtimes write it, for hooks and for seccomp agents.

Sources: OCI runtime specification 1.2, runtime.md "State" and config-linux.md "The Container Process State".
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

# An ID becomes a file name of ours: one path component without control characters.
ContainerId = Annotated[str, Meta(pattern=r"^(?!\.\.?\Z)[^/\x00-\x1f\x7f]+\Z", max_length=255)]


class State(msgspec.Struct, frozen=True, rename="camel"):
    """What a runtime tells of a container. Fields that later versions may add are ignored.

    ``pid`` is the first process, as numbered in the runtime's PID namespace; 0 where the runtime leaves it out.
    ``status`` is ``creating``, ``created``, ``running`` or ``stopped``, or the runtime's own invention.
    """

    oci_version: str
    id: ContainerId
    status: str
    bundle: str
    pid: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0
    annotations: dict[str, str] | None = None


class ContainerProcessState(msgspec.Struct, frozen=True, rename="camel"):
    """What comes with a seccomp listener: which process of which container it belongs to.

    ``pid`` is 0 where the runtime does not tell, as crun 1.8 for ``exec``: the container is found by its ID.
    ``fds`` are the names of the descriptors sent along, in their order. ``metadata`` is the bundle's
    ``linux.seccomp.listenerMetadata``.
    """

    oci_version: str
    pid: Annotated[int, Meta(ge=0, le=2**31 - 1)]
    state: State
    fds: list[str] | None = None
    metadata: str = ""
