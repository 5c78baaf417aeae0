"""Keeps a device that talks too much from burying everything else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

PER_SECOND = 20
"""Lines that a device may log in a second."""


@dataclass
class _Window:
    begin: float
    lines: int = 0
    dropped: int = 0


class LogLimit:
    """Lets `PER_SECOND` lines a second of each device pass, and counts the others.

    Args:
        now: the time in seconds.
    """

    def __init__(self, now: Callable[[], float] = monotonic) -> None:
        self._now = now
        self._windows: dict[str, _Window] = {}

    def lines(self, name: str, text: str) -> list[str]:
        """What is to be logged for a line of a device: nothing, it, or it after a count."""
        now = self._now()
        window = self._windows.get(name)
        if window is None or now - window.begin >= 1.0:
            found = [] if window is None or not window.dropped else [_told(window.dropped)]
            self._windows[name] = _Window(now, lines=1)
            return [*found, text]
        if window.lines < PER_SECOND:
            window.lines += 1
            return [text]
        window.dropped += 1
        return []

    def rest(self) -> list[tuple[str, str]]:
        """(device, count) for what was dropped and not told yet; for the end of a run."""
        found = [(name, _told(w.dropped)) for name, w in self._windows.items() if w.dropped]
        self._windows.clear()
        return found


def _told(count: int) -> str:
    return f"{count} line{' was' if count == 1 else 's were'} dropped"
