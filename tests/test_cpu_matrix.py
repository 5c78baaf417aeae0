"""The exception matrix: vector x mode x privilege x error code, against the manual's table.

What is expected comes from Intel SDM volume 3A: table 6-1 (vectors, classes, error codes), section
6.12 (frames; figures 6-4, 6-8), 6.14 (64-bit mode), 6.15 (which instruction the saved CS:EIP
names) and 20.1.4 (real mode); never from what the CPU did. A fault saves the address of its
instruction, a trap the one behind it. What the engine cannot do is marked as failing, by name.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
from cpu_bench import (
    CODE,
    GDT,
    HANDLERS,
    IDT,
    IST_STACK,
    K_CODE32,
    K_CODE64,
    K_DATA,
    K_DATA16,
    KERNEL_STACK,
    TSS,
    U_DATA,
    Bench,
)

from vmm.cpu.engine import StopReason
from vmm.cpu.state import CpuState, Segment

DATA, LOW_CODE, LOW_STACK = 0x6000, 0x7000, 0xF000
UNMAPPED = 0x700_0000
K_ABSENT, U_ABSENT, K_HANDLERS16, U_CODE16 = 0x58, 0x63, 0x68, 0x73
NOTHING = 0xFFF8
IF, DF, IOPL3, TF, NT, RF, VM = 0x200, 0x400, 0x3000, 0x100, 0x4000, 0x10000, 0x20000
KEPT = IF | DF | IOPL3 | TF | NT | VM | 0x240000
"""RFLAGS that are compared: all but the arithmetic flags and RF, which has a test of its own."""

REAL, V86, P16, P32, COMPAT, LONG = "real", "virtual-8086", "16-bit", "32-bit", "compat", "64-bit"
ALL = frozenset((REAL, V86, P16, P32, COMPAT, LONG))
SEGMENTED = frozenset((P16, P32, COMPAT, LONG))
"""Where a selector names a descriptor."""
SAME, INNER, IST = "same", "inner", "ist"
PRIVILEGES = {
    REAL: (SAME,),
    V86: (INNER,),
    P16: (SAME, INNER),
    P32: (SAME, INNER),
    COMPAT: (SAME, INNER, IST),
    LONG: (SAME, INNER, IST),
}
FAULT, TRAP, ABORT = "fault", "trap", "abort"

Setup = Callable[[Bench, CpuState, str], None]


def nothing(_bench: Bench, _state: CpuState, _mode: str) -> None:
    pass


@dataclass(frozen=True)
class Case:
    """One way to raise one vector.

    Attributes:
        at: where in `code` the instruction that raises it begins.
        length: of that instruction.
        error: the error code, `USER` set in it for user programs where it is a page fault's.
        missing: why the engine cannot do it, by mode ("" for every mode).
    """

    name: str
    vector: int
    kind: str
    code: bytes
    length: int
    error: int | None = None
    at: int = 0
    modes: frozenset[str] = ALL
    setup: Setup = nothing
    levels: tuple[str, ...] = (SAME, INNER, IST)
    missing: str = ""


def zero_divisor(_bench: Bench, state: CpuState, _mode: str) -> None:
    state.gpr[0], state.gpr[1] = 0x1234, 0


def quotient_too_large(_bench: Bench, state: CpuState, _mode: str) -> None:
    state.gpr[0], state.gpr[1] = 0xFFFF, 1


def bounds(bench: Bench, state: CpuState, _mode: str) -> None:
    bench.memory.write(DATA, bytes(16))
    state.gpr[0], state.gpr[3] = 0xFFFF_FFFF, DATA


def flags(mask: int) -> Setup:
    def setup(_bench: Bench, state: CpuState, _mode: str) -> None:
        state.rflags |= mask

    return setup


def task_switched(_bench: Bench, state: CpuState, _mode: str) -> None:
    state.cr0 |= 8


def absent_segment(_bench: Bench, state: CpuState, _mode: str) -> None:
    state.gpr[0] = U_ABSENT if state.ss.selector & 3 else K_ABSENT


def bad_selector(_bench: Bench, state: CpuState, _mode: str) -> None:
    state.gpr[0] = NOTHING | 3


def nested_in_nothing(bench: Bench, state: CpuState, _mode: str) -> None:
    state.rflags |= NT
    bench.memory.write(TSS, struct.pack("<H", K_DATA))


def unmapped(bench: Bench, state: CpuState, mode: str) -> None:
    state.gpr[3] = UNMAPPED if mode not in (P16, V86) else DATA
    if mode in (P16, P32, V86):
        table = 0x4000
        bench.memory.write(
            0x3000, struct.pack("<4I", table | 7, *(i << 22 | 0x87 for i in (1, 2, 3)))
        )
        pages = [i << 12 | 7 for i in range(1024)]
        pages[DATA >> 12] = 0
        bench.memory.write(table, struct.pack("<1024I", *pages))
        state.cr0, state.cr3, state.cr4 = 0x8001_0011, 0x3000, 0x10


def read_only(bench: Bench, state: CpuState, mode: str) -> None:
    unmapped(bench, state, mode)
    if mode in (P16, P32, V86):
        state.gpr[3] = DATA
        bench.memory.write(0x4000 + 4 * (DATA >> 12), struct.pack("<I", DATA | 5))
    else:
        state.gpr[3] = 0x20_0000
        bench.put(0x4000, 0x20_0005)


def not_executable(bench: Bench, state: CpuState, _mode: str) -> None:
    state.efer |= 0x800
    state.gpr[3] = 0x20_0000
    bench.put(0x4000, 0x20_0007 | 1 << 63)


def reserved_bit(bench: Bench, state: CpuState, _mode: str) -> None:
    state.gpr[3] = 0x20_0000
    bench.put(0x4000, 0x20_0007 | 1 << 51)


def fpu_zero_divide(_bench: Bench, state: CpuState, _mode: str) -> None:
    state.cr0 |= 0x20
    state.fpu_control = 0x37B


def sse_zero_divide(_bench: Bench, state: CpuState, _mode: str) -> None:
    state.cr0 |= 2
    state.cr4 |= 0x600
    state.mxcsr = 0x1F80 & ~0x200
    state.vectors = [struct.pack("<4f", i ^ 1, 0, 0, 0).hex() for i in range(16)]


def alignment(_bench: Bench, state: CpuState, _mode: str) -> None:
    state.cr0 |= 1 << 18
    state.rflags |= 1 << 18
    state.gpr[3] = DATA + 1


def without_gp_gate(bench: Bench, state: CpuState, mode: str) -> None:
    bad_selector(bench, state, mode)
    size = 16 if mode in (COMPAT, LONG) else 8
    bench.memory.write(IDT + 13 * size + 5, b"\x0e")


def not_canonical(_bench: Bench, state: CpuState, _mode: str) -> None:
    state.gpr[3] = 1 << 47


def stack_not_canonical(_bench: Bench, state: CpuState, _mode: str) -> None:
    state.gpr[4] = 1 << 47


NO_AC = "the engine checks no alignment"
NO_XM = "the engine raises no SIMD floating-point exceptions"
PAGED = frozenset((V86, P16, P32, COMPAT, LONG))
OLD = ALL - {LONG}
"""Modes that have INTO and BOUND."""

CASES = (
    Case("#DE divisor zero", 0, FAULT, b"\xf6\xf1", 2, setup=zero_divisor),
    Case("#DE quotient", 0, FAULT, b"\x90\xf6\xf1", 2, at=1, setup=quotient_too_large),
    Case("#DB single step", 1, TRAP, b"\x90\x90", 1, setup=flags(TF)),
    Case("#DB INT1", 1, TRAP, b"\x90\xf1", 1, at=1),
    Case("#BP", 3, TRAP, b"\x90\xcc", 1, at=1),
    Case("INT 3", 3, TRAP, b"\xcd\x03", 2),
    Case("#OF", 4, TRAP, b"\xce", 1, modes=OLD, setup=flags(0x800)),
    Case("#BR", 5, FAULT, b"\x62\x03", 2, modes=OLD, setup=bounds),
    Case("#UD UD2", 6, FAULT, b"\x90\x0f\x0b", 2, at=1),
    Case("#UD LOCK NOP", 6, FAULT, b"\xf0\x90", 2),
    Case("#UD PUSH ES", 6, FAULT, b"\x06", 1, modes=frozenset((LONG,))),
    Case("#NM", 7, FAULT, b"\xd9\xe8", 2, setup=task_switched),
    Case("#DF", 8, ABORT, b"\x8e\xd8", 2, 0, modes=SEGMENTED, setup=without_gp_gate),
    Case(
        "#TS nested task",
        10,
        FAULT,
        b"\xcf",
        1,
        K_DATA,
        modes=frozenset((P16, P32)),
        setup=nested_in_nothing,
    ),
    Case(
        "#NP", 11, FAULT, b"\x90\x8e\xd8", 2, K_ABSENT, at=1, modes=SEGMENTED, setup=absent_segment
    ),
    Case("#SS absent", 12, FAULT, b"\x8e\xd0", 2, K_ABSENT, modes=SEGMENTED, setup=absent_segment),
    Case(
        "#SS not canonical",
        12,
        FAULT,
        b"\x50",
        1,
        0,
        modes=frozenset((LONG,)),
        setup=stack_not_canonical,
        levels=(INNER, IST),
        missing="a stack that is not canonical gives #GP",
    ),
    Case(
        "#GP selector",
        13,
        FAULT,
        b"\x90\x8e\xd8",
        2,
        NOTHING,
        at=1,
        modes=SEGMENTED,
        setup=bad_selector,
    ),
    Case("#GP privilege", 13, FAULT, b"\xf4", 1, 0, modes=ALL - {REAL}, levels=(INNER,)),
    Case(
        "#GP not canonical",
        13,
        FAULT,
        b"\x8a\x03",
        2,
        0,
        modes=frozenset((LONG,)),
        setup=not_canonical,
    ),
    Case("#PF read", 14, FAULT, b"\x8a\x03", 2, 0, modes=PAGED, setup=unmapped),
    Case("#PF write", 14, FAULT, b"\x88\x03", 2, 2, modes=PAGED, setup=unmapped),
    Case("#PF protection", 14, FAULT, b"\x88\x03", 2, 3, modes=PAGED, setup=read_only),
    Case(
        "#PF reserved",
        14,
        FAULT,
        b"\x8a\x03",
        2,
        9,
        modes=frozenset((COMPAT, LONG)),
        setup=reserved_bit,
    ),
    Case(
        "#PF fetch",
        14,
        FAULT,
        b"\xff\xe3",
        0,
        0x11,
        modes=frozenset((COMPAT, LONG)),
        setup=not_executable,
    ),
    Case("#MF", 16, FAULT, b"\xd9\xe8\xd9\xee\xde\xf9\x9b", 1, at=6, setup=fpu_zero_divide),
    Case(
        "#AC",
        17,
        FAULT,
        b"\x8b\x03",
        2,
        0,
        modes=ALL - {REAL},
        levels=(INNER,),
        setup=alignment,
        missing=NO_AC,
    ),
    Case("#XM", 19, FAULT, b"\x0f\x5e\xc1", 3, setup=sse_zero_divide, missing=NO_XM),
    Case("INT 0x80", 0x80, TRAP, b"\x90\xcd\x80", 2, at=1),
    Case("NMI", 2, TRAP, b"", 0),
    Case("external interrupt", 0x31, TRAP, b"", 0),
)
ENGINE_CODE = {
    P16: {
        b"\x62\x03": b"\x62\x07",
        b"\x8a\x03": b"\x8a\x07",
        b"\x88\x03": b"\x88\x07",
        b"\x8b\x03": b"\x66\x8b\x07",
    }
}
ENGINE_CODE[REAL] = ENGINE_CODE[V86] = ENGINE_CODE[P16]
"""The same with a 16-bit address: [BX] for [EBX]."""


def build(bench: Bench, mode: str, level: str, vector: int) -> CpuState:
    """A state that is about to execute at CS:RIP, and a gate for `vector` of the mode's kind."""
    user = level != SAME
    if mode == REAL:
        state = bench.real()
        state.rflags = IF | DF | 2
        return state
    if mode in (COMPAT, LONG):
        state = bench.long(user and level == INNER, compat=mode == COMPAT)
        bench.gate64(vector, dpl=3, ist=1 if level == IST else 0)
    else:
        state = bench.protected(user, bits=16 if mode == P16 else 32)
        bench.gate32(vector, dpl=3)
    bench.put(
        GDT + K_ABSENT,
        0x00CF_1300_0000_FFFF,
        0x00CF_7300_0000_FFFF,
        0x0000_9B01_0000_FFFF,
        0x0000_FB00_0000_FFFF,
    )
    state.gdtr.limit = 0x77
    state.rflags = IF | DF | IOPL3 | 2
    if mode == P16:
        bench.put(IDT + 8 * vector, vector | K_HANDLERS16 << 16 | 0xE6 << 40)
        state.rip, state.gpr[4] = LOW_CODE, LOW_STACK
        if user:
            state.cs = Segment(U_CODE16, 0, 0xFFFF, 0xFB00)
            state.ss = Segment(U_DATA, 0, 0xFFFF_FFFF, 0xCFF300)
    if mode == V86:
        state.rflags |= VM
        for name in ("cs", "ss", "ds", "es", "fs", "gs"):
            selector = {"cs": CODE >> 4, "ss": 0x2000, "es": 0x111, "fs": 0x222, "gs": 0x333}.get(
                name, 0
            )
            setattr(state, name, Segment(selector, selector << 4, 0xFFFF, 0xF300))
        state.rip, state.gpr[4] = 0, LOW_STACK
    return state


