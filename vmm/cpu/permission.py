"""I/O privilege: IN, OUT, INS and OUTS of programs that may not use a port raise #GP.

The engine checks nothing, and its port callback cannot raise an exception. So a forbidden access
is undone: the callback keeps a copy of the whole context, which is that before the instruction, and
points CR3 at an empty page. Whatever the CPU still executes up to the end of its block changes
registers alone, since any access to memory faults and ends the run. Then the copy is loaded again
and the fault delivered. One thing escapes: INS stores a zero at its destination before it reads the
port.

Source: Intel SDM volume 1, section 19.5 (I/O protection mechanisms).
"""

from __future__ import annotations

import mmap

from vmm.cpu.context import CR0_PE, CR0_PG, F_VM, TR, Context
from vmm.cpu.library import memory_of
from vmm.cpu.paging import Fault, Linear

_EMPTY = (1 << 41) + (1 << 20)
"""Physical address of a page of zeros; guests reach 2**40 at most (`paging`)."""
_BITMAP_AT = 0x66
"""Where a TSS of 32 or 64 bits holds the offset of its I/O permission bitmap."""


class IoPermission:
    """Checks one engine's port accesses at CPL > 0.

    Attributes:
        denied: the fault of the access that was forbidden; None as long as none was.
    """

    def __init__(self, context: Context, linear: Linear) -> None:
        self._context = context
        self._linear = linear
        self.denied: Fault | None = None
        self._before = b""
        self._page = mmap.mmap(-1, mmap.PAGESIZE)
        context.engine.map_ram(_EMPTY, mmap.PAGESIZE, memory_of(self._page))

    def forbids(self, port: int, size: int) -> bool:
        """Whether this access must not happen; the run must then end and `undo` be called."""
        if self.denied is not None:
            return True  # a later access of the same block
        context = self._context
        context.save()
        flags = context.system_flags
        if not context.control(0) & CR0_PE or (not flags & F_VM and context.cpl <= flags >> 12 & 3):
            return False
        try:
            if self._permits(port, size):
                return False
            self.denied = Fault(13, 0)
        except Fault as fault:  # the bitmap is not mapped
            self.denied = fault
        self._before = bytes(context.bytes)
        cr = context.at.cr
        context.longs[cr + 3] = _EMPTY
        context.longs[cr] |= CR0_PG
        context.restore()
        context.engine.flush_tlb()
        return True

    def undo(self) -> Fault:
        """Go back to before the forbidden access; the context is saved. Gives its fault."""
        fault, self.denied = self.denied, None
        assert fault is not None
        context = self._context
        context.bytes[:] = self._before
        if fault.vector == 14:
            context.longs[context.at.cr + 2] = fault.address
        context.restore()
        context.engine.flush_tlb()
        return fault

    def _permits(self, port: int, size: int) -> bool:
        """What the bitmap of the present task says.

        Raises:
            Fault: it cannot be read.
        """
        context, linear = self._context, self._linear
        base, limit = context.base(TR), context.limit(TR)
        if not context.attributes(TR) >> 11 & 1 or limit < _BITMAP_AT + 1:
            return False
        at = linear.number(base + _BITMAP_AT, 2) + (port >> 3)
        if at + 1 > limit:
            return False  # always two bytes are read
        return not linear.number(base + at, 2) >> (port & 7) & (1 << size) - 1
