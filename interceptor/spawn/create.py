"""spawn(): from the caller's wishes to a plan, and the half of its execution that needs the host's rights."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Callable, Sequence
from typing import Unpack

from interceptor.kernel.fd import OwnedFd
from interceptor.kernel.flags import AT_FDCWD, MOUNT_ATTR__ATIME, MountAttr, MountFlag, OpenTreeFlag
from interceptor.kernel.mount import mount_setattr, open_tree
from interceptor.spawn import child, layout
from interceptor.spawn.channel import Channel
from interceptor.spawn.container import Agent, GuardedChild
from interceptor.spawn.job import Job
from interceptor.spawn.layout import Mount
from interceptor.spawn.network import Network, configure_outside, prepare
from interceptor.spawn.process import STEP_SECONDS, Command, JobOptions, Outputs, make_job

#: As Docker's userns-remap and Podman do by default.
FIRST_ID = 100000
ID_COUNT = 65536


class SpawnOptions(JobOptions, total=False):
    """What can be said of a new container, beside what can be said of its main process. All is optional."""

    #: Mounts beside the usual ones (/proc, /sys, /dev, /run, /tmp and what is below), made after them.
    mounts: Sequence[Mount]
    #: A directory of the host whose files belong to ``first_id`` and on. Default: a tmpfs with the host's /usr.
    rootfs: str | None
    #: ``linux.maskedPaths`` and ``linux.readonlyPaths`` of an OCI bundle.
    masked_paths: Sequence[str]
    readonly_paths: Sequence[str]
    #: False: the container's root is the host's. The daemon may refuse that.
    user_namespace: bool
    #: The host's user and group ID of the container's root, and how many there are from there on.
    first_id: int
    id_count: int
    #: ``none``, ``loopback`` (the default) or a `Veth`.
    network: Network
    hostname: str
    #: The container's ID. Default: a random one.
    cid: str
    #: False: any signal interrupts a trapped call, as with kernels before 5.19. For tests.
    wait_killable: bool
    #: False: welded, but no call is trapped: what the kernel alone answers in such a container. For tests.
    trapped: bool


def spawn(
    agent: Agent | None, command: Command | None, *arguments: object, **options: Unpack[SpawnOptions]
) -> GuardedChild:
    """See `interceptor.library.Interceptor.spawn`. Without an agent there is no filter and nothing is welded."""
    guarded = GuardedChild(
        options.get("cid") or f"ix-{secrets.token_hex(6)}",
        agent,
        user_namespace=options.get("user_namespace", True),
        wait_killable=options.get("wait_killable", True),
        trapped=options.get("trapped", True),
    )
    outputs = None
    try:
        if command is not None:
            outputs = Outputs.make(options)
        elif arguments:
            raise TypeError("arguments without a command")
        job = make_job(command, arguments, outputs, options) if command is not None and outputs else None
        with contextlib.ExitStack() as trees:
            plan = _plan(guarded, job, options, trees)
            (guarded.bundle / "config.json").write_text(json.dumps(_bundle(plan, options), indent=1))
            guarded.bring_up(plan, outputs, _before(plan, options))
        return guarded
    except BaseException:
        guarded.close()
        if outputs is not None:
            outputs.close()
        raise


def _plan(
    guarded: GuardedChild, job: Job | None, options: SpawnOptions, trees: contextlib.ExitStack
) -> child.Plan:
    """Opens what is bound; ``trees`` owns it. Raises `OSError`, `InterceptorError`."""
    hostname = options.get("hostname", "guarded")
    rootfs = options.get("rootfs")
    skeleton = layout.skeleton(hostname) if rootfs is None else None
    wanted = [*(skeleton.mounts if skeleton else ()), *layout.base_mounts()]
    wanted += [entry.checked() for entry in options.get("mounts", ())]
    return child.Plan(
        namespaces=layout.namespace_flags(guarded.user_namespace),
        user_namespace=guarded.user_namespace,
        hostname=hostname,
        network=options.get("network", "loopback"),
        rootfs=_bind(trees, Mount(rootfs, "/", "", ("rbind",))) if rootfs is not None else None,
        skeleton=skeleton,
        mounts=[(entry, _bind(trees, entry) if entry.is_bind else None) for entry in wanted],
        filter=guarded.filter(),
        job=job,
    )


def _bundle(plan: child.Plan, options: SpawnOptions) -> dict[str, object]:
    return layout.bundle(
        hostname=plan.hostname,
        mounts=[entry for entry, _ in plan.mounts],
        first_id=options.get("first_id", FIRST_ID) if plan.user_namespace else None,
        id_count=options.get("id_count", ID_COUNT),
        masked_paths=options.get("masked_paths", ()),
        readonly_paths=options.get("readonly_paths", ()),
    )


def _before(plan: child.Plan, options: SpawnOptions) -> Callable[[int, Channel], None]:
    """What the host does once the namespaces exist and before anything is done in them."""
    ids = f"0 {options.get('first_id', FIRST_ID)} {options.get('id_count', ID_COUNT)}\n"
    prepare(plan.network)

    def before(helper: int, channel: Channel) -> None:
        channel.receive("unshared", STEP_SECONDS)
        configure_outside(plan.network, helper)
        if plan.user_namespace:
            for name in ("uid_map", "gid_map"):
                with open(f"/proc/{helper}/{name}", "w") as file:
                    file.write(ids)
        channel.send("mapped")

    return before


def _bind(trees: contextlib.ExitStack, entry: Mount) -> child.Bind:
    """A detached copy of the source, flags set. The child could not always reach it, nor copy across namespaces.

    Raises `OSError`.
    """
    recursive = "rbind" in entry.options
    flags = OpenTreeFlag.OPEN_TREE_CLONE | (OpenTreeFlag.AT_RECURSIVE if recursive else 0)
    tree: OwnedFd = trees.enter_context(open_tree(AT_FDCWD, os.path.abspath(entry.source), flags))
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
