"""What is needed of a container's bundle and of its first process."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import msgspec

from interceptor.errors import ContainerError


class _Root(msgspec.Struct):
    path: str = "rootfs"
    readonly: bool = False


class _Linux(msgspec.Struct, rename="camel"):
    masked_paths: list[str] = []
    readonly_paths: list[str] = []


class _Spec(msgspec.Struct):
    root: _Root = msgspec.field(default_factory=_Root)
    linux: _Linux = msgspec.field(default_factory=_Linux)


@dataclass(frozen=True, slots=True)
class Bundle:
    """The parts of config.json that matter here (OCI runtime specification, config.md and config-linux.md)."""

    root: bytes
    """Absolute path of the root filesystem, as the runtime sees it before pivot_root."""
    root_readonly: bool
    masked: tuple[bytes, ...]
    readonly: tuple[bytes, ...]


def read_bundle(path: str) -> Bundle:
    """Reads ``PATH/config.json``. Raises `ContainerError`."""
    file = Path(path) / "config.json"
    try:
        spec = msgspec.json.decode(file.read_bytes(), type=_Spec)
    except OSError as error:
        raise ContainerError(f"{file}: {error.strerror}") from None
    except ValueError as error:
        raise ContainerError(f"{path!r}: no path of a bundle: {error}") from None
    except msgspec.DecodeError as error:
        raise ContainerError(f"{file}: {error}") from None
    root = os.path.normpath(os.path.join(path, spec.root.path))
    return Bundle(
        root=os.fsencode(root),
        root_readonly=spec.root.readonly,
        masked=tuple(os.fsencode(p) for p in spec.linux.masked_paths),
        readonly=tuple(os.fsencode(p) for p in spec.linux.readonly_paths),
    )


def host_id_of_root(pid: int, table: str) -> int:
    """The host's number for ID 0 of a process's user namespace; ``table`` is ``uid_map`` or ``gid_map``.

    Raises `ContainerError` where 0 is not mapped.
    """
    for line in Path(f"/proc/{pid}/{table}").read_text().splitlines():
        inside, outside, _length = (int(n) for n in line.split())
        if inside == 0:
            return outside
    raise ContainerError(f"process {pid}: its user namespace maps no root ({table})")


def mapped_ids(pid: int, table: str) -> int:
    """How many IDs, from 0 on and without a gap, a process's user namespace maps; ``table`` as above."""
    ranges = sorted(
        (int(inside), int(length))
        for inside, _, length in (
            line.split() for line in Path(f"/proc/{pid}/{table}").read_text().splitlines()
        )
    )
    mapped = 0
    for inside, length in ranges:
        if inside == mapped:
            mapped += length
    return min(mapped, 2**32 - 1)
