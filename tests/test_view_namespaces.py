"""Nodes of namespaces further in: whoever is in one finds its own there, as with the kernel's procfs."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import prctl
import pytest

from interceptor.kernel.flags import CLONE_NEWIPC, CLONE_NEWNET, CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWUTS
from interceptor.kernel.namespaces import setns, unshare
from tests.robust.support import eventually
from tests.view_support import Sandbox, ViewProcess, forked, node, outcome, read, reap, write

pytestmark = pytest.mark.root

FORWARD = "sys/net/ipv4/ip_forward"
SHMMNI = "sys/kernel/shmmni"
HOSTNAME = "sys/kernel/hostname"
ALL = CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS


@pytest.fixture
def view() -> Iterator[ViewProcess]:
    running = ViewProcess()
    yield running
    running.stop()


@pytest.fixture
def box(view: ViewProcess) -> Iterator[Sandbox]:
    sandbox = Sandbox("box")
    view.add(sandbox, keep=True)
    yield sandbox
    sandbox.stop()


def become_inner_root() -> None:
    """Root of a user namespace in the container's, with nothing but itself in it."""
    uid, gid = os.geteuid(), os.getegid()
    unshare(CLONE_NEWUSER)
    prctl.set_dumpable(1)  # a change of identity takes that away, and with it the right to write below
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
    Path("/proc/self/gid_map").write_text(f"0 {gid} 1")


def further_in(where: Callable[[str], str], inner_user: bool) -> list[object]:
    """What a service finds that unshares its namespaces, before and after, and what comes of its writes."""
    said: list[object] = [read(where(path)) for path in (FORWARD, SHMMNI, HOSTNAME)]
    with contextlib.ExitStack() as stack:
        before = {path: os.open(where(path), os.O_RDONLY) for path in (FORWARD, SHMMNI)}
        for fd in before.values():
            stack.callback(os.close, fd)
        if inner_user:
            become_inner_root()
        unshare(ALL)
        socket.sethostname("inner")
        said += [read(where(path)) for path in (FORWARD, SHMMNI, HOSTNAME)]
        for path, value in ((FORWARD, "1"), (SHMMNI, "777"), ("sys/net/core/somaxconn", "321")):
            said.append(outcome(write, where(path), value))
            said.append(read(where(path)))
        said += [os.pread(fd, 100, 0).decode() for fd in before.values()]  # opened before: the outer one's
        said += sorted(os.listdir(where("sys/net/ipv4/conf")))
        said.append(os.access(where(FORWARD), os.W_OK))
        said.append(oct(os.stat(where(SHMMNI)).st_mode))
    return said


def outer(where: Callable[[str], str]) -> list[str]:
    return [read(where(path)) for path in (FORWARD, SHMMNI, HOSTNAME, "sys/net/core/somaxconn")]


@pytest.mark.parametrize("inner_user", [False, True], ids=["same user namespace", "inner user namespace"])
def test_a_service_with_namespaces_of_its_own_finds_what_the_kernel_shows(
    view: ViewProcess, box: Sandbox, inner_user: bool
) -> None:
    def real(path: str) -> str:
        return f"/proc/self/fd/{box.proc.fileno()}/{path}"

    def shown(path: str) -> str:
        return node(f"proc/{path}")

    before = view.run(lambda: outer(shown), box)
    by_the_kernel = view.run(lambda: further_in(real, inner_user), box)
    assert view.run(lambda: further_in(shown, inner_user), box) == by_the_kernel
    assert "inner\n" in by_the_kernel and "777\n" in by_the_kernel and "321\n" in by_the_kernel
    assert view.run(lambda: outer(shown), box) == before, "the outer ones are untouched"


def test_the_name_is_set_where_the_writer_is(view: ViewProcess, box: Sandbox) -> None:
    view.run(lambda: write(node(f"proc/{HOSTNAME}"), "outer"), box)

    def inside() -> list[object]:
        unshare(CLONE_NEWUTS)
        write(node(f"proc/{HOSTNAME}"), "mine")
        return [socket.gethostname(), read(node(f"proc/{HOSTNAME}"))]

    assert view.run(inside, box) == ["mine", "mine\n"]
    assert view.run(lambda: [socket.gethostname(), read(node(f"proc/{HOSTNAME}"))], box) == [
        "outer",
        "outer\n",
    ]


