"""Guests that mean harm or are broken: no crash, no hang, no traceback."""

from __future__ import annotations

import random
import threading

import pytest
from cpu_bench import (
    CODE,
    HANDLERS,
    IDT,
    K_CODE64,
    KERNEL_STACK,
    MMIO,
    WINDOW,
    WINDOW_TABLE,
    Bench,
)

from vmm.cpu.engine import StopReason
from vmm.cpu.registers import SCRATCH
from vmm.cpu.state import CODE32, DescriptorTable, Segment, flat_segment

pytestmark = pytest.mark.usefixtures("both_paths")

END = 16 << 20


@pytest.mark.parametrize(
    ("code", "vector"),
    [
        (
            bytes.fromhex(
                # mov eax, 0xfe000000; jmp rax
                "b8000000feffe0"
            ),
            6,
        ),  # device memory
        (
            bytes.fromhex(
                # mov eax, 0xfe100000; jmp rax
                "b8000010feffe0"
            ),
            6,
        ),  # nothing at all
        (
            bytes.fromhex(
                # mov rax, 0x8000000000000000; jmp rax
                "48b80000000000000080ffe0"
            ),
            13,
        ),
        (
            bytes.fromhex(
                # mov eax, 0x7000000; jmp rax
                "b800000007ffe0"
            ),
            14,
        ),
    ],
)
def test_jumps_to_where_no_code_is(code: bytes, vector: int) -> None:
    with Bench() as bench:
        assert bench.run(bench.long(), code).reason is StopReason.HALT
        assert bench.vector() == vector
        assert not bench.mmio.reads


def test_a_jump_into_device_memory_is_named_in_the_shutdown() -> None:
    with Bench() as bench:
        state = bench.long()
        state.idtr.limit = 0
        stop = bench.run(
            state,
            bytes.fromhex(
                # mov eax, 0xfe000000; jmp rax
                "b8000000feffe0"
            ),
        )
        assert stop.reason is StopReason.SHUTDOWN
        assert "fetch from device memory" in stop.detail


@pytest.mark.parametrize("offset", [1, 4])
def test_running_off_the_end_of_ram(offset: int) -> None:
    with Bench() as bench:
        bench.memory.write(END - offset, b"\x90" * (offset - 1) + b"\x0f")
        code = bytes.fromhex(
            # mov eax, ebx; jmp eax
            "89d8ffe0"
        )
        state = bench.protected()
        state.gpr[3] = END - offset
        bench.run(state, code)
        assert bench.vector() == 6


def test_access_across_the_end_of_ram() -> None:
    with Bench() as bench:
        bench.memory.write(END - 2, b"\x34\x12")
        state = bench.protected()
        state.gpr[3] = END - 2
        code = bytes.fromhex(
            # mov eax, [ebx]; mov [ebx], ecx; lock xadd [ebx], ecx; hlt
            "8b03890bf00fc10bf4"
        )
        assert bench.run(state, code).reason is StopReason.HALT
        assert bench.cpu.get_state().gpr[0] == 0xFFFF_1234


@pytest.mark.parametrize("base", [0x800_0000, MMIO, 1 << 39, 1 << 62, (1 << 64) - 8])
@pytest.mark.parametrize("table", ["idtr", "gdtr"])
def test_descriptor_tables_outside_ram(base: int, table: str) -> None:
    with Bench() as bench:
        for state in (bench.long(), bench.protected(user=True)):
            setattr(state, table, DescriptorTable(base, 0xFFFF))
            # A GDT that reads as all ones even has a usable code segment.
            stop = bench.run(
                state,
                bytes.fromhex(
                    # int3
                    "cc"
                ),
            )
            assert stop.reason is StopReason.SHUTDOWN or (table == "gdtr" and stop.detail == "")


@pytest.mark.parametrize("stack", [0x700_0000, 1 << 50, 0x8000_0000_0000, 3])
def test_stack_nowhere(stack: int) -> None:
    with Bench() as bench:
        state = bench.long()
        state.gpr[4] = stack
        stop = bench.run(
            state,
            bytes.fromhex(
                # push rax; int3
                "50cc"
            ),
        )
        assert stop.reason in (StopReason.SHUTDOWN, StopReason.HALT)


