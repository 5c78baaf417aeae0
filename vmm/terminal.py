"""The user's terminal: raw keystrokes in, the guest's bytes out, and the escape menu.

On a terminal every key goes to the guest, Ctrl-C too; Ctrl-A opens the menu:

    Ctrl-A h   help                    Ctrl-A s   suspend / resume
    Ctrl-A x   quit                    Ctrl-A w   write a snapshot
    Ctrl-A i   status                  Ctrl-A a   adjust a device: a line, such as balloon,pages=9
    Ctrl-A Ctrl-A   send Ctrl-A to the guest

The terminal is always read, so that the menu works: what is typed while the guest takes nothing is
kept up to a limit, and dropped beyond it. Input from a pipe or a file goes to the guest as it is,
without a menu; its end, or a closed standard input, is no end of the guest.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import stat
import termios
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol

from vmm.events import EventLoop

ESCAPE = 0x01
"""Ctrl-A."""
HIGH_WATER = 64 << 10
"""Input that the guest has not taken beyond which no more is kept."""
_CHUNK = 4096

HELP = """\
Ctrl-A h  this help             Ctrl-A s  suspend / resume the guest
Ctrl-A x  quit                  Ctrl-A w  write a snapshot
Ctrl-A i  status                Ctrl-A a  adjust a device that runs
Ctrl-A Ctrl-A  send Ctrl-A to the guest"""
PROMPT = "vmm: adjust DEVICE,OPTION=VALUE: "
_ADJUST = ord("a")
_LONGEST_LINE = 200
_ENTER, _ERASE, _CANCEL = b"\r\n", b"\b\x7f", b"\x03\x04\x1b"
"""Keys while a line is typed; the last are Ctrl-C, Ctrl-D and Escape."""


class Controls(Protocol):
    """What the escape menu can do; the command line implements it."""

    def quit(self) -> None: ...

    def toggle_suspend(self) -> str: ...

    def write_snapshot(self) -> str: ...

    def status(self) -> str: ...

    def adjust(self, text: str) -> str: ...


class EscapeParser:
    """Splits keystrokes into bytes for the guest, menu keys, and the line that one takes."""

    def __init__(self) -> None:
        self._escaped = False
        self._line: bytearray | None = None

    def feed(self, data: bytes) -> list[tuple[str, bytes]]:
        """("input", bytes) and ("menu", one key) in the order they were typed.

        While a line is typed ("echo", bytes) is what the user sees of it; at its end comes
        ("line", text), empty if it was cancelled.
        """
        parts: list[tuple[str, bytes]] = []
        for byte in data:
            if self._line is not None:
                parts += self._edit(self._line, byte)
                continue
            kind = "input"
            if self._escaped:
                self._escaped = False
                kind = "input" if byte == ESCAPE else "menu"
                self._line = bytearray() if byte == _ADJUST else None
            elif byte == ESCAPE:
                self._escaped = True
                continue
            if kind == "input" and parts and parts[-1][0] == "input":
                parts[-1] = ("input", parts[-1][1] + bytes([byte]))
            else:
                parts.append((kind, bytes([byte])))
        return parts

    def _edit(self, line: bytearray, byte: int) -> list[tuple[str, bytes]]:
        if byte in _ENTER or byte in _CANCEL:
            self._line = None
            return [("echo", b"\r\n"), ("line", bytes(line) if byte in _ENTER else b"")]
        if byte in _ERASE and line:
            line.pop()
            return [("echo", b"\b \b")]
        if byte in range(0x20, 0x7F) and len(line) < _LONGEST_LINE:
            line.append(byte)
            return [("echo", bytes([byte]))]
        return []


@dataclass
class Terminal:
    """Connects descriptors of this process with a guest's console.

    Attributes:
        feed: takes input for the guest.
        backlog: how many bytes of input the guest has not taken yet.
        say: prints a line of the menu for the user (not to the guest's output).
        echo: shows what the user types for the menu.
        source: descriptor to read; -1: no input.
        resized: told the columns and rows of a terminal, at first and whenever they change.
    """

    events: EventLoop
    feed: Callable[[bytes], None]
    backlog: Callable[[], int]
    controls: Controls
    say: Callable[[str], None]
    source: int = 0
    resized: Callable[[int, int], None] = lambda _columns, _rows: None
    echo: Callable[[bytes], object] = lambda _data: None

    def __post_init__(self) -> None:
        self._size_changed = False
        self._old_handler: Any = None
        self._escape: EscapeParser | None = None
        self._saved: list[object] | None = None
        self._reading = False
        self._pollable = True
        self._overflowing = False

    def open(self) -> None:
        """Start reading; raw mode on a terminal."""
        try:
            mode = os.fstat(self.source).st_mode
        except OSError:
            return  # standard input is closed: no input
        if os.isatty(self.source):
            self._escape = EscapeParser()
            self._raw()
            self._follow_size()
        self._pollable = not stat.S_ISREG(mode)
        self._start_reading()

    def close(self) -> None:
        """Stop reading and give the terminal back as it was; harmless when repeated."""
        self._stop_reading()
        if self._old_handler is not None:
            signal.signal(signal.SIGWINCH, self._old_handler)
            self._old_handler = None
        if self._saved is not None:
            with contextlib.suppress(termios.error):
                # Not TCSADRAIN: that waits for whoever reads the screen.
                termios.tcsetattr(self.source, termios.TCSANOW, self._saved)  # type: ignore[arg-type]
            self._saved = None

    def look(self) -> None:
        """Called now and then: read on if the guest has caught up, tell of another size."""
        if self._size_changed:
            self._size_changed = False
            with contextlib.suppress(OSError):
                self.resized(*os.get_terminal_size(self.source))
        if self._pollable and not self._reading and self._paused and self.backlog() < HIGH_WATER:
            self._start_reading()
        elif not self._pollable and self._reading:
            self._read_file()

    _paused = False

    def _follow_size(self) -> None:
        def changed(_number: int, _frame: FrameType | None) -> None:
            self._size_changed = True

        self._size_changed = True
        if threading.current_thread() is threading.main_thread():
            # It wakes the loop as all signals do: see `vmm.interrupt`.
            self._old_handler = signal.signal(signal.SIGWINCH, changed)
        self.look()

    def _raw(self) -> None:
        attributes = termios.tcgetattr(self.source)
        self._saved = list(attributes)
        iflag, oflag, cflag, lflag, ispeed, ospeed, cc = attributes
        iflag &= ~(
            termios.IGNBRK
            | termios.BRKINT
            | termios.PARMRK
            | termios.ISTRIP
            | termios.INLCR
            | termios.IGNCR
            | termios.ICRNL
            | termios.IXON
        )
        lflag &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
        # Output processing stays on: small guests end their lines with LF alone.
        cc = list(cc)
        cc[termios.VMIN], cc[termios.VTIME] = 1, 0
        termios.tcsetattr(
            self.source, termios.TCSANOW, [iflag, oflag, cflag, lflag, ispeed, ospeed, cc]
        )

    def _start_reading(self) -> None:
        self._reading, self._paused = True, False
        if self._pollable:
            try:
                self.events.add(self.source, self._readable)
            except OSError as error:
                if error.errno != errno.EPERM:
                    raise
                self._pollable = False  # a kind of file that epoll does not take, like /dev/null
        if not self._pollable:
            self._read_file()

    def _stop_reading(self) -> None:
        if self._reading and self._pollable:
            self.events.remove(self.source)
        self._reading = False

    def _read_file(self) -> None:
        while self._reading and self.backlog() < HIGH_WATER:
            self._readable()

    def _readable(self) -> None:
        try:
            data = os.read(self.source, _CHUNK)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            self._stop_reading()
            return
        if self._escape is not None:
            for kind, part in self._escape.feed(data):
                match kind:
                    case "input":
                        self._typed(part)
                    case "echo":
                        self.echo(part)
                    case "line":
                        self.say(self.controls.adjust(part.decode("ascii")))
                    case _:
                        self._menu(part)
            return
        self.feed(data)
        if self._pollable and self.backlog() >= HIGH_WATER:
            self._stop_reading()
            self._paused = True

    def _typed(self, data: bytes) -> None:
        backlog = self.backlog()
        if backlog + len(data) <= HIGH_WATER:
            self._overflowing = self._overflowing and backlog > HIGH_WATER // 2
            self.feed(data)
        elif not self._overflowing:
            self._overflowing = True
            self.say(f"the guest has not taken {backlog} bytes of input: more input is dropped")

    def _menu(self, key: bytes) -> None:
        match key:
            case b"x" | b"q":
                self.controls.quit()
            case b"s":
                self.say(self.controls.toggle_suspend())
            case b"w":
                self.say(self.controls.write_snapshot())
            case b"i":
                self.say(self.controls.status())
            case b"a":
                self.echo(PROMPT.encode())
            case _:
                self.say(HELP)
