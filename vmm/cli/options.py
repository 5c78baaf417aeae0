"""What each command takes; what it does is imported when it runs."""

from __future__ import annotations

import argparse
import contextlib
from typing import Any

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


LONGEST_DEADLINE = 3600


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        value = float(text)
        if 0 < value < float("inf"):
            return value
    raise argparse.ArgumentTypeError(f"'{text}' is not a number of seconds above zero")


def _deadline(text: str) -> float:
    value = _seconds(text)
    if value > LONGEST_DEADLINE:
        raise argparse.ArgumentTypeError(f"'{text}' is more than {LONGEST_DEADLINE} seconds")
    return value


def _size(text: str) -> str:
    from devices.errors import UserError
    from vmm.config import parse_size

    try:
        parse_size(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _integer(text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number") from None


def _name(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("its name is empty")
    return text


def add_boot(commands: Any) -> None:
    parser = commands.add_parser(
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
        "--mem",
        metavar="SIZE",
        type=_size,
        default="128M",
        help="RAM, for example 64M or 1G (default: 128M)",
    )
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
    image.add_argument(
        "--device",
        metavar="MODEL[,OPTION=VALUE]...",
        action="append",
        default=[],
        help="one more device; every model takes name=, addr=, irq=, slot=, isolation=jail|none, "
        "dma=shared|granted",
    )
    image.add_argument(
        "--disk",
        metavar="FILE[,OPTION=VALUE]...",
        action="append",
        default=[],
        help="a disk, a raw image or block device: if=virtio|ide (default: virtio), readonly, "
        "serial=TEXT; with virtio also queues=N, direct, name=, slot=, isolation=jail|none, "
        "dma=shared|granted; may be repeated",
    )
    image.add_argument(
        "--net",
        metavar="LINK[,OPTION=VALUE]...",
        action="append",
        default=[],
        help="a network card: user (no privileges needed; forward=tcp:8080:80 lets port 8080 of "
        "this host lead to the guest's 80), pair:NAME (a cable to another machine), tap:NAME, "
        "none; mac=, name=, slot=, isolation=jail|none, dma=shared|granted; may be repeated "
        "(default: none)",
    )
    image.add_argument(
        "--no-default-devices",
        action="store_true",
        help="only what --device names (and the debug-exit port)",
    )
    _add_run_options(parser)
    parser.set_defaults(run=_boot, parser=parser, places=None)


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
    _add_run_options(parser)
    parser.set_defaults(run=_restore)


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    run = parser.add_argument_group("running")
    run.add_argument(
        "--serial",
        metavar="WHERE",
        default="stdio",
        help="the guest's serial port: stdio, file:PATH or none (default: stdio)",
    )
    run.add_argument("--timeout", metavar="SECONDS", type=_seconds, help="end the run after that")
    run.add_argument(
        "--snapshot",
        metavar="DIR",
        help="where --snapshot-at and the escape menu write a snapshot (default: vmm-snapshot)",
    )
    run.add_argument(
        "--snapshot-at",
        metavar="WHEN",
        type=str,  # in a machine file also a number
        help="take one snapshot: after SECONDS, at 'end', or when the guest prints this text "
        "(text:... if it looks like one of the others)",
    )
    run.add_argument(
        "--snapshot-then",
        choices=("continue", "quit"),
        default="continue",
        help="what the run does after --snapshot-at (default: continue)",
    )
    run.add_argument(
        "--snapshot-disks",
        choices=("copy", "none"),
        default="copy",
        help="whether a snapshot has the content of disks that the guest can write, or only says "
        "which they are (default: copy)",
    )
    run.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object at the end, with the guest's output in it, and nothing else",
    )
    run.add_argument(
        "--debug-console",
        metavar="WHERE",
        default="none",
        help="ports 0xe9 and 0x402: stderr, file:PATH or none (default: none)",
    )
    run.add_argument("--screen", action="store_true", help="at the end, show the text screen")
    run.add_argument(
        "--screen-live",
        action="store_true",
        help="draw the text screen on the terminal while it changes; elsewhere, tell what changed",
    )
    run.add_argument(
        "--trace",
        choices=("unclaimed",),
        help="at the end, list the ports, addresses and MSRs that nobody answered",
    )
    run.add_argument(
        "--symbols", metavar="FILE", help="names for crash reports: an ELF file or a System.map"
    )
    run.add_argument(
        "--stats", action="store_true", help="at the end, say where time and accesses went"
    )
    host = parser.add_argument_group("device processes")
    host.add_argument(
        "--jail",
        choices=("auto", "strict", "off"),
        default="auto",
        help="auto: every layer this host permits; strict: all or nothing; off: none, for "
        "debugging (default: auto)",
    )
    host.add_argument(
        "--on-failure",
        choices=("stop", "isolate"),
        default="stop",
        help="when a device process fails: end the run, or go on without it (default: stop)",
    )
    host.add_argument(
        "--deadline",
        metavar="SECONDS",
        type=_deadline,
        default=5.0,
        help="how long a device process may take to answer (default: 5, at most 3600)",
    )
    host.add_argument(
        "--lane",
        choices=("auto", "socket"),
        default="auto",
        help="socket: never use shared memory for register accesses (default: auto)",
    )


def add_guests(commands: Any) -> None:
    parser = commands.add_parser("guests", help="list the built-in guests")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=_guests)


def add_devices(commands: Any) -> None:
    parser = commands.add_parser("devices", help="list the device models and their options")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=_devices)


def add_jail(commands: Any) -> None:
    parser = commands.add_parser(
        "jail",
        help="show what jail each device gets on this host",
        description="Starts each default device in its jail and prints what was enforced, layer "
        "by layer, as verified from inside the device's process; then what each device has: "
        "descriptors, system calls, guest memory, limits, namespaces.",
    )
    parser.add_argument("--jail", choices=("auto", "strict", "off"), default="auto")
    parser.add_argument(
        "--device", metavar="MODEL[,OPTION=VALUE]...", action="append", default=[], help="also this"
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=_jail)


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