def test_exception_frame_into_device_memory() -> None:
    with Bench() as bench:
        state = bench.protected()
        state.gpr[4] = MMIO + 0x100
        bench.run(
            state,
            bytes.fromhex(
                # int3
                "cc"
            ),
        )
        assert bench.vector() == 3
        assert sum(size for _, size, _ in bench.mmio.writes) == 12


@pytest.mark.parametrize("cr3", [MMIO, 0x700_0000, 1 << 39, 1 << 41, 1 << 51, (1 << 64) - 1])
@pytest.mark.parametrize("mode", ["long", "pae", "32-bit"])
def test_page_tables_nowhere(cr3: int, mode: str) -> None:
    with Bench() as bench:
        state = bench.long()
        state.cr3 = cr3
        if mode != "long":
            state.efer, state.cr4 = 0, 0x20 if mode == "pae" else 0
            state.cs = flat_segment(0x40, CODE32)
        stop = bench.run(state, b"\x90\xf4")
        assert stop.reason in (StopReason.SHUTDOWN, StopReason.HALT, StopReason.BUDGET)


def test_page_tables_of_noise() -> None:
    rng = random.Random(7)
    with Bench() as bench:
        for _ in range(50):
            state = bench.long()
            for table in (0x1000, 0x2000, 0x3000, 0x4000):
                if rng.random() < 0.5:
                    bench.memory.write(table, rng.randbytes(4096))
            state.cr4 |= rng.choice((0, 0x1000))  # five levels
            bench.run(
                state,
                bytes.fromhex(
                    # mov rax, [rbx]; push rax; int3
                    "488b0350cc"
                ),
                2000,
            )


def test_repeated_string_into_device_memory_stops_and_goes_on() -> None:
    with Bench() as bench:
        state = bench.long()
        state.gpr[1], state.gpr[6], state.gpr[7] = 300, CODE, MMIO
        bench.start(
            state,
            bytes.fromhex(
                # cld; rep movsb; hlt
                "fcf3a4f4"
            ),
        )
        runs = 0
        while bench.cpu.run(40).reason is StopReason.BUDGET:
            runs += 1
        assert runs > 5
        assert [offset for offset, _, _ in bench.mmio.writes] == list(range(300))


@pytest.mark.parametrize("where", ["fetch", "invalid"])
def test_endless_exceptions_return_within_the_budget(where: str) -> None:
    with Bench() as bench:
        state = bench.long()
        if where == "fetch":  # the page-fault handler itself is not mapped
            bench.put(WINDOW_TABLE, 0)
            gate = 1 << 32 | K_CODE64 << 16 | 0x8E << 40 | (WINDOW >> 16) << 48
            bench.put(IDT + 16 * 14, gate, 0)
            code = bytes.fromhex(
                # mov rax, [0x200000]
                "488b042500002000"
            )
        else:
            bench.memory.write(HANDLERS + 6, b"\x48\xcf")
            code = b"\x0f\x0b"
        bench.start(state, code)
        for _ in range(5):
            before = bench.cpu.executed
            assert bench.cpu.run(5000).reason is StopReason.BUDGET
            assert 5000 <= bench.cpu.executed - before < 5000 + 4096
        assert bench.cpu.step(3).reason is StopReason.BUDGET
        threading.Timer(0.05, bench.cpu.kick).start()
        assert bench.cpu.run(1 << 60).reason is StopReason.BUDGET


@pytest.mark.parametrize(
    "code",
    [
        bytes.fromhex(
            # mov ecx, 0xc0000080; rdmsr; or eax, 0x1000; wrmsr; xor eax, eax; vmrun
            "b9800000c00f320d001000000f3031c00f01d8"
        ),
        bytes.fromhex(
            # rdpmc
            "0f33"
        ),
        bytes.fromhex(
            # rsm
            "0faa"
        ),
        bytes.fromhex(
            # xor ecx, ecx; xgetbv
            "31c90f01d0"
        ),
        bytes.fromhex(
            # vaddps ymm0, ymm1, ymm2
            "c5f458c2"
        ),
        bytes.fromhex("f00f0b"),
        bytes.fromhex(
            # stac
            "0f01cb"
        ),
    ],
)
def test_instructions_that_do_not_exist(code: bytes) -> None:
    with Bench() as bench:
        assert bench.run(bench.long(), code).reason is StopReason.HALT
        assert bench.vector() in (6, 13)


