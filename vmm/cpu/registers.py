"""Between the engine's registers and `CpuState`.

Most of the state lies in the context buffer. The parts that the engine keeps in a form of its own
(arithmetic flags, x87, SSE) go through its API, and the model-specific registers through RDMSR
and WRMSR, because some of them lie outside the buffer.
"""

from __future__ import annotations

import mmap

from vmm.cpu.budget import NO_LIMIT, Budget
from vmm.cpu.context import (
    CR0_PE,
    D_BIG,
    D_LONG,
    EFER_LMA,
    F_VM,
    MASK64,
    NONE,
    Context,
)
from vmm.cpu.intercept import Intercepts, available
from vmm.cpu.layout import (
    H_CPL,
    H_CS32,
    H_CS64,
    H_FPU,
    H_FPU_SHIFT,
    H_GUEST,
    H_IO_BREAKPOINT,
    H_LMA,
    H_OSFXSR,
    H_PE,
    H_SHADOW,
)
from vmm.cpu.library import REG, memory_of
from vmm.cpu.msrs import PASSED, READABLE
from vmm.cpu.nmi import NmiBlock
from vmm.cpu.state import CpuState, DescriptorTable, Segment
from vmm.cpu.tsc import Tsc
from vmm.cpu.validate import ATTRIBUTES, SEGMENT_NAMES, validate

_MSR_CANDIDATES = (
    *(0x174, 0x175, 0x176),  # SYSENTER_CS, _ESP, _EIP
    *(0x17A, 0x17B),  # MCG_STATUS, MCG_CTL
    *(0x1A0, 0x277, 0x2FF),  # MISC_ENABLE, PAT, MTRR default type
    *range(0x200, 0x210),  # variable MTRRs
    *(0x250, 0x258, 0x259, *range(0x268, 0x270)),  # fixed MTRRs
    *range(0x400, 0x428),  # machine-check banks
    *(0xC000_0081, 0xC000_0082, 0xC000_0083, 0xC000_0084),  # STAR, LSTAR, CSTAR, FMASK
    *(0xC000_0102, 0xC000_0103),  # KERNEL_GS_BASE, TSC_AUX
)
"""FS and GS bases are part of their segments, EFER is a field of its own."""

SCRATCH = 1 << 41
"""Physical address of a page for code of ours; guests reach 2**40 at most (`paging`)."""
_SET_DR7 = bytes.fromhex("0f23f8f4")  # mov dr7, rax; hlt
_DR7_ENABLES = 0xFF
_BREAKPOINTS = 32


