"""What each command takes; what it does is imported when it runs."""

from __future__ import annotations

import argparse
from typing import Any

from vmm.cli.groups import add_jail_mode, add_machine_options, add_run_options

_RAW = argparse.RawDescriptionHelpFormatter

BOOT_EXAMPLES = """\
the image is a Linux kernel (bzImage or vmlinux), a Multiboot 1 kernel, an ELF executable (32 or 64
bits), a boot sector, a flat binary, or the name of a built-in guest (python -m vmm guests); without
one the built-in default guest boots.

on a terminal, Ctrl-A h shows the escape menu: quit, suspend, snapshot, status,
the size of a balloon.

examples:
  python -m vmm boot
  python -m vmm boot vmlinuz --initrd initramfs.cpio.gz --append console=ttyS0 --mem 256M
  python -m vmm boot code.bin --load-addr 0x7000 --mode 64 --timeout 10
  python -m vmm boot counter --snapshot snap --snapshot-at "count 100"
  python -m vmm boot guest.bin --device echo,addr=0xF00,name=second
  python -m vmm boot vmlinuz --initrd initramfs.cpio.gz --disk root.img --append root=/dev/vda
  python -m vmm boot --firmware bios.bin --disk disk.img,if=ide
  python -m vmm boot --config machine.toml
"""

JAIL_DESCRIPTION = """\
Starts the devices that boot would start with the same options, each in its jail, and prints what
was enforced, layer by layer, as verified from inside the device's process; then what each device
has: descriptors, system calls, guest memory, limits, namespaces. No guest runs, but files, sockets
and networks of this host are opened as for one.
"""
JAIL_EXAMPLES = """\
examples:
  python -m vmm jail
  python -m vmm jail --disk root.img --net user --device rng,dma=granted
  python -m vmm jail --config machine.toml --json
"""
JAIL_TAKES = ("mem", "clock", "device", "disk", "net", "no_default_devices", "jail")
"""Options of a machine file that count there; the others say how a guest runs."""


def _integer(text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number") from None


def _name(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("its name is empty")
    return text


def add_boot(commands: Any) -> argparse.ArgumentParser:
    """The parser is that of the options which have a place in a machine file."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "boot", help="boot a guest", epilog=BOOT_EXAMPLES, formatter_class=_RAW
    )
    parser.add_argument("image", nargs="?", help="file or built-in guest (default: 'default')")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="a TOML file in which each of these options has a place, devices as [[device]]; "
        "what stands here wins over it",
    )
    image = parser.add_argument_group("the guest")
    image.add_argument(
        "--load-addr",
        metavar="ADDR",
        type=_integer,
        help="where a flat binary is loaded and starts (default: 0x100000)",
    )
    image.add_argument(
        "--mode",
        type=int,
        choices=(16, 32, 64),
        help="CPU mode of a flat binary: real, 32-bit protected or 64-bit long mode (default: 32)",
    )
    image.add_argument("--append", metavar="TEXT", default="", help="the kernel's command line")
    image.add_argument("--initrd", metavar="FILE", help="initial RAM disk (Linux)")
    image.add_argument(
        "--kernel-entry",
        choices=("auto", "vmlinux", "bzimage", "bzimage32", "pvh"),
        default="auto",
        help="how a Linux kernel is entered (default: auto, the fastest that will do)",
    )
    image.add_argument(
        "--firmware", metavar="ROM", help="start a firmware ROM (SeaBIOS) instead of an image"
    )
    image.add_argument(
        "--clock",
        choices=("real", "virtual"),
        default="real",
        help="virtual: time follows the executed code, and the same start gives the same run",
    )
    image.add_argument(
        "--module",
        metavar="FILE[,TEXT]",
        action="append",
        default=[],
        help="a Multiboot module and the text that names it; may be repeated",
    )
    add_machine_options(parser)
    add_run_options(parser)
    takes = [action.dest for action in parser._actions]
    parser.set_defaults(run=_boot, parser=parser, whole=parser, takes=takes, places=None)
    return parser


def add_restore(commands: Any) -> None:
    parser = commands.add_parser(
        "restore",
        help="go on from a snapshot, in this process and with newly forked devices",
        description="Continues a guest where its snapshot was taken.",
    )
    parser.add_argument("directory", type=_name, help="the snapshot")
    parser.add_argument(
        "--allow-model",
        metavar="MODULE:CLASS",
        action="append",
        default=[],
        help="a device model that is not vmm's own and whose code may be run; may be repeated",
    )
    parser.add_argument(
        "--disks",
        choices=("private", "original"),
        default="private",
        help="private: on copies of the disks as they were, which end with the run; original: go "
        "on with the files themselves, if nobody wrote to them since (default: private)",
    )
    parser.add_argument(
        "--device",
        metavar="NAME,OPTION=VALUE[,...]",
        action="append",
        default=[],
        help="another place on this host for the device of this name, beside a machine that has "
        "the old one: path= of a vsock or 9p, link= and forward= of a network card, log= of a "
        "console; path= of a disk whose file has moved (with --disks original); may be repeated",
    )
    add_run_options(parser)
    parser.set_defaults(run=_restore)


def add_guests(commands: Any) -> None:
    parser = commands.add_parser("guests", help="list the built-in guests")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=_guests)


def add_devices(commands: Any) -> None:
    parser = commands.add_parser("devices", help="list the device models and their options")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=_devices)


def add_jail(commands: Any, boot: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "jail",
        help="show what jail each device gets on this host",
        description=JAIL_DESCRIPTION,
        epilog=JAIL_EXAMPLES,
        formatter_class=_RAW,
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="a TOML file as for boot, of which the machine and its jail count; what stands here "
        "wins over it",
    )
    add_jail_mode(parser)
    parser.add_argument("--json", action="store_true", help="as JSON")
    add_machine_options(parser)
    parser.set_defaults(run=_jail, parser=parser, whole=boot, takes=JAIL_TAKES, places=None)
    parser.set_defaults(clock="real")


def add_demo(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="device isolation, crash and suspend as lessons",
        description="Without a name, lists the demos.",
    )
    parser.add_argument("name", nargs="?", help="isolation, crash or suspend")
    parser.add_argument("--json", action="store_true", help="what was shown, as JSON")
    parser.set_defaults(run=_demo)


def add_bench(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure accesses, CPU speed, disk requests, device start and snapshots",
        description="Every figure is the median of several rounds in one run; ratios compare "
        "figures of that run, since hosts are noisy.",
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.add_argument("--quick", action="store_true", help="a tenth of the rounds")
    parser.add_argument(
        "--linux",
        metavar="DIR",
        help="also Linux from there (see python -m guests.linux), beside QEMU if it is installed",
    )
    parser.set_defaults(run=_bench)


def _boot(args: argparse.Namespace) -> int:
    from vmm.cli.run import boot

    return boot(args)


def _restore(args: argparse.Namespace) -> int:
    from vmm.cli.run import restore

    return restore(args)


def _guests(args: argparse.Namespace) -> int:
    from vmm.cli.lists import guests

    return guests(args)


def _devices(args: argparse.Namespace) -> int:
    from vmm.cli.lists import devices

    return devices(args)


def _jail(args: argparse.Namespace) -> int:
    from vmm.cli.lists import jail

    return jail(args)


def _demo(args: argparse.Namespace) -> int:
    from vmm.demo import run

    return run(args)


def _bench(args: argparse.Namespace) -> int:
    from vmm.cli.bench import run

    return run(args)
