"""What container workloads do with /proc/sys and /sys, in guarded containers; and the host is the same afterwards."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from interceptor.library import GuardedChild, Interceptor
from interceptor.view import proc
from interceptor.view.nodes import Effect
from tests.test_view_table import host_values

pytestmark = pytest.mark.root

OWN = [row.path.decode() for row in proc.ROWS if row.effect in (Effect.STORE, Effect.RAISE)]

#: What distributions and packages put into sysctl.d, 2025 and 2026: systemd 257, procps, kubelet, k3s, Docker,
#: Elasticsearch, Redis, and tuning for QUIC. A leading "-": failures are ignored, as there.
SYSCTL_D = """
kernel.sysrq = 16
kernel.core_uses_pid = 1
kernel.core_pattern = |/usr/lib/systemd/systemd-coredump %P %u %g %s %t %c %h
kernel.core_pipe_limit = 16
fs.suid_dumpable = 2
kernel.pid_max = 4194304
kernel.printk = 4 4 1 7
kernel.kptr_restrict = 1
kernel.dmesg_restrict = 1
kernel.yama.ptrace_scope = 1
kernel.panic = 10
kernel.panic_on_oops = 1
kernel.keys.root_maxkeys = 1000000
kernel.keys.root_maxbytes = 25000000
kernel.hostname = inside
kernel.shmmax = 68719476736
kernel.sem = 250 32000 100 128
fs.protected_hardlinks = 1
fs.protected_symlinks = 1
fs.protected_regular = 2
fs.protected_fifos = 1
vm.overcommit_memory = 1
vm.panic_on_oom = 0
vm.max_map_count = 1048576
vm.swappiness = 1
vm.mmap_min_addr = 65536
net.core.default_qdisc = fq_codel
net.core.somaxconn = 4096
net.core.rmem_max = 7500000
net.core.wmem_max = 7500000
net.unix.max_dgram_qlen = 512
net.ipv4.ip_forward = 1
net.ipv4.ping_group_range = 0 2147483647
net.ipv4.conf.all.rp_filter = 2
net.ipv4.conf.default.promote_secondaries = 1
net.ipv4.tcp_retries2 = 5
net.ipv4.neigh.default.gc_thresh1 = 1024
net.ipv4.neigh.default.gc_thresh2 = 4096
net.ipv4.neigh.default.gc_thresh3 = 8192
fs.inotify.max_user_instances = 128
user.max_net_namespaces = 1000
"""


@pytest.fixture(scope="module")
def daemon() -> Iterator[Interceptor]:
    with Interceptor(host_writes=False) as running:
        yield running


@pytest.fixture
def child(daemon: Interceptor) -> Iterator[GuardedChild]:
    with daemon.spawn() as running:
        yield running


@pytest.fixture(autouse=True)
def host_unchanged() -> Iterator[None]:
    before = host_values()
    yield
    assert host_values() == before


def _run(*argv: str, text: str = "") -> tuple[int, str]:
    done = subprocess.run(argv, input=text, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


def _keys() -> list[str]:
    return [line.split(" = ")[0] for line in SYSCTL_D.split("\n") if line]


@pytest.mark.parametrize(
    "program", [["sysctl", "-p", "-"], ["/usr/lib/systemd/systemd-sysctl", "/dev/stdin"]]
)
def test_files_of_sysctl_d_are_applied_without_an_error(child: GuardedChild, program: list[str]) -> None:
    def apply() -> list[object]:
        there = [line for line in SYSCTL_D.split("\n") if line]
        result = _run(*program, text="\n".join(there) + "\n")
        values = []
        for line in there:
            key, value = line.split(" = ")
            with open("/proc/sys/" + key.replace(".", "/")) as file:
                shown = " ".join(file.read().split())
            if shown != " ".join(value.split()):
                values.append(f"{key}: {shown}")
        return [*result, values]

    if not os.path.exists(program[0]) and program[0].startswith("/"):
        pytest.fail(f"{program[0]} is not installed: apt-get install systemd")
    assert child.run(apply).value == [0, "", ["net.ipv4.ping_group_range: 0 65535"]]


def test_system_wide_files_are_applied(child: GuardedChild) -> None:
    assert child.run(_run, "sysctl", "--system").value == (0, "")


def test_every_row_can_be_written_with_its_own_value(child: GuardedChild) -> None:
    def write_all(paths: list[str]) -> list[str]:
        problems = []
        for path in paths:
            try:
                with open(f"/proc/{path}") as file:
                    value = file.read().strip()
            except FileNotFoundError:
                continue  # the machine has no such node
            name = path.removeprefix("sys/").replace(".", "\0").replace("/", ".").replace("\0", "/")
            status, errors = _run("sysctl", "-q", "-w", f"{name}={value}")
            if status or errors:
                problems.append(f"{name}={value}: {errors}")
        return problems

    assert child.run(write_all, OWN).value == []


def test_everything_can_be_read_with_the_usual_denials(child: GuardedChild) -> None:
    def read_all() -> list[str]:
        find = "find /proc/sys /proc/uptime /proc/swaps /sys/kernel /sys/devices/virtual -type f -print0"
        script = f"{find} 2>/dev/null | xargs -0 cat 2>&1 >/dev/null"
        done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False)
        usual = (
            *("Permission denied", "Operation not permitted", "Invalid argument", "No data available"),
            *("Operation not supported", "Input/output error", "No such device", "Value too large"),
        )
        # A queue of a device that has only one is ENOENT when read (netif_is_multiqueue in net/core/net-sysfs.c).
        lines = [line for line in done.stdout.splitlines() if "/queues/" not in line]
        return [line for line in lines if not line.endswith(usual)]

    assert child.run(read_all).value == []


def test_a_value_is_the_same_at_every_composite(child: GuardedChild) -> None:
    def everywhere() -> list[str]:
        from interceptor.kernel import mount as km

        top = Path("/mnt")
        km.mount(b"none", b"/mnt", b"tmpfs")
        for name in ("fresh", "bound", "root/proc"):
            (top / name).mkdir(parents=True)
        km.mount(b"proc", b"/mnt/fresh", b"proc")
        km.mount(b"/proc", b"/mnt/bound", None, 0x1000)
        km.mount(b"proc", b"/mnt/root/proc", b"proc")
        seen = []
        places = ["/proc", "/mnt/fresh", "/mnt/bound", "/mnt/root/proc"]
        for number, place in enumerate(places):
            Path(place, "sys/vm/swappiness").write_text(f"{number + 10}\n")
            Path(place, "sys/net/ipv4/ip_default_ttl").write_text(f"{number + 10}\n")
            for other in places:
                for name in ("vm/swappiness", "net/ipv4/ip_default_ttl"):
                    seen.append(f"{number + 10 == int(Path(other, 'sys', name).read_text())}")
        pid = os.fork()
        if not pid:
            os.chroot("/mnt/root")
            os._exit(0 if Path("/proc/sys/vm/swappiness").read_text() == "13\n" else 1)
        seen.append(str(os.waitpid(pid, 0)[1] == 0))
        return sorted(set(seen))

    assert child.run(everywhere).value == ["True"]


def test_network_devices_are_the_containers_own(child: GuardedChild) -> None:
    def devices() -> list[list[str]]:
        places = ("/sys/class/net", "/sys/devices/virtual/net", "/proc/sys/net/ipv4/conf")
        return [os.listdir(place) for place in places]

    listed = child.run(devices).value
    assert isinstance(listed, list)
    one, two, conf = (set(names) for names in listed)
    assert one == two <= {"lo", "eth0"} and conf == {"all", "default", *one}
