"""The rows of the tables that are the container's own: what they take, who may, what it does, how long it lasts."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import prctl
import pytest

from interceptor.view import proc
from interceptor.view import sys as sysfs
from interceptor.view.nodes import Effect, NodeError, Owner, Row, Stored
from interceptor.view.protocol import Base
from interceptor.view.sysctl import Check, group_range, ints, parameter, ratchet, string, ulong
from tests.view_support import Sandbox, ViewProcess, node, outcome, read, write

pytestmark = pytest.mark.root

OWN = [row for row in proc.ROWS if row.effect in (Effect.STORE, Effect.RAISE)]


@pytest.fixture(scope="module")
def boxes() -> Iterator[list[Sandbox]]:
    made = [Sandbox("box"), Sandbox("other")]
    yield made
    for sandbox in made:
        sandbox.stop()


@pytest.fixture(scope="module")
def view(boxes: list[Sandbox]) -> Iterator[ViewProcess]:
    """A view that may not write to the host."""
    process = ViewProcess("--no-host-writes")
    for sandbox in boxes:
        process.add(sandbox, keep=True)
    yield process
    assert process.process.poll() is None, "the server must survive everything"
    process.stop()


def host_values() -> dict[str, str]:
    """The host's `sysctl -a`, without what changes by itself."""
    text = subprocess.run(["sysctl", "-a"], capture_output=True, text=True, check=False).stdout
    moving = (
        "random.",
        "fs.quota.",
        "-nr",
        "-state",
        "entropy",
        "ns_last_pid",
        "pty.nr",
        "nf_conntrack_count",
        "file-nr",
    )
    lines = [line.split(" = ", 1) for line in text.splitlines() if " = " in line]
    return {name: value for name, value in lines if not any(word in name for word in moving)}


# What is written stays the container's, and lasts


def changed(row: Row, old: str) -> str | None:
    """Another value that the row takes."""
    for new in ("0", "1", "2", "3", "10", "5000", "100000", "262144", "fq", "/bin/false %p"):
        if new == old.strip():
            continue
        try:
            assert row.check is not None
            return row.check(Owner("x", 1, 1, 0), old.encode(), new.encode()).value.decode()
        except NodeError:
            continue
    return None


def test_every_own_value_is_kept_through_a_restart_and_is_nobody_elses(
    view: ViewProcess, boxes: list[Sandbox]
) -> None:
    before = host_values()
    box, other = boxes

    def values() -> dict[str, str]:
        return {row.path.decode(): str(outcome(read, node(f"proc/{row.path.decode()}"))) for row in OWN}

    def others() -> dict[str, str]:
        paths = [row.path.decode() for row in OWN]
        return {path: str(outcome(read, node(f"proc/{path}", "other"))) for path in paths}

    first, untouched = view.run(values, box), view.run(others, other)
    assert first == untouched, "both start from the host's values"
    there = {path: value for path, value in first.items() if value != "ENOENT"}
    assert len(there) > 50
    wanted = {
        row.path.decode(): new
        for row in OWN
        if row.path.decode() in there and (new := changed(row, there[row.path.decode()])) is not None
    }
    assert len(wanted) > 50

    def write_all() -> dict[str, object]:
        return {path: outcome(write, node(f"proc/{path}"), value) for path, value in wanted.items()}

    assert view.run(write_all, box) == {path: len(value) for path, value in wanted.items()}
    expected = first | wanted
    assert view.run(values, box) == expected
    assert view.run(others, other) == untouched
    view.restart()
    assert view.run(values, box) == expected
    assert view.run(others, other) == untouched
    assert host_values() == before


def test_values_begin_as_the_hosts(view: ViewProcess, boxes: list[Sandbox]) -> None:
    for path in ("kernel/cap_last_cap", "kernel/ngroups_max"):
        where = node(f"proc/sys/{path}")
        assert view.run(partial(read, where), boxes[0]) == read(f"/proc/sys/{path}")
        assert view.run(partial(outcome, write, where, "1"), boxes[0]) == "EACCES"


