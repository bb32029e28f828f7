"""The tables of the view: rows, how paths find them, and the nodes that are made up."""

from __future__ import annotations

import errno
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interceptor.kernel.fd import OwnedFd
from interceptor.mounts.managed import CGROUP_PROC, VIEW_PROC, viewed
from interceptor.view import proc
from interceptor.view import sys as sysfs
from interceptor.view.envoy import Container, Envoy
from interceptor.view.host import OverflowIds, Within
from interceptor.view.inodes import InodeTable, Ledger
from interceptor.view.nodes import (
    REAL,
    Directory,
    Effect,
    NodeError,
    Owner,
    Row,
    Table,
    constant,
    join,
    real,
    text,
)
from interceptor.view.protocol import Base, Namespace, Op, Reply
from interceptor.view.tasks import Task
from interceptor.view.values import Values

TABLE = Table({Base.PROC: proc.ROWS, Base.SYS: sysfs.ROWS})
NS = 1_000_000_000


@dataclass(frozen=True)
class Clock:
    """A host at one instant."""

    now_ns: int = 0
    ratio: float = 1.0

    def boottime_ns(self) -> int:
        return self.now_ns

    def idle_ratio(self) -> float:
        return self.ratio

    def read(self, base: Base, path: bytes) -> bytes | None:
        return None

    def read_all(self, base: Base, path: bytes) -> bytes | None:
        return None

    def read_cgroup(self, top: str, path: str) -> bytes | None:
        return None


def owner(created_ns: int = 0) -> Owner:
    return Owner("c", 100000, 100000, created_ns)


def test_uptime_counts_from_creation_and_cuts_digits_off() -> None:
    assert proc.uptime(owner(10 * NS), Clock(11 * NS + 999_999_999, ratio=1.5)) == b"1.99 2.99\n"


def test_uptime_before_creation_is_zero() -> None:
    assert proc.uptime(owner(10 * NS), Clock(9 * NS)) == b"0.00 0.00\n"


@given(st.integers(0, 2**50), st.integers(0, 2**50), st.integers(0, 2**40), st.integers(0, 2**40))
def test_uptime_never_runs_backwards(created: int, passed: int, more: int, idled: int) -> None:
    """The idle column too, although the host's ratio may fall: nothing is older than the host."""

    def columns(up_ns: int, idle_ns: int) -> list[float]:
        host = Clock(up_ns, idle_ns / max(up_ns, 1))
        return [float(column) for column in proc.uptime(owner(created), host).split()]

    up, idle = created + passed, (created + passed) // 2
    before = columns(up, idle)
    after = columns(up + more, idle + min(idled, more))
    # Floating point may cost the last digit shown.
    assert after[0] >= before[0] and after[1] >= before[1] - 0.011


def test_swaps_is_what_the_kernel_says_without_swap() -> None:
    with open("/proc/swaps", "rb") as file:
        assert file.readline() == proc.SWAPS_HEADER


@pytest.mark.parametrize(
    ("base", "path", "row"),
    [
        (Base.PROC, b"uptime", b"uptime"),
        (Base.PROC, b"swaps", b"swaps"),
        (Base.PROC, b"sys", b"sys"),
        (Base.PROC, b"sys/kernel/hostname", b"sys/kernel/hostname"),
        (Base.PROC, b"sys/sunrpc/nfs_debug", b"sys"),
        (Base.PROC, b"sys/net/sctp", b"sys/net"),
        (Base.PROC, b"sys/net/ipv4/vs", b"sys/net/ipv4/vs"),
        (Base.PROC, b"sys/net/ipv4/vs/version", b"sys/net/ipv4/vs"),
        (Base.PROC, b"sys/net/ipv4/conf/eth0/forwarding", b"sys/net/ipv4/conf"),
        (Base.PROC, b"", b""),
        (Base.SYS, b"kernel/mm", b"kernel"),
        (Base.SYS, b"devices", b"devices"),
        (Base.SYS, b"devices/virtual/net/lo", b"devices/virtual/net"),
        (Base.SYS, b"module/nf_conntrack", b"module/nf_conntrack"),
    ],
)
def test_path_finds_the_nearest_row(base: Base, path: bytes, row: bytes) -> None:
    found = TABLE.find(base, path)
    assert found is not None and found.path == row


