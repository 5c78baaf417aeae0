"""Groups of options that several commands have in common."""

from __future__ import annotations

import argparse
import contextlib
from typing import Any

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


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """What the machine is made of: see `vmm.cli.shape.machine_config`."""
    machine = parser.add_argument_group("the machine")
    machine.add_argument(
        "--mem",
        metavar="SIZE",
        type=_size,
        default="128M",
        help="RAM, for example 64M or 1G (default: 128M)",
    )
    machine.add_argument(
        "--device",
        metavar="MODEL[,OPTION=VALUE]...",
        action="append",
        default=[],
        help="one more device; every model takes name=, addr=, irq=, slot=, isolation=jail|none, "
        "dma=shared|granted (see 'devices'; what is true or false may stand without a value)",
    )
    machine.add_argument(
        "--disk",
        metavar="FILE[,OPTION=VALUE]...",
        action="append",
        default=[],
        help="a disk, a raw image or block device: if=virtio|ide (default: virtio), readonly, "
        "serial=TEXT; with virtio also queues=N, direct, name=, slot=, isolation=jail|none, "
        "dma=shared|granted; may be repeated",
    )
    machine.add_argument(
        "--net",
        metavar="LINK[,OPTION=VALUE]...",
        action="append",
        default=[],
        help="a network card: user (no privileges needed; forward=tcp:8080:80 lets port 8080 of "
        "this host lead to the guest's 80), pair:NAME (a cable to another machine), tap:NAME, "
        "none; mac=, name=, slot=, isolation=jail|none, dma=shared|granted; may be repeated "
        "(default: none)",
    )
    machine.add_argument(
        "--no-default-devices",
        action="store_true",
        help="only what --device, --disk and --net name (and the debug-exit port)",
    )


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """How a machine runs: see `vmm.cli.session`."""
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
    add_jail_mode(host)
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


def add_jail_mode(parser: Any) -> None:
    """``--jail``."""
    parser.add_argument(
        "--jail",
        choices=("auto", "strict", "off"),
        default="auto",
        help="auto: every layer this host permits; strict: all or nothing; off: none, for "
        "debugging (default: auto)",
    )
