"""What cgroup files of both versions say, and what becomes of the host's texts by it. Pure."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interceptor.containers.cgroups import places
from interceptor.view import cgroup, resources
from interceptor.view.cgroup import UNIFIED, Files, Memory, Transfers

MIB = 1 << 20
GIB = 1 << 30
HOST_MEMINFO = b"""MemTotal:       24684084 kB
MemFree:        24298720 kB
MemAvailable:   24231628 kB
Buffers:            1212 kB
Cached:           177536 kB
Active:            93196 kB
Inactive:          82880 kB
Active(anon):       1668 kB
Inactive(anon):     4704 kB
Active(file):      91528 kB
Inactive(file):    78176 kB
SwapTotal:       1048576 kB
SwapFree:        1000000 kB
AnonPages:         12440 kB
Shmem:              9024 kB
KReclaimable:      49172 kB
Slab:              96796 kB
SReclaimable:      49172 kB
SUnreclaim:        47624 kB
CommitLimit:    13390618 kB
Committed_AS:      59276 kB
VmallocTotal:   34359738367 kB
HugePages_Total:       0
DirectMap1G:    25165824 kB
"""
HOST_STAT = b"""cpu  1532614 553732 2432861 2758267 79160 0 13576 50308 0 0
cpu0 651038 279128 1187160 1546966 15818 0 2434 25144 0 0
cpu1 881576 274604 1245700 1211301 63342 0 11141 25163 0 0
intr 82363177 0 0
ctxt 430526078
btime 1795316363
"""
HOST_LOADAVG = b"0.25 0.42 0.96 1/87 12120\n"
HOST_DISKSTATS = b"""   7       0 loop0 31255 340 1196056 19473 358830 889712 8029074 317591 0 1 2 3 4 5 6 7 8
 254       0 vda 5496030 382605 178296306 37448790 2196958 1874464 200680584 3761994 0 1 2 3 4 5 6 7 8