@pytest.mark.parametrize(
    ("base", "path"),
    [
        (Base.PROC, b"1"),
        (Base.PROC, b"kcore"),
        (Base.PROC, b"sysrq-trigger"),
        (Base.PROC, b"sysx"),
        (Base.PROC, b"uptime/x"),
        (Base.SYS, b"firmware"),
        (Base.SYS, b"devices/pci0000:00"),
        (Base.SYS, b"module/kvm"),
        (Base.SYS, b"module/nf_conntrack/sections"),
    ],
)
def test_what_no_row_stands_for_does_not_exist(base: Base, path: bytes) -> None:
    directory, _, name = path.rpartition(b"/")
    with pytest.raises(NodeError) as caught:
        TABLE.child(base, directory, name)
    assert caught.value.errno == errno.ENOENT


@given(
    st.lists(
        st.sampled_from([b"sys", b"kernel", b"devices", b"virtual", b"net", b"1", b"uptime", b"module"]),
        max_size=6,
    )
)
def test_a_path_has_a_row_only_if_its_directory_has(names: list[bytes]) -> None:
    for base in Base:
        path = b"/".join(names)
        if names and TABLE.find(base, path) is not None:
            assert TABLE.find(base, path.rpartition(b"/")[0]) is not None


def test_directories_that_lead_to_rows_exist_and_list_them() -> None:
    module = TABLE.find(Base.SYS, b"module")
    assert module is not None and module.source is Directory.OF_ROWS and module.mode == stat.S_IFDIR | 0o555
    assert set(TABLE.children(Base.SYS, b"")) == {b"kernel", b"devices", b"module"}
    assert set(TABLE.children(Base.SYS, b"module/nf_conntrack")) == {b"parameters"}
    assert set(TABLE.children(Base.PROC, b"")) == {*VIEW_PROC, *CGROUP_PROC}
    for paths, base in zip(viewed(True), (Base.PROC, Base.SYS), strict=True):
        for path in paths:
            assert TABLE.find(base, path) is not None, "what stands on a managed path is in the tables"


def test_no_directory_is_made_up_inside_the_real_tree() -> None:
    table = Table({Base.PROC: (real(b"sys"), real(b"sys/net/ipv4/conf"))})
    net = table.find(Base.PROC, b"sys/net")
    assert net is not None and net.source is REAL and net.path == b"sys"
    assert table.children(Base.PROC, b"sys") == {}


def test_only_the_rows_own_path_has_its_fixed_attributes() -> None:
    row = TABLE.find(Base.PROC, b"sys/sunrpc")
    assert row is not None
    assert row.is_fixed_at(b"sys") and not row.is_fixed_at(b"sys/sunrpc")


def test_no_row_but_a_real_one_writes_to_the_real_node() -> None:
    for row in (*proc.ROWS, *sysfs.ROWS):
        assert row.effect is not Effect.REAL or row.source is REAL, row


def test_two_rows_for_one_path_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="two rows"):
        Table({Base.PROC: (text(b"a", constant(b"")), text(b"a", constant(b"")))})


def test_a_made_up_row_needs_attributes_and_cannot_write_to_the_real_node() -> None:
    with pytest.raises(ValueError, match="only the real node"):
        Row(b"a", constant(b""))
    with pytest.raises(ValueError, match="only the real node"):
        Row(b"a", constant(b""), mode=stat.S_IFREG | 0o644, effect=Effect.REAL)


def test_join_knows_the_root() -> None:
    assert join(b"", b"a") == b"a"
    assert join(b"a", b"b") == b"a/b"


def container(name: str) -> Container:
    return Container(Owner(name, 0, 0, 0), cast(Envoy, None), OverflowIds(), Values(Clock()))


class OldEnvoy:
    """One that knows nothing of user namespaces: a flag that it does not know is EINVAL to it."""

    stays_in_user_namespace = False

    async def call(self, op: Op, base: Base, path: bytes, *, within: Within | None = None) -> Reply:
        if within is not None:
            raise NodeError(errno.EINVAL)
        return Reply(1, 0, 0, struct.pack("=IIIIQqqq", stat.S_IFREG | 0o644, 1, 0, 0, 0, 0, 0, 0))


def test_an_envoy_from_before_an_upgrade_answers_for_its_own_user_namespace() -> None:
    envoy = OldEnvoy()
    box = Container(Owner("c", 0, 0, 0), cast(Envoy, envoy), OverflowIds(), Values(Clock()))
    found: list[tuple[int, bool]] = []

    def ask(kind: Namespace) -> None:
        async def operation() -> bytes:
            attr = await box.getattr(Base.PROC, b"sys/user/x", Within(kind, fd, (1,)))
            return b"%o" % attr.mode

        def finish(payload: bytes | None, error: int) -> None:
            assert (payload is None) == bool(error)
            found.append((error, envoy.stays_in_user_namespace))

        Task("getattr", operation(), finish).run()

    with OwnedFd(os.open("/dev/null", os.O_RDONLY)) as fd:
        ask(Namespace.NET)
        ask(Namespace.USER)
    assert found == [(errno.EINVAL, False), (0, True)]


