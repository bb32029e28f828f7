"""What one container asks for itself: OCI annotations ``io.interceptor.*`` and ``INTERCEPTOR_*`` of its environment.

Pure. Both spell the same settings, ``io.interceptor.honor_caps=true`` and ``INTERCEPTOR_HONOR_CAPS=true``. An
annotation is the manager's word and goes before the environment, which an image can set as well.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from interceptor.errors import ContainerError

ANNOTATION = "io.interceptor."
VARIABLE = "INTERCEPTOR_"

#: Strategies of `interceptor.idshift.choose`, and ``none``: the files belong to the container's IDs already.
Ownership = Literal["auto", "idmapped", "shiftfs", "clone", "none"]
OWNERSHIPS: tuple[Ownership, ...] = ("auto", "idmapped", "shiftfs", "clone", "none")


@dataclass(frozen=True)
class Settings:
    """The settings of one container; None leaves it to the configuration, or to what the container is."""

    honor_caps: bool | None = None
    """Keep the manager's capability sets instead of giving those of a system container."""
    systemd: bool | None = None
    """Prepare ``/run`` for systemd, and stop it by SIGRTMIN+3; None: if the first process is called so."""
    ownership: Ownership = "auto"
    """How the owners of the root filesystem's files are mapped."""
    skip_id_shift: tuple[str, ...] = ()
    """Destinations of mounts whose owners are not to be mapped; ``/`` is the root filesystem, ``*`` all of them."""


def read_settings(annotations: Mapping[str, object] | None, environment: Sequence[object] | None) -> Settings:
    """The settings in a specification's ``annotations`` and ``process.env``. Raises `ContainerError`."""
    values: dict[str, Any] = {}
    for entry in environment or ():
        name, _, text = str(entry).partition("=")
        if name.startswith(VARIABLE):
            _take(values, name, name[len(VARIABLE) :].lower(), text)
    for name, value in (annotations or {}).items():
        if name.startswith(ANNOTATION):
            _take(values, name, name[len(ANNOTATION) :], str(value))
    return Settings(**values)


def _take(values: dict[str, Any], name: str, key: str, text: str) -> None:
    known = [field.name for field in fields(Settings)]
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1)
        raise ContainerError(
            f"{name}: unknown setting; known: {', '.join(known)}",
            f"did you mean {near[0]}?" if near else None,
        )
    if key == "ownership":
        if text not in OWNERSHIPS:
            raise ContainerError(f"{name}: {text!r} cannot be used; allowed: {', '.join(OWNERSHIPS)}")
        values[key] = text
    elif key == "skip_id_shift":
        paths = tuple(path for path in text.split(",") if path)
        if bad := [path for path in paths if path != "*" and not path.startswith("/")]:
            raise ContainerError(
                f"{name}: {bad[0]!r} cannot be used; allowed: absolute paths with commas, or *"
            )
        values[key] = paths
    else:
        if text not in ("true", "false"):
            raise ContainerError(f"{name}: {text!r} cannot be used; allowed: true, false")
        values[key] = text == "true"