# Raising the host's


def test_host_is_raised_never_lowered_and_only_if_it_may_be() -> None:
    path = "fs/inotify/max_queued_events"
    before = int(read(f"/proc/sys/{path}"))
    box = Sandbox("box")
    seen = []
    try:
        for options in (("--no-host-writes",), ()):
            process = ViewProcess(*options)
            process.add(box)
            for value in (before + 1, before - 1):
                process.run(partial(write, node(f"proc/sys/{path}"), f"{value}\n"), box)
                seen.append(int(read(f"/proc/sys/{path}")) - before)
                assert process.run(lambda: read(node(f"proc/sys/{path}")), box) == f"{value}\n"
            process.stop()
            os.kill(box.envoy, 9)
            os.waitpid(box.envoy, 0)
    finally:
        Path(f"/proc/sys/{path}").write_text(f"{before}\n")
        box.stop()
    assert seen == [0, 0, 1, 1]


# Made up


def test_random_nodes(view: ViewProcess, boxes: list[Sandbox]) -> None:
    def both(name: str) -> list[str]:
        return [read(node(f"proc/sys/kernel/random/{name}", box)) for box in ("box", "box", "other")]

    one, again, elsewhere = view.run(lambda: both("uuid"))
    assert len({one, again, elsewhere}) == 3 and len(one) == 37
    one, again, elsewhere = view.run(lambda: both("boot_id"))
    assert one == again != elsewhere != read("/proc/sys/kernel/random/boot_id")
    view.restart()
    assert view.run(lambda: both("boot_id")) == [one, again, elsewhere]
    for name in ("uuid", "boot_id"):
        path = node(f"proc/sys/kernel/random/{name}")
        assert view.run(partial(outcome, write, path, "x"), boxes[0]) == "EPERM"
        assert view.run(partial(outcome, write, path, "x"), boxes[0], uid=1000) == "EACCES"


def test_innards_of_the_hosts_kernel_are_empty_directories(view: ViewProcess, boxes: list[Sandbox]) -> None:
    for name in ("config", "debug", "tracing", "security"):
        path = node(f"sys/kernel/{name}")
        assert view.run(partial(os.listdir, path), boxes[0]) == []
    assert view.run(lambda: outcome(write, node("sys/kernel/mm/ksm/run"), "1"), boxes[0]) == "EPERM"


def test_every_container_has_a_product_uuid_of_its_own(view: ViewProcess, boxes: list[Sandbox]) -> None:
    path = "sys/devices/virtual/dmi/id"
    listed = view.run(lambda: sorted(os.listdir(node(path))), boxes[0])
    assert {"product_uuid", "product_name", "sys_vendor", "board_vendor", "bios_vendor"} <= set(listed)
    one = view.run(lambda: read(node(f"{path}/product_uuid")), boxes[0])
    two = view.run(lambda: read(node(f"{path}/product_uuid", "other")), boxes[1])
    assert len(one) == len(two) == 37 and one != two
    assert view.run(lambda: outcome(read, node(f"{path}/product_uuid")), boxes[0], uid=1000) == "EACCES"
    assert view.run(lambda: read(node(f"{path}/sys_vendor")), boxes[0], uid=1000).endswith("\n")


def test_ping_group_range_is_clamped_to_the_containers_groups(
    view: ViewProcess, boxes: list[Sandbox]
) -> None:
    path = "sys/net/ipv4/ping_group_range"
    assert view.run(lambda: write(node(f"proc/{path}"), "0 2147483647\n"), boxes[0]) == 13
    assert view.run(lambda: read(path, boxes[0].proc.fileno()), boxes[0]) == "0\t65535\n"
    assert view.run(lambda: read(node(f"proc/{path}")), boxes[0]) == "0\t65535\n"


# Names: the real node of a namespace of root's own is the oracle


