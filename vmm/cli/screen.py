"""``--screen-live``: the guest's text screen, drawn while it changes.

On a terminal that is large enough the screen has its upper part, and all else scrolls below it.
Elsewhere each row that changed is a line of text with its number.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from time import monotonic

from devices.platform.vga_text import COLUMNS, ROWS
from vmm.events import EventLoop

PERIOD = 0.1
"""Seconds between two looks at the screen."""
_BELOW = 5
"""Rows that a terminal must have beside the screen and the ruler."""


class LiveScreen:
    """Draws until `close`.

    Args:
        events: calls every `PERIOD`.
        lines: the screen as it is now, at most `ROWS` lines.
        write: sends text to the user as it is.
        say: prints whole lines for the user.
        fd: what `write` goes to.
    """

    def __init__(
        self,
        events: EventLoop,
        lines: Callable[[], Sequence[str]],
        write: Callable[[str], object],
        say: Callable[[str], None],
        fd: int = 2,
    ) -> None:
        self._events = events
        self._lines = lines
        self._write = write
        self._say = say
        self._shown: list[str] = [""] * ROWS
        self.draws = self._begin(fd)
        """Whether it has a part of the terminal."""
        self._timer = events.call_at(monotonic(), self._look)

    def close(self) -> None:
        """Show the last picture and give the terminal back."""
        self._timer.cancel()
        self._update()
        if self.draws:
            # The whole terminal scrolls again, from its last row on.
            self._write("\x1b[r\x1b[999;1H")

    def _begin(self, fd: int) -> bool:
        try:
            size = os.get_terminal_size(fd)
        except OSError:
            return False
        if size.columns < COLUMNS or size.lines < ROWS + 1 + _BELOW:
            return False
        ruler = "-" * COLUMNS
        self._write(f"\x1b[2J\x1b[{ROWS + 1};1H{ruler}\x1b[{ROWS + 2};{size.lines}r")
        self._write(f"\x1b[{ROWS + 2};1H")
        return True

    def _look(self) -> None:
        self._update()
        self._timer = self._events.call_at(monotonic() + PERIOD, self._look)

    def _update(self) -> None:
        lines = list(self._lines())
        lines += [""] * (ROWS - len(lines))
        changed = [row for row in range(ROWS) if lines[row] != self._shown[row]]
        self._shown = lines
        if not changed:
            return
        if self.draws:
            drawn = "".join(f"\x1b[{row + 1};1H{lines[row]}\x1b[K" for row in changed)
            self._write(f"\x1b7{drawn}\x1b8")
        else:
            self._say("\n".join(f"screen {row + 1:2}| {lines[row]}" for row in changed))