def test_devices_are_those_of_the_callers_namespace(view: ViewProcess, box: Sandbox) -> None:
    """Listed, looked up and changed in one, and not there in the other, whoever comes first."""
    conf = node("proc/sys/net/ipv4/conf")

    def add(name: str) -> None:
        subprocess.run(["ip", "link", "add", name, "type", "bridge"], check=True)

    def there(name: str) -> list[object]:
        return [
            name in os.listdir(conf),
            outcome(read, f"{conf}/{name}/tag"),
            os.path.exists(f"{conf}/{name}"),
        ]

    def inside() -> list[object]:
        said = [there("outer0")]
        unshare(CLONE_NEWNET)
        add("inner0")
        said += [there("inner0"), there("outer0")]
        write(f"{conf}/inner0/tag", "1")
        return [*said, read(f"{conf}/inner0/tag")]

    view.run(lambda: add("outer0"), box)
    present, absent = [True, "0\n", True], [False, "ENOENT", False]
    assert view.run(inside, box) == [present, present, absent, "1\n"]
    assert view.run(lambda: [there("outer0"), there("inner0")], box) == [present, absent]


def test_a_handle_stays_in_its_namespace_when_the_view_is_killed(view: ViewProcess, box: Sandbox) -> None:
    ready, go = socket.socketpair()
    value = node(f"proc/{FORWARD}")
    view.run(lambda: write(value, "0"), box)

    def inside() -> None:
        setns(view.namespace, CLONE_NEWNS)
        box.enter()
        unshare(CLONE_NEWNET)
        fd = os.open(value, os.O_RDWR)
        go.send(b"x")
        assert go.recv(1) == b"x"
        os.write(fd, b"1")
        assert os.pread(fd, 10, 0) == b"1\n" and read(value) == "1\n"

    pid = forked(inside)
    assert ready.recv(1) == b"x"
    view.restart()
    ready.send(b"x")
    assert reap(pid) == 0
    assert view.run(lambda: read(value), box) == "0\n"
    ready.close()
    go.close()


def test_who_comes_from_outside_finds_the_containers_own(view: ViewProcess, box: Sandbox) -> None:
    """The host's network namespace does not belong to the container: nothing of it is read or written."""
    host = Path(f"/proc/{FORWARD}").read_text()
    other = "1" if host.strip() == "0" else "0"
    view.run(lambda: write(node(f"proc/{FORWARD}"), other), box)
    assert view.run(lambda: read(node(f"proc/{FORWARD}"))) == f"{other}\n"
    view.run(lambda: write(node(f"proc/{FORWARD}"), host.strip()))
    assert view.run(lambda: read(node(f"proc/{FORWARD}")), box) == host
    assert Path(f"/proc/{FORWARD}").read_text() == host


def test_namespaces_of_another_container_are_not_ones_own(view: ViewProcess, box: Sandbox) -> None:
    """A process with the mounts of one and the network of another finds that of the mounts."""
    other = Sandbox("other")
    try:
        view.add(other)
        view.run(lambda: write(node(f"proc/{FORWARD}", "other"), "1"), other)
        view.run(lambda: write(node(f"proc/{FORWARD}"), "0"), box)
        assert view.run(lambda: read(node(f"proc/{FORWARD}")), other) == "0\n"
        assert view.run(lambda: outcome(write, node(f"proc/{FORWARD}"), "1"), other) == "EACCES"
    finally:
        other.stop()


def test_an_inner_root_in_the_containers_network_may_not_write(view: ViewProcess, box: Sandbox) -> None:
    def inside() -> list[object]:
        become_inner_root()
        unshare(CLONE_NEWIPC)
        return [outcome(write, node(f"proc/{FORWARD}"), "1"), outcome(write, node(f"proc/{SHMMNI}"), "99")]

    assert view.run(inside, box) == ["EACCES", 2]


# ---- user namespaces ---------------------------------------------------------------------------------------

LIMIT = "sys/user/max_net_namespaces"
OTHER = "sys/user/max_uts_namespaces"


