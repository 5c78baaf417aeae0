"""NMIs: what holds one back (SDM volume 3A, 6.7.1 and 6.8.3).

A non-maskable interrupt blocks further ones until the next IRET, whatever that returns from. The
engine does not tell of IRET; so from an NMI on it is intercepted (`intercept`), once. Where it
cannot be, NMIs do not block each other.
"""

from __future__ import annotations

from vmm.cpu.context import Context
from vmm.cpu.intercept import IRET_INTERCEPT, available, instructions
from vmm.cpu.layout import H_SHADOW

NMI = 2
"""The vector of the non-maskable interrupt."""


class NmiBlock:
    """Of one engine. `save` the context before, where nothing else is said."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._word = instructions(context)
        self._returns_at: tuple[int, int] | None = None
        """RIP and RSP at the IRET that ends the block, and has not been executed yet."""
        self._ends_run = False

    def begin(self) -> None:
        """An NMI was delivered; restore the context afterwards."""
        if available():
            self._context.words[self._word] |= IRET_INTERCEPT

    def forget(self) -> None:
        """Another state of the CPU is taken up."""
        self._returns_at = None

    def returns(self) -> None:
        """The intercepted IRET comes next; restore the context afterwards."""
        self._context.words[self._word] &= ~IRET_INTERCEPT
        self._returns_at = self._place()
        self._ends_run = True

    def ended_run(self) -> bool:
        """Whether the run came to such an IRET, told once."""
        ended, self._ends_run = self._ends_run, False
        return ended

    def holds(self) -> bool:
        """Whether IRET has not been executed yet."""
        return self.handled() or self._at_iret()

    def handled(self) -> bool:
        """Whether the guest handles an NMI, and nothing but its IRET will change that."""
        return bool(self._context.words[self._word] & IRET_INTERCEPT)

    def window(self) -> bool | None:
        """Whether an NMI can be taken now; None: behind the next instruction. Saves the context.

        So it is behind STI, MOV SS and at the IRET.
        """
        self._context.save()
        if self.handled():
            return False
        return None if self._context.hidden & H_SHADOW or self._at_iret() else True

    def _place(self) -> tuple[int, int]:
        return self._context.rip, self._context.rsp

    def _at_iret(self) -> bool:
        if self._returns_at is not None and self._place() != self._returns_at:
            self._returns_at = None
        return self._returns_at is not None
