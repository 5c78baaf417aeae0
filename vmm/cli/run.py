"""``boot`` and ``restore``: a machine, a terminal, and how they end."""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

from devices.errors import DeviceError, UserError
from proxy.jail import JailMode
from vmm.boot import firmware
from vmm.boot.options import BootOptions, KernelEntry, Mode, Module
from vmm.cli.aids import UnclaimedTrace, read_symbols
from vmm.config import (
    ClockKind,
    FailurePolicy,
    HostOptions,
    MachineConfig,
    debug_exit,
    default_devices,
    parse_device,
    parse_size,
)
from vmm.machine import Machine
from vmm.outcome import Ending, Outcome
from vmm.pc import DEBUG_CONSOLE
from vmm.terminal import Terminal

DEFAULT_GUEST = "default"
DEFAULT_SNAPSHOT = "vmm-snapshot"


def boot(args: argparse.Namespace) -> int:
    """``python -m vmm boot``."""
    plan = SnapshotPlan.parse(args)
    rom = b"" if args.firmware is None else _read_file(args.firmware, "firmware")
    if args.firmware is not None:
        firmware.check(rom)
        if args.image is not None:
            raise UserError("--firmware starts by itself: give no image")
    image, name = _read_image(args.image)
    options = BootOptions(
        load_addr=args.load_addr,
        mode=None if args.mode is None else Mode(args.mode),
        cmdline=args.append,
        modules=tuple(_read_module(text) for text in args.module),
        name=name,
        initrd=None if args.initrd is None else _read_module(args.initrd),
        kernel_entry=KernelEntry(args.kernel_entry),
    )
    devices = [debug_exit()] if args.no_default_devices else list(default_devices())
    for text in args.device:
        devices.append(parse_device(text, [device.name for device in devices]))
    config = MachineConfig(parse_size(args.mem), tuple(devices), ClockKind(args.clock), len(rom))
    with Machine(config, host=_host_options(args)) as machine:
        if rom:
            machine.boot_firmware(rom, args.firmware)
        elif isinstance(image, str):
            machine.boot(image, _unless_default(options, name))
        else:
            machine.boot(image, options)
        return Session(machine, args, plan).run()


def restore(args: argparse.Namespace) -> int:
    """``python -m vmm restore``."""
    plan = SnapshotPlan.parse(args)
    with Machine.restore(args.directory, host=_host_options(args)) as machine:
        return Session(machine, args, plan).run()


def _unless_default(options: BootOptions, name: str) -> BootOptions | None:
    return None if options == BootOptions(name=name) else options


def _host_options(args: argparse.Namespace) -> HostOptions:
    return HostOptions(
        jail=JailMode(args.jail),
        deadline=args.deadline,
        on_failure=FailurePolicy(args.on_failure),
        fast_lane=args.lane == "auto",
    )


def _read_image(image: str | None) -> tuple[str | bytes, str]:
    import guests

    if image is None:
        return DEFAULT_GUEST, DEFAULT_GUEST
    if not os.path.exists(image) and image in guests.GUESTS:
        return image, image
    return _read_file(image, "image"), image