def limits_further_in(where: Callable[[str], str]) -> list[object]:
    """What the roots of user namespaces in each other find and set, and somebody in the innermost one."""
    said: list[object] = [read(where(LIMIT)), outcome(write, where(OTHER), "1111")]
    held = os.open(where(LIMIT), os.O_RDONLY)
    uid, gid = os.geteuid(), os.getegid()
    for value in ("77", "66"):
        unshare(CLONE_NEWUSER)
        prctl.set_dumpable(1)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
        said += [read(where(OTHER)), read(where(LIMIT)) == said[0], os.access(where(LIMIT), os.W_OK)]
        said += [outcome(write, where(LIMIT), value), read(where(LIMIT)), outcome(write, where(LIMIT), "x")]
        said += [outcome(write, where(LIMIT), "-1"), oct(os.stat(where(LIMIT)).st_mode)]
        said += [sorted(os.listdir(where("sys/user"))), outcome(read, where("sys/user/none"))]
        fd = os.open(where(LIMIT), os.O_RDWR)
        said += [os.pread(fd, 100, 0).decode(), os.pread(fd, 1, 1).decode(), os.write(fd, b"55\n")]
        said.append(os.pread(fd, 100, 0).decode())
        os.close(fd)
    pid = forked(lambda: without_rights(where))
    said += [reap(pid), read(where(LIMIT)), os.pread(held, 100, 0).decode() == said[0]]
    os.close(held)
    return said


def without_rights(where: Callable[[str], str]) -> None:
    prctl.cap_effective.limit()
    assert outcome(write, where(LIMIT), "5") == "EACCES" and read(where(LIMIT)) == "55\n"
    assert outcome(os.open, where(LIMIT), os.O_RDONLY) != "EACCES"


def test_limits_are_those_of_the_callers_user_namespace(view: ViewProcess, box: Sandbox) -> None:
    def real(path: str) -> str:
        return f"/proc/self/fd/{box.proc.fileno()}/{path}"

    def shown(path: str) -> str:
        return node(f"proc/{path}")

    host = Path(f"/proc/{LIMIT}").read_text()
    before = view.run(lambda: read(shown(LIMIT)), box)
    by_the_kernel = view.run(lambda: limits_further_in(real), box)
    assert view.run(lambda: limits_further_in(shown), box) == by_the_kernel
    assert "77\n" in by_the_kernel and "66\n" in by_the_kernel and by_the_kernel[-3:] == [0, "55\n", True]
    assert view.run(lambda: [read(shown(LIMIT)), read(shown(OTHER))], box) == [before, "1111\n"]
    assert Path(f"/proc/{LIMIT}").read_text() == host


def test_a_limit_of_an_inner_namespace_holds(view: ViewProcess, box: Sandbox) -> None:
    def inside() -> list[object]:
        become_inner_root()
        said = [outcome(unshare, CLONE_NEWUTS), outcome(write, node(f"proc/{OTHER}"), "1")]
        return [*said, outcome(unshare, CLONE_NEWUTS), outcome(unshare, CLONE_NEWIPC)]

    assert view.run(inside, box) == [None, 1, "ENOSPC", None]


def test_user_namespaces_of_others_show_the_containers_own(view: ViewProcess, box: Sandbox) -> None:
    """The host's, and another container's: nothing of theirs is read or written."""
    host = Path(f"/proc/{LIMIT}").read_text()
    view.run(lambda: write(node(f"proc/{LIMIT}"), "4321"), box)
    assert view.run(lambda: read(node(f"proc/{LIMIT}"))) == "4321\n"
    view.run(lambda: write(node(f"proc/{LIMIT}"), "4322"))
    assert view.run(lambda: read(node(f"proc/{LIMIT}")), box) == "4322\n"
    other = Sandbox("other")
    try:
        view.add(other)
        assert view.run(lambda: read(node(f"proc/{LIMIT}")), other) == "4322\n"
        assert view.run(lambda: outcome(write, node(f"proc/{LIMIT}"), "1"), other) == "EACCES"
    finally:
        other.stop()
    assert Path(f"/proc/{LIMIT}").read_text() == host


def test_many_in_inner_user_namespaces_leave_nothing_behind(view: ViewProcess, box: Sandbox) -> None:
    """The envoy's children: none of them stays, and no descriptor."""

    def inside() -> list[str]:
        become_inner_root()
        write(node(f"proc/{LIMIT}"), "12")
        return sorted({read(node(f"proc/{LIMIT}")) for _ in range(200)})

    def held() -> tuple[int, int]:
        return len(os.listdir(f"/proc/{box.envoy}/fd")), view.fds()

    view.run(lambda: read(node(f"proc/{LIMIT}")), box)
    before = held()
    assert view.run(inside, box) == ["12\n"]
    # The kernel tells of a closed file when it comes to it, and the envoy answers before it closes.
    eventually(lambda: held() == before, "what was held is let go")
    assert Path(f"/proc/{box.envoy}/task/{box.envoy}/children").read_text() == ""
