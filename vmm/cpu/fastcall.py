"""SYSCALL and SYSENTER, which the engine leaves to its hooks; it does SYSRET and SYSEXIT itself.

Source: Intel SDM volume 2B, "SYSCALL" and "SYSENTER". As on Intel CPUs, SYSCALL exists in
64-bit mode only.
"""

from __future__ import annotations

from vmm.cpu.context import (
    CR0_PE,
    CS,
    EFER_SCE,
    F_IF,
    F_RF,
    F_VM,
    MASK64,
    NONE,
    R11,
    RCX,
    SS,
    Context,
)
from vmm.cpu.layout import H_CS64, H_LMA
from vmm.cpu.library import REG
from vmm.cpu.paging import Fault, Linear

_CODE64, _CODE32, _DATA = 0xA0_9B00, 0xC0_9B00, 0xC0_9300
_SYSENTER_CS, _SYSENTER_ESP, _SYSENTER_EIP = 0x174, 0x175, 0x176


class FastCalls:
    """Both instructions on a saved context, RIP at the instruction."""

    def __init__(self, context: Context, linear: Linear) -> None:
        self._context = context
        self._linear = linear

    def length(self, opcode: int) -> int:
        """The length of ``0F opcode`` at RIP, whose prefixes the engine does not tell."""
        context = self._context
        wide = context.hidden & H_CS64
        linear = context.rip if wide else context.base(CS) + context.rip & NONE
        wanted = bytes((0x0F, opcode))
        for length in (2, 15):  # the second read may reach an unmapped page
            try:
                at = self._linear.read(linear, length).find(wanted)
            except Fault:
                continue
            if at >= 0:
                return at + 2
        return 2

    def syscall(self, length: int) -> None:
        """Enter the kernel at LSTAR.

        Raises:
            Fault: #UD where the instruction does not exist.
        """
        context = self._context
        longs, at = context.longs, context.at
        if not context.hidden & H_CS64 or not longs[at.efer] & EFER_SCE:
            raise Fault(6)
        flags = context.live_flags()
        longs[at.gpr + RCX] = context.rip + length & MASK64
        longs[at.gpr + R11] = flags & ~F_RF
        mask = longs[at.fmask] | F_RF
        context.restore()
        context.engine.write(REG.UC_X86_REG_EFLAGS, flags & ~mask | 2)
        context.save()
        selector = longs[at.star] >> 32 & 0xFFFC
        context.load_segment(SS, selector + 8, 0, NONE, _DATA)
        context.load_segment(CS, selector, 0, NONE, _CODE64)
        context.clear_flags(0)
        context.rip = longs[at.lstar]

    def sysenter(self, _length: int) -> None:
        """Enter the kernel at SYSENTER_EIP.

        Raises:
            Fault: #GP(0) in real mode, or when SYSENTER_CS holds no selector.
        """
        context = self._context
        read = context.engine.read_msr
        selector = read(_SYSENTER_CS) & 0xFFFC
        if not context.control(0) & CR0_PE or not selector:
            raise Fault(13, 0)
        long_mode = context.hidden & H_LMA
        mask = MASK64 if long_mode else NONE
        context.clear_flags(F_VM | F_IF | F_RF)
        context.load_segment(SS, selector + 8, 0, NONE, _DATA)
        context.load_segment(CS, selector, 0, NONE, _CODE64 if long_mode else _CODE32)
        context.rsp = read(_SYSENTER_ESP) & mask
        context.rip = read(_SYSENTER_EIP) & mask
