"""spawn(): from the caller's wishes to a plan, and the half of its execution that needs the host's rights."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Callable, Mapping, Sequence

from interceptor.kernel.fd import OwnedFd
from interceptor.kernel.flags import AT_FDCWD, MOUNT_ATTR__ATIME, MountAttr, MountFlag, OpenTreeFlag
from interceptor.kernel.mount import mount_setattr, open_tree
from interceptor.spawn import child, layout
from interceptor.spawn.channel import Channel
from interceptor.spawn.container import Agent, GuardedChild
from interceptor.spawn.layout import Mount
from interceptor.spawn.network import Network, configure_outside, prepare
from interceptor.spawn.process import STEP_SECONDS, Command, Outputs, make_job

#: As Docker's userns-remap and Podman do by default.
FIRST_ID = 100000
ID_COUNT = 65536


def spawn(
    agent: Agent | None,
    command: Command | None = None,
    *arguments: object,
    mounts: Sequence[Mount] = (),
    rootfs: str | None = None,
    masked_paths: Sequence[str] = (),
    readonly_paths: Sequence[str] = (),
    user_namespace: bool = True,
    first_id: int = FIRST_ID,
    id_count: int = ID_COUNT,
    network: Network = "loopback",
    hostname: str = "guarded",
    cid: str | None = None,
    stdin: bytes | None = None,
    capture: bool = True,
    environment: Mapping[str, str] | None = None,
    directory: str = "/",
    no_new_privs: bool = True,
    wait_killable: bool = True,
    pass_fds: Sequence[int] = (),
    drop_capabilities: Sequence[str] = (),
) -> GuardedChild:
    """Make a container and start ``command`` in it; see `interceptor.library.Interceptor.spawn`."""
    guarded = GuardedChild(cid or f"ix-{secrets.token_hex(6)}", agent, user_namespace, wait_killable)
    outputs = Outputs.make(stdin, capture) if command is not None else None
    try:
        with contextlib.ExitStack() as stack:
            job = None
            if command is not None and outputs is not None:
                job = make_job(
                    command,
                    arguments,
                    outputs,
                    environment=environment,
                    directory=directory,
                    no_new_privs=no_new_privs,
                    pass_fds=pass_fds,
                    drop_capabilities=drop_capabilities,
                )
            skeleton = layout.skeleton(hostname) if rootfs is None else None
            wanted = [
                *(skeleton.mounts if skeleton else ()),
                *layout.base_mounts(),
                *(m.checked() for m in mounts),
            ]
            plan = child.Plan(
                namespaces=layout.namespace_flags(user_namespace),
                user_namespace=user_namespace,
                hostname=hostname,
                network=network,
                rootfs=_bind(stack, Mount(rootfs, "/", "", ("rbind",))) if rootfs is not None else None,
                skeleton=skeleton,
                mounts=[(m, _bind(stack, m) if m.is_bind else None) for m in wanted],
                filter=guarded.filter(),
                job=job,
            )
            bundle = layout.bundle(
                hostname=hostname,
                mounts=wanted,
                first_id=first_id if user_namespace else None,
                id_count=id_count,
                masked_paths=masked_paths,
                readonly_paths=readonly_paths,
            )
            (guarded.bundle / "config.json").write_text(json.dumps(bundle, indent=1))
            guarded.bring_up(plan, outputs, _before(plan, first_id, id_count))
        return guarded
    except BaseException:
        guarded.close()
        if outputs is not None:
            outputs.close()
        raise


def _before(plan: child.Plan, first_id: int, id_count: int) -> Callable[[int, Channel], None]:
    """What the host does once the namespaces exist and before anything is done in them."""
    prepare(plan.network)

    def before(helper: int, channel: Channel) -> None:
        channel.receive("unshared", STEP_SECONDS)
        configure_outside(plan.network, helper)
        if plan.user_namespace:
            for name in ("uid_map", "gid_map"):
                with open(f"/proc/{helper}/{name}", "w") as file:
                    file.write(f"0 {first_id} {id_count}\n")
        channel.send("mapped")

    return before


def _bind(stack: contextlib.ExitStack, entry: Mount) -> child.Bind:
    """A detached copy of the source, flags set. The child could not always reach it, nor copy across namespaces.

    Raises `OSError`.
    """
    recursive = "rbind" in entry.options
    flags = OpenTreeFlag.OPEN_TREE_CLONE | (OpenTreeFlag.AT_RECURSIVE if recursive else 0)
    tree: OwnedFd = stack.enter_context(open_tree(AT_FDCWD, os.path.abspath(entry.source), flags))
    attributes = MountAttr(0)
    for flag, attribute in layout.ATTRIBUTES.items():
        if entry.flags & flag:
            attributes |= attribute
    if attributes:
        clear = MOUNT_ATTR__ATIME if attributes & MountAttr.MOUNT_ATTR_NOATIME else 0
        mount_setattr(tree, b"", set_=attributes, clear=clear, recursive=recursive)
    # The host's propagation must not reach into the child.
    mount_setattr(tree, b"", propagation=MountFlag.MS_PRIVATE, recursive=recursive)
    return child.Bind(tree.fileno(), os.path.isdir(entry.source))
