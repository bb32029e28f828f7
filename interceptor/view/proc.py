"""The view's nodes in procfs, one row a node: path, then where reads come from, what may be written, and its effect.

``own(path, check)`` is *per container*: stored for the container, the host's value at first, the host untouched.
With ``effect=RAISE`` the host's value is raised when the container's is larger, never lowered (``host_writes``).
``network(path, check)`` is the container's network namespace where the kernel has the node there, else as ``own``.
``real(path)`` is the kernel's node, in the container's namespaces and with its root's rights, with all that is below.
"""

from __future__ import annotations

import errno
import stat
import uuid as uuids

from interceptor.view import limited
from interceptor.view.nodes import (
    Capability,
    Effect,
    Host,
    Owner,
    Rights,
    Row,
    Stored,
    cached,
    constant,
    own,
    real,
    some_directory,
    text,
)
from interceptor.view.protocol import Base, Namespace
from interceptor.view.sysctl import (
    INT_MAX,
    INT_MIN,
    LONG_MAX,
    Check,
    group_range,
    ints,
    ratchet,
    string,
    ulong,
    word_of,
)

NS_PER_S = 1_000_000_000
SYSCTL, NETWORK = Rights.SYSCTL, Rights.NETWORK
NET, IPC, UTS, USER = Namespace
RAISE = Effect.RAISE
ADMIN = Capability.SYS_ADMIN


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


def random_uuid(_owner: Owner, _host: Host) -> bytes:
    """A new one at each read."""
    return b"%s\n" % str(uuids.uuid4()).encode()


def boot_id(owner: Owner, host: Host) -> bytes:
    """A container's boot is its creation: one id for its life, another for every container."""
    host_boot = uuids.UUID((host.read(Base.PROC, b"sys/kernel/random/boot_id") or b"0" * 32).decode().strip())
    return b"%s\n" % str(uuids.uuid5(host_boot, f"boot {owner.id} {owner.created_ns}")).encode()


def network(path: bytes, check: Check, *, effect: Effect = Effect.STORE, default: bytes | None = None) -> Row:
    """The container's network namespace where the kernel has the node there and writable, else per container."""
    return own(
        path,
        check,
        effect=effect,
        source=Stored.WHERE_NOT_REAL,
        namespace=NET,
        rights=NETWORK,
        default=default,
    )


#: Those of net/sched that can be a default (qdisc_set_default): none of them needs parameters.
QDISCS = frozenset(
    {b"pfifo_fast", b"pfifo", b"bfifo", b"fq", b"fq_codel", b"fq_pie", b"codel", b"cake", b"sfq", b"pie"}
)

_FS = (
    # systemd's process 1 raises both as far as they go (bump_file_max_and_nr_open).
    own(b"sys/fs/file-max", ulong(0, LONG_MAX), effect=RAISE),
    own(b"sys/fs/nr_open", ints(8, INT_MAX), effect=RAISE),
    own(b"sys/fs/protected_hardlinks", ints(0, 1)),
    own(b"sys/fs/protected_symlinks", ints(0, 1)),
    # systemd's 50-default.conf sets both, and 50-coredump.conf the third.
    own(b"sys/fs/protected_regular", ints(0, 2)),
    own(b"sys/fs/protected_fifos", ints(0, 2)),
    own(b"sys/fs/suid_dumpable", ints(0, 2)),
    # kubelet, k3s and whoever follows files of many pods: what a container may watch is bounded by the host's limit,
    # too, so these reach it. A user namespace of its own has no other limit (user/max_inotify_*).
    own(b"sys/fs/inotify/max_user_instances", ints(0, INT_MAX), effect=RAISE),
    own(b"sys/fs/inotify/max_user_watches", ints(0, INT_MAX), effect=RAISE),
    own(b"sys/fs/inotify/max_queued_events", ints(0, INT_MAX), effect=RAISE),
    # Elasticsearch, databases with asynchronous input and output, Ceph: sum over the host.
    own(b"sys/fs/aio-max-nr", ulong(0, LONG_MAX), effect=RAISE),
    # The IPC namespace's (ipc/mq_sysctl.c).
    real(b"sys/fs/mqueue", cache_s=10, namespace=IPC, kept=True, rights=SYSCTL),
    # Tools that splice much (Docker's buildkit) read it and some raise it.
    own(b"sys/fs/pipe-max-size", ints(4096, INT_MAX)),
)

