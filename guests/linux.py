"""``python -m guests.linux DIR``: a Linux kernel and a small root file system, ready to boot.

Both come from the packages of a Debian or Ubuntu system: the kernel as it is, its modules for the
devices of this project, and busybox, around which an initramfs is built here; ``--with PACKAGE``
adds other programs. Nothing is installed and root is not needed.

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
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from guests import cpio, modules, packages
from guests.packages import GuestError

KERNEL_PACKAGES = ("linux-image-cloud-amd64", "linux-image-virtual", "linux-image-amd64")
"""Tried in this order: Debian's kernel for virtual machines, Ubuntu's, Debian's for anything."""

BUSYBOX_PACKAGES = ("busybox-static",)

KERNEL, INITRAMFS, RECORD = "vmlinuz", "initramfs.cpio.gz", "linux-guest.json"
READY = "linux-guest: ready"
"""The line that `INIT` prints before the first prompt."""

MODULES = (
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtio_console",
    "virtio_rng",
    "virtio_balloon",
    "virtiofs",
    "9p",
    "9pnet_virtio",
    "vmw_vsock_virtio_transport",
    "pvpanic_pci",
    "ata_piix",
    "ata_generic",
    "sd_mod",
)
"""Kernel modules that the initramfs has, if the kernel does; what a guest's devices need of them
is loaded at boot."""

RECIPE = 5
"""Counts changes to what this module builds; files of another recipe are built anew."""

INIT = f"""\
#!/bin/sh
export PATH=/usr/bin:/usr/sbin:/bin:/sbin HOME=/root PS1='\\w # '
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
if [ -d /lib/modules ]; then
    echo /bin/modprobe >/proc/sys/kernel/modprobe
    # Drivers for what is there; once more for the devices behind a bus that a driver brought.
    for round in 1 2; do
        modprobe -qab $(find /sys/devices -name modalias -exec sort -u {{}} +) 2>/dev/null
    done
fi
mode=ro root= rootfstype= rootflags= init=/sbin/init
for word in $(cat /proc/cmdline); do
    case $word in
    ro|rw) mode=$word ;;
    root=*|rootfstype=*|rootflags=*|init=*) export "$word" ;;
    esac
done
if [ "$root" ]; then
    case $root in *=*) root=$(findfs "$root") ;; esac
    # Drivers find disks in their own time.
    for try in 1 2 3 4 5 6 7 8 9 10; do
        [ -b "$root" ] && break
        sleep 0.5
    done
    mkdir /root-disk
    flags=$mode${{rootflags:+,$rootflags}}
    if mount -o "$flags" ${{rootfstype:+-t "$rootfstype"}} "$root" /root-disk; then
        umount /proc /sys
        mount -o move /dev /root-disk/dev
        exec switch_root /root-disk "$init"
    fi
    echo "linux-guest: no root file system on $root"
fi
echo '{READY}'
# An init of its own starts the shell: what this one starts beside itself ignores Ctrl-C for ever.
mkdir -p /etc
echo "::respawn:env HOME=$HOME PATH=$PATH cttyhack sh" >/etc/inittab
exec init
"""

DHCP_SCRIPT = """\
#!/bin/sh
# udhcpc tells here what it has learned.
case "$1" in
deconfig)
    ip addr flush dev "$interface"
    ip link set "$interface" up
    ;;
bound | renew)
    ip addr replace "$ip/$mask" dev "$interface"
    for gateway in $router; do
        ip route replace default via "$gateway" dev "$interface"
    done
    for server in $dns; do
        echo "nameserver $server"
    done >/etc/resolv.conf
    ;;
esac
"""

_KERNEL_FILES = rf"boot/vmlinuz-.*|{modules.PATH}"


@dataclass(frozen=True)
class Order:
    """What the user asks for.

    Attributes:
        kernel: the kernel's package; None looks for a known one.
        modules: kernel modules; those that they depend on come by themselves.
        packages: more packages for the initramfs; the libraries that they need come by themselves.
    """

    kernel: str | None = None
    modules: Sequence[str] = MODULES
    packages: Sequence[str] = ()


@dataclass
class Record:
    """What is in the directory.

    Attributes:
        recipe: `RECIPE` of the version that built it.
        order: what was asked for.
        packages: package -> version.
        files: file -> SHA-256 of its contents.
    """

    recipe: int
    order: dict[str, Any]
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
    parser.add_argument(
        "--with",
        dest="packages",
        metavar="PACKAGE",
        action="append",
        default=[],
        help="add the files of this package and the libraries that it needs (repeatable)",
    )
    parser.add_argument(
        "--module",
        dest="modules",
        metavar="NAME",
        action="append",
        default=[],
        help="add this kernel module, with those that it depends on, to the usual ones: "
        f"{', '.join(MODULES)} (repeatable)",
    )
    parser.add_argument("--quiet", action="store_true", help="print only errors")
    args = parser.parse_args(arguments)

    def say(text: str) -> None:
        if not args.quiet:
            print(text, flush=True)

    order = Order(args.kernel, [*MODULES, *args.modules], args.packages)
    try:
        if not args.update and is_complete(args.directory, order):
            say(f"{args.directory}: complete already (--update looks for newer packages)")
        else:
            prepare(args.directory, order, say)
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


