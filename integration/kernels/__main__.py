"""Runs a command of this checkout under the kernel of a Debian release: ``python -m integration.kernels --help``.

The machine is made once a suite and cached: a root filesystem by debootstrap with that suite's kernel and what the
project needs, and a Python environment in it. Each run copies the checkout in, packs an ext4 image without mounting
anything, and boots it with qemu, under KVM where the machine has it and in software where not (then everything takes
ten to thirty times as long). The suite's own qemu is used, from the root filesystem's side of a chroot: the one of
Debian 12 crashes newer kernels in software emulation.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
KERNEL = "linux-image-cloud-amd64"
#: Whose Python is too old for the project: with the kernel of the first, the rest of the second.
USERSPACE = {"bullseye": "bookworm"}
#: What `integration/check` installs, and what makes a root filesystem a machine.
PACKAGES = (
    "initramfs-tools systemd systemd-sysv udev kmod dbus procps e2fsprogs",
    "git build-essential pkg-config python3-dev python3-venv libcap-dev libfuse3-dev libseccomp-dev",
    "fuse3 runc debootstrap debian-archive-keyring uidmap iproute2 strace util-linux",
    "qemu-system-x86 ca-certificates",
)
#: In the guest: the second serial port is the command's output, the third takes its exit status.
GUEST = """\
#!/bin/bash
cd /root/checkout
export PATH=/root/checkout/.venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export HOME=/root TERM=dumb COLUMNS=120
( echo "Linux $(uname -r)"; exec "$@" ) </dev/null >/dev/ttyS1 2>&1
echo $? >/dev/ttyS2
sync
poweroff -f
"""
UNIT = """\
[Unit]
Description=The command of this run
After=multi-user.target

[Service]
Type=oneshot
Delegate=yes
TimeoutStartSec=infinity
ExecStart=/root/guest {command}

[Install]
WantedBy=default.target
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the machine, run the command in it, and return the command's exit status (125: there was none)."""
    options = _parser().parse_args(arguments)
    if os.geteuid() != 0:
        print("integration.kernels has to run as root", file=sys.stderr)
        return 1
    machine = _machine(options.cache, options.suite)
    with tempfile.TemporaryDirectory(prefix="interceptor-kernels-", dir=options.cache) as scratch:
        tree = Path(scratch, "tree")
        print("copying the checkout, packing the disk", file=sys.stderr)
        subprocess.run(["cp", "--archive", "--reflink=auto", str(machine), str(tree)], check=True)
        _put_checkout(tree)
        if options.rootfs.exists():
            inner = Path(tree, *options.rootfs.absolute().parts[1:])
            inner.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(["cp", "--archive", str(options.rootfs), str(inner)], check=True)
        _put_command(tree, options.command)
        return _boot(Path(scratch), tree, options.memory, options.timeout)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m integration.kernels",
        description="Runs a command of this checkout under the kernel of a Debian release, in qemu.",
        epilog="examples:\n  sudo .venv/bin/python -m integration.kernels\n"
        "  sudo .venv/bin/python -m integration.kernels -- python -m pytest -q tests/test_library.py\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--suite",
        default="trixie",
        help="Debian suite (%(default)s: Linux 6.12; bookworm: 6.1; bullseye: 5.10 with the rest of bookworm)",
    )
    parser.add_argument(
        "--memory", default=3072, type=int, metavar="MiB", help="of the machine (%(default)s)"
    )
    parser.add_argument(
        "--timeout", default=3600, type=int, metavar="SECONDS", help="for all of it (%(default)s)"
    )
    parser.add_argument("--cache", default=Path("/var/cache/interceptor"), type=Path, metavar="DIR")
    parser.add_argument(
        "--rootfs",
        default=Path("/var/cache/interceptor/trixie"),
        type=Path,
        metavar="DIR",
        help="the quickstart's cached root filesystem, copied in so that the guest needs no network (%(default)s)",
    )
    parser.add_argument(
        "command",
        nargs="*",
        default=["./integration/quickstart", "--no-install"],
        help="default: %(default)s",
    )
    return parser


