"""INTx: from the pins of the functions to the interrupt lines of the board.

Pins are level-triggered and shared (PCI 3.0, 2.2.6): a line is high while any pin that is wired to
it is asserted. The board wires pin p of device d to PIRQ (d + p) mod 4, so that single-function
devices, which all use INTA#, spread over the four, and each PIRQ to one ISA interrupt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

PIRQ_IRQS = (10, 11, 10, 11)
"""The interrupt of PIRQ A to D: the two that no classic ISA device claims (9 is left to ACPI)."""
PINS = 4


class Slot(NamedTuple):
    """Where a function sits: device 0..31, function 0..7, on bus 0..255.

    Bus 0 is the root's; about the others see `devices.pci.topology`.
    """

    device: int
    function: int = 0
    bus: int = 0

    @property
    def number(self) -> int:
        """``bus << 8 | device << 3 | function``, as in CONFIG_ADDRESS and requester ids."""
        return self.bus << 8 | self.device << 3 | self.function

    @classmethod
    def of(cls, number: int) -> Slot:
        return cls(number >> 3 & 31, number & 7, number >> 8)

    def __str__(self) -> str:
        return f"{self.bus:02x}:{self.device:02x}.{self.function}"


class IntxRouter:
    """Levels of all pins, OR-ed by line.

    Args:
        set_irq_line: told (irq, level) whenever a line changes.
        irqs: the interrupt of each of the four PIRQs; two may share one.
    """

    def __init__(
        self, set_irq_line: Callable[[int, bool], None], irqs: Sequence[int] = PIRQ_IRQS
    ) -> None:
        if len(irqs) != PINS:
            raise ValueError(f"there are {PINS} PIRQ lines, not {len(irqs)}")
        self._set_irq_line = set_irq_line
        self._irqs = tuple(irqs)
        self.bridges: dict[int, Slot] = {}
        """The slot of the bridge before each bus other than 0."""
        self._asserted: dict[int, set[tuple[int, int]]] = {irq: set() for irq in irqs}

    def irq_for(self, slot: Slot, pin: int) -> int:
        """The interrupt of pin 0 (INTA#) to 3 (INTD#) of the device in `slot`."""
        while slot.bus:
            pin = (slot.device + pin) % PINS
            slot = self.bridges[slot.bus]
        return self._irqs[(slot.device + pin) % PINS]

    def set(self, slot: Slot, pin: int, level: bool) -> None:
        """Drive one pin; a repetition is harmless."""
        irq = self.irq_for(slot, pin)
        sources = self._asserted[irq]
        before = bool(sources)
        if level:
            sources.add((slot.number, pin))
        else:
            sources.discard((slot.number, pin))
        if before != bool(sources):
            self._set_irq_line(irq, not before)

    def pins(self, slot: Slot) -> list[int]:
        """The pins that this function asserts now."""
        return [
            pin
            for pin in range(PINS)
            if (slot.number, pin) in self._asserted[self.irq_for(slot, pin)]
        ]

    def release(self, slot: Slot) -> None:
        """The function is gone: it asserts nothing any more."""
        for pin in self.pins(slot):
            self.set(slot, pin, False)

    def load(self, asserted: Iterable[tuple[Slot, int]]) -> None:
        """Replace all levels by these asserted pins, and tell every line once, changed or not."""
        for sources in self._asserted.values():
            sources.clear()
        for slot, pin in asserted:
            self._asserted[self.irq_for(slot, pin)].add((slot.number, pin))
        for irq, sources in self._asserted.items():
            self._set_irq_line(irq, bool(sources))
