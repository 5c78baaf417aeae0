"""The engine's context buffer by the names of the architecture.

Everything here works on the buffer: call `save` before, `restore` after. Restoring flushes
neither the TLB nor translated code, which is right as long as no paging register changes.

Source: Intel SDM volume 3A, sections 2.3 and 3.4.3; what loading a segment does to the engine's
hidden flags was derived from its behaviour and is tested mode by mode.
"""

from __future__ import annotations

from vmm.cpu.layout import (
    H_ADDSEG,
    H_CPL,
    H_CS32,
    H_CS64,
    H_LMA,
    H_SHADOW,
    H_SS32,
    calibrate,
)
from vmm.cpu.library import REG, Engine

ES, CS, SS, DS, FS, GS, LDTR, TR = range(8)
"""Segment registers in the engine's order, which is also the order of their encoding."""

RSP, RCX, R11 = 4, 1, 11

CR0_PE, CR0_TS, CR0_WP, CR0_PG = 1, 1 << 3, 1 << 16, 1 << 31
CR4_PSE, CR4_PAE, CR4_LA57 = 1 << 4, 1 << 5, 1 << 12
EFER_SCE, EFER_LME, EFER_LMA, EFER_NXE = 1, 1 << 8, 1 << 10, 1 << 11
F_TF, F_IF, F_NT, F_RF, F_VM, F_AC = 1 << 8, 1 << 9, 1 << 14, 1 << 16, 1 << 17, 1 << 18

D_CONFORMING, D_CODE = 1 << 10, 1 << 11
D_SEGMENT, D_PRESENT = 1 << 12, 1 << 15
D_LONG, D_BIG, D_GRANULAR = 1 << 21, 1 << 22, 1 << 23
"""Bits of a descriptor's second dword."""

NONE = 0xFFFF_FFFF
MASK64 = (1 << 64) - 1


class Context:
    """The buffer of `engine`, its fields at `at` (see `layout.Layout`)."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.at = calibrate()
        self.bytes = engine.bytes
        self.words = engine.words
        self.longs = engine.longs
        self.save = engine.save
        self.restore = engine.restore

    # Plain registers.

    @property
    def rip(self) -> int:
        return self.longs[self.at.rip]

    @rip.setter
    def rip(self, value: int) -> None:
        self.longs[self.at.rip] = value & MASK64

    @property
    def rsp(self) -> int:
        return self.longs[self.at.gpr + RSP]

    @rsp.setter
    def rsp(self, value: int) -> None:
        self.longs[self.at.gpr + RSP] = value & MASK64

    @property
    def hidden(self) -> int:
        """The engine's hidden flags (``layout.H_*``)."""
        return self.words[self.at.hflags_w]

    @hidden.setter
    def hidden(self, value: int) -> None:
        self.words[self.at.hflags_w] = value

    @property
    def cpl(self) -> int:
        return self.words[self.at.hflags_w] & H_CPL

    def live_flags(self) -> int:
        """RFLAGS with its arithmetic bits, which the buffer does not hold; from the CPU itself."""
        return self.engine.read(REG.UC_X86_REG_EFLAGS) & 0xFFFF_FFFF

    @property
    def system_flags(self) -> int:
        """RFLAGS without the arithmetic bits and DF."""
        return self.words[self.at.eflags_w]

    def clear_flags(self, mask: int) -> None:
        """Clear system flags (never arithmetic ones), and the interrupt shadow."""
        self.words[self.at.eflags_w] &= ~mask & NONE
        self.clear_shadow()

    def clear_shadow(self) -> None:
        """No longer is STI or MOV SS the instruction before."""
        self.words[self.at.hflags_w] &= ~H_SHADOW & NONE

    def control(self, number: int) -> int:
        return self.longs[self.at.cr + number]

    def set_a20(self, is_open: bool) -> None:
        """Address bit 20 is the CPU's, or always 0; at once."""
        self.save()
        self.words[self.at.a20_w] = NONE if is_open else NONE & ~(1 << 20)
        self.restore()
        self.engine.flush_tlb()

    def linear_rip(self) -> int:
        """The linear address of the next instruction."""
        if self.hidden & H_CS64:
            return self.rip
        return self.base(CS) + self.rip & NONE

    # Segments.

    def selector(self, segment: int) -> int:
        return self.words[2 * (self.at.segments + 3 * segment)]

    def base(self, segment: int) -> int:
        return self.longs[self.at.segments + 3 * segment + 1]

    def limit(self, segment: int) -> int:
        return self.words[2 * (self.at.segments + 3 * segment) + 4]

    def attributes(self, segment: int) -> int:
        """The descriptor's second dword; only the bits of `Segment.attributes` mean something."""
        return self.words[2 * (self.at.segments + 3 * segment) + 5]

    def table(self, at: int) -> tuple[int, int]:
        """(base, limit) of GDTR or IDTR, given its place in the layout."""
        return self.longs[at + 1], self.words[2 * at + 4]

    def put_segment(
        self, segment: int, selector: int, base: int, limit: int, attributes: int
    ) -> None:
        """Write a segment register with its hidden part, and nothing else."""
        at = self.at.segments + 3 * segment
        self.words[2 * at] = selector
        self.longs[at + 1] = base
        self.words[2 * at + 4] = limit
        self.words[2 * at + 5] = attributes

    def load_segment(
        self, segment: int, selector: int, base: int, limit: int, attributes: int
    ) -> None:
        """Write a segment register and do to the hidden flags what a load by the CPU does."""
        self.put_segment(segment, selector, base, limit, attributes)
        hidden = self.hidden
        if segment == CS:
            hidden &= ~(H_CS32 | H_CS64)
            if hidden & H_LMA and attributes & D_LONG:
                hidden |= H_CS32 | H_CS64
            elif attributes & D_BIG:
                hidden |= H_CS32
        elif segment == SS:
            hidden = hidden & ~H_CPL | attributes >> 13 & 3
        self.hidden = hidden
        self.derive_addressing()

    def derive_addressing(self) -> None:
        """Recompute the hidden flags SS32 and ADDSEG from the segments."""
        hidden = self.hidden & ~(H_SS32 | H_ADDSEG)
        if self.attributes(SS) & D_BIG or hidden & H_CS64:
            hidden |= H_SS32
        if not hidden & H_CS64 and (
            not self.control(0) & CR0_PE
            or self.system_flags & F_VM
            or not hidden & H_CS32
            or self.base(DS) | self.base(ES) | self.base(SS)
        ):
            hidden |= H_ADDSEG
        self.hidden = hidden