def _machine(cache: Path, suite: str) -> Path:
    """Return the cached root filesystem of ``suite``, made if it is missing. Raises CalledProcessError."""
    final = cache / f"kernels-{suite}"
    if final.exists():
        return final
    print(f"debootstrap {suite}, once; this takes some minutes", file=sys.stderr)
    cache.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=cache))
    try:
        scratch.chmod(0o755)
        userspace = USERSPACE.get(suite, suite)
        subprocess.run(
            ["debootstrap", "--variant=minbase", userspace, str(scratch)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        # Some of these need a whole system to be configured in, which debootstrap's own order does not give them.
        install = ["install", "--yes", "--quiet", "--no-install-recommends"]
        _apt(scratch, *install, *" ".join(PACKAGES).split())
        if suite != userspace:
            sources = scratch / "etc/apt/sources.list"
            sources.write_text(sources.read_text() + sources.read_text().replace(userspace, suite))
            _apt(scratch, "update", "--quiet")
        _apt(scratch, *install, f"--target-release={suite}", KERNEL)
        shutil.rmtree(scratch / "var/cache/apt/archives", ignore_errors=True)
        (scratch / "etc/fstab").write_text("/dev/vda / ext4 defaults 0 1\n")
        scratch.rename(final)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return final


def _apt(tree: Path, *arguments: str) -> None:
    argv = [*_inside(tree), "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", *arguments]
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def _put_checkout(tree: Path) -> None:
    """Copy what git knows of this checkout into the machine and install it there, with what the tests need."""
    target = tree / "root/checkout"
    target.mkdir(parents=True)
    git = ["git", "-c", "safe.directory=*", "-C", str(CHECKOUT)]
    names = subprocess.run(
        [*git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        check=True,
        capture_output=True,
    ).stdout
    pack = ["tar", "-c", "-C", str(CHECKOUT), "--null", "--ignore-failed-read", "-T", "-"]
    archive = subprocess.run(pack, check=True, input=names, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", str(target)], check=True, input=archive)
    for name in ("/etc/resolv.conf", "/etc/pip.conf", "/etc/ssl/certs/ca-certificates.crt"):
        if os.path.exists(name):
            shutil.copy(name, tree / name.lstrip("/"))
    python = "/root/checkout/.venv/bin/python"
    for argv in (
        ["/usr/bin/python3", "-m", "venv", "/root/checkout/.venv"],
        [python, "-m", "pip", "install", "-q", "-e", "/root/checkout[test]"],
    ):
        subprocess.run([*_inside(tree), *argv], check=True)


def _inside(tree: Path) -> list[str]:
    """Return how to run a command in ``tree``, with a procfs that is gone when the command ends."""
    return ["unshare", "--mount", "--pid", "--fork", f"--mount-proc={tree}/proc", "chroot", str(tree)]


def _put_command(tree: Path, command: Sequence[str]) -> None:
    guest = tree / "root/guest"
    guest.write_text(GUEST)
    guest.chmod(0o755)
    units = tree / "etc/systemd/system"
    # systemd's quoting is a shell's, but for % and $.
    quoted = shlex.join(command).replace("%", "%%").replace("$", "$$")
    (units / "command.service").write_text(UNIT.format(command=quoted))
    wants = units / "default.target.wants"
    wants.mkdir(exist_ok=True)
    (wants / "command.service").symlink_to("../command.service")


def _has_kvm() -> bool:
    """Whether KVM runs a kernel: without the processor's help it ends at the first instruction unknown to it."""
    helped = re.search(r"\b(vmx|svm)\b", Path("/proc/cpuinfo").read_text(encoding="ascii"))
    return helped is not None and os.access("/dev/kvm", os.R_OK | os.W_OK)


def _boot(scratch: Path, tree: Path, memory: int, timeout: int) -> int:
    disk, output, status = (scratch / name for name in ("disk", "output", "status"))
    with open(disk, "wb") as image:
        image.truncate(8 << 30)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", str(tree), str(disk)], check=True)
    machine = Path(tree, "var/tmp/machine")
    machine.mkdir()
    kernel, initrd = (next(tree.glob(f"boot/{name}-*")).name for name in ("vmlinuz", "initrd.img"))
    fast = _has_kvm()
    qemu = [
        *("qemu-system-x86_64", "-machine", "q35", "-smp", "2", "-m", str(memory), "-no-reboot"),
        # Without KVM: one of the models without 57-bit addresses and protection keys, which cost much there.
        *(("-accel", "kvm", "-cpu", "host") if fast else ("-accel", "tcg", "-cpu", "Nehalem")),
        *("-nographic", "-monitor", "none", "-nic", "none"),
        *("-kernel", f"/boot/{kernel}", "-initrd", f"/boot/{initrd}"),
        *("-append", "root=/dev/vda rw console=ttyS0 systemd.show_status=0"),
        *("-drive", "file=/var/tmp/machine/disk,if=virtio,format=raw"),
        *("-serial", "file:/var/tmp/machine/console"),
        *("-serial", "file:/var/tmp/machine/output", "-serial", "file:/var/tmp/machine/status"),
    ]
    for name in (disk, output, status):
        name.touch()
    # All mounts are in a namespace of their own, which goes with the last process in it.
    prepare = 'mount --bind "$1" "$2/var/tmp/machine" && mount --bind /dev "$2/dev" && shift 2 && exec "$@"'
    argv = [
        "unshare",
        "--mount",
        "sh",
        "-c",
        prepare,
        "sh",
        str(scratch),
        str(tree),
        "chroot",
        str(tree),
        *qemu,
    ]
    follower = subprocess.Popen(["tail", "-f", "-c", "+1", str(output)])
    try:
        subprocess.run(argv, check=True, timeout=timeout, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    finally:
        follower.terminate()
        follower.wait()
    said = status.read_text().strip()
    if not said:
        print((scratch / "console").read_text(errors="replace")[-4000:], file=sys.stderr)
        print(
            "the machine stopped before the command had ended; above is what its kernel said last",
            file=sys.stderr,
        )
        return 125
    return int(said)


if __name__ == "__main__":
    sys.exit(main())