def expected(case: Case, mode: str, level: str, before: CpuState) -> tuple[int, int, list[int]]:
    """(bytes of an item, where the frame ends, its items from the lowest address up)."""
    user = before.ss.selector & 3 == 3 or mode == V86
    behind = {FAULT: 0, ABORT: 0, TRAP: case.length}[case.kind]
    rip = before.rip + case.at + behind
    if case.name == "#PF fetch":
        rip = before.gpr[3]
    saved = [rip, before.cs.selector, before.rflags & KEPT]
    old = [before.gpr[4], before.ss.selector]
    error = []
    if case.error is not None and mode != REAL:
        code = case.error
        if case.vector == 14 and user:
            code |= 4
        if code == K_ABSENT and user:
            code = U_ABSENT & ~3
        error = [code]
    if mode == REAL:
        return 2, before.ss.base + before.gpr[4], saved
    if mode == V86:
        segments = [before.es, before.ds, before.fs, before.gs]
        return 4, KERNEL_STACK, error + saved + old + [s.selector for s in segments]
    if mode in (COMPAT, LONG):
        top = {SAME: before.gpr[4], INNER: KERNEL_STACK, IST: IST_STACK}[level]
        return 8, top, error + saved + old
    size = 2 if mode == P16 else 4
    if level == INNER:
        return size, KERNEL_STACK, error + saved + old
    return size, before.gpr[4], error + saved