class Registers:
    """Reads and writes the whole state of one engine."""

    def __init__(self, context: Context, budget: Budget, nmi: NmiBlock, tsc: Tsc) -> None:
        self._context = context
        self._nmi = nmi
        self._tsc = tsc
        self._budget = budget
        engine = context.engine
        self._scratch = mmap.mmap(-1, mmap.PAGESIZE)
        engine.map_ram(SCRATCH, mmap.PAGESIZE, memory_of(self._scratch))
        self._msr_reset = {n: engine.read_msr(n) for n in _MSR_CANDIDATES if self._keeps(n)}
        self._intercepts: Intercepts | None = None
        if available():
            self._intercepts = Intercepts(context, (*self._msr_reset, *PASSED), READABLE)
        context.save()
        self._pristine = bytes(context.bytes)

    def _keeps(self, number: int) -> bool:
        engine = self._context.engine
        value = engine.read_msr(number)
        engine.write_msr(number, value ^ MASK64)
        kept = engine.read_msr(number) != value
        engine.write_msr(number, value)
        return kept

    def capture(self, halted: bool) -> CpuState:
        """The state now."""
        context = self._context
        engine, at = context.engine, context.at
        context.save()
        longs, hidden = context.longs, context.hidden
        segments = {
            name: Segment(
                context.selector(index),
                context.base(index),
                context.limit(index),
                context.attributes(index) & ATTRIBUTES,
            )
            for index, name in enumerate(SEGMENT_NAMES)
        }
        if hidden & H_PE and not context.system_flags & F_VM:
            # The privilege level is SS.DPL by definition; the engine keeps it apart.
            ss = segments["ss"]
            ss.attributes = ss.attributes & ~(3 << 13) | (hidden & H_CPL) << 13
        return CpuState(
            gpr=longs[at.gpr : at.gpr + 16].tolist(),
            # Outside 64-bit code the engine lets EIP run past its 32 bits.
            rip=longs[at.rip] & (MASK64 if hidden & H_CS64 else NONE),
            rflags=context.live_flags() | 2,
            **segments,
            gdtr=DescriptorTable(*context.table(at.gdtr)),
            idtr=DescriptorTable(*context.table(at.idtr)),
            cr0=longs[at.cr] & NONE,
            cr2=longs[at.cr + 2],
            cr3=longs[at.cr + 3],
            cr4=longs[at.cr + 4] & NONE,
            cr8=longs[at.cr + 8] & 15,
            efer=longs[at.efer],
            dr=longs[at.dr : at.dr + 8].tolist(),
            msrs={number: engine.read_msr(number) for number in self._msr_reset},
            x87=[engine.read_wide(REG.UC_X86_REG_ST0 + i, 10).hex() for i in range(8)],
            fpu_control=engine.read(REG.UC_X86_REG_FPCW) & 0xFFFF,
            fpu_status=engine.read(REG.UC_X86_REG_FPSW) & 0xFFFF,
            fpu_tags=engine.read(REG.UC_X86_REG_FPTAG) & 0xFFFF,
            mxcsr=engine.read(REG.UC_X86_REG_MXCSR) & 0xFFFF,
            vectors=[engine.read_wide(REG.UC_X86_REG_XMM0 + i, 16).hex() for i in range(16)],
            halted=halted,
            interrupt_shadow=bool(hidden & H_SHADOW),
            nmi_blocked=self._nmi.holds(),
            tsc_offset=self._tsc.offset,
        )

    def load(self, state: CpuState) -> None:
        """Take up a state, and forget every translation of addresses and of code.

        Raises:
            UserError: see `validate`; nothing was changed.
        """
        validate(state, self._msr_reset)
        context = self._context
        engine, at = context.engine, context.at
        context.save()
        a20 = context.words[at.a20_w]  # a pin of the CPU, not a register
        if any(context.bytes[at.breakpoints_b : at.breakpoints_b + _BREAKPOINTS]):
            self._set_dr7(context.longs[at.dr : at.dr + 4].tolist(), 0x400)
        breakpoints = bytes(_BREAKPOINTS)
        if state.dr[7] & _DR7_ENABLES:
            breakpoints = self._set_dr7(state.dr[:4], state.dr[7])
        self._load_by_api(state)
        context.save()
        longs = context.longs
        for index in range(16):
            longs[at.gpr + index] = state.gpr[index]
        longs[at.rip] = state.rip
        for index, value in ((0, state.cr0), (2, state.cr2), (3, state.cr3), (4, state.cr4)):
            longs[at.cr + index] = value
        longs[at.cr + 8] = state.cr8
        longs[at.efer] = state.efer
        for index in range(8):
            longs[at.dr + index] = state.dr[index]
        context.bytes[at.breakpoints_b : at.breakpoints_b + _BREAKPOINTS] = breakpoints
        for index, name in enumerate(SEGMENT_NAMES):
            segment = getattr(state, name)
            context.put_segment(
                index, segment.selector, segment.base, segment.limit, segment.attributes
            )
        for place, table in ((at.gdtr, state.gdtr), (at.idtr, state.idtr)):
            longs[place + 1] = table.base
            context.words[2 * place + 4] = table.limit
        context.words[at.a20_w] = a20
        context.words[at.old_exception_w] = NONE
        context.hidden = self._hidden(state)
        context.derive_addressing()
        self._tsc.offset = state.tsc_offset
        self._nmi.forget()
        if state.nmi_blocked:
            self._nmi.begin()
        context.restore()
        engine.flush_tlb()
        engine.flush_translations()

    def _hidden(self, state: CpuState) -> int:
        """The engine's hidden flags that belong to this state, but for SS32 and ADDSEG."""
        hidden = state.cr0 << H_FPU_SHIFT & H_FPU
        if self._intercepts is not None:
            hidden |= H_GUEST
        if state.cr0 & CR0_PE:
            hidden |= H_PE
            hidden |= 3 if state.rflags & F_VM else state.ss.attributes >> 13 & 3
        if state.interrupt_shadow:
            hidden |= H_SHADOW
        if state.cr4 & 1 << 9:
            hidden |= H_OSFXSR
        if state.efer & EFER_LMA:
            hidden |= H_LMA
        if state.efer & EFER_LMA and state.cs.attributes & D_LONG:
            hidden |= H_CS32 | H_CS64
        elif state.cs.attributes & D_BIG:
            hidden |= H_CS32
        for index in range(4):
            # An enabled breakpoint on I/O (type 2) is a hidden flag, not a breakpoint object.
            if state.dr[7] >> 2 * index & 3 and state.dr[7] >> 16 + 4 * index & 3 == 2:
                hidden |= H_IO_BREAKPOINT
        return hidden

    def _load_by_api(self, state: CpuState) -> None:
        """Start from the engine's own first state and write what has an internal form."""
        context = self._context
        engine = context.engine
        context.bytes[:] = self._pristine
        context.restore()
        engine.write(REG.UC_X86_REG_EFLAGS, state.rflags | 2)
        engine.write(REG.UC_X86_REG_FPCW, state.fpu_control)
        engine.write(REG.UC_X86_REG_FPSW, state.fpu_status)
        for index in range(8):
            value = bytes.fromhex(state.x87[index]) if state.x87 else bytes(10)
            engine.write_wide(REG.UC_X86_REG_ST0 + index, value)
        engine.write(REG.UC_X86_REG_FPTAG, state.fpu_tags)
        engine.write(REG.UC_X86_REG_MXCSR, state.mxcsr)
        for index in range(16):
            value = bytes.fromhex(state.vectors[index]) if state.vectors else bytes(16)
            # The engine's upper halves hold whatever it worked on last, but without AVX no guest
            # can see them: they are zeroed here and never saved.
            engine.write_wide(REG.UC_X86_REG_YMM0 + index, value.ljust(32, b"\0"))
        for number, reset in self._msr_reset.items():
            engine.write_msr(number, state.msrs.get(number, reset))

    def _set_dr7(self, addresses: list[int], dr7: int) -> bytes:
        """Let the CPU execute MOV DR7, which alone makes and frees breakpoint objects.

        Gives the bytes of the context that refer to them.
        """
        context = self._context
        at, words = context.at, self._budget.words
        context.save()
        held = bytes(context.bytes[at.breakpoints_b : at.breakpoints_b + _BREAKPOINTS])
        old_dr7 = context.longs[at.dr + 7]
        context.bytes[:] = self._pristine
        context.bytes[at.breakpoints_b : at.breakpoints_b + _BREAKPOINTS] = held
        for index, value in enumerate(addresses):
            context.longs[at.dr + index] = value
        context.longs[at.dr + 7] = old_dr7
        context.longs[at.gpr] = dr7
        context.restore()
        self._scratch[: len(_SET_DR7)] = _SET_DR7  # CR3 may have led here, which marks entries
        executed = words[0]
        words[1] = NO_LIMIT
        context.engine.start(SCRATCH)
        words[0] = executed
        context.save()
        return bytes(context.bytes[at.breakpoints_b : at.breakpoints_b + _BREAKPOINTS])