def test_inode_is_the_same_until_the_kernel_forgets_it() -> None:
    table, one, other = InodeTable(), container("one"), container("other")
    inode = table.intern(one, Base.PROC, b"sys", None, stat.S_IFDIR)
    inode.lookups += 2
    assert table.intern(one, Base.PROC, b"sys", None, stat.S_IFDIR) is inode
    assert table.intern(one, Base.SYS, b"sys", None, stat.S_IFDIR).number != inode.number
    assert table.intern(other, Base.PROC, b"sys", None, stat.S_IFDIR).number != inode.number
    table.forget(inode.number, 1)
    assert table.get(inode.number) is inode
    table.forget(inode.number, 1)
    with pytest.raises(NodeError) as caught:
        table.get(inode.number)
    assert caught.value.errno == errno.ESTALE
    again = table.intern(one, Base.PROC, b"sys", None, stat.S_IFDIR)
    assert again.number != inode.number, "numbers are never used again"


def test_a_node_of_another_kind_is_another_inode() -> None:
    table, owner_ = InodeTable(), container("c")
    file = table.intern(owner_, Base.SYS, b"x", None, stat.S_IFREG)
    file.lookups += 1
    directory = table.intern(owner_, Base.SYS, b"x", None, stat.S_IFDIR)
    directory.lookups += 1
    assert directory is not file
    table.forget(file.number, 1)
    assert table.intern(owner_, Base.SYS, b"x", None, stat.S_IFDIR) is directory


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 3)), max_size=50))
def test_memory_is_given_back_with_the_last_forget(lookups: list[tuple[int, int]]) -> None:
    table, owner_ = InodeTable(), container("c")
    counts: dict[int, int] = {}
    for path, count in lookups:
        inode = table.intern(owner_, Base.PROC, b"%d" % path, None, stat.S_IFREG)
        inode.lookups += count
        counts[inode.number] = counts.get(inode.number, 0) + count
    assert len(table) == 1 + len(counts)
    for number, count in counts.items():
        table.forget(number, count)
    assert len(table) == 1
    table.forget(table.root.number, 1000)
    assert table.get(table.root.number) is table.root


def test_a_successor_knows_the_numbers_that_the_kernel_was_told(tmp_path: Path) -> None:
    path = str(tmp_path / "inodes")
    table, one = InodeTable(Ledger(path)), container("one")
    assert table.inherit({"one": one}, TABLE) == 0
    kept = table.intern(one, Base.PROC, b"sys/vm/swappiness", None, stat.S_IFREG)
    plain = table.intern(one, None, b"", None, stat.S_IFDIR)
    gone = table.intern(one, Base.SYS, b"kernel", None, stat.S_IFDIR)
    gone.lookups += 1
    table.flush()
    table.forget(gone.number, 1)
    table.flush()
    with open(path, "ab") as file:
        file.write(
            b"99 100644 one 0 sys/cut sho"
        )  # killed in the middle of a line: the kernel never heard of it
    one_again = container("one")
    successor = InodeTable(Ledger(path))
    assert successor.inherit({"one": one_again}, TABLE) == 2
    found = successor.get(kept.number)
    assert (found.path, found.base, found.kind) == (b"sys/vm/swappiness", Base.PROC, stat.S_IFREG)
    assert found.row is TABLE.find(Base.PROC, b"sys/vm/swappiness") and found.container is one_again
    assert successor.get(plain.number).base is None
    with pytest.raises(NodeError):
        successor.get(gone.number)
    assert successor.intern(one_again, Base.PROC, b"new", None, stat.S_IFREG).number > gone.number
    successor.forget(kept.number, 5)
    assert successor.get(kept.number) is found, "how often a predecessor told the kernel is not known"
    successor.drop_inherited(one_again)
    assert len(successor) == 2


def test_the_ledger_does_not_grow_for_ever(tmp_path: Path) -> None:
    path = tmp_path / "inodes"
    table, one = InodeTable(Ledger(str(path))), container("one")
    table.inherit({"one": one}, TABLE)
    for _ in range(25000):
        inode = table.intern(one, Base.PROC, b"sys/vm", None, stat.S_IFDIR)
        inode.lookups += 1
        table.flush()
        table.forget(inode.number, 1)
    assert path.read_bytes().count(b"\n") < 25000
    successor = InodeTable(Ledger(str(path)))
    successor.inherit({"one": one}, TABLE)
    assert successor.intern(one, Base.PROC, b"x", None, stat.S_IFREG).number > inode.number
