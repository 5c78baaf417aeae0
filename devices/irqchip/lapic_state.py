"""What a snapshot keeps of a local APIC, and which of it can be."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import msgspec

from devices.contract import U8, U32
from devices.irqchip.apic_registers import (
    BROADCAST,
    BROADCAST_X2APIC,
    ICR_WRITABLE,
    LOWEST_VECTOR,
    LVT_WRITABLE,
    U4,
    ApicMode,
    Entry,
    Lvt,
    Svr,
)
from devices.irqchip.lapic_timer import TimerState

Words = Annotated[list[U32], msgspec.Meta(min_length=8, max_length=8)]
"""256 bits, one for each vector, as the eight registers show them."""


def to_words(bits: int) -> list[int]:
    return [bits >> shift & 0xFFFF_FFFF for shift in range(0, 256, 32)]


def from_words(words: list[int]) -> int:
    return sum(word << 32 * index for index, word in enumerate(words))


def logical_id(apic_id: int) -> int:
    """The LDR in x2APIC mode: the cluster above, the bit of the member below (10.12.10.2)."""
    return apic_id >> 4 << 16 | 1 << (apic_id & 0xF)


@dataclass
class LapicState:
    """One local APIC; what it has after power-up (10.4.7.1).

    Attributes:
        mode: IA32_APIC_BASE: off, xAPIC or x2APIC.
        ldr: logical APIC ID, the top byte of the LDR.
        dfr: the model, the top four bits of the DFR: 15 flat, 0 cluster.
        esr: what the ESR reads.
        errors: found since the ESR was last written.
        lvt: the LVT entries by `Lvt`.
        irr, isr, tmr: brought up to date by `LocalApic.snapshot` only.
        lines: the levels of LINT0 (bit 0) and LINT1 (bit 1).
        nmi: an NMI waits for the CPU to take it.
    """

    mode: ApicMode = ApicMode.XAPIC
    id: U8 = 0
    tpr: U8 = 0
    ldr: U8 = 0
    dfr: U4 = 0xF
    svr: Annotated[int, msgspec.Meta(ge=0, le=0x3FF)] = 0xFF
    esr: U8 = 0
    errors: U8 = 0
    icr: U32 = 0
    icr_high: U32 = 0
    lvt: Annotated[list[U32], msgspec.Meta(min_length=len(Lvt), max_length=len(Lvt))] = field(
        default_factory=lambda: [int(Entry.MASKED)] * len(Lvt)
    )
    irr: Words = field(default_factory=lambda: [0] * 8)
    isr: Words = field(default_factory=lambda: [0] * 8)
    tmr: Words = field(default_factory=lambda: [0] * 8)
    lines: Annotated[int, msgspec.Meta(ge=0, le=3)] = 0
    nmi: bool = False
    timer: TimerState = field(default_factory=TimerState)

    def __post_init__(self) -> None:
        if any(words[0] & (1 << LOWEST_VECTOR) - 1 for words in (self.irr, self.isr, self.tmr)):
            raise ValueError("the vectors 0 to 15 are illegal")
        if self.icr & ~ICR_WRITABLE:
            raise ValueError("the ICR has reserved bits set")
        for entry, writable in zip(self.lvt, LVT_WRITABLE, strict=True):
            if entry & ~writable & ~Entry.REMOTE_IRR:
                raise ValueError("an LVT entry has reserved bits set")
            if not self.svr & Svr.ENABLE and not entry & Entry.MASKED:
                raise ValueError("all LVT entries of a disabled APIC are masked")
        for source, entry in enumerate(self.lvt):
            level = source == Lvt.LINT0 and entry & Entry.LEVEL and not entry & 0x700
            if entry & Entry.REMOTE_IRR and not level:
                raise ValueError("only a level-triggered LINT0 has a remote IRR")
        self.timer.check(self.lvt[Lvt.TIMER] >> 17)

    def matches(self, destination: int, logical: bool) -> bool:
        """Whether a message is meant for this APIC (10.6.2.1, 10.6.2.2, 10.12.10)."""
        if not self.mode:
            return False
        if destination in (BROADCAST, BROADCAST_X2APIC):
            return True
        if not logical:
            return destination == self.id
        if self.mode is ApicMode.X2APIC:
            own = logical_id(self.id)
            return destination >> 16 == own >> 16 and bool(destination & own & 0xFFFF)
        if self.dfr == 0xF:
            return bool(destination & self.ldr)
        same = destination >> 4 in (self.ldr >> 4, 0xF)
        return same and bool(destination & self.ldr & 0xF)
