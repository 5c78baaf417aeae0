"""The time-stamp counter: a clock that the guest may set (SDM volume 3B, 17.17.3)."""

from __future__ import annotations

from collections.abc import Callable

from vmm.cpu.context import MASK64


class Tsc:
    """Counts as `clock` does, from where it was set to.

    Attributes:
        offset: what it counts less what the clock says; may be negative.
    """

    def __init__(self, clock: Callable[[], int]) -> None:
        self._clock = clock
        self.offset = 0

    def read(self) -> int:
        """64 bits."""
        return self._clock() + self.offset & MASK64

    def write(self, value: int) -> None:
        self.offset = value - self._clock()

    def to_clock(self, value: int) -> int:
        """What the clock says at this count, at least 1."""
        return max(value - self.offset, 1)

    def from_clock(self, when: int) -> int:
        """The count at that moment."""
        return when + self.offset & MASK64
