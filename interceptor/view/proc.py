"""The view's nodes in procfs, one row a node."""

from __future__ import annotations

import stat

from interceptor.view.nodes import Host, Owner, Row, constant, real, text

NS_PER_S = 1_000_000_000


def uptime(owner: Owner, host: Host) -> bytes:
    """Seconds since the container was created, and a share of the host's idle time that grows with them.

    The second column follows the host's idle seconds per second of uptime; it cannot run backwards, because a container
    is never older than the host. Digits are cut off, not rounded, as in fs/proc/uptime.c.
    """
    elapsed_ns = max(0, host.boottime_ns() - owner.created_ns)
    idle_ns = int(elapsed_ns * host.idle_ratio())
    return b"%s %s\n" % (_seconds(elapsed_ns), _seconds(idle_ns))


def _seconds(ns: int) -> bytes:
    return b"%d.%02d" % (ns // NS_PER_S, ns % NS_PER_S // (NS_PER_S // 100))


SWAPS_HEADER = b"Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
"""All that /proc/swaps says without swap (swap_show in mm/swapfile.c)."""

ROWS: tuple[Row, ...] = (
    text(b"uptime", uptime),
    text(b"swaps", constant(SWAPS_HEADER)),
    # Everything else in /proc/sys is the container's own, by its namespaces, or refused to it by the kernel.
    real(b"sys", mode=stat.S_IFDIR | 0o555, cache_s=1.0),
    # Limits of the container's user namespace, writable with CAP_SYS_RESOURCE in it (set_permissions, kernel/ucount.c).
    real(b"sys/user", rooted=True, cache_s=1.0),
    # Named after network devices, which come and go.
    real(b"sys/net/ipv4/conf"),
    real(b"sys/net/ipv4/neigh"),
    real(b"sys/net/ipv6/conf"),
    real(b"sys/net/ipv6/neigh"),
    real(b"sys/net/mpls/conf"),
)
