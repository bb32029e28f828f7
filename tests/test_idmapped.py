"""ID-mapped trees and overlays: what lands on disk, what the container sees, for one layer and for hundreds."""

from __future__ import annotations

import os
import shutil
import stat
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interceptor.errors import ContainerError, SyscallError
from interceptor.idshift import probe, stack
from interceptor.idshift.choose import STRATEGIES, Found, choose, needs_mapping, worth_trying
from interceptor.idshift.idmapped import Mapper, user_namespace
from interceptor.idshift.overlay import (
    Layers,
    MountLine,
    escape,
    mount_of,
    parse_layers,
    parse_mountinfo,
    split_lower,
)
from interceptor.idshift.subid import Block
from interceptor.kernel import mount
from interceptor.kernel.flags import CLONE_NEWNS, CLONE_NEWUSER
from interceptor.kernel.namespaces import setns, unshare

IDS = Block(200000, 65536)
#: Revision 2 of struct vfs_cap_data: CAP_NET_RAW permitted, effective.
CAPABILITY = struct.pack("<5I", 0x02000001, 1 << 13, 0, 0, 0)


# ---- pure: mountinfo, options ----


def overlay_line(options: str, point: str = "/d/overlay2/ID/merged") -> MountLine:
    return MountLine(1, point, "/", "overlay", options)


def test_layers_of_docker_and_containerd_are_found() -> None:
    absolute = overlay_line(
        "rw,lowerdir=/d/overlay2/l/A:/d/overlay2/l/B,upperdir=/d/overlay2/ID/diff,workdir=/w,index=off,xino=off"
    )
    found = parse_layers(absolute, lambda path: True)
    assert found == Layers(("/d/overlay2/l/A", "/d/overlay2/l/B"), "/d/overlay2/ID/diff", (("xino", "off"),))
    relative = overlay_line("rw,lowerdir=l/A:l/B,upperdir=ID/diff,workdir=ID/work")
    exists = {"/d/overlay2/l/A", "/d/overlay2/l/B", "/d/overlay2/ID/diff"}.__contains__
    assert parse_layers(relative, exists).lower == ("/d/overlay2/l/A", "/d/overlay2/l/B")
    assert parse_layers(relative, exists).upper == "/d/overlay2/ID/diff"
    snapshots = overlay_line(
        "rw,lowerdir=4/fs:3/fs,upperdir=/s/snapshots/5/fs,workdir=/s/snapshots/5/work", "/run/c/rootfs"
    )
    exists = {"/s/snapshots/4/fs", "/s/snapshots/3/fs"}.__contains__
    assert parse_layers(snapshots, exists).lower == ("/s/snapshots/4/fs", "/s/snapshots/3/fs")
    one_by_one = overlay_line("rw,lowerdir+=/a\\\\054b,lowerdir+=/c,metacopy=on".replace("\\\\", "\\"))
    assert parse_layers(one_by_one, lambda path: True) == Layers(("/a,b", "/c"), None, (("metacopy", "on"),))


@pytest.mark.parametrize(
    "options", ["rw,lowerdir=/a::/b", "rw,lowerdir=/a,datadir+=/b", "rw", "rw,lowerdir=x:y"]
)
def test_layers_that_cannot_be_made_out_are_an_error(options: str) -> None:
    with pytest.raises(ContainerError):
        parse_layers(overlay_line(options), lambda path: False)


@given(
    st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1), min_size=1, max_size=5
    )
)
def test_escaped_paths_come_back(paths: list[str]) -> None:
    whole = ":".join(path.replace("\\", "\\\\").replace(":", "\\:") for path in paths)
    assert split_lower(whole) == paths
    assert [split_lower(escape(path).replace(":", "\\:")) for path in paths] == [[path] for path in paths]


def test_the_mount_of_a_path_is_the_last_of_the_deepest() -> None:
    lines = parse_mountinfo(
        "1 0 8:1 / / rw - ext4 /dev/sda rw\n"
        "2 1 0:5 / /a\\040b rw shared:1 - overlay overlay rw,lowerdir=/x\n"
        "3 2 0:6 /sub /a\\040b rw - tmpfs t rw\n"
    )
    assert mount_of("/a b/c", lines).mnt_id == 3
    assert mount_of("/a bc", lines).mnt_id == 1
    assert mount_of("/", lines).fstype == "ext4"


# ---- pure: the choice ----

FOUND = st.builds(
    Found,
    path=st.just("/p"),
    root=st.booleans(),
    fstype=st.just("ext4"),
    skip=st.booleans(),
    special=st.booleans(),
    owned_inside=st.booleans(),
    failures=st.dictionaries(st.sampled_from(STRATEGIES), st.just("EINVAL")),
)


