"""Exceptions and interrupts through the guest's own tables, in every mode.

The engine only reports a vector; finding the handler, choosing a stack, pushing the frame and
loading CS, SS, RIP and RFLAGS happens here, on the saved context. Rules that hold throughout:

- Everything that can fault happens before anything is changed, so a fault needs no undoing.
- A fault met on the way is delivered in place of the first event; two that do not go together
  become a double fault, and a fault while delivering that one is a triple fault: shutdown
  (SDM volume 3A, section 6.15, "Interrupt 8").
- A software interrupt needs gate DPL >= CPL, and a fault while it is delivered returns *to* the
  INT instruction, although the engine has already moved RIP past it.

Sources: Intel SDM volume 3A, chapter 6, volume 2 "INT n/INTO/INT3/INT1", and for real mode
volume 3B, section 21.1.4. The engine checks no segment limits, so neither do we.
"""

from __future__ import annotations

import enum
import struct

from vmm.cpu.context import (
    CR0_PE,
    CS,
    D_BIG,
    D_CODE,
    D_CONFORMING,
    D_GRANULAR,
    D_LONG,
    D_PRESENT,
    D_SEGMENT,
    DS,
    ES,
    F_AC,
    F_IF,
    F_NT,
    F_RF,
    F_TF,
    F_VM,
    FS,
    GS,
    MASK64,
    NONE,
    SS,
    TR,
    Context,
)
from vmm.cpu.layout import H_CS64, H_LMA
from vmm.cpu.paging import Fault, Linear
from vmm.cpu.quick import QuickDelivery
from vmm.cpu.tasks import TaskSwitch

DOUBLE_FAULT, INVALID_TSS, NOT_PRESENT, STACK, PROTECTION, PAGE = 8, 10, 11, 12, 13, 14
DEBUG, INVALID_OPCODE = 1, 6
HAS_ERROR_CODE = frozenset((8, 10, 11, 12, 13, 14, 17, 21))
_CONTRIBUTORY = frozenset((0, 10, 11, 12, 13))

NAMES = (
    *("#DE", "#DB", "NMI", "#BP", "#OF", "#BR", "#UD", "#NM", "#DF", "vector 9", "#TS"),
    *("#NP", "#SS", "#GP", "#PF", "vector 15", "#MF", "#AC", "#MC", "#XM", "#VE", "#CP"),
)

TASK, INT16, TRAP16, INT32, TRAP32 = 5, 6, 7, 14, 15
"""Gate types, with the S bit (0) above them."""


def name_of(vector: int) -> str:
    return NAMES[vector] if vector < len(NAMES) else f"interrupt {vector:#x}"


class Source(enum.Enum):
    """Where an event comes from; it decides the DPL check, EXT and what a fault becomes."""

    EXCEPTION = 0
    EXTERNAL = 1
    SOFTWARE = 2


class TripleFault(Exception):
    """A fault while a double fault was delivered. The text names the chain of vectors."""


