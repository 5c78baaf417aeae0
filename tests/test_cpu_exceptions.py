"""Events through the guest's tables: vectors x modes x privileges, and everything that goes wrong.

Every handler is one HLT, so `Bench.vector` tells which one was entered.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

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
    KERNEL_STACK,
    TSS,
    U_CODE32,
    U_CODE64,
    U_DATA,
    USER_STACK,
    WINDOW,
    WINDOW_TABLE,
    Bench,
)

from vmm.cpu.engine import StopReason
from vmm.cpu.state import Segment

pytestmark = pytest.mark.usefixtures("both_paths")

UNMAPPED = 0x700_0000

# name: (code for 64 bits, code for 32 and 16 bits, vector, error code or None, offset of the
# faulting instruction)
FAULTS64 = {
    "divide": (
        bytes.fromhex(
            # xor ecx, ecx; div ecx
            "31c9f7f1"
        ),
        0,
        None,
        2,
    ),
    "breakpoint": (
        bytes.fromhex(
            # nop; int3
            "90cc"
        ),
        3,
        None,
        2,
    ),
    "invalid opcode": (
        bytes.fromhex(
            # nop; ud2
            "900f0b"
        ),
        6,
        None,
        1,
    ),
    "general protection": (
        bytes.fromhex(
            # mov eax, 0x33; mov ss, eax
            "b8330000008ed0"
        ),
        13,
        0x30,
        5,
    ),
    "not canonical": (
        bytes.fromhex(
            # mov rax, 0x800000000000; mov [rax], al
            "48b800000000008000008800"
        ),
        13,
        0,
        10,
    ),
    "page not present": (
        bytes.fromhex(
            # mov [0x7000000], al
            "88042500000007"
        ),
        14,
        2,
        0,
    ),
    "software interrupt": (
        bytes.fromhex(
            # int 0x80
            "cd80"
        ),
        0x80,
        None,
        2,
    ),
}
FAULTS32 = {
    "divide": (
        bytes.fromhex(
            # xor ecx, ecx; div ecx
            "31c9f7f1"
        ),
        0,
        None,
        2,
    ),
    "breakpoint": (
        bytes.fromhex(
            # nop; int3
            "90cc"
        ),
        3,
        None,
        2,
    ),
    "overflow": (
        bytes.fromhex(
            # mov al, 0x7f; add al, 1; into
            "b07f0401ce"
        ),
        4,
        None,
        5,
    ),
    "bound": (
        bytes.fromhex(
            # xor eax, eax; dec eax; bound eax, [0x28000]
            "31c048620500800200"
        ),
        5,
        None,
        3,
    ),
    "invalid opcode": (
        bytes.fromhex(
            # nop; ud2
            "900f0b"
        ),
        6,
        None,
        1,
    ),
    "general protection": (
        bytes.fromhex(
            # mov eax, 0x33; mov ss, eax
            "b8330000008ed0"
        ),
        13,
        0x30,
        5,
    ),
    "software interrupt": (
        bytes.fromhex(
            # int 0x80
            "cd80"
        ),
        0x80,
        None,
        2,
    ),
}
OPEN = (3, 4, 0x80)
"""Vectors that a user program may call: gates with DPL 3."""


@pytest.mark.parametrize("user", [False, True])
@pytest.mark.parametrize("name", FAULTS64)
def test_long_mode(name: str, user: bool) -> None:
    code, vector, error, offset = FAULTS64[name]
    with Bench() as bench:
        state = bench.long(user)
        for gate in OPEN:
            bench.gate64(gate, dpl=3)
        assert bench.run(state, code).reason is StopReason.HALT
        assert bench.vector() == vector
        after = bench.cpu.get_state()
        frame = [
            CODE + offset,
            U_CODE64 if user else K_CODE64,
            after.rflags & 0x8D5 | 2,
            USER_STACK if user else KERNEL_STACK,
            U_DATA if user else K_DATA,
        ]
        if error is not None:
            frame.insert(0, error | (4 if user and vector == 14 else 0))
        assert after.gpr[4] == KERNEL_STACK - 8 * len(frame)
        assert bench.words(after.gpr[4], len(frame)) == frame
        assert after.cs.selector == K_CODE64
        assert after.ss.selector == (0 if user else K_DATA)
        if vector == 14:
            assert after.cr2 == UNMAPPED


@pytest.mark.parametrize("user", [False, True])
@pytest.mark.parametrize("name", FAULTS32)
def test_protected_mode(name: str, user: bool) -> None:
    code, vector, error, offset = FAULTS32[name]
    with Bench() as bench:
        state = bench.protected(user)
        for gate in OPEN:
            bench.gate32(gate, dpl=3)
        assert bench.run(state, code).reason is StopReason.HALT
        assert bench.vector() == vector
        after = bench.cpu.get_state()
        frame = [CODE + offset, U_CODE32 if user else K_CODE32, after.rflags & 0x8D5 | 2]
        if user:
            frame += [USER_STACK, U_DATA]
        if error is not None:
            frame.insert(0, error)
        assert after.gpr[4] == KERNEL_STACK - 4 * len(frame)
        assert bench.words(after.gpr[4], len(frame), 4) == frame
        assert after.cs.selector == K_CODE32
        assert after.ss.selector == K_DATA


@pytest.mark.parametrize("kind", [6, 7, 14, 15])
def test_gate_kinds(kind: int) -> None:
    """16-bit gates push 16-bit frames; interrupt gates clear IF, trap gates do not."""
    with Bench() as bench:
        state = bench.protected()
        state.rflags = 0x202
        state.rip = 0x7000  # below 64 KiB: a 16-bit frame must hold it
        bench.gate32(0x21, kind, dpl=0)
        handler = HANDLERS + 0x21
        if kind < 8:
            handler &= 0xFFFF
            bench.memory.write(handler, b"\xf4")
        assert (
            bench.run(
                state,
                bytes.fromhex(
                    # int 0x21
                    "cd21"
                ),
            ).reason
            is StopReason.HALT
        )
        after = bench.cpu.get_state()
        assert after.rip == handler + 1
        size = 4 if kind > 8 else 2
        assert after.gpr[4] == KERNEL_STACK - 3 * size
        assert bench.words(after.gpr[4], 3, size) == [0x7002, K_CODE32, 0x202]
        assert bool(after.rflags & 0x200) == bool(kind & 1)


REAL_FAULTS = {
    "divide": (
        bytes.fromhex(
            # xor cx, cx; div cx
            "31c9f7f1"
        ),
        0,
        2,
    ),
    "breakpoint": (
        bytes.fromhex(
            # nop; int3
            "90cc"
        ),
        3,
        2,
    ),
    "invalid opcode": (
        bytes.fromhex(
            # nop; ud2
            "900f0b"
        ),
        6,
        1,
    ),
    "software interrupt": (
        bytes.fromhex(
            # int 0x21
            "cd21"
        ),
        0x21,
        2,
    ),
}


@pytest.mark.parametrize("name", REAL_FAULTS)
def test_real_mode(name: str) -> None:
    code, vector, offset = REAL_FAULTS[name]
    with Bench() as bench:
        state = bench.real()
        state.rflags = 0x202
        assert bench.run(state, code).reason is StopReason.HALT
        assert bench.vector() == vector
        after = bench.cpu.get_state()
        assert after.gpr[4] == 0x8000 - 6
        flags = bench.words(0x28000 - 6, 3, 2)
        assert flags[:2] == [offset, CODE >> 4]
        assert flags[2] & 0x200
        assert not after.rflags & 0x200


def test_real_mode_stack_wraps() -> None:
    with Bench() as bench:
        state = bench.real()
        state.gpr[4] = 0xABCD_0002
        bench.run(
            state,
            bytes.fromhex(
                # int 0x21
                "cd21"
            ),
        )
        assert bench.vector() == 0x21
        assert bench.cpu.get_state().gpr[4] == 0xABCD_FFFC
        assert bench.words(0x20000, 1, 2) == [2]
        assert bench.words(0x2FFFC, 2, 2) == [2, CODE >> 4]


def test_virtual_8086_mode() -> None:
    with Bench() as bench:
        state = bench.protected(user=True)
        state.rflags = 0x23202  # VM, IOPL 3, IF
        for name, selector in (("cs", CODE >> 4), ("ss", 0x3000), ("ds", 0x1111), ("es", 0x2222)):
            setattr(state, name, Segment(selector, selector << 4, 0xFFFF, 0xF300))
        state.fs = Segment(0x3333, 0x33330, 0xFFFF, 0xF300)
        state.gs = Segment(0x4444, 0x44440, 0xFFFF, 0xF300)
        state.rip, state.gpr[4] = 0, 0x7000
        bench.gate32(0x21, dpl=3)
        assert (
            bench.run(
                state,
                bytes.fromhex(
                    # int 0x21
                    "cd21"
                ),
            ).reason
            is StopReason.HALT
        )
        assert bench.vector() == 0x21
        after = bench.cpu.get_state()
        wanted = [2, CODE >> 4, 0x23202, 0x7000, 0x3000, 0x2222, 0x1111, 0x3333, 0x4444]
        assert bench.words(after.gpr[4], 9, 4) == wanted
        assert not after.rflags & 0x20000
        assert (after.ds.selector, after.gs.selector, after.ss.selector) == (0, 0, K_DATA)


def test_compatibility_mode_enters_long_mode() -> None:
    with Bench() as bench:
        state = bench.long(user=True, compat=True)
        bench.gate64(0x80, dpl=3)
        assert (
            bench.run(
                state,
                bytes.fromhex(
                    # int 0x80
                    "cd80"
                ),
            ).reason
            is StopReason.HALT
        )
        after = bench.cpu.get_state()
        assert after.cs.selector == K_CODE64
        frame = bench.words(after.gpr[4], 5)
        assert frame == [CODE + 2, U_CODE32, 2, USER_STACK, U_DATA]


def test_interrupt_stack_table() -> None:
    with Bench() as bench:
        state = bench.long()
        bench.gate64(3, ist=1)
        bench.run(
            state,
            bytes.fromhex(
                # int3
                "cc"
            ),
        )
        after = bench.cpu.get_state()
        assert after.gpr[4] == IST_STACK - 40
        assert bench.words(after.gpr[4] + 24, 2) == [KERNEL_STACK, K_DATA]


def test_stack_is_aligned_in_long_mode() -> None:
    with Bench() as bench:
        state = bench.long()
        state.gpr[4] = KERNEL_STACK - 13
        bench.run(
            state,
            bytes.fromhex(
                # int3
                "cc"
            ),
        )
        after = bench.cpu.get_state()
        assert after.gpr[4] == KERNEL_STACK - 16 - 40
        assert bench.words(after.gpr[4] + 24, 1) == [KERNEL_STACK - 13]


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize(
    "code",
    [
        bytes.fromhex(
            # int 0x21
            "cd21"
        ),
        bytes.fromhex(
            # int3
            "cc"
        ),
    ],
)
def test_user_may_not_call_kernel_gates(bits: int, code: bytes) -> None:
    """#GP(vector * 8 + 2), and the frame points at the INT itself."""
    with Bench() as bench:
        state = bench.long(user=True) if bits == 64 else bench.protected(user=True)
        bench.run(state, b"\x90" + code)
        assert bench.vector() == 13
        size = bits // 8
        number = 3 if len(code) == 1 else 0x21
        frame = bench.words(bench.cpu.get_state().gpr[4], 2, size)
        assert frame == [number * 8 + 2, CODE + 1]


