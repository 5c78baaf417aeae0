"""The A20 gate: one wire that the keyboard controller and port 0x92 both drive.

With the gate closed address bit 20 reads as zero at the CPU, so that addresses wrap at 1 MiB as on
an 8086. On boards the two sources are OR-ed; here, as on QEMU, the last one that wrote decides:
guests close the gate through either one alone and then look whether it worked.
"""

from __future__ import annotations

from collections.abc import Callable


class A20Gate:
    """Open at power-on, else the reset vector could not be reached.

    Its level is saved by the device that owns the wire (`devices.platform.port92.Port92`).

    Args:
        on_change: told the new level whenever it changes: it masks the CPU's addresses.
    """

    def __init__(self, on_change: Callable[[bool], None] | None = None) -> None:
        self.open = True
        self._on_change = on_change

    def set(self, level: bool) -> None:
        """Open or close the gate; a repetition is harmless."""
        if level != self.open:
            self.load(level)

    def load(self, level: bool) -> None:
        """Put the gate to a restored level, and say so even if it is the same."""
        self.open = level
        if self._on_change is not None:
            self._on_change(level)