_KERNEL = (
    cached(b"sys/kernel/cap_last_cap"),
    cached(b"sys/kernel/ngroups_max"),
    own(b"sys/kernel/pid_max", ints(1, 4194304)),
    own(b"sys/kernel/threads-max", ints(1, INT_MAX)),
    own(b"sys/kernel/sysrq", ints(0, 511), default=b"1\n"),
    own(b"sys/kernel/kptr_restrict", ints(0, 2), capability=ADMIN),
    own(b"sys/kernel/dmesg_restrict", ints(0, 1), capability=ADMIN),
    own(b"sys/kernel/panic", ints()),
    own(b"sys/kernel/panic_on_oops", ints(0, 1)),
    own(b"sys/kernel/printk", ints(count=4)),
    some_directory(b"sys/kernel/yama", SYSCTL),
    own(b"sys/kernel/yama/ptrace_scope", ints(0, 3), capability=Capability.SYS_PTRACE, default=b"0\n"),
    # systemd's 50-coredump.conf and 50-default.conf; what handles a dump is the host's affair.
    own(b"sys/kernel/core_pattern", string(127), is_text=True),
    own(b"sys/kernel/core_pipe_limit", ints(0, INT_MAX)),
    own(b"sys/kernel/core_uses_pid", ints(0, 1)),
    # kubelet sets both at its start (setupKernelTunables), or fails with protectKernelDefaults.
    own(b"sys/kernel/keys/root_maxkeys", ints(0, INT_MAX)),
    own(b"sys/kernel/keys/root_maxbytes", ints(0, INT_MAX)),
    # Docker and k3s advise these for many containers: each has a session keyring.
    own(b"sys/kernel/keys/maxkeys", ints(0, INT_MAX)),
    own(b"sys/kernel/keys/maxbytes", ints(0, INT_MAX)),
    # Hardening profiles (CIS, distributions' own) that sysctl --system applies.
    own(b"sys/kernel/randomize_va_space", ints(0, 2)),
    own(b"sys/kernel/perf_event_paranoid", ints(-1, INT_MAX)),
    own(b"sys/kernel/unprivileged_bpf_disabled", ints(0, 2), capability=ADMIN),
    own(b"sys/kernel/kexec_load_disabled", ratchet(0, 1), capability=ADMIN),
    own(b"sys/kernel/hung_task_timeout_secs", ints(0, INT_MAX)),
    own(b"sys/kernel/softlockup_panic", ints(0, 1)),
    own(b"sys/kernel/sched_autogroup_enabled", ints(0, 1)),
    # The UTS namespace's; the real nodes take writes from the initial root alone.
    real(
        b"sys/kernel/hostname",
        check=string(64),
        effect=Effect.HOSTNAME,
        namespace=UTS,
        rooted=True,
        cache_s=10,
        rights=SYSCTL,
    ),
    real(
        b"sys/kernel/domainname",
        check=string(64),
        effect=Effect.DOMAINNAME,
        namespace=UTS,
        rooted=True,
        cache_s=10,
        rights=SYSCTL,
    ),
    text(b"sys/kernel/random/uuid", random_uuid, rooted=True, rights=SYSCTL, refusal=errno.EPERM),
    text(b"sys/kernel/random/boot_id", boot_id, rooted=True, rights=SYSCTL, refusal=errno.EPERM),
    # Written with a capability (ipc_permissions), whatever the mode says.
    real(b"sys/kernel/sem_next_id", cache_s=10, namespace=IPC, rights=Rights.CHECKPOINT),
    real(b"sys/kernel/shm_next_id", cache_s=10, namespace=IPC, rights=Rights.CHECKPOINT),
    real(b"sys/kernel/msg_next_id", cache_s=10, namespace=IPC, rights=Rights.CHECKPOINT),
    # The IPC namespace's (ipc/ipc_sysctl.c).
    *(
        real(b"sys/kernel/" + name, cache_s=10, namespace=IPC, kept=True, rights=SYSCTL)
        for name in (
            *(b"sem", b"msgmax", b"msgmnb", b"msgmni", b"auto_msgmni"),
            *(b"shmall", b"shmmax", b"shmmni", b"shm_rmid_forced"),
        )
    ),
)

