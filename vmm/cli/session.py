"""One run of a machine for the command line: its terminal, its output, its snapshot, its end."""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from devices.errors import DeviceError, Subject, UserError, concerning
from vmm.cli.aids import UnclaimedTrace, read_symbols
from vmm.cli.files import read_file
from vmm.cli.output import Outputs, clean, disk_progress, open_output
from vmm.config import split_options
from vmm.machine import Machine
from vmm.outcome import Ending, Outcome
from vmm.pc import DEBUG_CONSOLE
from vmm.snapshot import check_place
from vmm.terminal import Terminal

if TYPE_CHECKING:
    from vmm.cli.screen import LiveScreen

DEFAULT_SNAPSHOT = "vmm-snapshot"
GRACE = 0.7
"""Seconds that the reader of the output has when the user wants the end."""


class SnapshotPlan:
    """What ``--snapshot`` and ``--snapshot-at`` ask for."""

    def __init__(
        self, path: Path, when: str | float | None, text: bytes, quit_after: bool, disks: str
    ) -> None:
        self.path = path
        self.disks = disks
        self.when = when
        """None, "end", "text" or seconds."""
        self.text = text
        self.quit_after = quit_after

    @classmethod
    def parse(cls, args: argparse.Namespace) -> SnapshotPlan:
        path = Path(args.snapshot or DEFAULT_SNAPSHOT)
        given = args.snapshot_at
        when: str | float | None = None
        text, at = b"", Subject("snapshot-at")
        if given is None:
            if args.snapshot_then == "quit":
                problem = "--snapshot-then quit: say when with --snapshot-at"
                raise UserError(problem, Subject("snapshot-then"))
        elif given == "end":
            when = "end"
        else:
            try:
                when = float(given.removesuffix("s"))
                if not 0 <= when < float("inf"):
                    raise UserError(f"--snapshot-at {given}: not a time that can come", at)
            except ValueError:
                when = "text"
                text = given.removeprefix("text:").encode("utf-8", "surrogateescape")
                if not text:
                    raise UserError("--snapshot-at: the text to wait for is empty", at) from None
        if when is not None or args.snapshot is not None:
            with concerning(Subject("snapshot")):
                check_place(path)
        return cls(path, when, text, args.snapshot_then == "quit", args.snapshot_disks)

    def missed(self) -> str:
        """Why there is no snapshot after a run that ended in order."""
        if self.when == "text":
            return "the guest did not print the text of --snapshot-at"
        return "the run ended before --snapshot-at"


