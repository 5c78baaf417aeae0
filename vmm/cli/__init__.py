"""The command line: a thin layer over `vmm.machine.Machine`.

Imports are inside the commands, so that ``--help`` and errors of usage come at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from vmm.cli import options

EXIT_STATUSES = """\
exit status:
  odd   the guest's own: it wrote V to the debug-exit port 0xf4; status is (V << 1 | 1) & 255
  0     the guest finished (HLT with interrupts off), or the user quit
  2     wrong usage, configuration, image or snapshot
  4     the guest crashed (triple fault)
  6     a device process died, hung or broke the protocol
  8     --timeout ran out
  10    this host cannot provide the jail that was asked for
  130   Ctrl-C"""


class _Parser(argparse.ArgumentParser):
    """Errors in one line that says where help is."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(
        prog="python -m vmm",
        description="A small virtual machine monitor: x86 guests on the Unicorn CPU emulator, "
        "every device in a jailed process of its own. No KVM, no root.",
        epilog=EXIT_STATUSES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, parser_class=_Parser
    )
    options.add_boot(commands)
    options.add_restore(commands)
    options.add_guests(commands)
    options.add_jail(commands)
    options.add_demo(commands)
    options.add_bench(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status of the process."""
    from devices.errors import DeviceError, UserError

    parser = build_parser()
    args = parser.parse_args(arguments)
    try:
        return int(args.run(args))
    except UserError as error:
        return _fail(str(error), getattr(error, "exit_status", 2))
    except DeviceError as error:
        return _fail(str(error), 6)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output has gone; say nothing more, not even at interpreter exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except MemoryError:
        return _fail("this host has not enough memory for that", 2)


def _fail(message: str, status: int) -> int:
    print(f"vmm: {' '.join(message.splitlines())}", file=sys.stderr)
    return status
