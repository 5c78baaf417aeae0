"""Registers in and out: a state taken in any mode continues identically in a fresh engine."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from cpu_bench import CODE, U_CODE32, U_CODE64, Bench

from devices.errors import UserError
from vmm.cpu.engine import StopReason
from vmm.cpu.state import CpuState, DescriptorTable, Segment

# Work on every kind of register: integer flags, x87, SSE, memory; then again for ever.
MIX64 = bytes.fromhex(
    # l: add rax, rbx; adc rbx, r15; ror rcx, 7; xor r8, rax; push rax; pop
    # r9; std; inc r10; fldpi; fmul st0, st0; fstp qword [0x30000]; fild qword
    # [0x30008]; fsqrt; fstp tword [0x30010]; addpd xmm0, xmm1; mulpd xmm9,
    # xmm0; pxor xmm3, xmm9; cvtsi2sd xmm1, rax; movups [0x30020], xmm3; cld;
    # stc; jmp l
    "4801d84c11fb48c1c9074931c0504159fd49ffc2d9ebdcc8dd1c2500000300df"
    "2c2508000300d9fadb3c2510000300660f58c166440f59c866410fefd9f2480f"
    "2ac80f111c2520000300fcf9e9afffffff"
)
MIX32 = bytes.fromhex(
    # l: add eax, ebx; adc ebx, esi; ror ecx, 7; xor edx, eax; push eax; pop
    # edi; fldpi; fmul st0, st0; fstp qword [0x30000]; fild qword [0x30008];
    # fsqrt; fstp tword [0x30010]; std; stc; jmp l
    "01d811f3c1c90731c2505fd9ebdcc8dd1d00000300df2d08000300d9fadb3d10000300fdf9e9d6ffffff"
)
MIX16 = bytes.fromhex(
    # l: add eax, ebx; adc ebx, esi; ror cx, 7; xor dx, ax; push ax; pop di;
    # mov [0x3000], ax; fldpi; fstp qword [0x3008]; mov es, ax; std; stc; jmp
    # l
    "6601d86611f3c1c90731c2505fa30030d9ebdd1e08308ec0fdf9e9e3ff"
)


def low(bench: Bench) -> CpuState:
    """16-bit protected mode, with IP below 64 KiB."""
    state = bench.protected(bits=16)
    state.rip = 0x7000
    return state


MODES: dict[str, tuple[Callable[[Bench], CpuState], bytes]] = {
    "real": (lambda b: b.real(), MIX16),
    "protected": (lambda b: b.protected(), MIX32),
    "protected ring 3": (lambda b: b.protected(user=True), MIX32),
    "protected 16-bit": (
        low,
        bytes.fromhex(
            # l: add eax, ebx; push ax; pop cx; jmp l
            "6601d85059e9f8ff"
        ),
    ),
    "long": (lambda b: b.long(), MIX64),
    "long ring 3": (lambda b: b.long(user=True), MIX64),
    "compatibility": (lambda b: b.long(user=True, compat=True), MIX32),
}


def begin(bench: Bench, mode: str) -> None:
    make, code = MODES[mode]
    state = make(bench)
    state.cr0 &= ~4
    state.cr4 |= 0x600
    rng = random.Random(mode)
    stack = state.gpr[4]
    state.gpr = [rng.getrandbits(64 if "long" in mode else 32) for _ in range(16)]
    state.gpr[4] = stack
    state.vectors = [rng.randbytes(16).hex() for _ in range(16)]
    state.msrs = {0xC000_0081: 0x1B_0008 << 32, 0xC000_0102: 0x1234_5678_9ABC, 0x277: 0x0606}
    state.dr[0] = 0x1111_2222
    bench.start(state, code, state.cs.base + state.rip)


@pytest.mark.parametrize("mode", MODES)
def test_continues_identically_elsewhere(mode: str) -> None:
    with Bench() as one, Bench() as two:
        begin(one, mode)
        for budget in (1, 50, 500, 5000):
            assert one.cpu.run(budget).reason is StopReason.BUDGET
            state = one.cpu.get_state()
            # Through JSON, as a snapshot goes.
            saved = msgspec.json.decode(msgspec.json.encode(state), type=CpuState)
            assert saved == state
            two.memory.write(0, one.memory.read(0, 1 << 22))
            two.cpu.set_state(saved)
            assert two.cpu.get_state() == state
            one.cpu.step(7)
            two.cpu.step(7)
            assert one.cpu.get_state() == two.cpu.get_state()
            one.cpu.run(5000)
            two.cpu.run(5000)
            assert one.cpu.get_state() == two.cpu.get_state()
            assert one.memory.read(0, 1 << 20) == two.memory.read(0, 1 << 20)


@pytest.mark.parametrize("mode", MODES)
def test_a_used_engine_is_as_good_as_a_fresh_one(mode: str) -> None:
    """Nothing of what ran before shows through a loaded state."""
    with Bench() as used, Bench() as fresh:
        for other in MODES:
            begin(used, other)
            used.cpu.run(3000)
        for bench in (used, fresh):
            bench.memory.write(0x30000, bytes(0x100))
            bench.memory.write(0x23000, bytes(0x100))
            begin(bench, mode)
            bench.cpu.run(4000)
        assert used.cpu.get_state() == fresh.cpu.get_state()


def test_modify_changes_the_state() -> None:
    with Bench() as bench:
        begin(bench, "long")
        before = bench.cpu.get_state()
        bench.cpu.run(500)
        assert bench.cpu.get_state() != before


def test_the_guest_sees_what_was_loaded() -> None:
    """The values arrive in the registers that the guest reads, not only in what we read back."""
    with Bench() as bench:
        state = bench.long()
        state.msrs = {0x176: 0x1122_3344_5566, 0x200: 0xABC0_0006, 0xC000_0103: 0x99}
        state.fs = Segment(0, 0x30000, 0xFFFF_FFFF, 0xCF9300)
        state.gdtr.limit = 0x5F
        state.mxcsr, state.fpu_control = 0x5F80, 0xF7F
        state.x87 = [f"{i:02x}" * 10 for i in range(8)]
        state.fpu_status, state.fpu_tags = 0x1800, 0
        state.vectors = [f"{i:02x}" * 16 for i in range(16)]
        state.dr[2] = 0x4444
        bench.put(0x30008, 0x5151)
        code = bytes.fromhex(
            # mov ecx, 0x176; rdmsr; mov r8d, eax; mov r9d, edx; mov ecx, 0x200;
            # rdmsr; mov r10d, eax; mov r11, [fs:8]; sgdt [0x31000]; stmxcsr
            # [0x31010]; fnstcw [0x31014]; fnstsw [0x31016]; movups [0x31020], xmm13;
            # fstp tword [0x31030]; mov r12, dr2; mov r13, cr3; hlt
            "b9760100000f324189c04189d1b9000200000f324189c2644c8b1c2508000000"
            "0f010425001003000fae1c2510100300d93c2514100300dd3c2516100300440f"
            "112c2520100300db3c2530100300410f21d4410f20ddf4"
        )
        assert bench.run(state, code).reason is StopReason.HALT
        after = bench.cpu.get_state().gpr
        assert after[8:14] == [0x3344_5566, 0x1122, 0xABC0_0006, 0x5151, 0x4444, 0x1000]
        assert bench.words(0x31000, 1, 2) == [0x5F]
        assert bench.words(0x31010, 1, 4) == [0x5F80]
        assert bench.words(0x31014, 2, 2) == [0xF7F, 0x1800]
        assert bench.memory.read(0x31020, 16) == b"\x0d" * 16
        assert bench.memory.read(0x31030, 10) == bytes(10)


def test_halted_is_state() -> None:
    with Bench() as one, Bench() as two:
        one.run(one.long(), b"\xf4")
        state = one.cpu.get_state()
        assert state.halted
        two.cpu.set_state(state)
        assert two.cpu.run(100).reason is StopReason.HALT


def test_set_state_forgets_translations() -> None:
    with Bench() as bench:
        state = bench.long()
        bench.run(
            state,
            bytes.fromhex(
                # mov eax, 1; hlt
                "b801000000f4"
            ),
        )
        bench.run(
            state,
            bytes.fromhex(
                # mov eax, 2; hlt
                "b802000000f4"
            ),
        )
        assert bench.cpu.get_state().gpr[0] == 2
        bench.put(0x3000, 0x60_0087)  # 0 -> 6 MiB: another page table meaning, same CR3
        bench.memory.write(
            0x60_0000 + CODE,
            bytes.fromhex(
                # mov eax, 3; hlt
                "b803000000f4"
            ),
        )
        bench.cpu.set_state(state)
        bench.cpu.run(100)
        assert bench.cpu.get_state().gpr[0] == 3


def test_breakpoint_registers_come_and_go() -> None:
    """Enabled breakpoints are objects inside the engine; loading states must not lose them."""
    with Bench() as bench:
        armed = bench.long()
        armed.dr = [0x28000, 0x28008, 0x28010, 0x28018, 0, 0, 0xFFFF_0FF0, 0xDDDD_06AA]
        code = bytes.fromhex(
            # xor eax, eax; mov dr7, rax; mov dr0, rbx; mov [0x28000], eax; hlt
            "31c00f23f80f23c389042500800200f4"
        )
        for _ in range(5):
            assert bench.run(armed, code).reason is StopReason.HALT
            assert bench.cpu.get_state().dr[7] == 0x400
            bench.cpu.set_state(armed)
            assert bench.cpu.get_state().dr == armed.dr
            bench.cpu.set_state(CpuState())
            bench.cpu.set_state(armed)
            executed = bench.cpu.executed
            bench.cpu.set_state(bench.long())
            assert bench.cpu.executed == executed


def put(name: str, value: Any) -> Callable[[CpuState], None]:
    return lambda state: setattr(state, name, value)


DAMAGE: dict[str, Callable[[CpuState], Any]] = {
    "gpr": put("gpr", [0] * 15),
    "rax": lambda s: s.gpr.__setitem__(0, 1 << 64),
    "r15": put("gpr", [0] * 15 + ["x"]),
    "rip": put("rip", -1),
    "rflags": put("rflags", 1 << 30),
    "cs": put("cs", None),
    "cs.selector": lambda s: setattr(s.cs, "selector", 0x10000),
    "ss.attributes": lambda s: setattr(s.ss, "attributes", 0x9301),
    "ldtr.limit": lambda s: setattr(s.ldtr, "limit", 1 << 32),
    "gdtr.base": lambda s: setattr(s.gdtr, "base", 1 << 64),
    "idtr": put("idtr", DescriptorTable),
    "cr0": put("cr0", 1 << 32),
    "cr4": put("cr4", 1.5),
    "efer": put("efer", 1 << 12),
    "dr": put("dr", []),
    "msrs": put("msrs", {0xDEAD: 1}),
    "msrs[0x277]": put("msrs", {0x277: -1}),
    "x87": put("x87", ["00"]),
    "x87[7]": put("x87", ["00" * 10] * 7 + ["zz" * 10]),
    "vectors[0]": put("vectors", ["0"] * 16),
    "mxcsr": put("mxcsr", True),
    "fpu_tags": put("fpu_tags", 1 << 16),
    "halted": put("halted", 1),
    "interrupt_shadow": put("interrupt_shadow", None),
}


@pytest.mark.parametrize("field", DAMAGE)
def test_damaged_states_are_refused_by_name(field: str) -> None:
    with Bench() as bench:
        begin(bench, "long")
        before = bench.cpu.get_state()
        damaged = copy.deepcopy(before)
        DAMAGE[field](damaged)
        with pytest.raises(UserError) as caught:
            bench.cpu.set_state(damaged)
        assert f" {field}:" in str(caught.value)
        assert bench.cpu.get_state() == before


def test_long_mode_without_paging_is_refused() -> None:
    with Bench() as bench:
        state = bench.long()
        state.cr0 &= ~(1 << 31)
        with pytest.raises(UserError, match="efer"):
            bench.cpu.set_state(state)


def test_mxcsr_reserved_bits_do_not_crash() -> None:
    with Bench() as bench:
        state = bench.long()
        state.mxcsr = 0xFFFF
        assert (
            bench.run(
                state,
                bytes.fromhex(
                    # addpd xmm0, xmm1; hlt
                    "660f58c1f4"
                ),
            ).reason
            is StopReason.HALT
        )


@pytest.mark.parametrize("seed", range(30))
def test_random_states_neither_crash_nor_hang(seed: int) -> None:
    """Any state that is accepted may be run: the guest fails, the machine does not."""
    rng = random.Random(seed)
    with Bench() as bench:
        for _ in range(20):
            state = CpuState()
            state.gpr = [rng.getrandbits(64) for _ in range(16)]
            state.cr0 = rng.choice([0x10, 0x11, 0x8000_0011, 0x8001_0031, rng.getrandbits(32)])
            state.cr3 = rng.choice([0, 0x1000, 0xFE00_0000, 1 << 41, rng.getrandbits(64)])
            state.cr4 = rng.choice([0, 0x20, 0x620, 0x1620, rng.getrandbits(32)])
            paging = state.cr0 >> 31
            state.efer = rng.choice([0, 0x500 if paging else 0x100, 0xD01 if paging else 0x901])
            state.rip = rng.getrandbits(64 if state.efer & 0x400 else 32)
            if rng.random() < 0.5:
                state.rip &= 0xFFFFF
            state.rflags = rng.getrandbits(22) & 0x3F7FD7
            for name in ("cs", "ss", "ds", "es", "fs", "gs", "ldtr", "tr"):
                attributes = rng.choice([0xAF9B00, 0xCF9B00, 0x9B00, rng.getrandbits(16) << 8])
                base = rng.choice([0, 0x1000, rng.getrandbits(64)])
                setattr(state, name, Segment(rng.getrandbits(16), base, 0xFFFF_FFFF, attributes))
            state.idtr = DescriptorTable(rng.choice([0, 0xFE00_0000, rng.getrandbits(64)]), 0xFFF)
            state.gdtr = DescriptorTable(rng.choice([0, 0xFE00_0000, rng.getrandbits(64)]), 0xFFFF)
            state.dr = [rng.getrandbits(64) for _ in range(8)]
            bench.memory.write(0, rng.randbytes(1 << 16))
            bench.cpu.set_state(state)
            before = bench.cpu.executed
            for _ in range(3):
                bench.cpu.run(2000)
                bench.cpu.step(2)
            assert bench.cpu.executed - before < 3 * 20_000
            kept = bench.cpu.get_state()
            bench.cpu.set_state(kept)
            assert bench.cpu.get_state() == kept


@pytest.mark.parametrize("compat", [False, True])
def test_ring_3_is_ring_3(compat: bool) -> None:
    """The bench itself: its user states may not execute HLT."""
    with Bench() as bench:
        state = bench.long(user=True, compat=compat)
        bench.run(state, b"\xf4")
        assert bench.vector() == 13
        assert state.cs.selector == (U_CODE32 if compat else U_CODE64)
