"""Serial: a 16550A UART, complete but for time.

Rules:
- Time does not pass in the UART. A character leaves as it is written, so the transmitter is always
  empty; a character timeout is there as soon as bytes wait below the trigger level.
- What comes from the outside waits on the line, in `backlog`, and arrives when the guest could
  notice: it reads a register that tells or an enabled interrupt fires. So input is never lost by
  an overrun or by the FIFO reset with which a driver starts; an overrun needs loopback.
- Where the real part's interrupt output falls for some microseconds and rises again (a THR written,
  the receiver read below its trigger level), so does this one: an edge-triggered interrupt
  controller lives on that.
- `Lsr.DATA_READY`, the IIR, the modem lines and the interrupt line follow from the state and are
  not part of it.

Source: National PC16550D data sheet, sections 8.1 to 8.12. That MCR OUT2 gates the interrupt is the
practice of the PC (IBM PC AT Technical Reference, serial adapter); as in later chip sets it is the
register bit that gates, also in loopback.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import msgspec

from devices.bus import BusType
from devices.bytewise import ByteRegisters
from devices.contract import U8, Device, DeviceHost, Region
from devices.uart16550 import (
    FIFO_SIZE,
    IIR_FIFOS_ENABLED,
    TRIGGER_LEVELS,
    WORD_MASKS,
    Fcr,
    Ier,
    Iir,
    Lcr,
    Lsr,
    Mcr,
    Msr,
    Register,
    modem_lines,
)

U4 = Annotated[int, msgspec.Meta(ge=0, le=0xF)]
U5 = Annotated[int, msgspec.Meta(ge=0, le=0x1F)]

BACKLOG_SIZE = 4096
"""Bytes of outside input that wait on the line at most."""

# An operation on an IntFlag costs a microsecond; these are the bits of the access path.
_DLAB = int(Lcr.DLAB)
_LOOPBACK = int(Mcr.LOOPBACK)
_OUT2 = int(Mcr.OUT2)
_ENABLE_DATA = int(Ier.RECEIVED_DATA)
_ENABLE_THRE = int(Ier.THR_EMPTY)
_ENABLE_LINE = int(Ier.LINE_STATUS)
_ENABLE_MODEM = int(Ier.MODEM_STATUS)
_DATA_READY = int(Lsr.DATA_READY)
_OVERRUN = int(Lsr.OVERRUN)
_TRANSMITTER_IDLE = int(Lsr.THR_EMPTY | Lsr.TRANSMITTER_EMPTY)
_FCR_KEPT = int(Fcr.ENABLE | Fcr.DMA_MODE | Fcr.TRIGGER)


class ComPort(enum.StrEnum):
    """The places of a PC for a serial port."""

    COM1 = "com1"
    COM2 = "com2"
    COM3 = "com3"
    COM4 = "com4"


_PLACES = {
    ComPort.COM1: (0x3F8, 4),
    ComPort.COM2: (0x2F8, 3),
    ComPort.COM3: (0x3E8, 4),
    ComPort.COM4: (0x2E8, 3),
}


@dataclass
class SerialOptions:
    """What a user may set.

    Attributes:
        port: chooses the default address and interrupt line.
    """

    port: ComPort = ComPort.COM1

    def __post_init__(self) -> None:
        self.port = ComPort(self.port)


@dataclass
class SerialState:
    """The UART and what waits on its line.

    Attributes:
        fcr: the bits that last (8.5); 0 is the 16450 mode without FIFOs.
        divisor_low, divisor_high: kept for the guest; the line has no speed.
        msr_deltas: the low half of the MSR.
        overrun: LSR bit 1.
        thre_pending: the THR became empty and nobody was told yet (8.6, table IV).
        received: the receiver FIFO, oldest first; in 16450 mode the one-byte buffer.
        backlog: input that has not arrived yet.
        refused: the machine was told that there is no room for its input.
    """

    ier: U4 = 0
    fcr: U8 = 0
    lcr: U8 = 0
    mcr: U5 = 0
    scratch: U8 = 0
    divisor_low: U8 = 1
    divisor_high: U8 = 0
    msr_deltas: U4 = 0
    overrun: bool = False
    thre_pending: bool = False
    received: bytearray = field(default_factory=bytearray)
    backlog: bytearray = field(default_factory=bytearray)
    refused: bool = False

    def __post_init__(self) -> None:
        if self.fcr & ~_FCR_KEPT or (self.fcr and not self.fcr & Fcr.ENABLE):
            raise ValueError(f"FCR cannot be {self.fcr:#x}")
        if len(self.received) > self.capacity:
            raise ValueError(f"{len(self.received)} bytes in a receiver of {self.capacity}")
        if len(self.backlog) > BACKLOG_SIZE:
            raise ValueError(f"{len(self.backlog)} bytes wait, more than {BACKLOG_SIZE}")

    @property
    def capacity(self) -> int:
        """Bytes that the receiver holds."""
        return FIFO_SIZE if self.fcr else 1

    @property
    def trigger(self) -> int:
        """Bytes in the receiver from which on it interrupts."""
        return TRIGGER_LEVELS[self.fcr >> 6]


class Serial(ByteRegisters, Device):
    model: ClassVar[str] = "serial"
    summary: ClassVar[str] = "16550A serial port"
    Options = SerialOptions
    State = SerialState
    options: SerialOptions
    state: SerialState

    def __init__(self, host: DeviceHost, options: Any = None) -> None:
        super().__init__(host, options)
        self._line = False
        self._readers = (
            self._read_data,
            self._read_ier,
            self._read_iir,
            lambda: self.state.lcr,
            lambda: self.state.mcr,
            self._read_lsr,
            self._read_msr,
            lambda: self.state.scratch,
        )
        self._writers = (
            self._write_data,
            self._write_ier,
            self._write_fcr,
            self._write_lcr,
            self._write_mcr,
            _read_only,
            _read_only,
            self._write_scratch,
        )

    def regions(self) -> tuple[Region, ...]:
        start, irq = _PLACES[self.options.port]
        return (Region("registers", BusType.PIO, len(Register), start, irq),)

    def read_byte(self, offset: int, /) -> int:
        return self._readers[offset]()

    def write_byte(self, offset: int, value: int, /) -> None:
        self._writers[offset](value)

    # The outside world.

    def receive(self, data: bytes) -> int:
        """Put `data` on the line; see `TakesInput`. It may come while asleep."""
        state = self.state
        taken = min(len(data), BACKLOG_SIZE - len(state.backlog))
        state.backlog += data[:taken]
        if taken < len(data):
            state.refused = True
        if not self.asleep:
            self._update()
        return taken

    def _arrive(self) -> None:
        """Let the line fill the receiver; in loopback it is cut off (8.8, bit 4)."""
        state = self.state
        if not state.backlog or state.mcr & _LOOPBACK:
            return
        count = state.capacity - len(state.received)
        state.received += state.backlog[:count]
        del state.backlog[:count]
        # Only once half of it is free: else a long paste would be one request for each byte.
        if state.refused and len(state.backlog) <= BACKLOG_SIZE // 2:
            state.refused = False
            self.host.input_wanted()

    # Interrupts.

    def interrupt(self) -> Iir:
        """The interrupt of the highest priority that is enabled and pending (8.6, 8.11)."""
        state = self.state
        enabled = state.ier
        if state.overrun and enabled & _ENABLE_LINE:
            return Iir.LINE_STATUS
        if state.received and enabled & _ENABLE_DATA:
            full = len(state.received) >= state.trigger
            return Iir.RECEIVED_DATA if full else Iir.CHARACTER_TIMEOUT
        return self._interrupt_below_receiver()

    def _interrupt_below_receiver(self) -> Iir:
        state = self.state
        if state.thre_pending and state.ier & _ENABLE_THRE:
            return Iir.THR_EMPTY
        if state.msr_deltas and state.ier & _ENABLE_MODEM:
            return Iir.MODEM_STATUS
        return Iir.NONE

    def _update(self) -> None:
        """Bring what follows from the state up to date, after each change."""
        state = self.state
        if not state.received and state.ier & _ENABLE_DATA:
            self._arrive()
        self._drive(bool(state.mcr & _OUT2) and self.interrupt() is not Iir.NONE)

    def _drive(self, level: bool) -> None:
        if level != self._line:
            self._line = level
            self.host.set_irq(level)

    # Reading.

    def _read_data(self) -> int:
        """RBR, 0 when empty; with DLAB the low divisor latch."""
        state = self.state
        if state.lcr & _DLAB:
            return state.divisor_low
        if not state.received:
            self._arrive()
            if not state.received:
                return 0
        value = state.received.pop(0)
        if self._line and len(state.received) < state.trigger:
            others = state.overrun and state.ier & _ENABLE_LINE
            self._drive(bool(others) or self._interrupt_below_receiver() is not Iir.NONE)
        self._update()
        return value

    def _read_ier(self) -> int:
        state = self.state
        return state.divisor_high if state.lcr & _DLAB else state.ier

    def _read_iir(self) -> int:
        """Reading it ends a THRE interrupt, if that is what it shows (8.6, table IV)."""
        state = self.state
        if state.ier & _ENABLE_DATA:
            self._arrive()
        shown = self.interrupt()
        if shown is Iir.THR_EMPTY:
            state.thre_pending = False
        self._update()
        return shown | IIR_FIFOS_ENABLED if state.fcr else int(shown)

    def _read_lsr(self) -> int:
        """Reading it clears the error bits (8.4)."""
        state = self.state
        if state.backlog:
            self._arrive()
        value = _TRANSMITTER_IDLE
        if state.received:
            value |= _DATA_READY
        if state.overrun:
            value |= _OVERRUN
            state.overrun = False
            self._update()
        return value

    def _read_msr(self) -> int:
        """Reading it clears the delta bits (8.9)."""
        state = self.state
        value = modem_lines(state.mcr) | state.msr_deltas
        if state.msr_deltas:
            state.msr_deltas = 0
            self._update()
        return value

    # Writing.

    def _write_data(self, value: int) -> None:
        """THR; with DLAB the low divisor latch."""
        state = self.state
        if state.lcr & _DLAB:
            state.divisor_low = value
            return
        if state.ier & _ENABLE_THRE and state.thre_pending:
            state.thre_pending = False
            self._update()
        if state.mcr & _LOOPBACK:
            self._loop_back(value & WORD_MASKS[state.lcr & Lcr.WORD_LENGTH])
        else:
            self.host.output(bytes((value,)))
        state.thre_pending = True
        if state.ier:
            self._update()

    def _loop_back(self, value: int) -> None:
        """The character goes to the receiver, which may overrun (8.4, bit 1).

        Without FIFOs the new character destroys the old one; a full FIFO stays as it is.
        """
        state = self.state
        if len(state.received) < state.capacity:
            state.received.append(value)
            return
        state.overrun = True
        if not state.fcr:
            state.received[0] = value

    def _write_ier(self, value: int) -> None:
        """Enabling the THRE interrupt while the THR is empty raises it (8.7 with 8.11)."""
        state = self.state
        if state.lcr & _DLAB:
            state.divisor_high = value
            return
        if value & ~state.ier & _ENABLE_THRE:
            state.thre_pending = True
        state.ier = value & 0x0F
        self._update()

    def _write_fcr(self, value: int) -> None:
        """Other bits count only with bit 0; a change of bit 0 clears the FIFOs (8.5)."""
        state = self.state
        fcr = value & _FCR_KEPT if value & Fcr.ENABLE else 0
        if bool(fcr) != bool(state.fcr) or (fcr and value & Fcr.RESET_RECEIVER):
            state.received.clear()
        state.fcr = fcr
        self._update()

    def _write_lcr(self, value: int) -> None:
        self.state.lcr = value

    def _write_mcr(self, value: int) -> None:
        """In loopback the MCR outputs are the modem inputs, and may change them (8.8, 8.9)."""
        state = self.state
        before = modem_lines(state.mcr)
        state.mcr = value & 0x1F
        after = modem_lines(state.mcr)
        changed = before ^ after
        # RI counts only when it ends.
        changed &= ~(after & Msr.RI)
        state.msr_deltas |= changed >> 4
        self._update()

    def _write_scratch(self, value: int) -> None:
        self.state.scratch = value

    # Life.

    def wake(self) -> None:
        super().wake()
        self._update()

    def restored(self) -> None:
        state = self.state
        # The line is driven in any case: the machine does not know its level.
        self._line = bool(state.mcr & _OUT2) and self.interrupt() is not Iir.NONE
        self.host.set_irq(self._line)
        if not state.refused:
            self.host.input_wanted()


def _read_only(value: int) -> None:
    """LSR and MSR (8.4, 8.9): a write there is lost."""
