"""The view's nodes in sysfs, one row a node: see proc.py."""

from __future__ import annotations

import errno
import stat
import uuid as uuids
from collections.abc import Callable

from interceptor.view import limited
from interceptor.view.nodes import (
    Effect,
    Host,
    Owner,
    Row,
    constant,
    directory,
    own,
    real,
    text,
)
from interceptor.view.nodes import Rights as R
from interceptor.view.protocol import Base
from interceptor.view.sysctl import parameter

_DMI = b"devices/virtual/dmi/id"
_NAMESPACE = uuids.UUID("5f0b0a4e-6c0d-4f0e-9d0c-0c6e3a4b8a51")


def product_uuid(owner: Owner, _host: Host) -> bytes:
    """Stable for a container's name, different for each."""
    return b"%s\n" % str(uuids.uuid5(_NAMESPACE, owner.id)).encode()


def serial(owner: Owner, host: Host) -> bytes:
    """Of its product, board and chassis: one that no other container has."""
    return product_uuid(owner, host)[:8].upper() + b"\n"


def _identity(name: bytes, otherwise: bytes) -> Callable[[Owner, Host], bytes]:
    """What the host's firmware says where everybody may read it, else something harmless."""

    def source(_owner: Owner, host: Host) -> bytes:
        return host.read(Base.SYS, _DMI + b"/" + name) or otherwise + b"\n"

    return source


#: What machines without DMI tables say. No name that systemd-detect-virt takes for a hypervisor.
_PUBLIC = (
    (b"bios_date", b"01/01/2025"),
    (b"bios_release", b"1.0"),
    (b"bios_vendor", b"Interceptor"),
    (b"bios_version", b"1.0"),
    (b"board_asset_tag", b""),
    (b"board_name", b"Container"),
    (b"board_vendor", b"Interceptor"),
    (b"board_version", b"1.0"),
    (b"chassis_asset_tag", b""),
    (b"chassis_type", b"1"),
    (b"chassis_vendor", b"Interceptor"),
    (b"chassis_version", b"1.0"),
    (b"modalias", b"dmi:bvnInterceptor:bvr1.0:svnInterceptor:pnContainer:pvr1.0:"),
    (b"product_family", b""),
    (b"product_name", b"Container"),
    (b"product_sku", b""),
    (b"product_version", b"1.0"),
    (b"sys_vendor", b"Interceptor"),
)

_IDENTITY = (
    directory(b"devices/virtual/dmi"),
    directory(_DMI),
    *(text(_DMI + b"/" + name, _identity(name, otherwise)) for name, otherwise in _PUBLIC),
    text(_DMI + b"/product_uuid", product_uuid, 0o400, rooted=True),
    text(_DMI + b"/product_serial", serial, 0o400, rooted=True),
    text(_DMI + b"/board_serial", serial, 0o400, rooted=True),
    text(_DMI + b"/chassis_serial", serial, 0o400, rooted=True),
    text(_DMI + b"/uevent", constant(b"MODALIAS=dmi:\n")),
)

ROWS: tuple[Row, ...] = (
    # Readable as the host's; a virtual host has a kernel of its own to tune, a container may not touch ours.
    real(b"kernel", mode=stat.S_IFDIR | 0o755, effect=Effect.NONE, cache_s=10, refusal=errno.EPERM),
    # Mount points of filesystems that show the host's innards.
    # As `_LIMITED` of proc.py.
    text(b"devices/system/cpu/online", limited.online),
    directory(b"kernel/config"),
    directory(b"kernel/debug"),
    directory(b"kernel/tracing"),
    directory(b"kernel/security"),
    real(b"devices/virtual", mode=stat.S_IFDIR | 0o755, cache_s=10),
    *_IDENTITY,
    # The container's own network devices: they come and go.
    real(b"devices/virtual/net"),
    # There only while the module is loaded.
    real(b"module/nf_conntrack/parameters", effect=Effect.NONE, refusal=errno.EPERM),
    own(
        b"module/nf_conntrack/parameters/hashsize",
        parameter(2**32 - 1),
        effect=Effect.RAISE,
        mode=0o600,
        rights=R.FILE,
        is_text=True,
    ),
)