@given(
    FOUND,
    st.lists(st.sampled_from(STRATEGIES), unique=True),
    st.sampled_from(["auto", "none", *STRATEGIES]),
)
def test_a_forbidden_or_failing_strategy_is_never_chosen(
    found: Found, allowed: list[str], wanted: str
) -> None:
    try:
        decision = choose(found, allowed, wanted)
    except ContainerError as error:
        assert found.root, "a bind is left as it is"
        assert all(strategy in str(error) for strategy in STRATEGIES)
        return
    assert decision.reason
    if decision.strategy in STRATEGIES:
        assert decision.strategy in allowed
        assert decision.strategy not in found.failures
        if found.root:
            assert wanted in ("auto", decision.strategy)
        else:
            assert decision.strategy != "clone"
        for better in STRATEGIES[: STRATEGIES.index(decision.strategy)]:
            forced = found.root and wanted not in ("auto", better)
            assert better not in allowed or better in found.failures or forced
    elif found.root:
        assert needs_mapping(found, wanted) == decision, "never silently"


@given(
    FOUND,
    st.lists(st.sampled_from(STRATEGIES), unique=True),
    st.sampled_from(["auto", "none", *STRATEGIES]),
)
def test_what_is_tried_in_turn_is_what_is_chosen(found: Found, allowed: list[str], wanted: str) -> None:
    """As a container's creation does: the first that works ends the attempts, and nothing else can be chosen then."""
    tried: dict[str, str] = {}
    for strategy in worth_trying(found, allowed, wanted):
        if strategy not in found.failures:
            assert choose(replace(found, failures=tried), allowed, wanted).strategy == strategy
            return
        tried[strategy] = found.failures[strategy]
    if needs_mapping(found, wanted) is not None or not found.root:
        assert choose(replace(found, failures=tried), allowed, wanted).strategy == "none"
        return
    with pytest.raises(ContainerError, match="its owners cannot be mapped"):
        choose(replace(found, failures=tried), allowed, wanted)


# ---- the kernel ----


@pytest.fixture
def disk() -> Iterator[Path]:
    """A directory on a disk's filesystem, for which pytest's own may not be one."""
    path = Path(tempfile.mkdtemp(dir="/var/tmp"))
    yield path
    shutil.rmtree(path)


def in_child(body: Callable[[], None]) -> None:
    """Runs ``body`` in a process with a mount namespace of its own; its exception is the failure."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            unshare(CLONE_NEWNS)
            mount.mount(b"none", b"/", None, 0x4000 | 0x40000)
            body()
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def mapped(disk: Path, body: Callable[[Mapper, int], None]) -> None:
    """Gives ``body`` a mapper and the user namespace, in a mount namespace of its own."""

    def run() -> None:
        stage = disk / "stage"
        stage.mkdir()
        mount.mount(b"stage", str(stage), b"tmpfs")
        with user_namespace(IDS, IDS) as namespace:
            body(Mapper(namespace, IDS, IDS, str(stage)), namespace.fileno())

    in_child(run)


def as_container_root(namespace: int, place: str, script: str) -> str:
    """The output of a script, run as root of the user namespace with ``place`` as its directory."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.chdir(place)
        setns(namespace, CLONE_NEWUSER)
        os.setgroups([])
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
        os.dup2(write, 1)
        os.execvp("sh", ["sh", "-euc", script])
    os.close(write)
    with open(read) as output:
        text = output.read()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, text
    return text


def make_layers(disk: Path, count: int = 2) -> Layers:
    """An image of ``count`` layers, and an empty upper one."""
    lower = [disk / f"lower{i}" for i in range(count)]
    for number, path in enumerate(lower):
        path.mkdir()
        (path / f"file{number}").write_text(str(number))
    bottom = lower[-1]
    (bottom / "tool").write_text("tool")
    os.chown(bottom / "tool", 33, 7)
    (bottom / "tool").chmod(0o6755)
    os.setxattr(bottom / "tool", "security.capability", CAPABILITY)
    (bottom / "old").write_text("old")
    (disk / "layer/diff").mkdir(parents=True)
    return Layers(tuple(map(str, lower)), str(disk / "layer/diff"))


@pytest.mark.root
def test_what_the_container_writes_is_root_s_on_disk(disk: Path) -> None:
    layers = make_layers(disk)

    def body(mapper: Mapper, namespace: int) -> None:
        (disk / "merged").mkdir()
        with mapper.overlay(layers, "interceptor-work") as tree:
            mount.attach(tree, mount.AT_FDCWD, str(disk / "merged"))
        script = (
            "stat -c %u:%g:%a tool; echo new > new; chown 5:6 old; mkdir d; chmod 4711 new; rm file0;"
            "cp --preserve=all tool copy; setcap cap_net_raw+ep d/../new; getcap tool"
        )
        shown = as_container_root(namespace, str(disk / "merged"), script)
        assert shown.split("\n")[0] == "33:7:6755"
        assert "cap_net_raw=ep" in shown

    mapped(disk, body)
    diff = disk / "layer/diff"
    owners = {p.name: (p.lstat().st_uid, p.lstat().st_gid) for p in diff.iterdir()}
    assert owners == {"new": (0, 0), "old": (5, 6), "d": (0, 0), "copy": (33, 7), "file0": (0, 0)}
    assert stat.S_ISCHR((diff / "file0").lstat().st_mode), "a whiteout"
    assert (diff / "copy").stat().st_mode & 0o7777 == 0o6755
    assert os.getxattr(diff / "copy", "security.capability") == CAPABILITY, (
        "the plain revision, without a root's ID"
    )
    assert os.getxattr(diff / "new", "security.capability")[:1] == b"\1"
    assert (disk / "lower1/tool").stat().st_uid == 33, "nothing is chowned"