def _read_file(path: str, what: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{what} {path}: {error.strerror}") from error


def _read_module(text: str) -> Module:
    path, _, name = text.partition(",")
    return Module(_read_file(path, "module"), name or path)


class SnapshotPlan:
    """What ``--snapshot`` and ``--snapshot-at`` ask for."""

    def __init__(self, path: Path, when: str | float | None, text: bytes, quit_after: bool) -> None:
        self.path = path
        self.when = when
        """None, "end", "text" or seconds."""
        self.text = text
        self.quit_after = quit_after

    @classmethod
    def parse(cls, args: argparse.Namespace) -> SnapshotPlan:
        path = Path(args.snapshot or DEFAULT_SNAPSHOT)
        given = args.snapshot_at
        when: str | float | None = None
        text = b""
        if given is None:
            if args.snapshot is not None:
                when = None
        elif given == "end":
            when = "end"
        else:
            try:
                when = float(given.removesuffix("s"))
                if not 0 <= when < float("inf"):
                    raise UserError(f"--snapshot-at {given}: not a time that can come")
            except ValueError:
                when = "text"
                text = given.removeprefix("text:").encode()
                if not text:
                    raise UserError("--snapshot-at: the text to wait for is empty") from None
        return cls(path, when, text, args.snapshot_then == "quit")


class Session:
    """One run of a machine for the command line; also the `Controls` of the escape menu."""

    def __init__(self, machine: Machine, args: argparse.Namespace, plan: SnapshotPlan) -> None:
        self.machine = machine
        self.args = args
        self.plan = plan
        self._began = monotonic()
        self._snapshot_due = False
        self._snapshot_taken = False
        self._closers: list[Callable[[], None]] = []

    def run(self) -> int:
        """Run to the end; the exit status."""
        machine = self.machine
        parts = machine.parts
        if parts.jail_line and not self.args.json:
            self.say(parts.jail_line)
        parts.wiring.log_sink = None if self.args.json else self._log
        terminal = self._connect_serial()
        self._connect_debug_console()
        if args_symbols := self.args.symbols:
            parts.symbols = read_symbols(args_symbols, _read_file(args_symbols, "symbols"))
        trace = UnclaimedTrace(parts.buses) if self.args.trace else None
        if self.plan.when == "text":
            machine.console.watch(self.plan.text, self._want_snapshot)
        elif isinstance(self.plan.when, float):
            parts.events.call_at(monotonic() + self.plan.when, self._want_snapshot)
        if self.args.stats:
            for bus in parts.buses.values():
                bus.timed = True
        machine.between = lambda: self._between(terminal)
        try:
            if terminal is not None:
                terminal.open()
            outcome = machine.run(timeout=self.args.timeout)
            if self.plan.when == "end" and not self._snapshot_taken:
                self._take_snapshot()
        except KeyboardInterrupt:
            outcome = Outcome(Ending.QUIT, "interrupted")
            self._report(outcome, 130, {})
            return 130
        finally:
            if terminal is not None:
                terminal.close()
            for close in self._closers:
                close()
        status = outcome.status
        extras: dict[str, Any] = {}
        if self.args.screen:
            extras["screen"] = parts.board.screen_lines()
        if trace is not None:
            extras["unclaimed"] = trace.lines()
        self._report(outcome, status, extras)
        return status

    def say(self, text: str) -> None:
        """A line for the user, apart from the guest's output."""
        sys.stderr.write("".join(f"vmm: {line}\r\n" for line in text.splitlines()))
        sys.stderr.flush()

    # The serial port.

    def _connect_serial(self) -> Terminal | None:
        where = self.args.serial
        machine = self.machine
        if where == "none":
            return None
        if where.startswith("file:"):
            file = self._open(where.removeprefix("file:"), f"--serial {where}")
            machine.console.sink = lambda data: self._write(file, data)
            return None
        if where != "stdio":
            raise UserError(f"--serial {where}: give stdio, file:PATH or none")
        if not self.args.json:
            machine.console.sink = lambda data: self._write(1, data)
        return Terminal(
            machine.parts.events, machine.send, lambda: len(machine.console.pending), self, self.say
        )

    def _connect_debug_console(self) -> None:
        where = self.args.debug_console
        console = self.machine.parts.consoles[DEBUG_CONSOLE]
        if where == "stderr":
            console.sink = lambda data: self._write(2, data)
        elif where.startswith("file:"):
            file = self._open(where.removeprefix("file:"), f"--debug-console {where}")
            console.sink = lambda data: self._write(file, data)
        elif where != "none":
            raise UserError(f"--debug-console {where}: give stderr, file:PATH or none")

    def _open(self, path: str, what: str) -> int:
        """A file to write, closed at the end of the run."""
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UserError(f"{what}: {error.strerror}") from error
        self._closers.append(lambda: os.close(fd))
        return fd

    def _write(self, fd: int, data: bytes) -> None:
        """Pass output on; called in the middle of an access, so it must not raise."""
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(fd, view) :]
        except OSError as error:
            self.machine.console.sink = None
            gone = error.errno == errno.EPIPE
            self._failed = None if gone else UserError(f"the guest's output: {error.strerror}")
            self.machine.stop(Outcome(Ending.QUIT, "nobody reads the output any more"))

    def _between(self, terminal: Terminal | None) -> None:
        if terminal is not None:
            terminal.look()
        if self._snapshot_due:
            self._snapshot_due = False
            try:
                self._take_snapshot()
            except (UserError, DeviceError) as error:
                self.machine.stop(Outcome(Ending.QUIT, str(error)))
                self._failed = error
                return
            if self.plan.quit_after:
                self.machine.stop(Outcome(Ending.QUIT, f"snapshot written to {self.plan.path}"))

    _failed: UserError | DeviceError | None = None

    def _want_snapshot(self) -> None:
        self._snapshot_due = True
        self.machine.parts.request_attention()

    def _take_snapshot(self) -> None:
        self._snapshot_taken = True
        self.machine.snapshot(self.plan.path)
        if not self.args.json:
            self.say(f"snapshot written to {self.plan.path}")

    # The escape menu.

    def quit(self) -> None:
        self.machine.stop(Outcome(Ending.QUIT, "quit from the menu"))

    def toggle_suspend(self) -> str:
        if self.machine.suspended:
            self.machine.resume()
            return "resumed"
        self.machine.suspend()
        return "suspended; Ctrl-A s resumes"

    def write_snapshot(self) -> str:
        try:
            self.machine.snapshot(self.plan.path)
        except (UserError, DeviceError) as error:
            return f"no snapshot: {error}"
        return f"snapshot written to {self.plan.path}; python -m vmm restore {self.plan.path}"

    def status(self) -> str:
        from vmm.cli.stats import status_lines

        return "\n".join(status_lines(self.machine, monotonic() - self._began))

    # The end.

    def _log(self, name: str, text: str) -> None:
        self.say(f"{name}: {text}")

    def _report(self, outcome: Outcome, status: int, extras: dict[str, Any]) -> None:
        if self._failed is not None:
            raise self._failed
        statistics = None
        if self.args.stats:
            from vmm.cli.stats import stats_lines, stats_values

            statistics = stats_values(self.machine)
            if not self.args.json:
                for line in stats_lines(statistics):
                    self.say(line)
        if self.args.json:
            print(json.dumps(self._json(outcome, status, statistics) | extras))
            return
        for lines in extras.values():
            self.say("\n".join(lines))
        if outcome.ending not in (Ending.HALTED, Ending.GUEST_EXIT):
            self.say(f"{outcome.ending}{': ' if outcome.detail else ''}{outcome.detail}")
        if outcome.report:
            self.say(outcome.report)

    def _json(
        self, outcome: Outcome, status: int, statistics: dict[str, Any] | None
    ) -> dict[str, Any]:
        values = outcome.as_json() | {
            "status": status,
            "output": self.machine.output.decode("utf-8", "replace"),
            "report": outcome.report,
            "seconds": round(monotonic() - self._began, 6),
            "jail": self.machine.parts.jail_line,
            "snapshot": str(self.plan.path) if self._snapshot_taken else None,
            "log": [list(line) for line in self.machine.parts.wiring.log_lines],
        }
        return values if statistics is None else values | {"stats": statistics}
