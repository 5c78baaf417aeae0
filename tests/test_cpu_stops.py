"""Tens of thousands of stops: nothing is executed twice or left out.

Read-modify-write of RAM and of device memory, and repeated string instructions, under stops by
budget and by kicks from another thread, with the native hook, with none, and with the portable one.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from cpu_bench import CODE, MMIO, Bench

from vmm.cpu.cpuid import cpuid
from vmm.cpu.engine import StopReason

ENGINES: dict[str, dict[str, Any]] = {
    "native": {"native": True},
    "uncounted": {"native": True, "counts": False},
    "portable": {"native": False},
}
COUNTER, SOURCE = 0x30000, 0x100000

# l: inc rcx; inc qword [rbx]; lock inc qword [rbx+8]; add [rbx+16], rcx; jmp l
RAM_LOOP = bytes.fromhex("48ffc148ff03f048ff430848014b10e9ecffffff")
# l: inc rcx; inc dword [rbp]; jmp l
MMIO_LOOP = bytes.fromhex("48ffc1ff4500ebf8")
# l: mov rsi, r8; mov rdi, r9; mov ecx, r10d; cld; rep movsb; inc r11; jmp l
MOVS_LOOP = bytes.fromhex("4c89c64c89cf4489d1fcf3a449ffc3ebef")


class Kicker:
    """Kicks a CPU from another thread, as fast as it can."""

    def __init__(self, bench: Bench) -> None:
        self._cpu = bench.cpu
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._kick)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _kick(self) -> None:
        while not self._done.is_set():
            self._cpu.kick()
            time.sleep(0)  # else this thread keeps the interpreter for 5 ms


def stops(bench: Bench, how: str, count: int) -> None:
    """Stop the running program `count` times."""
    if how == "budget":
        for turn in range(count):
            assert bench.cpu.run(1 + turn % 50).reason is StopReason.BUDGET
        return
    with Kicker(bench):
        for _ in range(count):
            assert bench.cpu.run().reason is StopReason.BUDGET


WAYS = [(e, h) for e in ENGINES for h in ("budget", "kick") if (e, h) != ("uncounted", "budget")]
"""A budget makes an engine count."""


@pytest.mark.parametrize(("engine", "how"), WAYS)
def test_read_modify_write(engine: str, how: str) -> None:
    with Bench(**ENGINES[engine]) as bench:
        state = bench.long()
        state.gpr[3] = COUNTER
        bench.start(state, RAM_LOOP)
        stops(bench, how, 20_000)
        after = bench.cpu.get_state()
        assert after.rip == CODE  # the loop is one block
        count = after.gpr[1]
        total = count * (count + 1) // 2 & (1 << 64) - 1
        assert count > 1000
        assert bench.words(COUNTER, 3) == [count, count, total]


@pytest.mark.parametrize(("engine", "how"), WAYS)
def test_read_modify_write_of_device_memory(engine: str, how: str) -> None:
    with Bench(**ENGINES[engine]) as bench:
        value = reads = writes = 0

        def read(_offset: int, _size: int) -> int:
            nonlocal reads
            reads += 1
            return value

        def write(_offset: int, _size: int, new: int) -> None:
            nonlocal writes, value
            assert new == value + 1
            writes, value = writes + 1, new

        bench.mmio.answer, bench.mmio.on_write = read, write
        state = bench.long()
        state.gpr[5] = MMIO
        bench.start(state, MMIO_LOOP)
        stops(bench, how, 10_000)
        count = bench.cpu.get_state().gpr[1]
        assert count == reads == writes == value > 1000


# l: inc qword [rsi]; mov eax, 0x15; cpuid; sub eax, 0; or r8, rax; syscall; jmp l
HOOKED_LOOP = bytes.fromhex("48ff06 b815000000 0fa2 2d00000000 4909c0 0f05 ebea")
SYSCALL_ENTRY = 0x24000
# inc qword [rsi+8]; jmp rcx
SYSCALL_HANDLER = bytes.fromhex("48ff4608 ffe1")


@pytest.mark.parametrize(("engine", "how"), WAYS)
def test_instructions_that_the_engine_leaves_to_us(engine: str, how: str) -> None:
    """CPUID is ours and SYSCALL does something, also behind a stop that was asked for."""
    with Bench(**ENGINES[engine]) as bench:
        code = bytearray(HOOKED_LOOP)
        code[11:15] = cpuid(0x15)[0].to_bytes(4, "little")
        bench.memory.write(SYSCALL_ENTRY, SYSCALL_HANDLER)
        state = bench.long()
        state.gpr[6], state.gpr[8] = COUNTER, 0
        state.efer |= 1
        state.msrs = {0xC000_0081: 0x0010_0008 << 32, 0xC000_0082: SYSCALL_ENTRY}
        bench.start(state, bytes(code))
        stops(bench, how, 10_000)
        rounds, calls = bench.words(COUNTER, 2)
        assert rounds - calls in (0, 1)
        assert calls > 1000
        assert bench.cpu.get_state().gpr[8] == 0


@pytest.mark.parametrize(("engine", "how"), WAYS)
def test_repeated_moves(engine: str, how: str) -> None:
    """Overlapping by one: each byte moved twice or not at all would show to the end."""
    with Bench(**ENGINES[engine]) as bench:
        state = bench.long()
        size = 200
        state.gpr[8], state.gpr[9], state.gpr[10] = SOURCE, SOURCE + 1, size
        bench.memory.write(SOURCE, bytes(range(1, 251)))
        bench.start(state, MOVS_LOOP)
        stops(bench, how, 10_000)
        after = bench.cpu.get_state()
        # Wherever it is, RSI, RDI and RCX agree.
        if after.rip == CODE + 10:
            assert after.gpr[7] - after.gpr[6] == 1
            assert after.gpr[6] - SOURCE + after.gpr[1] == size
        assert after.gpr[11] > 0
        assert bench.memory.read(SOURCE, size + 1) == bytes((1,)) * (size + 1)
        assert bench.memory.read(SOURCE + size + 1, 20) == bytes(range(size + 2, size + 22))


@pytest.mark.parametrize(("engine", "how"), WAYS)
def test_repeated_moves_into_device_memory(engine: str, how: str) -> None:
    """Each byte reaches the device once, in order."""
    with Bench(**ENGINES[engine]) as bench:
        state = bench.long()
        count = 4000
        state.gpr[1], state.gpr[6], state.gpr[7] = count, SOURCE, MMIO
        data = bytes((i * 7 + i // 256) & 0xFF for i in range(count))
        bench.memory.write(SOURCE, data)
        bench.start(state, b"\xfc\xf3\xa4\xf4")  # cld; rep movsb; hlt
        turns = 0
        if how == "budget":
            while bench.cpu.run(3).reason is StopReason.BUDGET:
                turns += 1
        else:
            bench.mmio.on_write = lambda *_: time.sleep(0)  # the kicker's turn
            with Kicker(bench):
                while bench.cpu.run().reason is StopReason.BUDGET:
                    turns += 1
        assert bench.cpu.halted
        assert turns > 10
        assert [(at, value) for at, _, value in bench.mmio.writes] == list(enumerate(data))