@pytest.mark.root
@pytest.mark.parametrize("short_names", [False, True])
def test_an_image_of_many_layers(disk: Path, short_names: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = make_layers(disk, 150)
    if short_names:

        def refuse(*_: object) -> None:
            raise SyscallError(22, "fsconfig(lowerdir+)")

        # As kernels before 6.8 do.
        monkeypatch.setattr(stack, "one_by_one", refuse)

    def body(mapper: Mapper, namespace: int) -> None:
        (disk / "merged").mkdir()
        with mapper.overlay(layers, "interceptor-work") as tree:
            mount.attach(tree, mount.AT_FDCWD, str(disk / "merged"))
        assert as_container_root(namespace, str(disk / "merged"), "ls | wc -l; echo x > x") == "152\n"

    mapped(disk, body)
    assert (disk / "layer/diff/x").stat().st_uid == 0


@pytest.mark.root
def test_a_plain_tree_and_what_cannot_be_mapped(disk: Path) -> None:
    (disk / "tree").mkdir()
    (disk / "tree/f").write_text("x")
    os.chown(disk / "tree/f", 70000, 70000)

    def body(mapper: Mapper, namespace: int) -> None:
        (disk / "at").mkdir()
        with mapper.tree(str(disk / "tree")) as tree:
            mount.attach(tree, mount.AT_FDCWD, str(disk / "at"))
        shown = as_container_root(namespace, str(disk / "at"), "stat -c %u . f; touch g")
        assert shown == "0\n65534\n", "an owner beyond the range is nobody"
        for path in ("/proc", "/sys"):
            with pytest.raises(SyscallError) as caught:
                mapper.tree(path)
            assert caught.value.errno == 22

    mapped(disk, body)
    assert (disk / "tree/g").stat().st_uid == 0


@pytest.mark.root
def test_the_mapping_namespace_leaves_no_process(leak_check: None) -> None:
    before = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(os.getpid())], capture_output=True, check=False
    ).stdout
    with user_namespace(IDS, Block(300000, 10)) as namespace:
        assert os.readlink(f"/proc/self/fd/{namespace.fileno()}").startswith("user:")
    after = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(os.getpid())], capture_output=True, check=False
    ).stdout
    assert before.count(b"\n") == after.count(b"\n")


# ---- what doctor says ----


def probes(**works: bool) -> list[probe.Probe]:
    """A row for each, as if found on some storage."""
    names = {
        "idmapped": "idmapped overlay",
        "shiftfs": "shiftfs",
        "metadata": "clone by metadata",
        "reflink": "clone by reflink",
        "copy": "clone by copy",
    }
    return [
        probe.Probe("/d", "ext4", name, works.get(key, False), f"{key} fails") for key, name in names.items()
    ]


@pytest.mark.parametrize(
    ("works", "allowed", "strategy_", "words"),
    [
        ({"idmapped", "shiftfs", "copy"}, STRATEGIES, "idmapped", "it works"),
        ({"shiftfs", "metadata"}, STRATEGIES, "shiftfs", "it works"),
        ({"metadata", "reflink", "copy"}, STRATEGIES, "clone", "without copying data"),
        ({"reflink", "copy"}, STRATEGIES, "clone", "without copying data"),
        ({"copy"}, STRATEGIES, "clone", "all data is copied at each start"),
        ({"idmapped", "copy"}, ("clone",), "clone", "all data is copied"),
        (
            {"idmapped"},
            ("shiftfs",),
            "none",
            "idmapped: forbidden by ownership_strategies; shiftfs: shiftfs fails",
        ),
        (set(), STRATEGIES, "none", "clone: copy fails"),
    ],
)
def test_doctor_says_what_a_container_would_get(
    works: set[str], allowed: tuple[str, ...], strategy_: str, words: str
) -> None:
    found, why = probe.strategy(probes(**dict.fromkeys(works, True)), allowed)
    assert found == strategy_
    assert words in why


@pytest.mark.root
def test_probes_are_made_on_the_storage_itself_and_leave_nothing(disk: Path) -> None:
    found = {one.name: one for one in probe.probe_storage(str(disk), "ext4")}
    assert found["idmapped overlay"].works
    assert found["clone by metadata"].works
    assert found["clone by copy"].works
    assert "no shiftfs" in found["shiftfs"].reason or found["shiftfs"].works
    assert list(disk.iterdir()) == []
    refused = {one.name: one for one in probe.probe_storage("/proc", "proc")}
    assert not any(one.works for one in refused.values())
