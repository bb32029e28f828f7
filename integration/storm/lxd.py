"""LXD's interception of mount(2), on a private daemon with one container, where the package is installed.

LXD intercepts for containers of its own only, so it is asked through them. What both are asked for is the same call
with the same answer: a new ext4 on no device, EPERM.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import statistics
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from integration.storm.contestants import COMPILE, HERE, SOURCES, Caller, furnish, mounts_with
from integration.storm.figures import FEW, Percentiles, Ratio
from integration.storm.workloads import TARGET, Workload, mount
from interceptor.errors import InterceptorError
from interceptor.library import Interceptor

#: Seconds that the daemon may take to start, and a command of its to end.
START_SECONDS, COMMAND_SECONDS = 60, 120
#: Calls of one turn: theirs take milliseconds.
CALLS, OUR_CALLS = 40, 500
BAR = 150.0

DENIED_MOUNT = Workload(
    "denied_mount", (mount("denied_mount", "none", TARGET, "ext4", expected=errno.EPERM),), OUR_CALLS
)
_METADATA = "architecture: x86_64\ncreation_date: 1\nproperties:\n  os: storm\n"
_INIT = "#include <unistd.h>\nint main(void) { for (;;) pause(); }\n"
_SETTINGS = ("security.syscalls.intercept.mount=true", "security.syscalls.intercept.mount.allowed=ext4")


@dataclass(frozen=True)
class Beside:
    """The same denied mount in a container of LXD's and in one of ours."""

    theirs: list[float]
    """Microseconds: the median of each turn."""
    ours: Percentiles
    ratio: Ratio

    def as_json(self) -> dict[str, object]:
        return {"theirs_us": self.theirs, "ours_us": self.ours.as_json(), "ratio": round(self.ratio.value, 1)}


def installed() -> bool:
    """Whether there is a daemon to start."""
    return shutil.which("lxd") is not None and shutil.which("lxc") is not None


class Lxd:
    """A daemon on a directory of its own, with the container ``storm``."""

    def __init__(self, directory: Path) -> None:
        self._environment = {**os.environ, "LXD_DIR": str(directory / "lxd")}
        self._directory = directory
        (directory / "lxd").mkdir()
        with open(directory / "log", "wb") as log:
            # Its mounts are nobody else's business, and end with it.
            self._process = subprocess.Popen(
                ["unshare", "--mount", "--propagation", "private", "lxd", "--group", "root"],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def run(self, *argv: str) -> bytes:
        """A command of LXD's; what it prints. Raises `InterceptorError`."""
        try:
            done = subprocess.run(
                argv,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=COMMAND_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise InterceptorError(
                f"{' '.join(argv)}: no end after {COMMAND_SECONDS} s{self._log()}"
            ) from None
        if done.returncode:
            raise InterceptorError(f"{' '.join(argv)}: {done.stderr.decode().strip()}{self._log()}")
        return done.stdout

    def furnish(self) -> None:
        """Makes the container: a static init that waits, and the benchmark's program."""
        image = self._image()
        self.run("lxd", "waitready", f"--timeout={START_SECONDS}")
        for words in (
            ["storage", "create", "default", "dir"],
            ["profile", "device", "add", "default", "root", "disk", "path=/", "pool=default"],
            ["image", "import", str(image), "--alias", "storm"],
            ["init", "storm", "storm", *(word for setting in _SETTINGS for word in ("-c", setting))],
            ["start", "storm"],
        ):
            self.run("lxc", "--force-local", *words)

    def _image(self) -> Path:
        root = self._directory / "rootfs"
        for name in ("sbin", "proc", "sys", "dev", "etc", "tmp/target", "run", "root", "mnt"):
            (root / name).mkdir(parents=True)
        source = self._directory / "init.c"
        source.write_text(_INIT)
        programs = ((source,), root / "sbin/init"), (tuple(HERE / name for name in SOURCES), root / "floor")
        for sources, target in programs:
            subprocess.run([*COMPILE, "-static", *map(str, sources), "-o", str(target)], check=True)
        (self._directory / "metadata.yaml").write_text(_METADATA)
        image = self._directory / "image.tar"
        with tarfile.open(image, "w") as archive:
            for name in ("metadata.yaml", "rootfs"):
                archive.add(self._directory / name, name)
        return image

    def median_us(self) -> float:
        """Of one turn of denied mounts in the container."""
        call = DENIED_MOUNT.steps[0].call
        argv = ("lxc", "--force-local", "exec", "storm", "--", "/floor", "-n", str(CALLS), "-c", call)
        return float(json.loads(self.run(*argv))["us"]["p50"])

    def close(self) -> None:
        """Ends the container and the daemon."""
        with contextlib.suppress(InterceptorError):
            self.run("lxc", "--force-local", "delete", "--force", "storm")
        with contextlib.suppress(InterceptorError):
            self.run("lxd", "shutdown")
        self._process.terminate()
        try:
            self._process.wait(START_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _log(self) -> str:
        return ":\n" + (self._directory / "log").read_text(errors="replace")[-2000:]


@contextlib.contextmanager
def _running() -> Iterator[Lxd]:
    directory = Path(tempfile.mkdtemp(prefix="storm-lxd-"))
    directory.chmod(0o711)
    try:
        with contextlib.closing(Lxd(directory)) as lxd:
            lxd.furnish()
            yield lxd
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def measure(program: Path, rounds: int) -> Beside:
    """Both, in turns. Raises `InterceptorError` where LXD does not start."""
    with (
        _running() as lxd,
        Interceptor(log_level="warning") as daemon,
        daemon.spawn(mounts=mounts_with(program)) as container,
    ):
        container.call(furnish, FEW)
        caller = Caller(container, "none")
        try:
            caller.run(DENIED_MOUNT, OUR_CALLS)
            theirs: list[float] = []
            ratios: list[float] = []
            samples: list[int] = []
            for _ in range(rounds):
                ours = caller.run(DENIED_MOUNT, OUR_CALLS)["denied_mount"]
                theirs.append(lxd.median_us())
                samples.extend(ours)
                ratios.append(theirs[-1] / (statistics.median(ours) / 1000))
        finally:
            caller.close()
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if rounds > 1 else ratios * 3
    return Beside(theirs, Percentiles.of(samples), Ratio(middle, low, high, BAR, at_least=True))