_VM = (
    own(b"sys/vm/overcommit_memory", ints(0, 2)),
    own(b"sys/vm/mmap_min_addr", ulong(), capability=Capability.SYS_RAWIO),
    own(b"sys/vm/max_map_count", ints(0, INT_MAX), effect=RAISE),
    own(b"sys/vm/swappiness", ints(0, 200)),
    # kubelet wants 0 (setupKernelTunables).
    own(b"sys/vm/panic_on_oom", ints(0, 2)),
    # What packages of databases put into sysctl.d: Redis, PostgreSQL, MongoDB, Elasticsearch, etcd.
    own(b"sys/vm/overcommit_ratio", ints(0, INT_MAX)),
    own(b"sys/vm/dirty_ratio", ints(0, 100)),
    own(b"sys/vm/dirty_background_ratio", ints(0, 100)),
    own(b"sys/vm/dirty_expire_centisecs", ints(0, INT_MAX)),
    own(b"sys/vm/dirty_writeback_centisecs", ints(0, INT_MAX)),
    own(b"sys/vm/vfs_cache_pressure", ints(0, INT_MAX)),
    own(b"sys/vm/min_free_kbytes", ints(0, INT_MAX)),
    own(b"sys/vm/oom_kill_allocating_task", ints(0, INT_MAX)),
    real(b"sys/vm", cache_s=10, kept=True, rights=SYSCTL),
    # By PID namespace, and an envoy is in none of the container's.
    own(b"sys/vm/memfd_noexec", ratchet(0, 2), capability=ADMIN),
)

_NET = (
    network(b"sys/net/core/somaxconn", ints(0, INT_MAX), effect=RAISE),
    network(b"sys/net/unix/max_dgram_qlen", ints(INT_MIN, INT_MAX), effect=RAISE),
    own(
        b"sys/net/core/default_qdisc",
        word_of(QDISCS, errno.ENOENT),
        rights=NETWORK,
        default=b"pfifo_fast\n",
        is_text=True,
    ),
    # QUIC servers, Tailscale, Kubernetes tuning: only the initial network namespace has them. Limits for sockets
    # stay the host's.
    *(
        network(b"sys/net/core/" + name, ints(low, INT_MAX))
        for name, low in (
            (b"rmem_max", 2304),
            (b"wmem_max", 4608),
            (b"rmem_default", 2304),
            (b"wmem_default", 4608),
            (b"netdev_max_backlog", 0),
            (b"optmem_max", 0),
        )
    ),
    network(b"sys/net/core/bpf_jit_enable", ints(0, 2)),
    network(b"sys/net/core/bpf_jit_harden", ints(0, 2)),
    # Not kept: it is shown as the reader's user namespace maps it.
    real(b"sys/net/ipv4/ping_group_range", check=group_range, cache_s=10, namespace=NET, rights=NETWORK),
    # Network namespaces but the initial one have no defaults for neighbours at all.
    some_directory(b"sys/net/ipv4/neigh/default", NETWORK, NET),
    some_directory(b"sys/net/ipv6/neigh/default", NETWORK, NET),
    *(
        network(
            b"sys/net/ipv%s/neigh/default/gc_thresh%d" % (version, number), ints(0, INT_MAX), default=default
        )
        for version in (b"4", b"6")
        for number, default in ((1, b"128\n"), (2, b"512\n"), (3, b"1024\n"))
    ),
    # kube-proxy in ipvs mode. Network namespaces of other user namespaces have none of them (ip_vs_control_net_init).
    some_directory(b"sys/net/ipv4/vs", NETWORK, NET),
    *(
        network(b"sys/net/ipv4/vs/" + name, ints(low, high), effect=effect)
        for name, low, high, effect in (
            (b"conntrack", 0, 1, RAISE),
            (b"conn_reuse_mode", 0, 1, Effect.STORE),
            (b"expire_nodest_conn", 0, 1, Effect.STORE),
            (b"expire_quiescent_template", 0, 1, Effect.STORE),
            (b"amemthresh", 0, INT_MAX, Effect.STORE),
            (b"am_droprate", 0, INT_MAX, Effect.STORE),
            (b"drop_entry", 0, 3, Effect.STORE),
            (b"drop_packet", 0, 3, Effect.STORE),
            (b"secure_tcp", 0, 3, Effect.STORE),
            (b"snat_reroute", 0, 1, Effect.STORE),
            (b"cache_bypass", 0, 1, Effect.STORE),
            (b"backup_only", 0, 1, Effect.STORE),
            (b"sloppy_tcp", 0, 1, Effect.STORE),
            (b"sloppy_sctp", 0, 1, Effect.STORE),
            (b"sync_ports", 1, 64, Effect.STORE),
            (b"sync_persist_mode", 0, 1, Effect.STORE),
            (b"sync_version", 0, 1, Effect.STORE),
            (b"sync_refresh_period", 0, INT_MAX, Effect.STORE),
            (b"sync_retries", 0, 3, Effect.STORE),
            (b"nat_icmp_send", 0, 1, Effect.STORE),
            (b"pmtu_disc", 0, 1, Effect.STORE),
            (b"schedule_icmp", 0, 1, Effect.STORE),
            (b"ignore_tunneled", 0, 1, Effect.STORE),
            (b"run_estimation", 0, 1, Effect.STORE),
        )
    ),
    some_directory(b"sys/net/netfilter", NETWORK, NET),
    # nf_conntrack_max is there in each network namespace, but may be written in the initial one alone before 6.16.
    network(b"sys/net/netfilter/nf_conntrack_max", ints(0, INT_MAX), effect=RAISE),
    network(b"sys/net/netfilter/nf_conntrack_generic_timeout", ints(0, INT_MAX), effect=RAISE),
    network(b"sys/net/netfilter/nf_conntrack_tcp_timeout_established", ints(0, INT_MAX), effect=RAISE),
    network(b"sys/net/netfilter/nf_conntrack_tcp_timeout_close_wait", ints(0, INT_MAX), effect=RAISE),
    network(b"sys/net/netfilter/nf_conntrack_tcp_be_liberal", ints(0, 1)),
    # The same value by its old name, which sysctl.d files still use.
    network(b"sys/net/nf_conntrack_max", ints(0, INT_MAX), effect=RAISE),
    # Named after network devices, which come and go.
    real(b"sys/net/ipv4/conf", cache_s=10, by_device=True, namespace=NET, kept=True, rights=NETWORK),
    real(b"sys/net/ipv4/neigh", cache_s=10, by_device=True, namespace=NET, kept=True, rights=NETWORK),
    real(b"sys/net/ipv6/conf", cache_s=10, by_device=True, namespace=NET, kept=True, rights=NETWORK),
    real(b"sys/net/ipv6/neigh", cache_s=10, by_device=True, namespace=NET, kept=True, rights=NETWORK),
    real(b"sys/net/mpls/conf", cache_s=10, by_device=True, namespace=NET, kept=True, rights=NETWORK),
    # The rest of it is the network namespace's. Protocols that are modules may go by who reads, as sctp did until 6.13.
    *(
        real(b"sys/net/" + name, cache_s=10, namespace=NET, kept=True, rights=NETWORK)
        for name in (b"core", b"ipv4", b"ipv6", b"netfilter/nf_log")
    ),
    real(b"sys/net", cache_s=10, namespace=NET, rights=NETWORK),
)