def test_overlong_instruction() -> None:
    with Bench() as bench:
        bench.run(bench.long(), b"\x66" * 20 + b"\x90")
        assert bench.vector() == 13


def test_single_step_trap() -> None:
    with Bench() as bench:
        code = bytes.fromhex(
            # pushfq; or dword [rsp], 0x100; popfq; nop; nop; hlt
            "9c810c24000100009d9090f4"
        )
        bench.run(bench.long(), code)
        assert bench.vector() == 1
        assert bench.words(KERNEL_STACK - 40, 1) == [CODE + 10]


def test_debug_registers_do_not_hang() -> None:
    """Data breakpoints never hit (see test_cpu_debug.py); a guest that arms them goes on."""
    with Bench() as bench:
        code = bytes.fromhex(
            # mov eax, 0x20030; mov dr0, rax; mov eax, 0x28000; mov dr1, rax; mov eax,
            # 0xd0040f; mov dr7, rax; mov [0x28000], eax; nop; nop; nop; nop; nop;
            # nop; nop; nop; nop; nop; nop; nop; nop; hlt
            "b8300002000f23c0b8008002000f23c8b80f04d0000f23f88904250080020090"
            "909090909090909090909090f4"
        )
        assert bench.run(bench.long(), code).reason is StopReason.HALT


def test_writes_over_its_own_code() -> None:
    with Bench() as bench:
        code = bytes.fromhex(
            # l: mov byte [rel m+1], 7; m: mov al, 1; cmp al, 7; jne l; hlt
            "c6050100000007b0013c070f85effffffff4"
        )
        assert bench.run(bench.long(), code).reason is StopReason.HALT
        assert bench.cpu.get_state().gpr[0] & 0xFF == 7


@pytest.mark.parametrize("seed", range(8))
def test_noise_as_code(seed: int) -> None:
    rng = random.Random(seed)
    with Bench() as bench:
        for make in (bench.real, bench.protected, bench.long, lambda: bench.long(user=True)):
            for _ in range(10):
                state = make()
                state.gpr[:4] = [rng.getrandbits(24) for _ in range(4)]
                bench.start(state, rng.randbytes(4096), state.cs.base + state.rip)
                for _ in range(3):
                    bench.cpu.run(3000)
                    bench.cpu.invalidate(rng.getrandbits(24), 4096)
                    bench.cpu.set_state(bench.cpu.get_state())


def test_paging_without_protection() -> None:
    with Bench() as bench:
        stop = bench.run(
            bench.real(),
            bytes.fromhex(
                # mov eax, 0x80000010; mov cr0, eax; hlt
                "66b8100000800f22c0f4"
            ),
        )
        assert stop.reason in (StopReason.SHUTDOWN, StopReason.HALT)


def test_bad_selector_on_the_stack_of_iret() -> None:
    with Bench() as bench:
        code = bytes.fromhex(
            # push 0; push 0; push 0; push 0xfff8; push 0; iretq
            "6a006a006a0068f8ff00006a0048cf"
        )
        bench.run(bench.long(), code)
        assert bench.vector() == 13
        assert bench.words(bench.cpu.get_state().gpr[4], 1) == [0xFFF8]


def test_segment_of_noise() -> None:
    with Bench() as bench:
        state = bench.real()
        state.ds = Segment(0xFFFF, 0xFFFF0, 0xFFFF, 0x9300)
        bench.run(
            state,
            bytes.fromhex(
                # mov eax, [0xfffc]; hlt
                "66a1fcfff4"
            ),
        )
        assert bench.cpu.halted


def test_page_tables_over_a_page_of_ours() -> None:
    """The engine takes any CR3, and a walk marks what it takes for an entry as accessed."""
    with Bench() as bench:
        state = bench.long()
        state.gpr[0] = SCRATCH
        # mov cr3, rax; mov rcx, [rbx]
        bench.run(state, bytes.fromhex("0f22d8488b0b"))
        state = bench.long()
        state.dr[0], state.dr[7] = CODE + 1, 0x402
        bench.run(state, b"\x90\x90\xf4")
        assert bench.vector() == 1, "breakpoints are set by code in that page"