def matrix() -> list[object]:
    return [
        pytest.param(
            case,
            mode,
            level,
            id=f"{case.name}-{mode}-{level}",
            marks=[pytest.mark.xfail(reason=case.missing, strict=True)] if case.missing else [],
        )
        for case in CASES
        for mode in (REAL, V86, P16, P32, COMPAT, LONG)
        for level in PRIVILEGES[mode]
        if mode in case.modes and (level in case.levels or mode == REAL)
    ]


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(("case", "mode", "level"), matrix())
def test_matrix(case: Case, mode: str, level: str, native: bool) -> None:
    with Bench(native=native) as bench:
        state = build(bench, mode, level, case.vector)
        case.setup(bench, state, mode)
        code = case.code
        for long_form, short in ENGINE_CODE.get(mode, {}).items():
            if code == long_form:
                code, case = short, replace(case, length=len(short))
        bench.start(state, code + b"\xeb\xfe", state.cs.base + state.rip)
        if case.name == "NMI":
            assert bench.cpu.inject_nmi() is None
        elif case.name == "external interrupt":
            assert bench.cpu.interruptible()
            assert bench.cpu.inject(case.vector) is None
        assert bench.cpu.run(2000).reason is StopReason.HALT, "no handler was entered"
        assert bench.vector() == case.vector
        after = bench.cpu.get_state()
        size, top, frame = expected(case, mode, level, state)
        mask = (1 << 8 * size) - 1
        start = top - size * len(frame)
        assert (after.ss.base + after.gpr[4]) == start
        saved = bench.words(start, len(frame), size)
        at = len(frame) - {REAL: 1, V86: 7}.get(mode, 3 if size == 8 or level == INNER else 1)
        assert saved[at] & 2
        saved[at] &= KEPT
        assert saved == [item & mask for item in frame]
        # CPL, CS, SS and RFLAGS of the handler.
        handler = {REAL: HANDLERS >> 4, P16: K_HANDLERS16, COMPAT: K_CODE64, LONG: K_CODE64}
        assert after.cs.selector == handler.get(mode, K_CODE32)
        assert after.ss.attributes >> 13 & 3 == 0
        if mode == REAL:
            stack = state.ss.selector
        elif mode in (COMPAT, LONG):
            stack = K_DATA if state.ss.selector & 3 == 0 else 0
        else:
            stack = K_DATA16 if mode == P16 and level == SAME else K_DATA
        assert after.ss.selector == stack
        gone = IF | TF | NT | VM | (1 << 18 if mode == REAL else 0)
        assert after.rflags & (KEPT | RF) == state.rflags & KEPT & ~gone
        assert after.cr2 == (state.gpr[3] if case.vector == 14 else 0)
        if case.vector == 1:
            assert bool(after.dr[6] & 0x4000) is (case.name == "#DB single step")
        if mode == V86:
            assert not after.ds.selector | after.es.selector | after.fs.selector | after.gs.selector