def _scripted(path: str) -> list[object]:
    """All ways to write a string, and what is read after each."""
    steps: list[object] = []
    texts = [
        b"one\n",
        b"two",
        b"x" * 64 + b"\n",
        b"y" * 80,
        b"a b\tc\n",
        b"\n",
        b"in\nside\n",
        b"nul\0x",
        b"",
    ]
    for text in texts:
        fd = os.open(path, os.O_WRONLY | os.O_TRUNC)
        steps.append(outcome(os.write, fd, text))
        os.close(fd)
        steps.append(read(path))
    fd = os.open(path, os.O_RDWR)
    steps += [
        os.write(fd, b"abc"),
        os.write(fd, b"def\n"),
        os.write(fd, b"ghi"),
        os.lseek(fd, 0, os.SEEK_SET),
    ]
    steps += [os.pread(fd, 3, 0).decode(), os.pread(fd, 99, 3).decode(), os.pwrite(fd, b"z", 40)]
    os.close(fd)
    steps.append(read(path))
    steps += [read_in_pieces(path, 2)]
    return steps


def read_in_pieces(path: str, size: int) -> str:
    fd = os.open(path, os.O_RDONLY)
    try:
        return "|".join(iter(lambda: os.read(fd, size).decode(), ""))
    finally:
        os.close(fd)


@pytest.mark.parametrize("name", ["hostname", "domainname"])
def test_names_are_written_and_read_as_the_real_ones(
    view: ViewProcess, boxes: list[Sandbox], name: str
) -> None:
    def really() -> list[object]:
        from interceptor.kernel.flags import CLONE_NEWUTS
        from interceptor.kernel.namespaces import unshare

        unshare(CLONE_NEWUTS)
        return _scripted(f"/proc/sys/kernel/{name}")

    real = view.run(really)
    assert view.run(lambda: _scripted(node(f"proc/sys/kernel/{name}")), boxes[0]) == real
    assert view.run(lambda: outcome(write, node(f"proc/sys/kernel/{name}"), "x"), boxes[0], 1000) == "EACCES"


# Numbers: the kernel's parser is the oracle of ours

NUMBERS = [
    *(
        "1",
        "1\n",
        " 1",
        "\t1 \n",
        "+1",
        "-1",
        "-",
        "--1",
        "",
        "\n",
        " ",
        "x",
        "1x",
        "1,",
        "1 x",
        "1\0",
        "\0",
        "1\n2",
    ),
    *(
        "0x10",
        "0X1f",
        "0x",
        "0xg",
        "010",
        "08",
        "00",
        "1.5",
        "1e3",
        "0b1",
        "٣",
        "1\v",
        "1\r",
        "\v1",
        "1 2",
        "1 2 3",
    ),
    *("1 2 3 4", "2147483647", "2147483648", "-2147483648", "-2147483649", "4294967296", "9" * 19, "9" * 20),
    *(
        "9" * 21,
        "9" * 22,
        "9" * 40,
        "0" * 20 + "1",
        "0" * 21 + "1",
        "18446744073709551615",
        "18446744073709551616",
    ),
    *(
        "1 " * 10,
        " " * 4094 + "1",
        " " * 4095 + "1",
        "1" + " " * 5000,
        "-0",
        "-5 6",
        "7 -",
        "3 99999999999",
        "0x 1",
    ),
]
#: Real nodes of plain kinds in namespaces of the container's: their table's handler, as `Check`.
ORACLES: dict[str, Check] = {
    "sys/net/ipv4/tcp_max_tw_buckets": ints(),
    "sys/net/ipv4/tcp_rmem": ints(1, count=3),
    "sys/net/ipv4/tcp_pacing_ss_ratio": ints(0, 1000),
    "sys/kernel/shmmax": ulong(),
}


