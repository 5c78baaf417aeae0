"""Hardware task switches through a task gate, and descriptors.

The engine does task switches of far JMP, CALL and IRET itself; the one that an interrupt makes
through a task gate is ours, like every delivery.

Source: Intel SDM volume 3A, sections 7.2 (TSS) and 7.3 (task switching).
"""

from __future__ import annotations

import struct

from vmm.cpu.context import (
    CR0_PG,
    CR0_TS,
    CS,
    D_BIG,
    D_GRANULAR,
    D_PRESENT,
    D_SEGMENT,
    DS,
    ES,
    F_NT,
    F_VM,
    FS,
    GS,
    LDTR,
    NONE,
    SS,
    TR,
    Context,
)
from vmm.cpu.layout import H_CPL, H_FPU
from vmm.cpu.library import REG
from vmm.cpu.paging import Fault, Linear

INVALID_TSS, NOT_PRESENT, STACK, PROTECTION = 10, 11, 12, 13
_BUSY = 1 << 9
_SEGMENTS = (ES, CS, SS, DS, FS, GS)
_FLAGS = 0x27_7FD5
"""RFLAGS bits that a TSS may set."""


class TaskSwitch:
    """Task gates on a saved context."""

    def __init__(self, context: Context, linear: Linear) -> None:
        self._context = context
        self._linear = linear

    def descriptor(self, selector: int) -> tuple[int, int] | None:
        """The two dwords that `selector` names in the GDT or LDT; None beyond the table."""
        context = self._context
        if selector & 4:
            base, limit = context.base(LDTR), context.limit(LDTR)
        else:
            base, limit = context.table(context.at.gdtr)
        if selector | 7 > limit:
            return None
        low, high = struct.unpack("<II", self._linear.read(base + (selector & ~7), 8))
        return low, high

    def enter(self, selector: int, code: int | None, flags: int, external: bool) -> None:
        """Switch to the task of a task gate's `selector`, nested in the present one.

        Raises:
            Fault: before the switch in the old task's context; after it, in the new one's.
        """
        context, linear = self._context, self._linear
        error = selector & 0xFFFC | external
        pair = self.descriptor(selector) if not selector & 4 else None
        # An available 16-bit or 32-bit TSS: type 1 or 9.
        if pair is None or pair[1] >> 8 & 0x17 != 1:
            raise Fault(PROTECTION, error)
        if not pair[1] & D_PRESENT:
            raise Fault(NOT_PRESENT, error)
        wide = bool(pair[1] >> 11 & 1)
        base = pair[0] >> 16 | (pair[1] & 0xFF) << 16 | pair[1] & 0xFF00_0000
        limit = pair[0] & 0xFFFF | pair[1] & 0xF_0000
        if pair[1] & D_GRANULAR:
            limit = limit << 12 | 0xFFF
        if limit < (103 if wide else 43):
            raise Fault(INVALID_TSS, error)
        new = linear.read(base, 104 if wide else 44)
        self._leave(flags)
        linear.write(base, struct.pack("<H", context.selector(TR)))
        table, _ = context.table(context.at.gdtr)
        linear.write(table + (selector & ~7) + 4, struct.pack("<I", pair[1] | _BUSY))
        context.put_segment(TR, selector, base, limit, pair[1] | _BUSY)
        self._load(new, wide)
        if code is not None:
            self._push_code(code, 4 if wide else 2)

    def _leave(self, flags: int) -> None:
        """Store the present task in its TSS."""
        context, linear = self._context, self._linear
        base = context.base(TR)
        gpr = context.at.gpr
        values = [context.rip, flags, *context.longs[gpr : gpr + 8].tolist()]
        segments = [context.selector(s) for s in _SEGMENTS]
        if context.attributes(TR) >> 11 & 1:
            data = struct.pack("<10I", *(v & NONE for v in values))
            linear.write(base + 0x20, data + struct.pack("<6I", *segments))
        else:
            data = struct.pack("<10H", *(v & 0xFFFF for v in values))
            linear.write(base + 0xE, data + struct.pack("<4H", *segments[:4]))

    def _load(self, tss: bytes, wide: bool) -> None:
        context = self._context
        at = context.at
        if wide:
            cr3, rip, flags, *gpr = struct.unpack_from("<11I", tss, 0x1C)
            selectors = [v & 0xFFFF for v in struct.unpack_from("<7I", tss, 0x48)]
            if context.control(0) & CR0_PG:
                context.longs[at.cr + 3] = cr3
                context.restore()
                context.engine.flush_tlb()
        else:
            rip, flags, *gpr = struct.unpack_from("<10H", tss, 0xE)
            gpr = [v | 0xFFFF_0000 for v in gpr]
            es, cs, ss, ds, ldt = struct.unpack_from("<5H", tss, 0x22)
            selectors = [es, cs, ss, ds, 0, 0, ldt]
        context.longs[at.cr] |= CR0_TS
        context.hidden |= H_FPU & ~(H_FPU >> 1)  # HF_TS is the highest of the three
        context.restore()
        context.engine.write(REG.UC_X86_REG_EFLAGS, flags & _FLAGS | 2 | F_NT)
        context.save()
        context.rip = rip
        for index, value in enumerate(gpr):
            context.longs[at.gpr + index] = value
        self._load_ldt(selectors[6])
        if flags & F_VM:
            for segment, selector in zip(_SEGMENTS, selectors, strict=False):
                context.load_segment(segment, selector, selector << 4, 0xFFFF, 0xF300)
            return
        context.hidden = context.hidden & ~H_CPL | selectors[1] & 3
        for segment in (CS, SS, ES, DS, FS, GS):
            self._load_segment(segment, selectors[segment])

    def _load_ldt(self, selector: int) -> None:
        context = self._context
        context.put_segment(LDTR, selector & ~4, 0, 0, 0)
        if not selector & 0xFFFC:
            return
        pair = None if selector & 4 else self.descriptor(selector)
        if pair is None or pair[1] >> 8 & 0x1F != 2 or not pair[1] & D_PRESENT:
            raise Fault(INVALID_TSS, selector & 0xFFFC)
        base = pair[0] >> 16 | (pair[1] & 0xFF) << 16 | pair[1] & 0xFF00_0000
        context.put_segment(LDTR, selector, base, pair[0] & 0xFFFF | pair[1] & 0xF_0000, pair[1])

    def _load_segment(self, segment: int, selector: int) -> None:
        context = self._context
        if not selector & 0xFFFC:
            if segment in (CS, SS):
                raise Fault(INVALID_TSS, 0)
            context.put_segment(segment, selector, 0, 0, 0)
            return
        pair = self.descriptor(selector)
        if pair is None or not pair[1] & D_SEGMENT:
            raise Fault(INVALID_TSS, selector & 0xFFFC)
        if not pair[1] & D_PRESENT:
            raise Fault(STACK if segment == SS else NOT_PRESENT, selector & 0xFFFC)
        base = pair[0] >> 16 | (pair[1] & 0xFF) << 16 | pair[1] & 0xFF00_0000
        limit = pair[0] & 0xFFFF | pair[1] & 0xF_0000
        if pair[1] & D_GRANULAR:
            limit = limit << 12 | 0xFFF
        context.load_segment(segment, selector, base, limit, pair[1] | 0x100)

    def _push_code(self, code: int, size: int) -> None:
        context = self._context
        mask = NONE if context.attributes(SS) & D_BIG else 0xFFFF
        sp = context.rsp - size & mask
        place = context.base(SS) + sp & NONE
        self._linear.write(place, code.to_bytes(size, "little"), context.cpl == 3)
        context.rsp = context.rsp & ~mask & NONE | sp