class Delivery:
    """Delivers events into a saved context."""

    def __init__(self, context: Context, linear: Linear) -> None:
        self._context = context
        self._linear = linear
        self._tasks = TaskSwitch(context, linear)
        self._quick = QuickDelivery(context, linear.physical)

    def deliver(self, vector: int, code: int | None, source: Source, note: str = "") -> None:
        """Enter the handler of `vector`. The context must be saved, and restored afterwards.

        Args:
            vector: 0..255.
            code: the error code, or None.
            source: see `Source`.
            note: why, for the text of a triple fault.

        Raises:
            TripleFault: the CPU shuts down; the context keeps the state before the event.
        """
        if self._quick.deliver(vector, code, source is Source.SOFTWARE):
            return
        context = self._context
        flags = context.live_flags()
        chain = [name_of(vector) + (f" ({note})" if note else "")]
        start = context.rip
        while True:
            try:
                self._enter(vector, code, source, flags)
            except Fault as fault:
                chain.append(_describe(fault))
                if vector == DOUBLE_FAULT and source is Source.EXCEPTION:
                    where = f"{context.selector(CS):#x}:{context.rip:#x}"
                    raise TripleFault(f"{' -> '.join(chain)}, at {where}") from None
                if source is Source.SOFTWARE:
                    context.rip = start - self._software_length(vector, start)
                if fault.vector == PAGE:
                    context.longs[context.at.cr + 2] = fault.address
                if source is Source.EXCEPTION and _make_double(vector, fault.vector):
                    vector, code = DOUBLE_FAULT, 0
                    chain.append(NAMES[DOUBLE_FAULT])
                else:
                    vector, code = fault.vector, fault.code
                source = Source.EXCEPTION
                flags = context.live_flags()  # a task switch may have loaded others
            else:
                break
        # The engine would otherwise make its next fault a double fault.
        context.words[context.at.old_exception_w] = NONE

    def _software_length(self, vector: int, after: int) -> int:
        """The length of the INT that ends at `after`: INT3, INTO and INT1 have one byte."""
        short = {3: 0xCC, 4: 0xCE, 1: 0xF1}.get(vector)
        context = self._context
        linear = context.base(CS) + after - 1 & (MASK64 if context.hidden & H_CS64 else NONE)
        try:
            return 1 if self._linear.number(linear, 1) == short else 2
        except Fault:
            return 2

    def _enter(self, vector: int, code: int | None, source: Source, flags: int) -> None:
        context = self._context
        if not context.control(0) & CR0_PE:
            self._enter_real(vector, flags)
        elif context.hidden & H_LMA:
            self._enter_long(vector, code, source, flags)
        else:
            self._enter_protected(vector, code, source, flags)

    # Real mode.

    def _enter_real(self, vector: int, flags: int) -> None:
        context, linear = self._context, self._linear
        table, limit = context.table(context.at.idtr)
        if vector * 4 + 3 > limit:
            raise Fault(PROTECTION)
        offset, selector = struct.unpack("<HH", linear.read(table + vector * 4, 4))
        mask = NONE if context.attributes(SS) & D_BIG else 0xFFFF
        frame = (flags, context.selector(CS), context.rip)
        sp = context.rsp
        for value in frame:
            sp = sp & ~mask | sp - 2 & mask
            linear.write(context.base(SS) + (sp & mask) & NONE, struct.pack("<H", value & 0xFFFF))
        context.rsp = sp
        context.rip = offset
        context.put_segment(CS, selector, selector << 4, context.limit(CS), context.attributes(CS))
        context.clear_flags(F_IF | F_TF | F_AC | F_RF)

    # Protected mode, 16-bit and 32-bit, and virtual-8086.

    def _gate(self, vector: int, size: int, source: Source, types: frozenset[int]) -> bytes:
        """The checked gate of `vector`."""
        context = self._context
        external = source is not Source.SOFTWARE
        code = vector * 8 + 2 + external
        table, limit = context.table(context.at.idtr)
        if (vector + 1) * size - 1 > limit:
            raise Fault(PROTECTION, code)
        gate = self._linear.read(table + vector * size, size)
        if gate[5] & 0x1F not in types:
            raise Fault(PROTECTION, code)
        if not external and gate[5] >> 5 & 3 < context.cpl:
            raise Fault(PROTECTION, code)
        if not gate[5] & 0x80:
            raise Fault(NOT_PRESENT, code)
        return gate

    def _code_segment(self, selector: int, external: bool) -> tuple[int, int]:
        """The checked descriptor of a handler's code segment."""
        if not selector & 0xFFFC:
            raise Fault(PROTECTION, int(external))
        code = selector & 0xFFFC | external
        pair = self._tasks.descriptor(selector)
        if pair is None or pair[1] & (D_SEGMENT | D_CODE) != D_SEGMENT | D_CODE:
            raise Fault(PROTECTION, code)
        if pair[1] >> 13 & 3 > self._context.cpl:
            raise Fault(PROTECTION, code)
        if not pair[1] & D_PRESENT:
            raise Fault(NOT_PRESENT, code)
        return pair

    def _enter_protected(self, vector: int, code: int | None, source: Source, flags: int) -> None:
        context = self._context
        external = source is not Source.SOFTWARE
        gate = self._gate(vector, 8, source, _GATES)
        kind = gate[5] & 0x1F
        selector = gate[2] | gate[3] << 8
        if kind == TASK:
            self._tasks.enter(selector, code, flags, external)
            return
        offset = gate[0] | gate[1] << 8
        wide = kind in (INT32, TRAP32)
        if wide:
            offset |= gate[6] << 16 | gate[7] << 24
        pair = self._code_segment(selector, external)
        cpl = context.cpl
        dpl = cpl if pair[1] & D_CONFORMING else pair[1] >> 13 & 3
        virtual = context.system_flags & F_VM
        if virtual and (dpl or pair[1] & D_CONFORMING):
            raise Fault(PROTECTION, selector & 0xFFFC | external)
        frame: list[int] = []
        stack = None
        if dpl < cpl:
            sp, stack_selector, stack = self._inner_stack(dpl, external)
            base, big = _base(stack), stack[1] & D_BIG
            if virtual:
                frame += [context.selector(s) for s in (GS, FS, DS, ES)]
            frame += [context.selector(SS), context.rsp]
        else:
            sp, base, big = context.rsp, context.base(SS), context.attributes(SS) & D_BIG
        frame += [flags, context.selector(CS), context.rip]
        if code is not None:
            frame.append(code)
        mask = NONE if big else 0xFFFF
        size = 4 if wide else 2
        data = struct.pack(
            f"<{len(frame)}{'I' if wide else 'H'}",
            *(value & (1 << 8 * size) - 1 for value in reversed(frame)),
        )
        self._push(base, sp & mask, mask, data, dpl == 3)
        sp = sp & ~mask & NONE | sp - len(data) & mask
        if stack is not None:
            if virtual:
                for segment in (ES, DS, FS, GS):
                    context.put_segment(segment, 0, 0, 0, 0)
            context.clear_flags(F_VM)
            rpl = stack_selector & ~3 | dpl
            context.load_segment(SS, rpl, base, limit_of(stack), stack[1])
        context.rsp = sp
        context.clear_flags(F_TF | F_RF | F_NT | (0 if kind & 1 else F_IF))
        context.load_segment(CS, selector & ~3 | dpl, _base(pair), limit_of(pair), pair[1])
        context.rip = offset

    def _push(self, base: int, top: int, mask: int, data: bytes, user: bool) -> None:
        """Write `data` below base:top, wrapping at the stack's width."""
        linear = self._linear
        if top == 0 or len(data) <= top:
            linear.write(base + (top - len(data) & mask) & NONE, data, user)
            return
        linear.write(base & NONE, data[-top:], user)  # it goes on at the segment's other end
        linear.write(base + mask + 1 - (len(data) - top) & NONE, data[:-top], user)

    def _inner_stack(self, dpl: int, external: bool) -> tuple[int, int, tuple[int, int]]:
        """(ESP, SS selector, SS descriptor) for privilege level `dpl`, from the TSS."""
        context, linear = self._context, self._linear
        base, limit = context.base(TR), context.limit(TR)
        wide = context.attributes(TR) >> 11 & 1  # a 32-bit TSS
        at, size = (dpl * 8 + 4, 4) if wide else (dpl * 4 + 2, 2)
        if at + size + 1 > limit:
            raise Fault(INVALID_TSS, context.selector(TR) & 0xFFFC | external)
        esp = linear.number(base + at & NONE, size)
        selector = linear.number(base + at + size & NONE, 2)
        code = selector & 0xFFFC | external
        if not selector & 0xFFFC or selector & 3 != dpl:
            raise Fault(INVALID_TSS, code)
        pair = self._tasks.descriptor(selector)
        writable_data = D_SEGMENT | 1 << 9
        if (
            pair is None
            or pair[1] >> 13 & 3 != dpl
            or pair[1] & (writable_data | D_CODE) != writable_data
        ):
            raise Fault(INVALID_TSS, code)
        if not pair[1] & D_PRESENT:
            raise Fault(STACK, code)
        return esp, selector, pair

    # Long mode.

    def _enter_long(self, vector: int, code: int | None, source: Source, flags: int) -> None:
        context, linear = self._context, self._linear
        external = source is not Source.SOFTWARE
        gate = self._gate(vector, 16, source, _LONG_GATES)
        low, selector, ist, kind, middle, high = _LONG_GATE.unpack(gate)
        offset = low | middle << 16 | high << 32
        pair = self._code_segment(selector, external)
        if pair[1] & (D_LONG | D_BIG) != D_LONG:
            raise Fault(PROTECTION, selector & 0xFFFC | external)
        cpl = context.cpl
        dpl = cpl if pair[1] & D_CONFORMING else pair[1] >> 13 & 3
        sp = old_sp = context.rsp
        at = 28 + 8 * (ist & 7) if ist & 7 else 4 + 8 * dpl if dpl < cpl else 0
        if at:
            if at + 7 > context.limit(TR):
                raise Fault(INVALID_TSS, context.selector(TR) & 0xFFFC | external)
            sp = linear.number(context.base(TR) + at & MASK64, 8)
        if not linear.canonical(offset):
            raise Fault(PROTECTION, int(external))
        sp &= ~15
        old = (context.rip, context.selector(CS), flags, old_sp, context.selector(SS))
        frame = old if code is None else (code, *old)
        sp = sp - 8 * len(frame) & MASK64
        if not linear.canonical(sp) or not linear.canonical(sp + 8 * len(frame) - 1 & MASK64):
            raise Fault(STACK, int(external))
        linear.write(sp, struct.pack(f"<{len(frame)}Q", *frame), dpl == 3)
        context.clear_flags(F_TF | F_RF | F_NT | F_VM | (0 if kind & 1 else F_IF))
        if dpl < cpl:
            context.load_segment(SS, dpl, 0, 0, dpl << 13)
        context.rsp = sp
        # 64-bit code has no base, whatever the descriptor says; the engine would add it to RIP.
        context.load_segment(CS, selector & ~3 | dpl, 0, limit_of(pair), pair[1])
        context.rip = offset


_GATES = frozenset((TASK, INT16, TRAP16, INT32, TRAP32))
_LONG_GATES = frozenset((INT32, TRAP32))
_LONG_GATE = struct.Struct("<HHBBHIxxxx")


def _base(pair: tuple[int, int]) -> int:
    """The base address in a descriptor given as two dwords."""
    return pair[0] >> 16 | (pair[1] & 0xFF) << 16 | pair[1] & 0xFF00_0000


def limit_of(pair: tuple[int, int]) -> int:
    """The limit in a descriptor, in bytes."""
    limit = pair[0] & 0xFFFF | pair[1] & 0xF_0000
    return limit << 12 | 0xFFF if pair[1] & D_GRANULAR else limit


def _make_double(first: int, second: int) -> bool:
    """Whether two exceptions become a double fault (SDM table 6-5)."""
    if first in _CONTRIBUTORY:
        return second in _CONTRIBUTORY
    return first == PAGE and (second == PAGE or second in _CONTRIBUTORY)


def _describe(fault: Fault) -> str:
    if fault.vector == PAGE:
        return f"#PF at {fault.address:#x}"
    return name_of(fault.vector)