@pytest.mark.parametrize("path", ORACLES)
def test_numbers_are_taken_as_the_kernel_takes_them(
    boxes: list[Sandbox], view: ViewProcess, path: str
) -> None:
    check = ORACLES[path]
    start = b"4096 5000 6000" if path.endswith("rmem") else b"77"

    def really(data: bytes) -> list[object]:
        fd = os.open(path, os.O_RDWR, dir_fd=boxes[0].proc.fileno())
        try:
            os.write(fd, start)
            result = outcome(os.pwrite, fd, data, 0)
            return [result, os.pread(fd, 100, 0).decode()]
        finally:
            os.close(fd)

    def ours(data: bytes) -> list[object]:
        current = b"\t".join(start.split()) + b"\n"
        try:
            accepted = check(Owner("x", 0, 0, 0), current, data)
        except NodeError as error:
            return [errno.errorcode[error.errno], None]
        return [accepted.taken, accepted.value.decode()]

    real = view.run(lambda: [really(text.encode()) for text in NUMBERS if text], boxes[0])
    for text, (result, value) in zip([text for text in NUMBERS if text], real, strict=True):
        seen = ours(text.encode())
        assert seen[0] == result, (text, seen, result, value)
        if seen[1] is not None:
            assert seen[1] == value, (text, seen, result, value)


def test_checks_of_their_own() -> None:
    owner = Owner("x", 1, 1, 0, groups=1000)
    assert group_range(owner, b"1\t0\n", b"0 5000\n").value == b"0\t999\n"
    assert group_range(owner, b"1\t0\n", b"1 0").value == b"1\t0\n"
    assert parameter(100)(owner, b"5\n", b"64\n").value == b"64\n"
    assert string(3)(owner, b"\n", b"abcdef").value == b"abc\n"
    for check, current, data, error in (
        (parameter(100), b"5\n", b"101", errno.ERANGE),
        (parameter(100), b"5\n", b"5 6", errno.EINVAL),
        (ratchet(0, 2), b"1\n", b"0", errno.EPERM),
        (group_range, b"1\t0\n", b"-1 5", errno.EINVAL),
    ):
        with pytest.raises(NodeError) as caught:
            check(owner, current, data)
        assert caught.value.errno == error


@pytest.mark.parametrize(
    ("path", "bad", "good"),
    [
        ("kernel/pid_max", "0", "4194304"),
        ("kernel/pid_max", "4194305", "1"),
        ("kernel/sysrq", "512", "511"),
        ("kernel/kptr_restrict", "3", "2"),
        ("kernel/dmesg_restrict", "2", "1"),
        ("kernel/yama/ptrace_scope", "4", "3"),
        ("fs/protected_hardlinks", "2", "1"),
        ("fs/protected_symlinks", "-1", "0"),
        ("vm/overcommit_memory", "3", "2"),
    ],
)
def test_values_outside_are_einval(
    view: ViewProcess, boxes: list[Sandbox], path: str, bad: str, good: str
) -> None:
    def attempts() -> list[object]:
        where = node(f"proc/sys/{path}")
        return [outcome(write, where, good), outcome(write, where, bad), read(where)]

    assert view.run(attempts, boxes[0]) == [len(good), "EINVAL", f"{good}\n"]


def test_unknown_qdisc_is_enoent(view: ViewProcess, boxes: list[Sandbox]) -> None:
    path = node("proc/sys/net/core/default_qdisc")
    assert view.run(
        lambda: [outcome(write, path, "nonsense"), write(path, "fq\n"), read(path)], boxes[0]
    ) == [
        "ENOENT",
        3,
        "fq\n",
    ]


# Rights, with and without capabilities: a real node beside the view's is the oracle


def with_only(
    sandbox: Sandbox, capabilities: tuple[str, ...], uid: int, work: Callable[[], Any]
) -> Callable[[], Any]:
    """``work`` by a user of the container with these capabilities and no others."""

    def limited() -> Any:
        prctl.securebits.keep_caps = True
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        wanted = [getattr(prctl, "CAP_" + name.upper()) for name in capabilities]
        prctl.cap_effective.limit()  # never more than what is permitted
        prctl.cap_permitted.limit(*wanted)
        for name in capabilities:
            setattr(prctl.cap_effective, name, True)
        return work()

    return limited


