"""The registers of the local APIC by number, and their page in memory (SDM volume 3A, table 10-1).

An access is two list look-ups and a call: some kernels read the ID half a million times a second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from devices.bus import ALL_ONES
from devices.irqchip.apic_registers import Lvt, Register

if TYPE_CHECKING:
    from devices.irqchip.lapic import LocalApic

VERSION = 0x14 | (len(Lvt) - 1) << 16
"""Integrated APIC, six LVT entries, no suppression of EOI broadcasts (10.4.8)."""
_REGISTERS = 256


def _ignore(_: int, /) -> None:
    """A write to a read-only register."""


class RegisterFile:
    """Reads and writes by register number.

    Attributes:
        readers, writers: by number, 0..255; numbers without a register log an error in the ESR.
    """

    def __init__(self, apic: LocalApic) -> None:
        self._apic = apic
        self.readers: list[Callable[[], int]] = [self._read_reserved] * _REGISTERS
        self.writers: list[Callable[[int], None]] = [self._write_reserved] * _REGISTERS
        self._add_plain(apic)
        for word in range(8):
            self._add_words(apic, word, 32 * word)
        for source in range(len(Lvt)):
            self._add_lvt(apic, source)

    def _add(
        self,
        register: Register,
        reader: Callable[[], int],
        writer: Callable[[int], None] = _ignore,
    ) -> None:
        self.readers[register], self.writers[register] = reader, writer

    def _add_plain(self, apic: LocalApic) -> None:
        add, timer = self._add, apic.timer
        # Not `apic.state` itself: a restore puts another in its place.
        add(Register.ID, lambda: apic.state.id << 24, lambda value: apic.address(id=value >> 24))
        add(Register.VERSION, lambda: VERSION)
        add(Register.TPR, lambda: apic.state.tpr, apic.write_tpr)
        add(Register.APR, apic.arbitration_priority)
        add(Register.PPR, lambda: apic.ppr)
        add(Register.EOI, lambda: 0, lambda _: apic.end_of_interrupt())
        add(Register.RRD, lambda: 0)
        add(Register.LDR, lambda: apic.state.ldr << 24, lambda value: apic.address(ldr=value >> 24))
        add(
            Register.DFR,
            lambda: apic.state.dfr << 28 | 0x0FFF_FFFF,
            lambda value: apic.address(dfr=value >> 28),
        )
        add(Register.SVR, lambda: apic.state.svr, apic.write_svr)
        add(Register.ESR, lambda: apic.state.esr, lambda _: apic.write_esr())
        add(Register.ICR, lambda: apic.state.icr, self._write_icr)
        add(Register.ICR_HIGH, lambda: apic.state.icr_high, self._write_icr_high)
        add(Register.INITIAL_COUNT, lambda: timer.state.initial, timer.write_initial)
        add(Register.CURRENT_COUNT, timer.current)
        add(Register.DIVIDE, lambda: timer.state.divide, timer.write_divide)

    def _add_words(self, apic: LocalApic, word: int, shift: int) -> None:
        self.readers[Register.ISR + word] = lambda: apic.isr >> shift & 0xFFFF_FFFF
        self.readers[Register.TMR + word] = lambda: apic.tmr >> shift & 0xFFFF_FFFF
        self.readers[Register.IRR + word] = lambda: apic.irr >> shift & 0xFFFF_FFFF
        for first in (Register.ISR, Register.TMR, Register.IRR):
            self.writers[first + word] = _ignore

    def _add_lvt(self, apic: LocalApic, source: int) -> None:
        self.readers[Register.LVT + source] = lambda: apic.state.lvt[source]
        self.writers[Register.LVT + source] = lambda value: apic.write_lvt(source, value)

    def _write_icr(self, value: int) -> None:
        self._apic.send(value, self._apic.state.icr_high >> 24)

    def _write_icr_high(self, value: int) -> None:
        self._apic.state.icr_high = value & 0xFF00_0000

    def _read_reserved(self) -> int:
        self._apic.illegal_register()
        return 0

    def _write_reserved(self, _: int) -> None:
        self._apic.illegal_register()


class Window:
    """The page of registers; it answers only while `open`, which is in xAPIC mode."""

    def __init__(self, registers: RegisterFile) -> None:
        self.open = True
        self._readers = registers.readers
        self._writers = registers.writers

    def read(self, offset: int, size: int) -> int:
        if not self.open:
            return ALL_ONES[size]
        within = offset & 0xF
        if within == 0 and size >= 4:
            return self._readers[offset >> 4]()
        if within + size > 4:
            return 0
        return self._readers[offset >> 4]() >> 8 * within & ALL_ONES[size]

    def write(self, offset: int, size: int, value: int) -> None:
        if size == 4 and not offset & 0xF and self.open:
            self._writers[offset >> 4](value)
