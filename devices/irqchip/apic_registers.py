"""The words of the APICs: register numbers, bits and encoded fields.

Source: Intel SDM volume 3A, chapter 10 "Advanced Programmable Interrupt Controller", for the local
APIC and for messages; the 82093AA data sheet (290566), section 3, for the IOAPIC.
"""

from __future__ import annotations

import enum
from typing import Annotated

import msgspec

U4 = Annotated[int, msgspec.Meta(ge=0, le=0xF)]
U63 = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]

APIC_BASE = 0xFEE0_0000
"""Where the local APIC's registers are, and where messages (MSI) are written to."""
LOWEST_VECTOR = 16
"""Vectors below it are illegal for an APIC (10.5.2); its IRR, ISR and TMR have no such bits."""
BROADCAST = 0xFF
"""The 8-bit destination that means everybody (10.6.2.1, 10.6.2.2)."""
BROADCAST_X2APIC = 0xFFFF_FFFF
"""The same with 32 bits (10.12.9)."""


class Register(enum.IntEnum):
    """Local APIC registers by number: offset / 16 in memory, MSR - 0x800 (table 10-1, 10-6)."""

    ID = 0x02
    VERSION = 0x03
    TPR = 0x08
    APR = 0x09
    PPR = 0x0A
    EOI = 0x0B
    RRD = 0x0C
    LDR = 0x0D
    DFR = 0x0E
    SVR = 0x0F
    ISR = 0x10
    TMR = 0x18
    IRR = 0x20
    ESR = 0x28
    ICR = 0x30
    ICR_HIGH = 0x31
    LVT = 0x32
    INITIAL_COUNT = 0x38
    CURRENT_COUNT = 0x39
    DIVIDE = 0x3E
    SELF_IPI = 0x3F


class DeliveryMode(enum.IntEnum):
    """Bits 10:8 of an LVT entry, the ICR, a redirection entry and a message's data."""

    FIXED = 0
    LOWEST_PRIORITY = 1
    SMI = 2
    NMI = 4
    INIT = 5
    STARTUP = 6
    EXTINT = 7


class Lvt(enum.IntEnum):
    """The entries of the local vector table, in the order of their registers (10.5.1)."""

    TIMER = 0
    THERMAL = 1
    PERFORMANCE = 2
    LINT0 = 3
    LINT1 = 4
    ERROR = 5


class Entry(enum.IntFlag):
    """Bits that an LVT entry and a redirection entry have in common; bits 7:0 are the vector."""

    LOGICAL = 1 << 11
    SEND_PENDING = 1 << 12
    ACTIVE_LOW = 1 << 13
    REMOTE_IRR = 1 << 14
    LEVEL = 1 << 15
    MASKED = 1 << 16


LVT_WRITABLE = (0x7_00FF, 0x1_07FF, 0x1_07FF, 0x1_A7FF, 0x1_A7FF, 0x1_00FF)
"""By `Lvt`: what software may set (figure 10-8)."""


class TimerMode(enum.IntEnum):
    """Bits 18:17 of the timer's LVT entry (10.5.4); the reserved value counts like one-shot."""

    ONE_SHOT = 0
    PERIODIC = 1
    TSC_DEADLINE = 2
    RESERVED = 3


class Svr(enum.IntFlag):
    """The spurious-interrupt vector register (10.9); bits 7:0 are the vector."""

    ENABLE = 1 << 8
    NO_FOCUS_CHECK = 1 << 9


class Esr(enum.IntFlag):
    """Errors that can happen with one CPU (10.5.3)."""

    SEND_ILLEGAL_VECTOR = 1 << 5
    RECEIVE_ILLEGAL_VECTOR = 1 << 6
    ILLEGAL_REGISTER = 1 << 7


class Shorthand(enum.IntEnum):
    """Bits 19:18 of the ICR (10.6.1)."""

    NONE = 0
    SELF = 1
    ALL = 2
    OTHERS = 3


ICR_WRITABLE = 0xC_CFFF
ICR_ASSERT = 1 << 14


class ApicMode(enum.IntEnum):
    """IA32_APIC_BASE bits 11:10, EN and EXTD (10.12.1)."""

    DISABLED = 0
    XAPIC = 2
    X2APIC = 3
