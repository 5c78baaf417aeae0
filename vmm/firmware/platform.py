"""The board as its tables tell it: one description, from which ACPI, MP table and fw_cfg follow.

Interrupts, the same in every table: ISA line n is global system interrupt (GSI) n, except that the
timer's line 0 arrives at GSI 2. PCI lines and the SCI are level-triggered and, in the words of the
tables, active low, as PCI has it; where an interrupt controller is modelled, a line is simply up
or down, so nothing but the consistency of the tables depends on that word.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from devices.bus import Range
from devices.pci.ecam import ECAM
from devices.pci.host_bridge import IO_WINDOW, MMIO_WINDOW
from devices.pci.intx import PINS, PIRQ_IRQS

TIMER_GSI = 2
SCI_IRQ = 9
PCI_SLOTS = range(1, 32)
"""Device numbers on bus 0 that may have interrupts; 0 is the host bridge."""


@dataclass(frozen=True)
class SerialPort:
    """An ISA serial port: its I/O address and interrupt line."""

    port: int
    irq: int


COM1 = SerialPort(0x3F8, 4)


@dataclass(frozen=True)
class Platform:
    """Where things are. The defaults are those of this machine.

    Attributes:
        mmio_window: where memory BARs may go; keep it the one that BARs are assigned from.
        io_window: where I/O BARs may go.
        ecam: where the configuration space of all 256 buses is mapped.
        pm_base: of the ACPI registers: PM1a event block, PM1a control at +4, PM timer at +8.
        pm_timer_bits: width of the PM timer, 24 or 32.
        power_button: the PM1 event block has a power button.
        hpet: address, or None if there is none.
        hpet_id: the low half of its General Capabilities register.
        keyboard_controller: there is an i8042.
        vga: a VGA may be probed for.
        pirqs: the GSIs of PIRQ A to D.
        fw_cfg: there is one at 0x510.
    """

    lapic: int = 0xFEE0_0000
    ioapic: int = 0xFEC0_0000
    ioapic_id: int = 1
    mmio_window: Range = MMIO_WINDOW
    io_window: Range = IO_WINDOW
    ecam: Range = ECAM
    pm_base: int = 0x600
    pm_timer_bits: int = 24
    power_button: bool = True
    hpet: int | None = 0xFED0_0000
    hpet_id: int = 0x8086_A201
    keyboard_controller: bool = True
    vga: bool = False
    serial: tuple[SerialPort, ...] = (COM1,)
    pirqs: tuple[int, ...] = PIRQ_IRQS
    fw_cfg: bool = False

    def pci_interrupts(self) -> Iterator[tuple[int, int, int]]:
        """(slot, pin 0..3, GSI) of every pin that a function could have.

        The same rule as `devices.pci.intx.IntxRouter.irq_for`.
        """
        for slot in PCI_SLOTS:
            for pin in range(PINS):
                yield slot, pin, self.pirqs[(slot + pin) % PINS]

    def level_irqs(self) -> frozenset[int]:
        """The lines that are level-triggered."""
        return frozenset({SCI_IRQ, *self.pirqs})
