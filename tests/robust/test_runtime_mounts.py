"""What a real runc mounts after the createRuntime hook, and what it mounted where no hook ran."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from interceptor.library import Interceptor
from tests.robust.support import settles_at
from tests.robust.test_teardown import _used
from tests.test_readme import guarded_bundle

pytestmark = [pytest.mark.root, pytest.mark.slow]

#: Prints ``NAME STATUS`` for each command. The first call that is trapped waits until the container is set up: runc
#: does not, and where no hook ran the container is unprotected until then.
TRY = (
    'try() { name=$1; shift; if "$@" >/dev/null 2>&1; then echo $name done; else echo $name refused; fi; }\n'
    "mount -t tmpfs x /mnt && umount /mnt\n"
)

Edit = Callable[[dict[str, Any]], None]


def _run(
    daemon: Interceptor, bundle: Path, script: str, edit: Edit
) -> tuple[dict[str, str], list[list[str]]]:
    """What a container of runc says: the outcome of each try, and the columns of its mount table."""
    (bundle / "interceptor-hook").symlink_to(Path(sys.executable).parent / "interceptor-hook")
    guarded_bundle(daemon, bundle, ["sh", "-c", TRY + script + "exec cat /proc/self/mountinfo\n"])
    config = json.loads((bundle / "config.json").read_text())
    edit(config)
    (bundle / "config.json").write_text(json.dumps(config))
    argv = ["runc", "--root", str(bundle / "state"), "run", "--bundle", str(bundle), "by-runc"]
    done = subprocess.run(
        argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr + daemon.log_path.read_text()[-4000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    return {line[0]: line[1] for line in lines if len(line) == 2}, [line for line in lines if len(line) > 6]


def _without_hook(config: dict[str, Any]) -> None:
    del config["hooks"]


def _with_more_paths(config: dict[str, Any]) -> None:
    config["root"]["readonly"] = False
    config["linux"]["readonlyPaths"] = ["/etc", "/proc/sys/net"]


PATHS = ["/proc/acpi", "/proc/keys", "/proc/bus", "/proc/irq", "/proc/sys", "/sys/firmware"]
UMOUNTS = "".join(f"try {path} umount {path}\n" for path in PATHS)


@pytest.mark.parametrize("edit", [lambda config: None, _without_hook], ids=["hook", "no hook"])
def test_masks_of_the_runtime_are_the_welded_ones(daemon: Interceptor, tmp_path: Path, edit: Edit) -> None:
    """Each is there once, and nothing of it can be taken off."""
    before = _used(daemon)
    said, table = _run(daemon, tmp_path, UMOUNTS, edit)
    assert said == dict.fromkeys(PATHS, "refused")
    points = [line[4] for line in table]
    assert [point for point in points if points.count(point) > 1] == []
    flags = {line[4]: line[5].split(",")[0] for line in table}
    assert {path: flags[path] for path in PATHS} == dict.fromkeys(PATHS, "ro")
    settles_at(daemon, before)


@pytest.mark.parametrize("edit", [lambda config: None, _without_hook], ids=["hook", "no hook"])
def test_the_read_only_root_of_a_container_stays_so(daemon: Interceptor, tmp_path: Path, edit: Edit) -> None:
    script = (
        "try remount mount -o remount,bind,rw /\n"
        "try touch touch /root/made\n"
        "try copy sh -c 'mount --bind / /mnt && mount -o remount,bind,rw /mnt'\n"
        "try namespace unshare -m mount -o remount,bind,rw /\n"
        "try nested unshare -Ur -m mount -o remount,bind,rw /\n"
    )
    said, table = _run(daemon, tmp_path, script, edit)
    assert said == dict.fromkeys(["remount", "touch", "copy", "namespace", "nested"], "refused")
    (root,) = [line for line in table if line[4] == "/"]
    assert root[5].split(",")[0] == "ro"


def test_read_only_paths_elsewhere_are_welded_too(daemon: Interceptor, tmp_path: Path) -> None:
    """Free mounts as far as unmounting goes, but not to be made writable (a mount that the container began with)."""
    script = (
        "try etc mount -o remount,bind,rw /etc\n"
        "try net mount -o remount,bind,rw /proc/sys/net\n"
        "try touch touch /etc/made\n"
        "try root touch /tmp/made\n"
        "rm -f /root/made /etc/made /tmp/made\n"
    )
    said, table = _run(daemon, tmp_path, script, _with_more_paths)
    assert said == {"etc": "refused", "net": "refused", "touch": "refused", "root": "done"}
    assert {"/etc", "/proc/sys/net"} <= {line[4] for line in table}