def is_complete(directory: Path, order: Order | None = None) -> bool:
    """Whether `directory` holds what this version builds for `order`, unchanged since."""
    try:
        record = Record(**json.loads((directory / RECORD).read_bytes()))
        return (
            record.recipe == RECIPE
            and record.order == json.loads(json.dumps(asdict(order or Order())))
            and record.files.keys() == {KERNEL, INITRAMFS}
            and all(_digest((directory / n).read_bytes()) == d for n, d in record.files.items())
        )
    except (OSError, ValueError, TypeError, AttributeError):
        return False


def prepare(directory: Path, order: Order, say: Callable[[str], None]) -> None:
    """Download the packages and write the files.

    Args:
        say: takes lines about the progress.

    Raises:
        GuestError: there is no apt here, no such package, or no network.
        OSError: `directory` cannot be written.
    """
    packages.check_tools()
    kernel = packages.find(
        (order.kernel,) if order.kernel else KERNEL_PACKAGES, r"linux-image-(unsigned-)?\d"
    )
    busybox = packages.find(BUSYBOX_PACKAGES, r"busybox-static")
    added = dict.fromkeys(packages.find((name,), re.escape(name)) for name in order.packages)
    libraries = dict.fromkeys(each for name in added for each in packages.libraries(name))
    directory.mkdir(parents=True, exist_ok=True)
    versions: dict[str, str] = {}

    @contextmanager
    def fetched(name: str) -> Iterator[packages.Package]:
        say(f"downloading {name}")
        with packages.work_directory(directory) as work:
            package = packages.download(name, Path(work))
            versions[name] = package.version
            yield package

    with fetched(kernel) as package:
        members = {info.name: data for info, data in package.members(_KERNEL_FILES)}
    images = [data for name, data in members.items() if name.startswith("boot/")]
    if not images:
        raise GuestError(f"{kernel} has no file like boot/vmlinuz-*")
    # Ubuntu has the modules in a package of their own.
    for name in packages.depends(kernel) if len(members) == 1 and order.modules else ():
        if name.startswith("linux-modules-"):
            with fetched(name) as package:
                members |= {info.name: data for info, data in package.members(modules.PATH)}
    with fetched(busybox) as package:
        programs = [data for _, data in package.members(r"(usr/)?bin/busybox")]
    if not programs:
        raise GuestError(f"{busybox} has no file like bin/busybox")
    chosen, missing = modules.select(members, order.modules)
    if missing and chosen:
        say(f"no modules of this kernel: {', '.join(missing)}")
    extras = modules.entries(chosen)
    for name in (*libraries, *(each for each in added if each not in libraries)):
        with fetched(name) as package:
            extras += package.entries(libraries_only=name not in added)
    say(f"building {INITRAMFS}")
    files = {KERNEL: images[0], INITRAMFS: initramfs(programs[0], extras)}
    for file, data in files.items():
        _write(directory / file, data)
        say(f"{directory / file}: {len(data) / 1e6:.1f} MB")
    digests = {file: _digest(data) for file, data in files.items()}
    record = Record(RECIPE, asdict(order), versions, digests)
    _write(directory / RECORD, json.dumps(asdict(record), indent=2).encode() + b"\n")


def initramfs(busybox: bytes, extras: Iterable[cpio.Entry] = ()) -> bytes:
    """The compressed root file system around a static busybox; same input, same bytes.

    Args:
        extras: more files; of two with one name the first counts.
    """
    entries = [
        *(cpio.directory(name) for name in ("bin", "dev", "etc", "proc", "root", "sys", "tmp")),
        # The kernel opens it for process 1, before anything is mounted on /dev.
        cpio.character_device("dev/console", 5, 1),
        cpio.program("bin/busybox", busybox),
        cpio.symlink("bin/sh", "busybox"),
        cpio.program("init", INIT.encode()),
        cpio.directory("etc/udhcpc"),
        cpio.program("etc/udhcpc/default.script", DHCP_SCRIPT.encode()),
    ]
    there = {entry.name for entry in entries}
    for entry in extras:
        for parent in reversed(PurePosixPath(entry.name).parents):
            if str(parent) not in (".", *there):
                there.add(str(parent))
                entries.append(cpio.directory(str(parent)))
        if entry.name not in there:
            there.add(entry.name)
            entries.append(entry)
    return gzip.compress(cpio.pack(entries), 9, mtime=0)


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
