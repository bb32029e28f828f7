"""What a clone of a root filesystem costs, beside an ID-mapped one and a full copy.

    python -m integration.docker.clone [--rounds N] [--json]

The root filesystem is of 250 MB: Debian's, filled up. Prints milliseconds of ``docker run … true`` by strategy, of a
full copy alone, without the removal of either, and the disk space that a start takes, as the filesystem counts it. A
strategy that copied would take both, a copy and a start. All of it on a new ext4 of its own:
on one from which much was deleted lately, as where tests run, making a file can take 20 times as long.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from integration.containers import quickstart, rootfs
from integration.containers.kernel_calls import unshare_mounts
from integration.docker.engine import Docker, import_image, serving

ROUNDS = 7
SIZE = 250 << 20
#: For the tree, the image, a copy, and what a container takes.
DISK = 3 << 30
IMAGE = "interceptor-test/clone:measured"

#: What is measured, and what is not.
Contestant = tuple[Callable[[], object], Callable[[], object]]


def measure(rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds, and megabytes of disk, by contestant."""
    cache = quickstart.parser().get_default("cache")
    rootfs.ensure(cache, 100000)
    work = Path(tempfile.mkdtemp(prefix="interceptor-measured-", dir="/var/tmp"))
    try:
        tree = work / "tree"
        subprocess.run(["cp", "--archive", str(cache / rootfs.SUITE), str(tree)], check=True)
        with open(tree / "srv/filled-up", "wb") as file:
            file.write(os.urandom(max(0, SIZE - used(tree))))
        with serving() as docker:
            import_image(docker, tree, IMAGE)
            contestants = {
                "runc": _runner(docker, "runc", "none"),
                "idmapped": _runner(docker, "interceptor", "idmapped"),
                "clone": _runner(docker, "interceptor", "clone"),
                "full copy": (lambda: _copy(tree, work / "copy"), lambda: shutil.rmtree(work / "copy")),
            }
            times = _times(contestants, rounds)
            taken = {name: _taken(docker, tree, name) for name in contestants}
        files = sum(len(names) + len(below) for _, below, names in os.walk(tree))
    finally:
        shutil.rmtree(work)
    return {
        name: {
            "median_ms": round(statistics.median(one), 1),
            "disk_mb": round(taken[name] / 1e6, 1),
            "files": files,
        }
        for name, one in times.items()
    }


@contextlib.contextmanager
def _new_disk() -> Iterator[None]:
    """A new filesystem in place of /var/tmp, in a mount namespace of the caller's own."""
    with tempfile.NamedTemporaryFile(dir="/var/tmp") as image:
        image.truncate(DISK)
        subprocess.run(["mkfs.ext4", "-q", image.name], check=True)
        subprocess.run(["mount", "-o", "loop", image.name, "/var/tmp"], check=True)
        try:
            yield
        finally:
            subprocess.run(["umount", "--lazy", "/var/tmp"], check=True)


def used(tree: Path) -> int:
    """Bytes of the disk that a tree takes."""
    done = subprocess.run(["du", "-s", "--block-size=1", str(tree)], check=True, capture_output=True)
    return int(done.stdout.split()[0])


def _runner(docker: Docker, runtime: str, ownership: str) -> Contestant:
    argv = ["run", "--name=started", "--network=none", f"--runtime={runtime}"]
    argv += ["-e", f"INTERCEPTOR_OWNERSHIP={ownership}", IMAGE, "true"]
    return lambda: docker(*argv), lambda: docker("rm", "started")


def _copy(tree: Path, to: Path) -> None:
    subprocess.run(["cp", "--archive", "--reflink=auto", str(tree), str(to)], check=True)


def _times(contestants: dict[str, Contestant], rounds: int) -> dict[str, list[float]]:
    """All in turn, so that a busy machine is busy for all; the first round is not warm."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, (run, remove) in contestants.items():
            begin = time.monotonic()
            run()
            if number:
                times[name].append((time.monotonic() - begin) * 1000)
            remove()
    return times


def _taken(docker: Docker, tree: Path, name: str) -> int:
    """Bytes that a started container takes: of its own directories, without what it has mounted."""
    if name == "full copy":
        return used(tree)
    runtime = "runc" if name == "runc" else "interceptor"
    environment = f"INTERCEPTOR_OWNERSHIP={name if name != 'runc' else 'none'}"
    docker.start("measured", "-e", environment, IMAGE, "sleep", "infinity", runtime=runtime)
    upper = docker("inspect", "-f", "{{.GraphDriver.Data.UpperDir}}", "measured").strip()
    try:
        return sum(
            used(path) for path in Path(upper).parent.iterdir() if path.name != "merged" and path.is_dir()
        )
    finally:
        docker("rm", "-f", "measured")


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m integration.docker.clone", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("must be run as root")
    unshare_mounts()
    with _new_disk():
        figures = measure(options.rounds)
    if options.json:
        print(json.dumps(figures))
        return 0
    for name, row in figures.items():
        print(f"{name:10} {row['median_ms']:8.1f} ms {row['disk_mb']:8.1f} MB   ({row['files']} files)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