@pytest.mark.parametrize("long", [False, True])
def test_external_interrupts_ignore_the_gate_level(long: bool) -> None:
    with Bench() as bench:
        state = bench.long(user=True) if long else bench.protected(user=True)
        state.rflags = 0x202
        bench.start(state, b"\x90")
        assert bench.cpu.inject(0x20) is None
        assert bench.cpu.run(100).reason is StopReason.HALT
        assert bench.vector() == 0x20
        frame = bench.words(bench.cpu.get_state().gpr[4], 1, 8 if long else 4)
        assert frame == [CODE]


def test_external_vector_8_in_real_mode_is_the_timer() -> None:
    """The PC's timer uses the vector of the double fault, without being one."""
    with Bench() as bench:
        bench.start(bench.real(), b"\x90")
        assert bench.cpu.inject(8) is None
        bench.cpu.run(100)
        assert bench.vector() == 8


# Faults while a fault is delivered.


def absent(bench: Bench, vector: int, size: int) -> None:
    bench.memory.write(IDT + vector * size + 5, b"\x0e")


@pytest.mark.parametrize("long", [False, True])
def test_missing_gates(long: bool) -> None:
    size = 16 if long else 8
    with Bench() as bench:
        # Benign, then contributory: the second one alone is delivered.
        absent(bench, 6, size) if (state := (bench.long() if long else bench.protected())) else None
        bench.run(state, b"\x0f\x0b")
        assert bench.vector() == 11
        frame = bench.words(bench.cpu.get_state().gpr[4], 2, size // 2)
        assert frame == [6 * 8 + 3, CODE]  # EXT is set: no INT instruction was at fault
        # Contributory twice: a double fault.
        state = bench.long() if long else bench.protected()
        absent(bench, 0, size)
        bench.run(
            state,
            bytes.fromhex(
                # xor ecx, ecx; div ecx
                "31c9f7f1"
            ),
        )
        assert bench.vector() == 8
        frame = bench.words(bench.cpu.get_state().gpr[4], 2, size // 2)
        assert frame == [0, CODE + 2]
        # And without a gate for that: shutdown.
        state = bench.long() if long else bench.protected()
        absent(bench, 0, size)
        absent(bench, 8, size)
        stop = bench.run(
            state,
            bytes.fromhex(
                # xor ecx, ecx; div ecx
                "31c9f7f1"
            ),
        )
        assert stop.reason is StopReason.SHUTDOWN
        assert "#DE" in stop.detail
        assert "#DF" in stop.detail
        assert f"{CODE + 2:#x}" in stop.detail
        assert bench.cpu.run(100) == stop


def test_page_fault_on_the_stack_is_a_double_fault() -> None:
    with Bench() as bench:
        state = bench.long()
        bench.gate64(8, ist=1)
        state.gpr[4] = UNMAPPED
        bench.run(
            state,
            bytes.fromhex(
                # push rax
                "50"
            ),
        )
        assert bench.vector() == 8
        after = bench.cpu.get_state()
        assert bench.words(after.gpr[4], 2) == [0, CODE]
        assert after.cr2 == UNMAPPED - 48


def test_page_fault_for_a_user_stack_switch_that_works_again() -> None:
    """A second page fault is one of its own: nothing of the first is left over."""
    with Bench() as bench:
        state = bench.long()
        bench.gate64(14, ist=1)
        for _ in range(4):
            bench.run(
                state,
                bytes.fromhex(
                    # mov [0x7000000], al
                    "88042500000007"
                ),
            )
            assert bench.vector() == 14


@pytest.mark.parametrize(
    ("change", "vector", "error"),
    [
        (lambda b: b.memory.write(TSS + 8, b"\0\0"), 10, 0),  # SS0 null
        (lambda b: b.memory.write(TSS + 8, b"\x23\0"), 10, 0x20),  # SS0 of ring 3
        (lambda b: b.memory.write(TSS + 8, b"\xf8\xff"), 10, 0xFFF8),  # SS0 beyond the GDT
        (lambda b: b.memory.write(GDT + K_DATA + 5, b"\x13"), 12, K_DATA),  # not present
        (lambda b: b.memory.write(GDT + K_DATA + 5, b"\x91"), 10, K_DATA),  # not writable
    ],
)
def test_bad_inner_stacks(change: Callable[[Bench], None], vector: int, error: int) -> None:
    """The fault needs a stack too, so it goes through a task-less route: a ring-3 handler."""
    with Bench() as bench:
        state = bench.protected(user=True)
        bench.gate32(0x80, dpl=3)
        bench.gate32(vector, selector=U_CODE32)
        bench.memory.write(HANDLERS + vector, b"\xeb\xfe")  # HLT is not for ring 3
        change(bench)
        bench.run(
            state,
            bytes.fromhex(
                # int 0x80
                "cd80"
            ),
            1000,
        )
        after = bench.cpu.get_state()
        assert after.rip == HANDLERS + vector
        assert bench.words(after.gpr[4], 2, 4) == [error, CODE]


@pytest.mark.parametrize(
    ("selector", "error"), [(0, 0), (K_DATA, K_DATA), (0xFFF8, 0xFFF8), (U_CODE32, None)]
)
def test_bad_handler_segments(selector: int, error: int | None) -> None:
    """From ring 0: a null, data or missing segment, and one of an outer ring."""
    with Bench() as bench:
        state = bench.protected()
        bench.gate32(0x21, selector=selector)
        bench.run(
            state,
            bytes.fromhex(
                # int 0x21
                "cd21"
            ),
        )
        assert bench.vector() == 13
        frame = bench.words(bench.cpu.get_state().gpr[4], 2, 4)
        assert frame == [selector & 0xFFFC if error is None else error, CODE]


def test_idt_limit() -> None:
    with Bench() as bench:
        state = bench.long()
        state.idtr.limit = 0x20 * 16 - 1
        bench.run(
            state,
            bytes.fromhex(
                # int 0x20
                "cd20"
            ),
        )
        assert bench.vector() == 13
        assert bench.words(bench.cpu.get_state().gpr[4], 1) == [0x20 * 8 + 2]


def test_ivt_limit_in_real_mode() -> None:
    with Bench() as bench:
        state = bench.real()
        state.idtr.limit = 0xFF
        bench.run(
            state,
            bytes.fromhex(
                # int 0x40
                "cd40"
            ),
        )
        assert bench.vector() == 13


def test_task_gate() -> None:
    """A double fault through a task gate runs on a stack and in a context of its own."""
    task, selector = 0xB000, 0x58
    with Bench() as bench:
        state = bench.protected()
        state.gdtr.limit = 0x67
        bench.put(GDT + selector, 0x0000_8900_B000_0067)
        bench.put(IDT + 8 * 8, selector << 16 | 0x85 << 40)
        fields = {0x20: HANDLERS + 8, 0x24: 2, 0x38: IST_STACK, 0x28: 0x1234}
        fields |= {0x48 + 4 * i: K_CODE32 if i == 1 else K_DATA for i in range(6)}
        bench.memory.write(task, bytes(104))
        for at, value in fields.items():
            bench.memory.write(task + at, value.to_bytes(4, "little"))
        absent(bench, 0, 8)
        state.gpr[3] = 0x77
        bench.run(
            state,
            bytes.fromhex(
                # xor ecx, ecx; div ecx
                "31c9f7f1"
            ),
        )
        assert bench.vector() == 8
        after = bench.cpu.get_state()
        assert (after.gpr[0], after.tr.selector) == (0x1234, selector)
        assert after.rflags & 0x4000  # nested
        assert after.cr0 & 8  # task switched
        assert bench.words(after.gpr[4], 1, 4) == [0]
        assert after.gpr[4] == IST_STACK - 4
        assert bench.words(TSS + 0x20, 1, 4) == [CODE + 2]  # the old task
        assert bench.words(TSS + 0x34, 1, 4) == [0x77]


# Returning, and fast system calls.


@pytest.mark.parametrize("user", [False, True])
def test_iret_goes_back(user: bool) -> None:
    with Bench() as bench:
        state = bench.long(user)
        bench.gate64(0x80, dpl=3)
        bench.memory.write(HANDLERS + 0x80, b"\x48\xcf")
        state.rflags = 0x202
        code = bytes.fromhex(
            # std; mov eax, 5; int 0x80; inc eax; pushfq; pop rbx; ud2
            "fdb805000000cd80ffc09c5b0f0b"
        )
        bench.run(state, code)
        assert bench.vector() == 6
        after = bench.cpu.get_state()
        assert after.gpr[0] == 6
        assert after.gpr[3] & 0x600 == 0x600


SYSCALL_MSRS = {0xC000_0081: 0x0010_0008 << 32, 0xC000_0082: 0x24000, 0xC000_0084: 0x700}


@pytest.mark.parametrize("prefix", [b"", b"\x66", b"\x2e\x66"])
def test_syscall_and_sysret(prefix: bytes) -> None:
    with Bench() as bench:
        state = bench.long(user=True)
        state.msrs = dict(SYSCALL_MSRS)
        state.rflags = 0x202
        bench.memory.write(
            0x24000,
            bytes.fromhex(
                # mov rbx, r11; mov rsi, rsp; pushfq; pop rdi; o64 sysret
                "4c89db4889e69c5f480f07"
            ),
        )
        state.gpr[4] = USER_STACK
        code = (
            bytes.fromhex(
                # std; stc
                "fdf9"
            )
            + prefix
            + bytes.fromhex(
                # syscall; mov ax, cs; ud2
                "0f05668cc80f0b"
            )
        )
        bench.run(state, code)
        assert bench.vector() == 6
        after = bench.cpu.get_state()
        assert after.gpr[1] == CODE + 4 + len(prefix)  # RCX
        assert after.gpr[3] & 0x601 == 0x601  # R11: IF, DF and CF as they were
        assert after.gpr[7] & 0x601 == 0x001  # FMASK took IF and DF away
        assert after.gpr[6] == USER_STACK
        assert after.gpr[0] & 0xFFFF == 0x23  # SYSRET: STAR[63:48] + 16, ring 3


def test_syscall_is_invalid_when_off_and_outside_64_bit_code() -> None:
    with Bench() as bench:
        state = bench.long(user=True)
        state.efer &= ~1
        bench.run(
            state,
            bytes.fromhex(
                # nop; syscall
                "900f05"
            ),
        )
        assert bench.vector() == 6
        assert bench.words(bench.cpu.get_state().gpr[4], 1) == [CODE + 1]
        state = bench.long(user=True, compat=True)
        state.msrs = dict(SYSCALL_MSRS)
        bench.run(
            state,
            bytes.fromhex(
                # nop; syscall
                "900f05"
            ),
        )
        assert bench.vector() == 6


@pytest.mark.parametrize("long", [False, True])
def test_sysenter(long: bool) -> None:
    with Bench() as bench:
        state = bench.long(user=True) if long else bench.protected(user=True)
        state.rflags = 0x202
        state.msrs = {0x174: K_CODE64 if long else K_CODE32, 0x175: KERNEL_STACK, 0x176: 0x24000}
        bench.memory.write(0x24000, b"\x90\xf4")
        assert (
            bench.run(
                state,
                bytes.fromhex(
                    # sysenter
                    "0f34"
                ),
            ).reason
            is StopReason.HALT
        )
        after = bench.cpu.get_state()
        assert (after.rip, after.gpr[4]) == (0x24002, KERNEL_STACK)
        assert after.cs.selector == state.msrs[0x174]
        assert after.ss.selector == after.cs.selector + 8
        assert not after.rflags & 0x200
        state.msrs[0x174] = 0
        bench.run(
            state,
            bytes.fromhex(
                # sysenter
                "0f34"
            ),
        )
        assert bench.vector() == 13


def test_user_page_fault_error_codes() -> None:
    with Bench() as bench:
        state = bench.long(user=True)
        bench.put(
            WINDOW_TABLE, 0, WINDOW | 3, WINDOW | 5, WINDOW | 7 | 1 << 41, WINDOW | 7 | 1 << 63
        )
        for page, code, error in (
            (
                0,
                bytes.fromhex(
                    # mov al, [rbx]
                    "8a03"
                ),
                4,
            ),
            (
                0,
                bytes.fromhex(
                    # mov [rbx], al
                    "8803"
                ),
                6,
            ),
            (
                1,
                bytes.fromhex(
                    # mov al, [rbx]
                    "8a03"
                ),
                5,
            ),
            (
                2,
                bytes.fromhex(
                    # mov [rbx], al
                    "8803"
                ),
                7,
            ),
            (
                3,
                bytes.fromhex(
                    # mov al, [rbx]
                    "8a03"
                ),
                13,
            ),
            (
                4,
                bytes.fromhex(
                    # jmp rbx
                    "ffe3"
                ),
                0x15,
            ),
        ):
            state.gpr[3] = WINDOW + 0x1000 * page + 0x10
            bench.run(state, code)
            assert bench.vector() == 14
            after = bench.cpu.get_state()
            assert after.cr2 == state.gpr[3]
            assert bench.words(after.gpr[4], 1) == [error]


@pytest.mark.parametrize("mode", ["long", "protected"])
def test_one_fault_after_another_is_no_double_fault(mode: str) -> None:
    """The engine remembers the last one until it is told that it was delivered."""
    with Bench() as bench:
        state = getattr(bench, mode)()
        state.gpr[0] = 0xFFF8
        back = struct.pack("<i", CODE - (HANDLERS + 13 + 13))
        # #GP: add ecx, 1; cmp ecx, 3; je end; jmp CODE; end: hlt
        bench.memory.write(HANDLERS + 13, bytes.fromhex("83c101 83f903 7405 e9") + back + b"\xf4")
        assert bench.run(state, b"\x8e\xd8").reason is StopReason.HALT  # mov ds, ax
        after = bench.cpu.get_state()
        assert (after.gpr[1], after.rip) == (3, HANDLERS + 13 + 14)
