"""How long a container takes to start: ``docker run --runtime=interceptor … true`` against plain runc.

    python -m integration.docker [--rounds N] [--json]

The other contestant is stock runc with a user namespace, as ``dockerd --userns-remap`` makes it, with files that were
chowned when the image came; and stock runc without one. All in turn, so that a busy machine is busy for all. Prints
milliseconds, median and 90th percentile, the ratio of the medians, and the median of the ratios of each round.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from integration.containers import quickstart, rootfs
from integration.docker.engine import IMAGE, Docker, engine, import_image, serving

ROUNDS = 20
#: The figure that is wanted: ratio to plain runc with a user namespace.
LIMIT = 1.5


def measure(rounds: int) -> dict[str, list[float]]:
    """Milliseconds by contestant, round by round."""
    cache = quickstart.parser().get_default("cache")
    rootfs.ensure(cache, 100000)
    with ExitStack() as stack:
        docker = stack.enter_context(serving())
        second = stack.enter_context(remapped(docker))
        for one in (docker, second):
            import_image(one, cache / rootfs.SUITE)
        contestants = {
            "interceptor": _starter(docker, "interceptor"),
            "runc, userns-remap": _starter(second, "runc"),
            "runc": _starter(docker, "runc"),
        }
        times: dict[str, list[float]] = {name: [] for name in contestants}
        for number in range(rounds + 2):
            for name, start in contestants.items():
                begin = time.monotonic()
                start()
                # The first rounds are not warm.
                if number >= 2:
                    times[name].append((time.monotonic() - begin) * 1000)
    return times


def _starter(docker: Docker, runtime: str) -> Callable[[], str]:
    argv = ["run", "--rm", "--network=none", f"--runtime={runtime}", IMAGE, "true"]
    return lambda: docker(*argv)


@contextmanager
def remapped(docker: Docker) -> Iterator[Docker]:
    """A second engine, with userns-remap: its user's IDs are in files that only it sees as /etc/subuid and subgid."""
    run = Path(tempfile.mkdtemp(prefix="interceptor-remap-", dir="/run"))
    data = Path(tempfile.mkdtemp(prefix="interceptor-remap-", dir="/var/tmp"))
    try:
        for path in (run, data):
            path.chmod(0o755)
        (run / "subids").write_text("nobody:2000000:65536\n")
        with engine(
            run, data, docker.daemon, "--userns-remap=nobody:nogroup", subids=run / "subids"
        ) as second:
            yield second
    finally:
        for path in (run, data):
            shutil.rmtree(path, ignore_errors=True)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m integration.docker", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("must be run as root")
    times = measure(options.rounds)
    figures = {
        name: {"median_ms": round(statistics.median(t), 1), "p90_ms": round(sorted(t)[len(t) * 9 // 10], 1)}
        for name, t in times.items()
    }
    ours, theirs = times["interceptor"], times["runc, userns-remap"]
    ratio = round(statistics.median(ours) / statistics.median(theirs), 2)
    paired = round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 2)
    if options.json:
        print(json.dumps({"start": figures, "ratio": ratio, "paired": paired}))
    else:
        for name, row in figures.items():
            print(f"{name:20} {row['median_ms']:8.1f} ms   90th percentile {row['p90_ms']:8.1f} ms")
        print(
            f"interceptor against runc with a user namespace: {ratio}, each round {paired} (wanted: at most {LIMIT})"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
