"""What the mounts of a container are: facts from the kernel, classes by lineage, outcomes by policy. For the CLI.

Nothing here touches a file of the container: all is asked of the kernel by mount ID (statmount(2), listmount(2)).
"""

from __future__ import annotations

import dataclasses
import os
import time

from interceptor.containers.registry import Container
from interceptor.errors import ContainerError
from interceptor.kernel import stat
from interceptor.kernel.flags import MountAttr, Shown
from interceptor.kernel.stat import MountStat
from interceptor.mounts import explain
from interceptor.mounts.lineage import UNIQUE_FROM, MountClass, classify
from interceptor.verdicts import Answerer, Scene


def tree(container: Container, namespace: int = 0) -> list[dict[str, object]]:
    """Every mount of a mount namespace (by ID; 0: the container's first), parents before children, with its class.

    In the first one, what the container was created with and has lost comes last, ``present`` being false.
    """
    baseline = container.baseline
    scene = Scene(namespace or baseline.namespace)
    mounts = {m.mnt_id: m for m in scene.below(stat.LSMT_ROOT) if m.point}
    children: dict[int, list[MountStat]] = {}
    for mount in sorted(mounts.values(), key=lambda m: m.mnt_id):
        children.setdefault(mount.parent_id if mount.parent_id in mounts else 0, []).append(mount)
    rows: list[dict[str, object]] = []
    open_ = [(mount, 0) for mount in reversed(children.get(0, []))]
    while open_:
        mount, depth = open_.pop()
        kind = classify(scene.chain(mount.mnt_id), baseline, scene.namespace)
        rows.append({**_row(mount, kind), "depth": depth, "present": True})
        open_ += [(child, depth + 1) for child in reversed(children.get(mount.mnt_id, []))]
    if scene.namespace == baseline.namespace:
        rows += [
            {
                "id": m.mnt_id,
                "class": m.kind.value,
                "path": os.fsdecode(m.point),
                "root": os.fsdecode(m.root),
                "depth": 0,
                "present": False,
            }
            for m in baseline.mounts.values()
            if m.mnt_id not in mounts
        ]
    return rows


def whereabouts(container: Container) -> dict[str, object]:
    """Its first process and, to recognise that by, the inode of its user namespace."""
    return {"pid": container.pid, "userns": os.fstat(container.userns.fileno()).st_ino}


def mount(container: Container, answerer: Answerer, mnt_id: int, namespace: int = 0) -> dict[str, object]:
    """What one mount is, since when, by which lineage, and what each operation on it would get.

    Raises `ContainerError` where there is no such mount in the namespace (by ID; 0: the container's first).
    """
    baseline = container.baseline
    scene = Scene(namespace or baseline.namespace)
    chain = scene.chain(mnt_id)
    if not chain:
        raise ContainerError(f"mount {mnt_id} is not in that mount namespace of container {container.cid}")
    kinds = [classify(chain[i:], baseline, scene.namespace) for i in range(len(chain))]
    known = sorted({**dict.fromkeys(baseline.mounts, container.created_ns), **container.births}.items())
    # IDs that are used again do not tell who is older.
    tells = mnt_id >= UNIQUE_FROM or mnt_id in baseline.mounts
    earliest, latest = explain.born(mnt_id, known) if tells else (0, None)
    outcomes = explain.outcomes(
        kinds[0], lambda request: answerer.circumstances(container, scene, chain, kinds[0], request)
    )
    return {
        **_row(chain[0], kinds[0]),
        "meaning": explain.MEANING[kinds[0]],
        "since": _since(earliest, latest, container.created_ns),
        "lineage": explain.lineage(chain, kinds, baseline, scene.namespace == baseline.namespace),
        "operations": [dataclasses.asdict(outcome) for outcome in outcomes],
    }


def _row(mount: MountStat, kind: MountClass) -> dict[str, object]:
    return {
        "id": mount.mnt_id,
        "class": kind.value,
        "path": os.fsdecode(mount.point),
        "root": os.fsdecode(mount.root),
        "fstype": os.fsdecode(mount.fstype),
        "flags": str(Shown(mount.attributes, MountAttr)),
        "parent": mount.parent_id,
    }


def _since(earliest: int, latest: int | None, created: int) -> str:
    """In seconds ago; the kernel does not keep when a mount was made."""
    now = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    ago = f"{(now - (earliest or created)) / 1e9:.1f} s ago"
    if latest == earliest:
        return f"{ago}, when the container was created" if earliest == created else ago
    if latest is None:
        return f"less than {ago}"
    return f"between {ago} and {(now - latest) / 1e9:.1f} s ago"
