"""Code that a device overwrites: the guest must run the new bytes."""

from __future__ import annotations

import pytest
from cpu_bench import CODE, MMIO, WINDOW, WINDOW_TABLE, Bench

from vmm.cpu.engine import StopReason
from vmm.cpu.state import CpuState

BODY = 0x300000


def body(value: int) -> bytes:
    return b"\xb8" + value.to_bytes(4, "little") + b"\xc3"  # mov eax, value; ret


class Caller:
    """Guest code that calls an address that it reads from a port, halting after each call."""

    def __init__(self, bench: Bench, state: CpuState, code: bytes) -> None:
        self.bench = bench
        bench.start(state, code, state.cs.base + state.rip)

    def value(self, selector: int) -> int:
        """Let the guest call its function number `selector` (read from port 0x80)."""
        self.bench.ports.answer = lambda _offset, _size: selector
        self.bench.cpu.halted = False
        assert self.bench.cpu.run(10_000).reason is StopReason.HALT
        return self.bench.cpu.get_state().gpr[0]


LOOP64 = bytes.fromhex(
    # l: in eax, 0x80; mov ebx, eax; call rbx; hlt; jmp l
    "e58089c3ffd3f4e9f4ffffff"
)
LOOP32 = bytes.fromhex(
    # l: in eax, 0x80; call eax; hlt; jmp l
    "e580ffd0f4e9f6ffffff"
)
LOOP16 = bytes.fromhex(
    # l: in eax, 0x80; call ax; movzx eax, ax; hlt; jmp l
    "66e580ffd0660fb7c0f4e9f3ff"
)


@pytest.mark.parametrize("length", [1, 6, 4096, 1 << 20])
def test_without_paging(length: int) -> None:
    with Bench() as bench:
        caller = Caller(bench, bench.protected(), LOOP32)
        bench.memory.write(BODY, body(1))
        assert caller.value(BODY) == 1
        for value in range(2, 6):
            bench.memory.write(BODY, body(value))
            bench.cpu.invalidate(BODY, length)
            assert caller.value(BODY) == value


def test_the_test_can_fail() -> None:
    """Without `invalidate` the old code runs: else the other tests here prove nothing."""
    with Bench() as bench:
        caller = Caller(bench, bench.protected(), LOOP32)
        bench.memory.write(BODY, body(1))
        assert caller.value(BODY) == 1
        bench.memory.write(BODY, body(2))
        assert caller.value(BODY) == 1


def test_real_mode() -> None:
    with Bench() as bench:
        caller = Caller(bench, bench.real(), LOOP16)
        code = bytes.fromhex(
            # mov ax, 1; ret
            "b80100c3"
        )
        bench.memory.write(CODE + 0x1000, code)
        assert caller.value(0x1000) == 1
        bench.memory.write(CODE + 0x1001, b"\x02")
        bench.cpu.invalidate(CODE + 0x1001, 1)
        assert caller.value(0x1000) == 2


def test_two_aliases_in_long_mode() -> None:
    with Bench() as bench:
        state = bench.long()
        bench.put(WINDOW_TABLE, BODY | 7, BODY | 7)
        caller = Caller(bench, state, LOOP64)
        bench.memory.write(BODY, body(1))
        targets = (WINDOW, WINDOW + 0x1000, BODY)
        assert [caller.value(t) for t in targets] == [1, 1, 1]
        bench.memory.write(BODY, body(2))
        bench.cpu.invalidate(BODY, 4096)
        assert [caller.value(t) for t in targets] == [2, 2, 2]


def test_block_across_two_pages() -> None:
    with Bench() as bench:
        caller = Caller(bench, bench.long(), LOOP64)
        bench.memory.write(BODY + 0xFFE, body(0x01020304))
        assert caller.value(BODY + 0xFFE) == 0x01020304
        bench.memory.write(BODY + 0x1000, b"\x99")
        bench.cpu.invalidate(BODY + 0x1000, 1)
        assert caller.value(BODY + 0xFFE) == 0x01029904


def test_page_that_the_guest_cannot_reach_now() -> None:
    with Bench() as bench:
        caller = Caller(bench, bench.long(), LOOP64)
        bench.memory.write(BODY, body(1))
        bench.put(WINDOW_TABLE, BODY | 7)
        assert caller.value(WINDOW) == 1
        bench.memory.write(BODY, body(2))
        bench.cpu.invalidate(BODY, 4096)
        state = bench.cpu.get_state()
        assert state.cr0 == 0x8001_0011
        assert caller.value(WINDOW) == 2


@pytest.mark.parametrize("way", ["out", "mmio"])
def test_inside_a_callback(way: str) -> None:
    """The device overwrites code while the guest's OUT or store waits for it."""
    with Bench() as bench:
        access = {
            "out": bytes.fromhex(
                # out 0x80, al
                "e680"
            ),
            "mmio": bytes.fromhex(
                # mov [rsi], al
                "8806"
            ),
        }[way]
        code = (
            bytes.fromhex(
                # call rbx; mov ecx, eax
                "ffd389c1"
            )
            + access
            + bytes.fromhex(
                # call rbx; hlt
                "ffd3f4"
            )
        )
        state = bench.long()
        state.gpr[3], state.gpr[6] = BODY, MMIO
        bench.memory.write(BODY, body(1))

        def overwrite(*_: int) -> None:
            bench.memory.write(BODY, body(2))
            bench.cpu.invalidate(BODY, 4096)

        bench.ports.on_write = bench.mmio.on_write = overwrite
        assert bench.run(state, code).reason is StopReason.HALT
        after = bench.cpu.get_state()
        assert (after.gpr[1], after.gpr[0]) == (1, 2)


def test_user_mode_with_ac_set() -> None:
    with Bench() as bench:
        state = bench.long(user=True)
        state.gpr[3], state.rflags = BODY, 0x40002
        bench.memory.write(BODY, body(1))
        code = bytes.fromhex(
            # l: call rbx; cmp eax, 2; jne l; ud2
            "ffd383f8020f85f5ffffff0f0b"
        )
        bench.start(state, code)
        assert bench.cpu.run(1000).reason is StopReason.BUDGET
        bench.memory.write(BODY, body(2))
        bench.cpu.invalidate(BODY, 6)
        assert bench.cpu.run(1000).reason is StopReason.HALT
        assert bench.vector() == 6


def test_nothing_else_changes() -> None:
    with Bench() as bench:
        bench.start(
            bench.long(),
            bytes.fromhex(
                # l: inc rax; jmp l
                "48ffc0e9f8ffffff"
            ),
        )
        bench.cpu.run(1000)
        before = bench.cpu.get_state()
        bench.cpu.invalidate(0, 1 << 40)
        bench.cpu.invalidate(MMIO, 4096)
        assert bench.cpu.get_state() == before
        assert bench.cpu.run(1000).reason is StopReason.BUDGET
