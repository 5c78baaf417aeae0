"""``python -m guests.linux DIR``: a Linux kernel and a small root file system, ready to boot.

Both come from the packages of a Debian or Ubuntu system: the kernel as it is, and busybox, around
which an initramfs is built here. Nothing is installed and root is not needed: the packages are
downloaded by apt, which checks their signatures, and one file is taken out of each.

DIR gets ``vmlinuz``, ``initramfs.cpio.gz`` and ``linux-guest.json``, which says what they were made
of. A second call finds them complete and does nothing; ``--update`` asks for newer packages.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from guests import cpio

KERNEL_PACKAGES = ("linux-image-cloud-amd64", "linux-image-virtual", "linux-image-amd64")
"""Tried in this order: Debian's kernel for virtual machines, Ubuntu's, Debian's for anything."""

BUSYBOX_PACKAGES = ("busybox-static",)

KERNEL, INITRAMFS, RECORD = "vmlinuz", "initramfs.cpio.gz", "linux-guest.json"
READY = "linux-guest: ready"
"""The line that `INIT` prints before the first prompt."""

RECIPE = 1
"""Counts changes to what this module builds; files of another recipe are built anew."""

INIT = f"""\
#!/bin/sh
export PATH=/bin HOME=/root PS1='\\w # '
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
# What poweroff, halt and reboot without -f send to process 1.
trap 'poweroff -f' USR2
trap 'halt -f' USR1
trap 'reboot -f' TERM
echo '{READY}'
while :; do
    # A session of its own on the console's real device: job control and Ctrl-C work there.
    setsid cttyhack sh </dev/console >/dev/console 2>&1 &
    wait $!
done
"""

_MEMBER_LIMIT = 256 << 20


class GuestError(Exception):
    """The guest cannot be made ready; the text says why and what helps."""


