"""Instructions that the engine does not finish: SYSCALL, SYSENTER, INT1 and, when stepping, HLT.

The engine leaves the first two to its hooks; it does SYSRET and SYSEXIT itself.

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
from vmm.cpu.layout import H_ADDSEG, H_CPL, H_CS32, H_CS64, H_LMA, H_SHADOW, H_SS32
from vmm.cpu.paging import Fault, Linear
from vmm.cpu.quick import QuickDelivery

_CODE64, _CODE32, _DATA = 0xA0_9B00, 0xC0_9B00, 0xC0_9300
_SYSENTER_CS, _SYSENTER_ESP, _SYSENTER_EIP = 0x174, 0x175, 0x176


_PREFIXES = bytes((0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF2, 0xF3))
PREFIXES64 = _PREFIXES + bytes(range(0x40, 0x50))


class FastCalls:
    """Works on a saved context, RIP at the instruction."""

    def __init__(self, context: Context, linear: Linear) -> None:
        self._context = context
        self._linear = linear
        self._quick = QuickDelivery(context, linear.physical)

    def length(self, opcode: int) -> int:
        """The length of ``0F opcode`` at RIP, whose prefixes the engine does not tell."""
        context = self._context
        wide = context.hidden & H_CS64
        linear = context.linear_rip()
        place = self._quick.find(linear) if wide else -1
        if place >= 0 and place & 0xFFF < 0xFFF:
            code = self._quick.ram[place : place + 2]
            if code[1] == opcode and code[0] == 0x0F:
                return 2
        wanted = bytes((0x0F, opcode))
        for length in (2, 15):  # the second read may reach an unmapped page
            try:
                at = self._linear.read(linear, length).find(wanted)
            except Fault:
                continue
            if at >= 0:
                return at + 2
        return 2

    def after(self, wanted: bytes) -> int | None:
        """RIP behind the next instruction if that has this one-byte opcode; saves the context."""
        context = self._context
        context.save()
        wide = context.hidden & H_CS64
        linear = context.linear_rip()
        code = self._linear.peek(linear, 15)
        opcode = code.lstrip(PREFIXES64 if wide else _PREFIXES)
        return context.rip + len(code) - len(opcode) + 1 if opcode[:1] == wanted else None

    def syscall(self, length: int) -> int | None:
        """Enter the kernel at LSTAR; the new RFLAGS, to be written after the context.

        Raises:
            Fault: #UD where the instruction does not exist.
        """
        context = self._context
        words, longs, at = context.words, context.longs, context.at
        hidden = words[at.hflags_w]
        if not hidden & H_CS64 or not longs[at.efer] & EFER_SCE:
            raise Fault(6)
        flags = context.live_flags()
        longs[at.gpr + RCX] = longs[at.rip] + length & MASK64
        longs[at.gpr + R11] = flags & ~F_RF
        selector = longs[at.star] >> 32 & 0xFFFC
        context.put_segment(SS, selector + 8, 0, NONE, _DATA)
        context.put_segment(CS, selector, 0, NONE, _CODE64)
        words[at.hflags_w] = hidden & ~(H_CPL | H_SHADOW | H_ADDSEG) | H_CS32 | H_SS32
        longs[at.rip] = longs[at.lstar]
        return flags & ~(longs[at.fmask] | F_RF) | 2

    def sysenter(self, _length: int) -> int | None:
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
        return None
