"""The registers of a 16550A, as the National PC16550D data sheet (1995) defines them.

Section numbers in the docstrings are those of that data sheet.
"""

from __future__ import annotations

import enum


class Register(enum.IntEnum):
    """Offsets; reading and writing may reach different registers (8.0, table II).

    While `Lcr.DLAB` is set, `DATA` and `IER` are the low and the high divisor latch (8.3).
    """

    DATA = 0
    IER = 1
    IIR_FCR = 2
    LCR = 3
    MCR = 4
    LSR = 5
    MSR = 6
    SCR = 7


class Ier(enum.IntFlag):
    """Interrupt enable (8.7); bits 4..7 are always zero."""

    RECEIVED_DATA = 0x01
    THR_EMPTY = 0x02
    LINE_STATUS = 0x04
    MODEM_STATUS = 0x08


class Iir(enum.IntEnum):
    """Interrupt identification, bits 3..0 (8.6, table IV): a code of priorities, no bit set."""

    MODEM_STATUS = 0x0
    NONE = 0x1
    THR_EMPTY = 0x2
    RECEIVED_DATA = 0x4
    LINE_STATUS = 0x6
    CHARACTER_TIMEOUT = 0xC


IIR_FIFOS_ENABLED = 0xC0


class Fcr(enum.IntFlag):
    """FIFO control (8.5). The two resets clear themselves; the DMA mode only moves pins."""

    ENABLE = 0x01
    RESET_RECEIVER = 0x02
    RESET_TRANSMITTER = 0x04
    DMA_MODE = 0x08
    TRIGGER = 0xC0


TRIGGER_LEVELS = (1, 4, 8, 14)
"""Bytes in the receiver FIFO at which it interrupts, by FCR bits 7..6."""

FIFO_SIZE = 16


class Lcr(enum.IntFlag):
    """Line control (8.1). Parity, stop bits and break have no effect on a line of whole bytes."""

    WORD_LENGTH = 0x03
    STOP_BITS = 0x04
    PARITY = 0x08
    EVEN_PARITY = 0x10
    STICK_PARITY = 0x20
    BREAK = 0x40
    DLAB = 0x80


WORD_MASKS = (0x1F, 0x3F, 0x7F, 0xFF)
"""The bits of a character of 5, 6, 7, 8 bits, by LCR bits 1..0."""


class Mcr(enum.IntFlag):
    """Modem control (8.8); bits 5..7 are always zero."""

    DTR = 0x01
    RTS = 0x02
    OUT1 = 0x04
    OUT2 = 0x08
    LOOPBACK = 0x10


class Lsr(enum.IntFlag):
    """Line status (8.4). A line of whole bytes knows no parity, framing or break errors."""

    DATA_READY = 0x01
    OVERRUN = 0x02
    PARITY_ERROR = 0x04
    FRAMING_ERROR = 0x08
    BREAK = 0x10
    THR_EMPTY = 0x20
    TRANSMITTER_EMPTY = 0x40
    FIFO_ERROR = 0x80


class Msr(enum.IntFlag):
    """Modem status (8.9). The low half says what changed since the last read."""

    DELTA_CTS = 0x01
    DELTA_DSR = 0x02
    TRAILING_EDGE_RI = 0x04
    DELTA_DCD = 0x08
    CTS = 0x10
    DSR = 0x20
    RI = 0x40
    DCD = 0x80


def modem_lines(mcr: int) -> int:
    """MSR bits 7..4: in loopback RTS, DTR, OUT1, OUT2 (8.8), else a modem that is ready."""
    if not mcr & Mcr.LOOPBACK:
        return int(Msr.CTS | Msr.DSR | Msr.DCD)
    lines = 0
    if mcr & Mcr.RTS:
        lines |= Msr.CTS
    if mcr & Mcr.DTR:
        lines |= Msr.DSR
    if mcr & Mcr.OUT1:
        lines |= Msr.RI
    if mcr & Mcr.OUT2:
        lines |= Msr.DCD
    return int(lines)