@dataclass
class Record:
    """What is in the directory.

    Attributes:
        recipe: `RECIPE` of the version that built it.
        packages: package -> version.
        files: file -> SHA-256 of its contents.
    """

    recipe: int
    packages: dict[str, str]
    files: dict[str, str]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m guests.linux",
        description="Make a Linux kernel and a busybox initramfs ready to boot, from the packages "
        "of this Debian or Ubuntu system. Installs nothing, needs no root.",
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="where they go; made if absent")
    parser.add_argument("--update", action="store_true", help="look for newer packages")
    parser.add_argument("--kernel", metavar="PACKAGE", help="the kernel's package")
    parser.add_argument("--quiet", action="store_true", help="print only errors")
    args = parser.parse_args(arguments)

    def say(text: str) -> None:
        if not args.quiet:
            print(text, flush=True)

    try:
        if not args.update and args.kernel is None and is_complete(args.directory):
            say(f"{args.directory}: complete already (--update looks for newer packages)")
        else:
            prepare(args.directory, args.kernel, say)
    except GuestError as error:
        print(f"guests.linux: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"guests.linux: {error.filename or ''}: {error.strerror}", file=sys.stderr)
        return 2
    say("Boot it:")
    say(f"  {boot_command(args.directory)}")
    return 0


def boot_command(directory: Path) -> str:
    """The command line that boots what is in `directory`."""
    kernel, initramfs = (shlex.quote(str(directory / name)) for name in (KERNEL, INITRAMFS))
    return f'python -m vmm boot {kernel} --initrd {initramfs} --append "console=ttyS0"'


def is_complete(directory: Path) -> bool:
    """Whether `directory` holds what this version builds, unchanged since."""
    try:
        record = Record(**json.loads((directory / RECORD).read_bytes()))
        return (
            record.recipe == RECIPE
            and record.files.keys() == {KERNEL, INITRAMFS}
            and all(_digest((directory / n).read_bytes()) == d for n, d in record.files.items())
        )
    except (OSError, ValueError, TypeError, AttributeError):
        return False


def prepare(directory: Path, kernel: str | None, say: Callable[[str], None]) -> None:
    """Download the packages and write the files.

    Args:
        kernel: the kernel's package; None looks for a known one.
        say: takes lines about the progress.

    Raises:
        GuestError: there is no apt here, no such package, or no network.
        OSError: `directory` cannot be written.
    """
    for tool in ("apt-get", "apt-cache", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise GuestError(
                f"there is no {tool} here: this needs a Debian or Ubuntu system. Elsewhere give "
                f"`python -m vmm boot` any x86-64 kernel, and copy {INITRAMFS} from such a system"
            )
    names = [
        find_package((kernel,) if kernel else KERNEL_PACKAGES, r"linux-image-(unsigned-)?\d"),
        find_package(BUSYBOX_PACKAGES, r"busybox-static"),
    ]
    directory.mkdir(parents=True, exist_ok=True)
    contents, versions = [], {}
    for name, member in zip(names, (r"\./boot/vmlinuz-.*", r"\./(usr/)?bin/busybox"), strict=True):
        say(f"downloading {name}")
        # Beside its destination: this file system is the one known to have room.
        with tempfile.TemporaryDirectory(prefix=".packages-", dir=directory) as work:
            package = download(name, Path(work))
            versions[name] = _run("dpkg-deb", "--field", str(package), "Version").strip()
            contents.append(extract(package, member))
    say(f"building {INITRAMFS}")
    files = {KERNEL: contents[0], INITRAMFS: initramfs(contents[1])}
    for file, data in files.items():
        _write(directory / file, data)
        say(f"{directory / file}: {len(data) / 1e6:.1f} MB")
    record = Record(RECIPE, versions, {file: _digest(data) for file, data in files.items()})
    _write(directory / RECORD, json.dumps(asdict(record), indent=2).encode() + b"\n")


def find_package(candidates: Sequence[str], real: str) -> str:
    """The first candidate that apt knows, or what it depends on if it is only a name for that.

    Args:
        real: pattern of the names of packages that hold files.

    Raises:
        GuestError: apt knows none of them.
    """
    foreign = _run("dpkg", "--print-architecture").strip() != "amd64"
    for candidate in candidates:
        name = f"{candidate}:amd64" if foreign and ":" not in candidate else candidate
        if re.match(real, name):
            if "Package:" in _run("apt-cache", "show", "--no-all-versions", name, check=False):
                return name
            continue
        for line in _run("apt-cache", "depends", name, check=False).splitlines():
            kind, _, dependency = line.strip().partition(": ")
            if kind == "Depends" and re.match(real, dependency):
                return dependency
    hint = "dpkg --add-architecture amd64 && apt-get update" if foreign else "apt-get update"
    raise GuestError(f"apt knows no package {' or '.join(candidates)}; as root: {hint}")


def download(name: str, directory: Path) -> Path:
    """Fetch a package into `directory`.

    Raises:
        GuestError: apt could not.
    """
    # The sandbox user of apt may not be allowed into the directory; only root has one.
    _run("apt-get", "--quiet", "-o", "APT::Sandbox::User=root", "download", name, cwd=directory)
    packages = list(directory.glob("*.deb"))
    if len(packages) != 1:
        raise GuestError(f"apt-get download {name} left {len(packages)} packages, not one")
    return packages[0]


def extract(package: Path, member: str) -> bytes:
    """The one file of a package whose name matches `member`.

    Raises:
        GuestError: it has no such file, or it is damaged.
    """
    with subprocess.Popen(
        ["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE
    ) as process:
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                for info in archive:
                    if info.isfile() and re.fullmatch(member, info.name):
                        file = archive.extractfile(info)
                        assert file is not None
                        return file.read(_MEMBER_LIMIT)
        except (tarfile.TarError, EOFError) as error:
            raise GuestError(f"{package.name} is damaged: {error}") from error
        finally:
            process.kill()
    raise GuestError(f"{package.name} has no file like {member}")


def initramfs(busybox: bytes) -> bytes:
    """The compressed root file system around a static busybox; same input, same bytes."""
    archive = cpio.pack(
        (
            *(cpio.directory(name) for name in ("bin", "dev", "etc", "proc", "root", "sys", "tmp")),
            # The kernel opens it for process 1, before anything is mounted on /dev.
            cpio.character_device("dev/console", 5, 1),
            cpio.program("bin/busybox", busybox),
            cpio.symlink("bin/sh", "busybox"),
            cpio.program("init", INIT.encode()),
        )
    )
    return gzip.compress(archive, 9, mtime=0)


def _run(*command: str, check: bool = True, cwd: Path | None = None) -> str:
    """What a command prints, in the C locale."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if check and done.returncode:
        reason = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise GuestError(f"{' '.join(command)}: {reason[-1]}")
    return done.stdout if done.returncode == 0 else ""


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _write(path: Path, data: bytes) -> None:
    """All of it or nothing."""
    with tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


if __name__ == "__main__":
    sys.exit(main())
