"""The interrupt controllers of a PC, wired together, and what the CPU sees of them.

    ISA IRQ n ──┬─► PicPair ── INT ──┬──────────────────► LocalApic LINT0 ──► CPU: pending()
                │                    └─► IoApic pin 0          ▲
                └─► IoApic pin n (IRQ 0: pin 2) ── message ────┤
    GSI 16..23 ──► IoApic pin                                  │
    device ── MSI, 0xFEExxxxx ─────────────────────────────────┘

This is the symmetric I/O mode of the MultiProcessor Specification 1.4 (3.6.2), with both of its
virtual wires at once: pin 0 and LINT0. Which of the ways an interrupt takes is the guest's choice,
by what it masks. There is no state here: each controller has its own.
"""

from __future__ import annotations

from collections.abc import Callable

from devices.clock import Clock
from devices.contract import Device, DeviceHost
from devices.irqchip.apic_registers import APIC_BASE
from devices.irqchip.ioapic import PINS, IoApic
from devices.irqchip.lapic import LocalApic
from devices.irqchip.pic import PicPair

_ISA_LINES = 16
_TIMER_PIN = 2
_PIC_PIN = 0
_LINT0, _LINT1 = 0, 1


def _nobody() -> None:
    """A wire that leads nowhere."""


class IrqChip:
    """Owns and connects `pic`, `ioapic` and `lapic`; the vCPU loop asks it for interrupts.

    Args:
        on_init: called when the guest sent an INIT to its own CPU.

    Attributes:
        on_pending: called when an interrupt or NMI begins to wait for the CPU, also from within an
            access of the guest; it may kick the CPU, not run it.
        on_withdrawn: called when no interrupt waits any more, not only because it was acknowledged.
    """

    def __init__(
        self,
        host: DeviceHost,
        clock: Clock,
        *,
        on_init: Callable[[], None] = _nobody,
    ) -> None:
        self._pending = False
        self._nmi_seen = False
        self.on_pending: Callable[[], None] = _nobody
        self.on_withdrawn: Callable[[], None] = _nobody
        self.lapic = LocalApic(
            host,
            clock,
            changed=self._update,
            broadcast_eoi=self._level_ended,
            reachable=self._reachable,
            on_init=on_init,
        )
        self.ioapic = IoApic(host, deliver=self.lapic.message, changed=self._update)
        self.pic = PicPair(host, on_output=self._pic_output)

    def devices(self) -> tuple[Device, ...]:
        """The three of them, in the order in which they must be restored.

        While one is restored its outputs move; that disturbs only those after it.
        """
        return self.pic, self.ioapic, self.lapic

    # From devices.

    def set_irq(self, gsi: int, level: bool) -> None:
        """Drive an interrupt line: 0..15 are the ISA IRQs, 16..23 lead to the IOAPIC only.

        Raises:
            ValueError: there is no such line; 2 is the wire between the two 8259.
        """
        if gsi < _ISA_LINES:
            self.pic.set_irq(gsi, level)
            self.ioapic.set_pin(gsi or _TIMER_PIN, level)
        elif gsi < PINS:
            self.ioapic.set_pin(gsi, level)
        else:
            raise ValueError(f"no interrupt line {gsi}: there are 0..{PINS - 1} without 2")

    def msi(self, address: int, data: int) -> bool:
        """A device writes a message (SDM volume 3A, 10.11); whether the CPU took it.

        The destination mode bit counts with and without the redirection hint: the manual has it
        ignored without, but guests rely on what processors do. Of level-triggered messages the
        de-assertion does nothing.
        """
        if address >> 20 != APIC_BASE >> 20:
            return False
        level = bool(data & 0x8000)
        if level and not data & 0x4000:
            return False
        return self.lapic.message(
            address >> 12 & 0xFF, bool(address & 4), data >> 8 & 7, data & 0xFF, level
        )

    def set_nmi(self, level: bool) -> None:
        """Drive the NMI line of the board, which is LINT1."""
        self.lapic.set_lint(_LINT1, level)

    # To the CPU.

    def pending(self) -> bool:
        """Whether the CPU is asked to take an interrupt."""
        return self._pending

    def acknowledge(self) -> int:
        """The CPU takes the interrupt: its vector, 0..255.

        The 8259 goes first: ExtINT has no priority class that could be compared. If the request is
        gone, the vector is the spurious one of the controller in charge.
        """
        if self._extint() or not (self._pending or self.lapic.software_enabled):
            return self.pic.acknowledge()
        return self.lapic.acknowledge()

    def nmi_pending(self) -> bool:
        """Whether an NMI waits for the CPU."""
        return self.lapic.state.nmi

    def take_nmi(self) -> bool:
        """The CPU takes the NMI: whether there was one."""
        self._nmi_seen = False
        return self.lapic.take_nmi()

    # Wires.

    def _extint(self) -> bool:
        return self.lapic.extint or (self.ioapic.extint and self.pic.pending())

    def _pic_output(self, level: bool) -> None:
        self.lapic.set_lint(_LINT0, level)
        self.ioapic.set_pin(_PIC_PIN, level)
        self._update()

    def _level_ended(self, vector: int) -> None:
        self.ioapic.end_of_interrupt(vector)

    def _reachable(self) -> None:
        self.ioapic.retry()

    def _update(self) -> None:
        """Derive what the CPU sees; say so when it is something new."""
        was, self._pending = self._pending, self.lapic.request >= 0 or self._extint()
        saw, self._nmi_seen = self._nmi_seen, self.lapic.state.nmi
        if (self._pending and not was) or (self._nmi_seen and not saw):
            self.on_pending()
        elif was and not self._pending:
            self.on_withdrawn()