NODES = [
    "sys/net/ipv4/ip_forward",
    "sys/net/ipv4/tcp_fastopen_key",
    "sys/user/max_net_namespaces",
    "sys/kernel/msgmax",
    "sys/kernel/sem_next_id",
    "sys/kernel/version",
    "sys/kernel/ns_last_pid",
    "sys/net/ipv4/conf/lo/rp_filter",
]
SETS: list[tuple[str, ...]] = [
    (),
    ("net_admin",),
    ("dac_override",),
    ("sys_resource",),
    ("sys_admin",),
    ("net_admin", "dac_override", "sys_admin", "sys_resource"),
]


@pytest.mark.parametrize("uid", [0, 1000])
@pytest.mark.parametrize("capabilities", SETS)
def test_rights_are_the_kernels_with_any_capabilities(
    view: ViewProcess, boxes: list[Sandbox], uid: int, capabilities: tuple[str, ...]
) -> None:
    box = boxes[0]

    def results() -> list[object]:
        found: list[object] = []
        for path in NODES:
            tries: list[list[object]] = []
            for top in (node("proc"), f"/proc/self/fd/{box.proc.fileno()}"):
                tries.append(
                    [
                        outcome(lambda where=f"{top}/{path}", flags=flags: os.close(os.open(where, flags)))
                        for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC)
                    ]
                    + [os.access(f"{top}/{path}", mode) for mode in (os.R_OK, os.W_OK, os.X_OK)]
                    + [outcome(os.truncate, f"{top}/{path}", 0), outcome(os.utime, f"{top}/{path}")]
                )
            found.append([path, *tries])
        return found

    for path, seen, real in view.run(with_only(box, capabilities, uid, results), box):
        if path == "sys/user/max_net_namespaces":
            seen, real = seen[:-1], real[:-1]  # its owner differs: whom the kernel names is not who may
        assert seen == real, path


def test_capability_of_a_namespace_further_in_counts_for_nothing(
    view: ViewProcess, boxes: list[Sandbox]
) -> None:
    from interceptor.kernel.flags import CLONE_NEWUSER
    from interceptor.kernel.namespaces import unshare

    box = boxes[0]

    def further_in() -> list[object]:
        unshare(CLONE_NEWUSER)
        return [
            outcome(write, f"{top}/sys/net/ipv4/ip_forward", "1")
            for top in (node("proc"), f"/proc/self/fd/{box.proc.fileno()}")
        ]

    assert view.run(further_in, box, uid=1000) == ["EACCES", "EACCES"]


def test_own_values_belong_to_the_containers_root(view: ViewProcess, boxes: list[Sandbox]) -> None:
    path = node("proc/sys/vm/swappiness")
    assert view.run(lambda: [os.stat(path).st_uid, os.stat(path).st_mode], boxes[0]) == [
        0,
        stat.S_IFREG | 0o644,
    ]
    assert view.run(lambda: outcome(write, path, "10"), boxes[0], uid=1000) == "EACCES"
    assert view.run(lambda: outcome(read, path), boxes[0], uid=1000).endswith("\n")
    plain = with_only(boxes[0], (), 0, lambda: [outcome(write, path, "11"), outcome(write, restricted, "1")])
    restricted = node("proc/sys/kernel/kptr_restrict")
    assert view.run(plain, boxes[0]) == [2, "EPERM"], "a value that asks for a capability"


def test_rows_say_what_they_need_to() -> None:
    for base, rows in ((Base.PROC, proc.ROWS), (Base.SYS, sysfs.ROWS)):
        for row in rows:
            assert not row.path.startswith(b"/") and not row.path.endswith(b"/")
            if row.effect is Effect.RAISE:
                assert not row.is_text or base is Base.SYS, "only numbers can be larger"
            if isinstance(row.source, Stored):
                assert row.rooted or row.effect is Effect.NONE