class Session:
    """One run of a machine for the command line; also the `Controls` of the escape menu."""

    def __init__(self, machine: Machine, args: argparse.Namespace, plan: SnapshotPlan) -> None:
        self.machine = machine
        self.args = args
        self.plan = plan
        self.outputs = Outputs(machine.parts.events.interrupt)
        self._began = monotonic()
        self._snapshot_due = False
        self._snapshot_taken = False
        self._failed: UserError | DeviceError | None = None
        self._reader_gone = False
        self._hurry = False
        """The user wants the end: do not wait for a reader that stalls."""
        self._guest_fds: list[int] = []
        self._opened: list[int] = []

    def run(self) -> int:
        """Run to the end; the exit status.

        Raises:
            UserError: an option, or output that cannot be written.
            DeviceError: the snapshot that was asked for cannot be taken.
        """
        try:
            return self._run()
        finally:
            if self.outputs.drain(GRACE):
                for fd in self._opened:
                    os.close(fd)
            self.outputs.close()

    def _run(self) -> int:
        machine, parts = self.machine, self.machine.parts
        if not self.args.json:
            self.say("\n".join([parts.jail_line, *parts.host_files.notes]).strip())
        parts.wiring.log_sink = None if self.args.json else self._log
        terminal = self._connect_serial()
        self._connect_debug_console()
        if symbols := self.args.symbols:
            parts.symbols = read_symbols(symbols, read_file(symbols, "symbols"))
        trace = UnclaimedTrace(parts.spaces()) if self.args.trace else None
        if self.plan.when == "text":
            machine.console.watch(self.plan.text, self._want_snapshot)
        elif isinstance(self.plan.when, float):
            parts.events.call_at(monotonic() + self.plan.when, self._want_snapshot)
        if self.args.stats:
            for bus in parts.buses.values():
                bus.timed = True
        machine.between = lambda: self._between(terminal)
        extras: dict[str, Any] = {}
        live = None
        try:
            try:
                if terminal is not None:
                    terminal.open()
                live = self._live_screen()
                outcome = machine.run(timeout=self.args.timeout)
                if self.plan.when == "end" and not self._snapshot_taken:
                    self._take_snapshot()
            finally:
                if live is not None:
                    live.close()
                if terminal is not None:
                    terminal.close()
            if self.args.screen:
                extras["screen"] = parts.board.screen_lines()
            if trace is not None:
                extras["unclaimed"] = trace.lines()
            self._finish_output(outcome)
        except KeyboardInterrupt:
            outcome = Outcome(Ending.INTERRUPTED, "SIGINT")
            self._finish_output(outcome)
        self._report(outcome, extras)
        return outcome.status

    def _live_screen(self) -> LiveScreen | None:
        if not self.args.screen_live or self.args.json:
            return None
        from vmm.cli.screen import LiveScreen

        parts = self.machine.parts
        return LiveScreen(
            parts.events,
            parts.board.screen_lines,
            lambda text: self.outputs.write(2, text.encode("utf-8", "replace")),
            self.say,
        )

    def say(self, text: str) -> None:
        """Lines for the user, apart from the guest's output."""
        lines = "".join(f"vmm: {clean(line)}\r\n" for line in text.splitlines())
        self.outputs.write(2, lines.encode("utf-8", "replace"))

    # The serial port.

    def _connect_serial(self) -> Terminal | None:
        where = self.args.serial
        machine = self.machine
        if where == "none":
            return None
        if where.startswith("file:"):
            path = where.removeprefix("file:")
            machine.console.sink = self._sink(self._open(path, "serial"))
            return None
        if where != "stdio":
            raise UserError(f"--serial {where}: give stdio, file:PATH or none", Subject("serial"))
        if not self.args.json:
            machine.console.sink = self._sink(1)
        return Terminal(
            machine.parts.events,
            machine.send,
            lambda: len(machine.console.pending),
            self,
            self.say,
            resized=self._resized,
            echo=lambda data: self.outputs.write(2, data),
        )

    def _resized(self, columns: int, rows: int) -> None:
        with suppress(UserError):  # a serial port has no size
            name = self.machine.parts.console_name
            self.machine.adjust(name, columns=columns, rows=rows)

    def _connect_debug_console(self) -> None:
        where = self.args.debug_console
        console = self.machine.parts.consoles[DEBUG_CONSOLE]
        if where == "stderr":
            console.sink = self._sink(2)
        elif where.startswith("file:"):
            path = where.removeprefix("file:")
            console.sink = self._sink(self._open(path, "debug-console"))
        elif where != "none":
            problem = "give stderr, file:PATH or none"
            raise UserError(f"--debug-console {where}: {problem}", Subject("debug-console"))

    def _open(self, path: str, option: str) -> int:
        """A file to write, closed at the end of the run."""
        fd = open_output(path, option, self.machine.parts.host_files)
        self._opened.append(fd)
        return fd

    def _sink(self, fd: int) -> Callable[[bytes], None]:
        """Passes the guest's output on; called in the middle of an access, so it must not raise."""
        self._guest_fds.append(fd)
        outputs, pause = self.outputs, self.machine.parts.request_attention

        def sink(data: bytes) -> None:
            if outputs.write(fd, data):
                pause()

        return sink

    def _output_lost(self) -> bool:
        """Whether a place that the guest's output goes to takes no more; notes why."""
        for fd in self._guest_fds:
            error = self.outputs.failure(fd)
            if error is None:
                continue
            if error.errno == errno.EPIPE:
                self._reader_gone = True
            elif self._failed is None:
                self._failed = UserError(f"the guest's output: {error.strerror}")
            return True
        return False

    def _finish_output(self, outcome: Outcome) -> None:
        """Have the guest's output written, with patience unless the user wants the end."""
        patience = None
        if self._hurry or outcome.ending in (Ending.TIMEOUT, Ending.INTERRUPTED):
            patience = GRACE
        elif self.args.timeout is not None:
            patience = max(self._began + self.args.timeout - monotonic(), GRACE)
        self.outputs.drain(patience)
        self._output_lost()
        if left := self.outputs.pending() + self.outputs.lost():
            self.say(f"{left} bytes of output were dropped: nobody read them")

    # Between two slices of execution.

    def _between(self, terminal: Terminal | None) -> None:
        self._look(terminal)
        parts = self.machine.parts
        while self.outputs.full and not parts.vcpu.stopping:
            # The guest waits for the reader of its output; all else goes on.
            parts.events.poll(None, guest=False)
            self._look(terminal)

    def _look(self, terminal: Terminal | None) -> None:
        if terminal is not None:
            terminal.look()
        if self._output_lost():
            self.machine.stop(Outcome(Ending.QUIT, "nobody reads the output any more"))
        if self._snapshot_due:
            self._snapshot_due = False
            try:
                self._take_snapshot()
            except (UserError, DeviceError) as error:
                self._failed = error
                if self.plan.quit_after or isinstance(error, DeviceError):
                    self.machine.stop(Outcome(Ending.QUIT, str(error)))
                else:
                    self.say(f"no snapshot, the guest runs on: {error}")
                return
            if self.plan.quit_after:
                self.machine.stop(Outcome(Ending.QUIT, f"snapshot written to {self.plan.path}"))

    def _want_snapshot(self) -> None:
        self._snapshot_due = True
        self.machine.parts.request_attention()

    def _take_snapshot(self) -> None:
        lines = self._write_snapshot()
        self._snapshot_taken = True
        if not self.args.json:
            self.say("\n".join(lines))

    def _write_snapshot(self) -> list[str]:
        """Take it; lines on what was done."""
        path = self.plan.path
        tell = disk_progress((lambda _: None) if self.args.json else self.say)
        with concerning(Subject("snapshot")):
            lines = self.machine.snapshot(path, disks=self.plan.disks, progress=tell)
        return [*lines, f"snapshot written to {path}"]

    # The escape menu.

    def quit(self) -> None:
        self._hurry = True
        self.machine.stop(Outcome(Ending.QUIT, "quit from the menu"))

    def toggle_suspend(self) -> str:
        suspended = self.machine.suspended
        try:
            if suspended:
                self.machine.resume()
                return "resumed"
            self.machine.suspend()
        except DeviceError as error:
            return f"{'resumed, but' if suspended else 'not suspended:'} {error}"
        return "suspended; Ctrl-A s resumes"

    def write_snapshot(self) -> str:
        try:
            lines = self._write_snapshot()
        except (UserError, DeviceError) as error:
            return f"no snapshot: {error}"
        return "\n".join(lines) + f"; python -m vmm restore {self.plan.path}"

    def status(self) -> str:
        from vmm.cli.stats import status_lines

        return "\n".join(status_lines(self.machine, monotonic() - self._began))

    def adjust(self, text: str) -> str:
        if not text.strip():
            return "nothing was adjusted"
        try:
            name, options = split_options(text.strip())
            if not options:
                raise UserError("write DEVICE,OPTION=VALUE, for example balloon,pages=8192")
            self.machine.adjust(name, **options)
        except (UserError, DeviceError) as error:
            return f"not adjusted: {error}"
        return f"adjusted: {text.strip()}"

    # The end.

    def _log(self, name: str, text: str) -> None:
        self.say(f"{name}: {' '.join(text.splitlines())}")

    def _report(self, outcome: Outcome, extras: dict[str, Any]) -> None:
        wiring = self.machine.parts.wiring
        for name, text in wiring.log_limit.rest():
            wiring.log(name, text)
        if self._failed is not None and outcome.ending is not Ending.INTERRUPTED:
            raise self._failed
        statistics = None
        if self.args.stats:
            from vmm.cli.stats import stats_lines, stats_values

            statistics = stats_values(self.machine)
            if not self.args.json:
                for line in stats_lines(statistics):
                    self.say(line)
        if self.args.json:
            self._print(json.dumps(self._json(outcome, statistics) | extras) + "\n", outcome)
            return
        for lines in extras.values():
            self.say("\n".join(lines))
        if self.plan.when is not None and not self._snapshot_taken:
            self.say(f"no snapshot was taken: {self.plan.missed()}")
        if outcome.detail or outcome.ending not in (Ending.HALTED, Ending.GUEST_EXIT):
            self.say(f"{outcome.ending}{': ' if outcome.detail else ''}{outcome.detail}")
        if outcome.report:
            self.say(outcome.report)

    def _print(self, text: str, outcome: Outcome) -> None:
        """Print the result of the run; a reader that stalls is not waited for after Ctrl-C."""
        if outcome.ending is not Ending.INTERRUPTED:
            sys.stdout.write(text)
            return
        self.outputs.write(1, text.encode(), limit=sys.maxsize)
        self.outputs.drain(GRACE)

    def _json(self, outcome: Outcome, statistics: dict[str, Any] | None) -> dict[str, Any]:
        values = outcome.as_json() | {
            "output": self.machine.output.decode("utf-8", "replace"),
            "report": outcome.report,
            "seconds": round(monotonic() - self._began, 6),
            "jail": self.machine.parts.jail_line,
            "snapshot": str(self.plan.path) if self._snapshot_taken else None,
            "log": [list(line) for line in self.machine.parts.wiring.log_lines],
        }
        return values if statistics is None else values | {"stats": statistics}