@pytest.mark.parametrize("mode", [P32, LONG])
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name in ("#UD UD2", "#PF read", "INT 0x80")]
)
def test_trap_gates_leave_if_alone(case: Case, mode: str) -> None:
    """SDM volume 3A, section 6.12.1.2."""
    with Bench() as bench:
        state = build(bench, mode, INNER, case.vector)
        case.setup(bench, state, mode)
        make = bench.gate64 if mode == LONG else bench.gate32
        make(case.vector, kind=15, dpl=3)
        bench.run(state, case.code)
        assert bench.vector() == case.vector
        assert bench.cpu.get_state().rflags & KEPT == state.rflags & KEPT


@pytest.mark.xfail(reason="RF is not saved: nothing needs it, see docs/cpu.md", strict=True)
@pytest.mark.parametrize("mode", [V86, P32, COMPAT, LONG])
def test_faults_save_rf(mode: str) -> None:
    """SDM volume 3B, section 17.3.1.1: a fault saves RFLAGS with RF set."""
    with Bench() as bench:
        state = build(bench, mode, INNER, 6)
        bench.run(state, b"\x0f\x0b")
        size = 8 if mode in (COMPAT, LONG) else 4
        assert bench.words(bench.cpu.get_state().gpr[4] + 2 * size, 1, size)[0] & RF


