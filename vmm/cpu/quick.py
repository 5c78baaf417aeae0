"""The common case of event delivery, several times faster than `delivery`.

Nearly every exception of a running system is a 64-bit one: paging with four levels, an interrupt or
trap gate to ring-0 code, tables and stack mapped, present and already accessed, all in RAM. This
module recognises exactly that and does it without one call more than needed. At the first thing
that is otherwise it gives up, with nothing changed, and the complete code takes over; so no rule
of the architecture lives here alone.
"""

from __future__ import annotations

import struct

from vmm.cpu.context import (
    CR4_LA57,
    CS,
    D_GRANULAR,
    F_IF,
    F_NT,
    F_RF,
    F_TF,
    F_VM,
    MASK64,
    NONE,
    SS,
    TR,
    Context,
)
from vmm.cpu.layout import H_ADDSEG, H_CPL, H_CS32, H_CS64, H_LMA, H_SHADOW, H_SS32
from vmm.cpu.paging import ADDRESS, LARGE, PHYSICAL_BITS, Physical

_READ, _WRITE = 0x21, 0x23  # present and accessed; also writable
_DIRTY = 0x40
_ABNORMAL = ADDRESS & ~((1 << PHYSICAL_BITS) - 1)
_LARGE_ABNORMAL = 0x1F_E000
_CLEARED = F_TF | F_RF | F_NT | F_VM
_HIDDEN_CLEARED = H_CPL | H_SHADOW | H_ADDSEG | H_SS32
_CANONICAL = (0, 0x1FFFF)

# Bits 40-55 of a descriptor: present, S, code, long; not conforming, DPL 0, not D.
_CODE_MASK = 0x0060_FC00_0000_0000
_CODE_WANTED = 0x0020_9800_0000_0000

_FRAMES = {5: struct.Struct("<5Q").pack_into, 6: struct.Struct("<6Q").pack_into}


class QuickDelivery:
    """Delivers into a saved context if it can."""

    def __init__(self, context: Context, physical: Physical) -> None:
        self._context = context
        self._words, self._longs = context.words, context.longs
        self.ram, self._table = physical.low, physical.longs
        at = context.at
        self._hflags, self._eflags = at.hflags_w, at.eflags_w
        self._cr, self._gpr, self._rip = at.cr, at.gpr, at.rip
        self._idtr, self._gdtr = at.idtr, at.gdtr
        self._cs = at.segments + 3 * CS
        self._ss = at.segments + 3 * SS
        self._tr = at.segments + 3 * TR
        self._old_exception = at.old_exception_w

    def find(self, linear: int, write: bool = False) -> int:
        """The physical address in low RAM of a supervisor access, or -1: look closer."""
        if linear >> 47 not in _CANONICAL:
            return -1
        longs, table, cr = self._longs, self._table, self._cr
        if longs[cr + 4] & CR4_LA57:
            return -1
        wanted = _WRITE if write else _READ
        mask = wanted | _ABNORMAL | LARGE
        try:
            entry = table[(longs[cr + 3] & ADDRESS) >> 3 | linear >> 39 & 0x1FF]
            if entry & mask != wanted:
                return -1
            entry = table[(entry & ADDRESS) >> 3 | linear >> 30 & 0x1FF]
            if entry & mask != wanted:
                return -1
            entry = table[(entry & ADDRESS) >> 3 | linear >> 21 & 0x1FF]
            if entry & LARGE:
                if write:
                    wanted |= _DIRTY
                if entry & (wanted | _ABNORMAL | _LARGE_ABNORMAL) != wanted:
                    return -1
                place = entry & 0xFF_FFE0_0000 | linear & 0x1F_FFFF
            else:
                if entry & mask != wanted:
                    return -1
                entry = table[(entry & ADDRESS) >> 3 | linear >> 12 & 0x1FF]
                if write:
                    wanted |= _DIRTY
                if entry & (wanted | _ABNORMAL) != wanted:
                    return -1
                place = entry & ADDRESS | linear & 0xFFF
        except IndexError:
            return -1
        return place if place >> 3 < len(table) else -1

    def deliver(self, vector: int, code: int | None, software: bool) -> bool:
        """Enter the handler; False: not a common case, and nothing was changed."""
        words, longs, table, find = self._words, self._longs, self._table, self.find
        hidden = words[self._hflags]
        if not hidden & H_LMA or vector * 16 + 15 > words[2 * self._idtr + 4]:
            return False
        cpl = hidden & H_CPL
        place = find(longs[self._idtr + 1] + vector * 16 & MASK64)
        if place < 0 or place & 7 or place & 0xFFF > 0xFF0:
            return False
        gate, high = table[place >> 3], table[(place >> 3) + 1]
        selector = gate >> 16 & 0xFFFC
        if (
            gate >> 40 & 0x9E != 0x8E
            or (software and gate >> 45 & 3 < cpl)
            or not selector
            or selector & 4
            or selector + 7 > words[2 * self._gdtr + 4]
        ):
            return False
        rip = gate & 0xFFFF | gate >> 32 & 0xFFFF_0000 | (high & NONE) << 32
        place = find(longs[self._gdtr + 1] + selector & MASK64)
        if place < 0 or place & 7 or rip >> 47 not in _CANONICAL:
            return False
        descriptor = table[place >> 3]
        if descriptor & _CODE_MASK != _CODE_WANTED:
            return False
        limit = descriptor & 0xFFFF | descriptor >> 32 & 0xF_0000
        if descriptor >> 32 & D_GRANULAR:
            limit = limit << 12 | 0xFFF
        sp = old_sp = longs[self._gpr + 4]
        ist = gate >> 32 & 7
        if ist or cpl:
            at = 28 + 8 * ist if ist else 4
            if at + 7 > words[2 * self._tr + 4]:
                return False
            place = find(longs[self._tr + 1] + at & MASK64)
            if place < 0 or place & 0xFFF > 0xFF8:
                return False
            sp = int.from_bytes(self.ram[place : place + 8], "little")
        count = 5 if code is None else 6
        sp = (sp & ~15) - 8 * count & MASK64
        place = find(sp, True)
        if place < 0 or (place & 0xFFF) + 8 * count > 0x1000:
            return False
        cs, ss = 2 * self._cs, 2 * self._ss
        flags = self._context.live_flags()
        if code is None:
            _FRAMES[5](self.ram, place, longs[self._rip], words[cs], flags, old_sp, words[ss])
        else:
            frame = (code, longs[self._rip], words[cs], flags, old_sp, words[ss])
            _FRAMES[6](self.ram, place, *frame)
        # Bit 0 of the type tells a trap gate, which leaves IF alone.
        words[self._eflags] &= NONE & ~_CLEARED if gate >> 40 & 1 else NONE & ~(_CLEARED | F_IF)
        if cpl:
            words[ss], words[ss + 4], words[ss + 5] = 0, 0, 0
            longs[self._ss + 1] = 0
        words[cs] = selector
        longs[self._cs + 1] = 0
        words[cs + 4] = limit
        words[cs + 5] = descriptor >> 32
        words[self._hflags] = hidden & ~_HIDDEN_CLEARED | H_CS64 | H_CS32 | H_SS32
        longs[self._gpr + 4] = sp
        longs[self._rip] = rip
        words[self._old_exception] = NONE
        return True
