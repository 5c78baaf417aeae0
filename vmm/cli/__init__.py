"""The command line: a thin layer over `vmm.machine.Machine`.

Imports are inside the commands, so that ``--help`` and errors of usage come at once.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from vmm.cli import options
from vmm.cli.output import clean
from vmm.interrupt import early_signals

EXIT_STATUSES = """\
exit status:
  odd   the guest's own: it wrote V to the debug-exit port 0xf4; status is (V << 1 | 1) & 255
  0     the guest finished (HLT with interrupts off) or switched itself off, the user quit, or
        whoever read the output has gone
  2     wrong usage, configuration, image or snapshot
  4     the guest crashed (triple fault)
  6     a device process died, hung or broke the protocol
  8     --timeout ran out
  10    this host cannot provide the jail that was asked for
  12    the guest asked for a reset
  14    the guest's kernel panicked, as pvpanic was told
  130   Ctrl-C, SIGTERM, SIGHUP"""


class _Parser(argparse.ArgumentParser):
    """Errors in one line that says where help is."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {clean(message)} (see {self.prog} --help)\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """A command knows all that follows it: what is left over is its error, not its parent's."""
        found, left = super().parse_known_args(args, namespace)
        if left:
            self.error(f"unrecognized arguments: {' '.join(left)}")
        return found, left


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
    boot = options.add_boot(commands)
    options.add_restore(commands)
    options.add_guests(commands)
    options.add_devices(commands)
    options.add_jail(commands, boot)
    options.add_demo(commands)
    options.add_bench(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status of the process."""
    _fill_standard_descriptors()
    try:
        with early_signals():
            status = _run(arguments)
            sys.stdout.flush()
            return status
    except KeyboardInterrupt:
        _forget_output()
        return 130
    except BrokenPipeError:
        status = 0  # whoever read our output has gone: nothing more is said
    except OSError as error:
        about = "" if error.filename is None else f"{error.filename}: "
        status = _fail(f"{about}{error.strerror or error}", 2)
    except MemoryError:
        status = _fail("this host has not enough memory for that", 2)
    try:
        sys.stdout.flush()
    except (OSError, KeyboardInterrupt):
        _forget_output()
    return status


def _run(arguments: Sequence[str] | None) -> int:
    from devices.errors import DeviceError, UserError

    parser = build_parser()
    try:
        args = parser.parse_args(arguments)
        if getattr(args, "config", None) is None:
            return int(args.run(args))
        from vmm.cli.given import Places
        from vmm.cli.machine_file import read_defaults

        places = Places()
        found = read_defaults(args.config, args.whole, places)
        taken = {dest: found[dest] for dest in found if dest in args.takes}
        args.parser.set_defaults(places=places, **taken)
        args = parser.parse_args(arguments)
        places.drop_overridden(vars(args))
        return int(args.run(args))
    except SystemExit as end:
        sys.stdout.flush()
        return int(end.code or 0)
    except UserError as error:
        return _fail(str(error), getattr(error, "exit_status", 2))
    except DeviceError as error:
        return _fail(str(error), 6)


def _fail(message: str, status: int) -> int:
    with contextlib.suppress(OSError, ValueError):
        print(f"vmm: {clean(' '.join(message.splitlines()))}", file=sys.stderr, flush=True)
    return status


def _fill_standard_descriptors() -> None:
    """Open /dev/null where standard input, output or error is closed.

    Otherwise the next descriptor of the machine gets that number, and the guest's output goes into
    it.
    """
    with contextlib.suppress(OSError):
        while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
            os.set_inheritable(fd, True)
        os.close(fd)
    if sys.stdout is None:
        sys.stdout = _text_output(1)
    if sys.stderr is None:
        sys.stderr = _text_output(2)


def _text_output(fd: int) -> io.TextIOWrapper:
    raw = io.FileIO(fd, "w", closefd=False)
    return io.TextIOWrapper(io.BufferedWriter(raw), "utf-8", "backslashreplace")


def _forget_output() -> None:
    """What was printed and could not be written must not be tried again when Python ends."""
    with contextlib.suppress(OSError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