@pytest.mark.parametrize("mode", [P32, LONG])
def test_traps_and_interrupts_save_rf_as_it_is(mode: str) -> None:
    with Bench() as bench:
        bench.run(build(bench, mode, INNER, 0x80), b"\xcd\x80")
        size = 8 if mode == LONG else 4
        assert not bench.words(bench.cpu.get_state().gpr[4] + 2 * size, 1, size)[0] & RF


@pytest.mark.parametrize(
    ("case", "mode"),
    [
        pytest.param(case, mode, id=f"{case.name}-{mode}")
        for case in CASES
        for mode in (P32, LONG)
        if case.code and mode in case.modes and INNER in case.levels and not case.missing
    ],
)
def test_gates_of_dpl_0_are_for_software_interrupts_alone(case: Case, mode: str) -> None:
    """From CPL 3, INT n, INT3 and INTO need the gate's DPL; exceptions and INT1 do not."""
    with Bench() as bench:
        state = build(bench, mode, INNER, case.vector)
        (bench.gate64 if mode == LONG else bench.gate32)(case.vector)
        case.setup(bench, state, mode)
        bench.run(state, case.code + b"\xeb\xfe")
        checked = case.name in ("#BP", "INT 3", "#OF", "INT 0x80")
        assert bench.vector() == (13 if checked else case.vector)
        if checked:
            size = 8 if mode == LONG else 4
            frame = bench.words(bench.cpu.get_state().gpr[4], 2, size)
            assert frame == [case.vector * 8 + 2, CODE + case.at]