"""


def files(given: Mapping[str, bytes], *above: Mapping[str, bytes]) -> Files:
    """A cgroup with these files, and those above it."""
    levels = [given, *above]
    return lambda _controller, name, up: levels[up].get(name) if up < len(levels) else None


def fields(meminfo: bytes) -> dict[str, int]:
    lines = (line.split() for line in meminfo.decode().splitlines())
    return {words[0].rstrip(":"): int(words[1]) for words in lines}


def times(stat: bytes) -> dict[str, list[int]]:
    lines = (line.split() for line in stat.decode().splitlines() if line.startswith("cpu"))
    return {words[0]: [int(word) for word in words[1:]] for words in lines}


# ---- facts -------------------------------------------------------------------------------------------------


def test_memory_of_version_2_is_limited_by_the_least_above() -> None:
    found = cgroup.memory(
        files(
            {
                "memory.current": b"1048576\n",
                "memory.max": b"max\n",
                "memory.swap.max": b"0\n",
                "memory.swap.current": b"4096\n",
                "memory.stat": b"anon 4096\nfile 8192\n",
            },
            {"memory.max": b"268435456\n", "memory.swap.max": b"max\n"},
            {"memory.max": b"536870912\n"},
        )
    )
    assert found == Memory(256 * MIB, MIB, 0, 4096, {"anon": 4096, "file": 8192})


def test_memory_of_version_1_has_the_limit_of_all_levels_in_its_statistics() -> None:
    text = b"cache 1\nhierarchical_memory_limit 268435456\nhierarchical_memsw_limit 402653184\n"
    text += b"total_cache 8192\ntotal_rss 4096\ntotal_swap 12288\n"
    found = cgroup.memory(files({"memory.usage_in_bytes": b"1048576\n", "memory.stat": text}))
    assert found == Memory(256 * MIB, MIB, 128 * MIB, 12288, {"file": 8192, "anon": 4096})
    unlimited = b"hierarchical_memory_limit 9223372036854771712\n"
    found = cgroup.memory(files({"memory.usage_in_bytes": b"1\n", "memory.stat": unlimited}))
    assert found is not None and found.limit is None
    assert cgroup.memory(files({})) is None


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        ([{"cpu.max": b"150000 100000\n"}], 2),
        ([{"cpu.max": b"1000 100000\n"}], 1),
        ([{"cpu.max": b"max 100000\n"}, {"cpu.max": b"300000 100000\n"}], 3),
        ([{"cpu.max": b"max 100000\n"}], None),
        ([{"cpu.cfs_quota_us": b"-1\n", "cpu.cfs_period_us": b"100000\n"}], None),
        ([{"cpu.cfs_quota_us": b"250000\n", "cpu.cfs_period_us": b"100000\n"}], 3),
        ([{"cpu.max": b"100000 0\n"}], None),
        ([{}], None),
    ],
)
def test_quota_counts_processors(levels: list[dict[str, bytes]], expected: int | None) -> None:
    assert cgroup.quota(files(*levels)) == expected


def test_times_tasks_and_pressure() -> None:
    new = {"cpu.stat": b"usage_usec 9\nuser_usec 7\nsystem_usec 2\n", "pids.current": b"12\n"}
    new["cpu.pressure"] = b"some avg10=0.00 avg60=0.00 avg300=0.00 total=123\nfull avg10=0.00 total=5\n"
    assert cgroup.cpu_time(files(new)) == (7, 2)
    assert (cgroup.tasks(files(new)), cgroup.stalled(files(new))) == (12, 123)
    old = {"cpu.stat": b"nr_periods 0\n", "cpuacct.usage_user": b"7999\n", "cpuacct.usage_sys": b"2000\n"}
    assert cgroup.cpu_time(files(old)) == (7, 2)
    assert cgroup.cpu_time(files({})) is None


def test_transfers_of_both_versions() -> None:
    new = b"254:0 rbytes=1024 wbytes=2048 rios=1 wios=2 dbytes=0 dios=0\n7:0 \n"
    same = {b"254:0": Transfers(1, 1024, 2, 2048)}
    assert cgroup.transfers(files({"io.stat": new})) == same
    old = {
        "blkio.throttle.io_serviced_recursive": b"254:0 Read 1\n254:0 Write 2\n254:0 Total 3\nTotal 3\n",
        "blkio.throttle.io_service_bytes_recursive": b"254:0 Read 1024\n254:0 Write 2048\nTotal 3072\n",
    }
    assert cgroup.transfers(files(old)) == same
    assert cgroup.transfers(files({})) is None


#: Every file that is read, so that each can say anything.
_NAMES = (
    *("memory.current", "memory.max", "memory.swap.max", "memory.swap.current", "memory.stat"),
    *("memory.usage_in_bytes", "cpuset.cpus.effective", "cpuset.effective_cpus", "cpu.max", "cpu.stat"),
    *("cpu.cfs_quota_us", "cpu.cfs_period_us", "cpuacct.usage_user", "cpuacct.usage_sys", "cpu.pressure"),
    *("pids.current", "io.stat", "blkio.throttle.io_serviced_recursive"),
    "blkio.throttle.io_service_bytes_recursive",
)
_SAID = (
    *(
        b"max",
        b"-1",
        b"0",
        b"1",
        b"4096",
        b"0-3,7",
        b"3-1",
        b"1-",
        b"99999999999999999999999",
        b"\xb2",
        b"\xff",
    ),
    *(
        b"some total=",
        b"some total=9",
        b"8:0 rios=1",
        b"8:0 Read 5",
        b"anon 7",
        b"file",
        b" ",
        b"\n",
        b"",
        b",",
    ),
    *(
        b"user_usec 5",
        b"system_usec -5",
        b"hierarchical_memory_limit 5",
        b"total_cache 1",
        b"999999999999999999",
    ),
)
_words = st.sampled_from(_SAID)
_texts = st.lists(_words | st.binary(max_size=8), max_size=6).map(b"\n".join) | st.binary(max_size=30)
_levels = st.lists(st.dictionaries(st.sampled_from(_NAMES), _texts), min_size=1, max_size=3)
_hosts = (
    st.sampled_from([HOST_MEMINFO, HOST_STAT, HOST_LOADAVG, HOST_DISKSTATS, b"", b"cpu\ncpu0\n"]) | _texts
)


@given(_levels, _hosts, st.integers(0, 2**62), st.integers(0, 2**62))
def test_nothing_that_a_file_says_is_an_error(
    levels: list[dict[str, bytes]], host: bytes, now: int, created: int
) -> None:
    found = files(*levels)
    cpus = resources.shown_cpus(cgroup.cpu_list(b"0-7"), cgroup.allowed_cpus(found), cgroup.quota(found))
    assert cpus and set(cpus) <= set(range(8))
    account = resources.Account()
    resources.meminfo(host, cgroup.memory(found))
    resources.cpuinfo(host, cpus)
    resources.stat(host, cpus, cgroup.cpu_time(found), max(0, now - created), account)
    resources.diskstats(host, cgroup.transfers(found))
    for later in (now, now + 1, now + 10**9):
        resources.loadavg(host, cgroup.stalled(found), later, created, cgroup.tasks(found), account)


@given(_texts)
def test_a_list_of_processors_is_printed_as_it_was_read(text: bytes) -> None:
    cpus = cgroup.cpu_list(text)
    assert cgroup.cpu_list(resources.as_list(cpus)) == cpus


# ---- texts -------------------------------------------------------------------------------------------------

_amounts = st.integers(0, 40 * GIB)
_KEYS = (
    *("anon", "file", "shmem", "slab_reclaimable", "slab_unreclaimable", "active_file", "inactive_file"),
    *("active_anon", "inactive_anon", "kernel_stack", "file_mapped"),
)
_keys = st.sampled_from(_KEYS)


@given(_amounts, _amounts, _amounts | st.none(), _amounts, st.dictionaries(_keys, _amounts))
def test_sums_of_meminfo_hold(
    limit: int, usage: int, swap: int | None, swapped: int, stat: dict[str, int]
) -> None:
    text = resources.meminfo(HOST_MEMINFO, Memory(limit, usage, swap, swapped, stat))
    host, ours = fields(HOST_MEMINFO), fields(text)
    assert list(ours) == list(host), "the same lines in the same order"
    if limit // 1024 >= host["MemTotal"]:
        assert text == HOST_MEMINFO
        return
    assert ours["MemTotal"] == limit // 1024
    assert min(ours.values()) >= 0
    for name in ("MemFree", "MemAvailable", "Cached", "AnonPages", "Slab", "Active(file)"):
        assert ours[name] <= ours["MemTotal"], name
    assert ours["MemFree"] <= ours["MemAvailable"]
    # What free(1) subtracts must leave something.
    assert ours["MemFree"] + ours["Buffers"] + ours["Cached"] + ours["SReclaimable"] <= ours["MemTotal"]
    assert ours["Slab"] == ours["SReclaimable"] + ours["SUnreclaim"]
    assert ours["Active"] == ours["Active(anon)"] + ours["Active(file)"]
    assert ours["Inactive"] == ours["Inactive(anon)"] + ours["Inactive(file)"]
    assert ours["SwapFree"] <= ours["SwapTotal"] <= host["SwapTotal"]
    assert ours["VmallocTotal"] == host["VmallocTotal"]


def test_meminfo_looks_like_the_kernels() -> None:
    text = resources.meminfo(HOST_MEMINFO, Memory(256 * MIB, 64 * MIB, None, 0, {"file": 16 * MIB}))
    assert text.startswith(b"MemTotal:         262144 kB\nMemFree:          196608 kB\n")
    assert b"\nCached:            16384 kB\n" in text and b"\nHugePages_Total:       0\n" in text
    assert resources.meminfo(HOST_MEMINFO, None) == HOST_MEMINFO


def test_cpuinfo_has_the_processors_that_may_be_used_by_their_own_numbers() -> None:
    block = b"processor\t: %d\nmodel name\t: Some\nflags\t\t: fpu vme"
    host = b"\n\n".join([block % 0, block % 1, block % 2]) + b"\n\n"
    assert resources.cpuinfo(host, [1]) == block % 1 + b"\n\n"
    assert resources.cpuinfo(host, [0, 1, 2]) == host
    assert resources.cpuinfo(b"# processors    : 2\n", [1]) == b"# processors    : 2\n"


def test_quota_leaves_the_first_of_the_processors_that_may_be_used() -> None:
    assert resources.shown_cpus(range(8), {2, 3, 5}, 2) == [2, 3]
    assert resources.shown_cpus(range(8), {2, 3, 5}, None) == [2, 3, 5]
    assert resources.shown_cpus(range(8), (), None) == list(range(8))
    assert resources.shown_cpus(range(2), {7}, 0) == [0]


_use = st.tuples(st.integers(0, 10**10), st.integers(0, 10**10), st.integers(0, 10**13))


@given(st.lists(_use, min_size=2, max_size=5), st.sampled_from([[0], [1], [0, 1]]))
def test_times_of_stat_add_up_and_never_run_backwards(
    steps: list[tuple[int, int, int]], cpus: list[int]
) -> None:
    """Whatever is used in however little time."""
    account = resources.Account()
    user = system = elapsed = 0
    before: dict[str, list[int]] = {}
    for more_user, more_system, more in steps:
        user, system, elapsed = user + more_user, system + more_system, elapsed + more
        text = resources.stat(HOST_STAT, cpus, (user, system), elapsed, account)
        now = times(text)
        assert set(now) == {"cpu", *(f"cpu{cpu}" for cpu in cpus)}
        for column, total in enumerate(now["cpu"]):
            assert total == sum(now[f"cpu{cpu}"][column] for cpu in cpus)
        assert now["cpu"][0] == user // 10_000 and now["cpu"][2] == system // 10_000
        assert sum(now["cpu"]) >= elapsed // 10**7 * len(cpus) - len(cpus) * 2
        for name, columns in before.items():
            assert all(a <= b for a, b in zip(columns, now[name], strict=True))
        before = now
        assert text.endswith(b"btime 1795316363\n")


def test_stat_without_known_times_has_the_hosts_for_the_processors_shown() -> None:
    text = resources.stat(HOST_STAT, [1], None, 0, resources.Account())
    assert times(text)["cpu"] == times(HOST_STAT)["cpu1"] == times(text)["cpu1"]
    assert "cpu0" not in times(text)


def test_load_of_a_container_that_is_busy_comes_up_and_goes_down() -> None:
    account = resources.Account()
    shown = []
    busy = 0
    for second in range(0, 1200, 5):
        busy += 10_000_000 if second < 600 else 0
        text = resources.loadavg(HOST_LOADAVG, busy, (second + 5) * 10**9, 0, 7, account)
        shown.append([float(word) for word in text.split()[:3]])
        assert text.split()[4] == b"7", "no other PID namespace's last PID"
    assert shown[119][0] == pytest.approx(2, abs=0.05) and shown[119][2] == pytest.approx(0.97, abs=0.05)
    assert shown[-1][0] < 0.05 < shown[-1][2] < 1
    assert shown[119][0] > shown[119][1] > shown[119][2]


@given(st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 10**12)), min_size=1, max_size=6))
def test_load_is_between_nothing_and_the_most_that_was_used(steps: list[tuple[int, int]]) -> None:
    account = resources.Account()
    busy = now = 0
    most = 0.0
    for more, passed in steps:
        busy, now = busy + more, now + passed
        before = account.load or resources.Load(0, 0)
        if now - before.at_ns >= 10**7:
            most = max(most, (busy - before.busy_us) * 1000 / (now - before.at_ns))
        words = resources.loadavg(HOST_LOADAVG, busy, now, 0, 3, account).split()
        assert all(0 <= float(word) <= most + 0.01 for word in words[:3])


def test_load_does_not_depend_on_how_often_it_is_asked_for() -> None:
    often, seldom = resources.Account(), resources.Account()
    for second in range(1, 121):
        text = resources.loadavg(HOST_LOADAVG, second * 500_000, second * 10**9, 0, 3, often)
    assert text == resources.loadavg(HOST_LOADAVG, 60_000_000, 120 * 10**9, 0, 3, seldom)


def test_diskstats_has_the_devices_that_were_used() -> None:
    text = resources.diskstats(HOST_DISKSTATS, {b"254:0": Transfers(1, 1024, 2, 2048)})
    assert text == b" 254       0 vda 1 0 2 0 2 0 4 0 0 0 0 0 0 0 0 0 0\n"
    assert resources.diskstats(HOST_DISKSTATS, None) == HOST_DISKSTATS
    assert resources.diskstats(HOST_DISKSTATS, {}) == b""


# ---- where the cgroup is -----------------------------------------------------------------------------------

_MOUNTS = """\
20 1 0:20 / /sys/fs/cgroup rw - tmpfs tmpfs rw
21 20 0:21 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
22 20 0:22 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
23 20 0:23 / /sys/fs/cgroup/uni\\040fied rw - cgroup2 cgroup2 rw
24 20 0:24 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd
"""


def test_places_of_a_hybrid_host() -> None:
    found = places(
        "4:memory:/box/one\n3:cpu,cpuacct:/box\n2:cpuset:/box\n1:name=systemd:/x\n0::/box\n", _MOUNTS
    )
    assert found == {
        "memory": ("/sys/fs/cgroup/memory", "box/one"),
        "cpu": ("/sys/fs/cgroup/cpu,cpuacct", "box"),
        "cpuacct": ("/sys/fs/cgroup/cpu,cpuacct", "box"),
        UNIFIED: ("/sys/fs/cgroup/uni fied", "box"),
    }


def test_a_root_is_nobodys_own_and_what_is_out_of_sight_is_left_out() -> None:
    assert places("4:memory:/\n0::/\n", _MOUNTS) == {}
    nested = "23 20 0:23 /outer /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
    assert places("0::/outer/box\n", nested) == {UNIFIED: ("/sys/fs/cgroup", "box")}
    for path in ("/other", "/outerbox", "/outer/../other", "/../box", "/outer"):
        assert places(f"0::{path}\n", nested) == {}, path


def test_files_are_looked_for_in_version_1_first_and_upwards() -> None:
    asked: list[tuple[str, str]] = []

    def read(top: str, path: str) -> bytes | None:
        asked.append((top, path))
        return None

    found = cgroup.files_of({"memory": ("/m", "a/b"), UNIFIED: ("/u", "c")}, read)
    for above in range(4):
        assert found("memory", "f", above) is None
    assert asked == [("/m", "a/b/f"), ("/u", "c/f"), ("/m", "a/f"), ("/u", "f"), ("/m", "f")]


@given(st.text(max_size=60), st.text(max_size=60))
def test_places_of_anything(cgroups: str, mounts: str) -> None:
    for text in (mounts, _MOUNTS):
        for top, path in places(cgroups, text).values():
            assert top and path and ".." not in path.split("/")
