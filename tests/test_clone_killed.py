"""The way back from a clone, killed at one system call after another; and clones of images with many layers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from interceptor.errors import SyscallError
from interceptor.idshift import clone, giveback, stack
from interceptor.kernel import mount
from tests.clone_lab import Lab, disk, facts, make_lab, same
from tests.test_clone import LONG, no_stub, private, scenario

pytestmark = pytest.mark.root

ROOT = Path(__file__).resolve().parent.parent

#: All that changes something on disk, or what is mounted. (A call that does not exist here is passed over: "?".)
CALLS = ",".join(
    f"?{name}"
    for name in (
        *(
            "rename",
            "renameat",
            "renameat2",
            "link",
            "linkat",
            "unlink",
            "unlinkat",
            "rmdir",
            "mkdir",
            "mkdirat",
        ),
        *("mknod", "mknodat", "symlink", "symlinkat", "truncate", "ftruncate", "setxattr", "lsetxattr"),
        *("removexattr", "lremovexattr", "lchown", "chown", "fchownat", "chmod", "fchmodat", "utimensat"),
        *(
            "copy_file_range",
            "pwrite64",
            "write",
            "fsync",
            "syncfs",
            "mount",
            "umount2",
            "fsconfig",
            "move_mount",
        ),
    )
)
SCRIPT = "import sys; from interceptor.idshift.giveback import give_back; give_back(sys.argv[1], False)"

#: Of the calls of one run, every so-manieth; they are about 140.
STRIDE = 1 if LONG else 12


def strace(directory: str, *options: str) -> int:
    """The exit status of a run under strace(1), in a mount namespace that ends with it."""
    traced = [sys.executable, "-c", SCRIPT, directory]
    argv = ["unshare", "--mount", "strace", "-f", "-qq", "-e", f"trace={CALLS}", *options, *traced]
    return subprocess.run(argv, cwd=ROOT, check=False).returncode


def calls(lab: Lab) -> list[tuple[str, int]]:
    """Every call that a run makes: its name, and the how-manieth of that name it is."""
    scenario(lab)
    counts = lab.place / "counts"
    assert strace(lab.directory, "-c", "-U", "calls,name", "-o", str(counts)) == 0
    rows = [line.split() for line in counts.read_text().splitlines()]
    found = [(row[1], int(row[0])) for row in rows if len(row) == 2 and row[0].isdecimal()]
    return [(name, n + 1) for name, count in found if name != "total" for n in range(count)]


def test_whoever_is_killed_at_any_system_call_leaves_it_to_the_next() -> None:
    def body() -> int:
        with disk("ext4") as at:
            lab = make_lab(at)
            made = calls(lab)
            lab.close()
            for name, number in made[::STRIDE]:
                lab = make_lab(at)
                seen = scenario(lab)
                inject = f"inject={name}:signal=SIGKILL:when={number}"
                assert strace(lab.directory, "-o", os.devnull, "-e", inject) in (-9, 137), (name, number)
                giveback.give_back(lab.directory, final=False)
                lab.show_manager()
                same(facts(lab.manager), seen)
                same(lab.seen(), seen)
                no_stub(lab)
                lab.close()
            return len(made)

    assert private(body) > 100


@pytest.mark.parametrize("short_names", [False, True])
def test_an_image_of_many_layers_is_cloned(short_names: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if short_names:

        def refuse(*_: object) -> None:
            raise SyscallError(22, "fsconfig(lowerdir+)")

        # As kernels before 6.8 do.
        monkeypatch.setattr(stack, "one_by_one", refuse)

    def body() -> None:
        with disk("ext4") as at:
            lab = make_lab(at)
            lower = [lab.place / f"layer{number}" for number in range(150)]
            for number, path in enumerate(lower):
                path.mkdir()
                (path / f"file{number}").write_text(str(number))
            record = many(lab, lower)
            (lab.place / "stages").mkdir()
            options: list[stack.Option] = [
                ("upperdir", str(lab.target)),
                ("workdir", str(lab.place / "layer/work")),
                ("index", "off"),
            ]
            with stack.mount_layers(list(map(str, lower)), options, stage(lab, "manager")) as tree:
                mount.attach(tree, mount.AT_FDCWD, str(lab.manager))
            clone.create(lab.directory, record, lambda: None)
            with clone.mount_clone(lab.directory, record, "work", stage(lab, "inside")) as tree:
                mount.attach(tree, mount.AT_FDCWD, str(lab.inside))
            assert len(os.listdir(lab.inside)) == 150
            assert (lab.inside / "file149").read_text() == "149"
            (lab.inside / "file0").unlink()
            (lab.inside / "file77").write_text("changed")
            (lab.inside / "file149").chmod(0o600)
            giveback.finish(lab.directory)
            assert sorted(os.listdir(lab.target)) == ["file0", "file149", "file77"]
            assert (lab.target / "file149").read_text() == "149"
            lab.close()

    private(body)


def stage(lab: Lab, name: str) -> str:
    """An empty directory."""
    place = lab.place / "stages" / name
    place.mkdir()
    return str(place)


def many(lab: Lab, lower: list[Path]) -> clone.Record:
    """The record of a clone over that many layers."""
    import msgspec

    return msgspec.structs.replace(lab.record(), lower=tuple(map(os.fsencode, lower)))