#: What stands on them in a container is the view only with `cgroup_aware` (interceptor/mounts/managed.py).
_LIMITED = (
    text(b"meminfo", limited.meminfo),
    text(b"cpuinfo", limited.cpuinfo),
    text(b"stat", limited.stat),
    text(b"loadavg", limited.loadavg),
    text(b"diskstats", limited.diskstats),
)

ROWS: tuple[Row, ...] = (
    text(b"uptime", uptime),
    text(b"swaps", constant(SWAPS_HEADER)),
    # By the task that reads, not by the node that is open (proc_do_uts_string; ns_last_pid goes by PID namespace).
    *(
        real(b"sys/kernel/" + name, cache_s=10, rights=SYSCTL)
        for name in (b"ostype", b"osrelease", b"version", b"arch", b"ns_last_pid")
    ),
    *(
        real(b"sys/" + name, cache_s=10, kept=True, rights=SYSCTL)
        for name in (b"abi", b"debug", b"dev", b"fs", b"kernel")
    ),
    # Everything else in /proc/sys is the container's own, by its namespaces, or refused to it by the kernel.
    real(b"sys", mode=stat.S_IFDIR | 0o555, cache_s=10, rights=SYSCTL),
    # Limits of the user namespace, the container's or one further in.
    real(b"sys/user", rooted=True, cache_s=10, namespace=USER, kept=True, rights=Rights.LIMITS),
    *_FS,
    *_KERNEL,
    *_VM,
    *_NET,
    *_LIMITED,
)
