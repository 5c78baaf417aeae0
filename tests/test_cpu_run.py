"""Running and stopping: budgets, kicks, requested stops, single steps, HLT, the two buses."""

from __future__ import annotations

import threading
import time
from typing import NoReturn

import pytest
from cpu_bench import CODE, KERNEL_STACK, MMIO, PORT, Bench

from vmm.cpu.budget import Budget
from vmm.cpu.engine import STEP_COST, StopReason
from vmm.cpu.state import CpuState, Segment

COUNTER = 0x30000

# A loop whose register and memory counters agree at its head exactly if no instruction was run
# twice or skipped.
COUNT = bytes.fromhex(
    # l: inc rcx; inc qword [rbx]; lock inc qword [rbx+8]; add [rbx+16], rcx;
    # jmp l
    "48ffc148ff03f048ff430848014b10e9ecffffff"
)


def counting(bench: Bench) -> CpuState:
    state = bench.long()
    state.gpr[3] = COUNTER
    return state


def assert_exact(bench: Bench) -> int:
    """The counters of COUNT agree; the count."""
    state = bench.cpu.get_state()
    assert state.rip == CODE  # the loop is one block
    count = state.gpr[1]
    total = count * (count + 1) // 2 & (1 << 64) - 1
    assert bench.words(COUNTER, 3) == [count, count, total]
    return count


@pytest.mark.parametrize("native", [True, False])
def test_budget_stops_are_exact_and_return(native: bool) -> None:
    with Bench(native=native) as bench:
        bench.start(counting(bench), COUNT)
        for budget in (1, 5, 17, 100, 1000):
            before = bench.cpu.executed
            assert bench.cpu.run(budget).reason is StopReason.BUDGET
            used = bench.cpu.executed - before
            assert budget <= used < budget + len(COUNT)
            assert_exact(bench)
        assert bench.cpu.executed == assert_exact(bench) * len(COUNT)


def test_zero_budget_executes_nothing() -> None:
    with Bench() as bench:
        bench.start(counting(bench), COUNT)
        assert bench.cpu.run(0).reason is StopReason.BUDGET
        assert assert_exact(bench) == 0


def test_kicks_from_another_thread_are_exact() -> None:
    with Bench() as bench:
        bench.start(counting(bench), COUNT)
        kicks, done = 0, threading.Event()

        def kicker() -> None:
            nonlocal kicks
            while not done.is_set():
                bench.cpu.kick()
                kicks += 1
                time.sleep(0)  # else this thread keeps the interpreter for 5 ms

        thread = threading.Thread(target=kicker)
        thread.start()
        try:
            for _ in range(20_000):
                assert bench.cpu.run(1 << 40).reason is StopReason.BUDGET
        finally:
            done.set()
            thread.join()
        assert kicks >= 20_000
        assert assert_exact(bench) > 0


def test_kick_is_not_lost_between_runs() -> None:
    with Bench() as bench:
        bench.start(counting(bench), COUNT)
        bench.cpu.kick()
        assert bench.cpu.run(1 << 60).reason is StopReason.BUDGET
        assert assert_exact(bench) == 0
        assert bench.cpu.run(100).reason is StopReason.BUDGET
        assert assert_exact(bench) > 0


def test_kick_ends_endless_exceptions() -> None:
    with Bench() as bench:
        state = bench.long()
        bench.memory.write(0x10006, b"\x48\xcf")  # the handler of #UD returns to the same UD2
        bench.start(state, b"\x0f\x0b")
        threading.Timer(0.05, bench.cpu.kick).start()
        assert bench.cpu.run(1 << 60).reason is StopReason.BUDGET


def test_halt_and_wake() -> None:
    with Bench() as bench:
        code = bytes.fromhex(
            # sti; hlt; mov eax, 7; hlt
            "fbf4b807000000f4"
        )
        assert bench.run(bench.long(), code).reason is StopReason.HALT
        assert bench.cpu.halted
        assert bench.cpu.get_state().rip == CODE + 2
        assert bench.cpu.run(100).reason is StopReason.HALT
        assert bench.cpu.get_state().rip == CODE + 2
        assert bench.cpu.interruptible()
        bench.memory.write(0x10040, b"\x48\xcf")  # IRETQ
        assert bench.cpu.inject(0x40) is None
        assert not bench.cpu.halted
        assert not bench.cpu.interruptible()
        assert bench.cpu.run(1000).reason is StopReason.HALT
        assert bench.cpu.get_state().gpr[0] == 7


def test_interrupt_shadow_after_sti_and_mov_ss() -> None:
    with Bench() as bench:
        code = bytes.fromhex(
            # sti; nop; mov ss, eax; nop; nop; hlt
            "fb908ed09090f4"
        )
        state = bench.long()
        state.gpr[0] = 0x10
        bench.start(state, code)
        seen = []
        for _ in range(5):
            seen.append((bench.cpu.interruptible(), bench.cpu.get_state().interrupt_shadow))
            bench.cpu.step()
        assert seen == [(False, False), (False, True), (True, False), (False, True), (True, False)]


def test_shadow_survives_a_state_round_trip() -> None:
    with Bench() as bench:
        bench.start(
            bench.long(),
            bytes.fromhex(
                # sti; nop; hlt
                "fb90f4"
            ),
        )
        bench.cpu.step()
        state = bench.cpu.get_state()
        assert state.interrupt_shadow
        with Bench() as other:
            other.memory.write(0, bench.memory.read(0, 1 << 20))
            other.cpu.set_state(state)
            assert not other.cpu.interruptible()
            other.cpu.step()
            assert other.cpu.interruptible()


@pytest.mark.parametrize("native", [True, False])
def test_step_counts_instructions(native: bool) -> None:
    with Bench(native=native) as bench:
        code = bytes.fromhex(
            # mov ecx, 3; cld; mov edi, 0x30000; rep stosb; inc eax; inc eax; hlt
            "b903000000fcbf00000300f3aaffc0ffc0f4"
        )
        bench.start(bench.long(), code)
        rips = []
        while not bench.cpu.halted:
            rips.append(bench.cpu.get_state().rip - CODE)
            bench.cpu.step()
        # Each iteration of REP STOSB is a step; so is the look that finds RCX zero.
        assert rips in ([0, 5, 6, 11, 11, 11, 13, 15, 17], [0, 5, 6, 11, 11, 11, 11, 13, 15, 17])
        bench.start(bench.long(), code)
        assert bench.cpu.step(3).reason is StopReason.BUDGET
        assert bench.cpu.get_state().rip == CODE + 11


@pytest.mark.parametrize("counts", [True, False])
def test_a_kick_does_not_swallow_a_step(counts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with Bench(counts=counts) as bench:
        cpu = bench.cpu
        arm, kicks = Budget.arm, iter((True, False) * 3)

        def kicked(budget: Budget, amount: int) -> None:
            arm(budget, amount)
            if next(kicks):
                cpu._budget.end()  # what is left of a kick that is under way now

        bench.start(bench.long(), b"\x48\xff\xc1" * 3)  # inc rcx
        monkeypatch.setattr(Budget, "arm", kicked)
        cpu.step(3)
        after = cpu.get_state()
        assert (after.gpr[1], after.rip, cpu.executed) == (3, CODE + 9, 3 * STEP_COST)


def test_step_counts_in_code_that_has_run_before() -> None:
    with Bench() as bench:
        bench.start(
            bench.long(),
            bytes.fromhex(
                # l: inc rax; inc rcx; inc rdx; jmp l
                "48ffc048ffc148ffc2e9f2ffffff"
            ),
        )
        bench.cpu.run(1000)
        before = bench.cpu.get_state()
        bench.cpu.step(2)
        after = bench.cpu.get_state()
        assert [a - b for a, b in zip(after.gpr[:3], before.gpr[:3], strict=True)] == [1, 1, 0]
        bench.cpu.run(1000)
        bench.cpu.step(2)
        assert bench.cpu.get_state().rip == CODE + 6


def test_step_into_a_fault_and_at_a_halt() -> None:
    with Bench() as bench:
        bench.start(
            bench.long(),
            bytes.fromhex(
                # nop; ud2
                "900f0b"
            ),
        )
        bench.cpu.step(2)
        assert bench.cpu.get_state().rip == 0x10006  # at the handler, not in it
        assert bench.cpu.step(5).reason is StopReason.HALT
        assert bench.cpu.halted


@pytest.mark.parametrize("counts", [True, False])
def test_a_step_halts_also_behind_a_stop(counts: bool) -> None:
    """As every run that ends by its number of steps leaves one behind."""
    with Bench(counts=counts) as bench:
        bench.start(bench.long(), b"\x90\xf4\x90")
        bench.cpu.step()
        bench.cpu.stop_now()
        bench.cpu.step()
        assert bench.cpu.halted
        assert bench.cpu.step().reason is StopReason.HALT
        assert bench.cpu.get_state().rip == CODE + 2


def test_stepping_equals_running() -> None:
    code = bytes.fromhex(
        # mov ecx, 50; l: imul rax, rax, 13; add rax, rcx; push rax; pop rdx; xor
        # [rbx], rdx; adc rsi, rdx; dec ecx; jnz l; hlt
        "b932000000486bc00d4801c8505a4831134811d6ffc90f85e9fffffff4"
    )
    with Bench() as one, Bench() as two:
        one.run(counting(one), code)
        two.start(counting(two), code)
        while two.cpu.step().reason is StopReason.BUDGET:
            pass
        assert one.cpu.get_state() == two.cpu.get_state()
        assert one.memory.read(0, 1 << 20) == two.memory.read(0, 1 << 20)


# Instructions behind an access, whose repetition would show: also accesses to device memory.
AFTER = bytes.fromhex(
    # inc qword [rbx]; mov [rbp], al; mov al, [rbp]; inc qword [rbx+8]; hlt
    "48ff038845008a450048ff4308f4"
)


@pytest.mark.parametrize("kind", ["out", "outs", "in", "ins", "mmio-write", "mmio-read"])
@pytest.mark.parametrize("counts", [True, False])
def test_stop_now_repeats_and_skips_nothing(kind: str, counts: bool) -> None:
    with Bench(counts=counts) as bench:

        def answer(offset: int, _size: int) -> int:
            if offset < 4:
                bench.cpu.stop_now()
            return 0x55

        def on_write(offset: int, size: int, _value: int) -> None:
            answer(offset, size)

        bench.ports.answer = bench.mmio.answer = answer
        bench.mmio.on_write = bench.ports.on_write = on_write
        state = counting(bench)
        state.gpr[1], state.gpr[2], state.gpr[6], state.gpr[7] = 4, PORT, MMIO, 0x31000
        state.gpr[5] = MMIO + 8
        if kind == "outs":
            state.gpr[6] = 0x31000
        code = {
            "out": bytes.fromhex(
                # out 0x80, al
                "e680"
            ),
            "outs": bytes.fromhex(
                # cld; rep outsb
                "fcf36e"
            ),
            "in": bytes.fromhex(
                # in al, dx
                "ec"
            ),
            "ins": bytes.fromhex(
                # cld; rep insb
                "fcf36c"
            ),
            "mmio-read": bytes.fromhex(
                # mov eax, [rsi]
                "8b06"
            ),
            "mmio-write": bytes.fromhex(
                # mov [rsi], eax
                "8906"
            ),
        }[kind]
        bench.memory.write(0x31000, b"abcd")
        bench.start(state, code + AFTER)
        stops = []
        while not bench.cpu.halted:
            stops.append(bench.cpu.run().reason)
            assert len(stops) < 10
        assert StopReason.REQUESTED in stops
        assert bench.cpu.run().reason is StopReason.HALT
        accesses = 4 if kind in ("ins", "outs") else 1
        device = bench.mmio if "mmio" in kind else bench.ports
        log = device.reads if kind in ("in", "ins", "mmio-read") else device.writes
        assert len([entry for entry in log if entry[0] < 4]) == accesses
        assert bench.words(COUNTER, 2) == [1, 1]
        assert [entry for entry in bench.mmio.reads if entry[0] == 8] == [(8, 1)]
        assert len([entry for entry in bench.mmio.writes if entry[0] == 8]) == 1
        if kind == "outs":
            assert bytes(value for _, _, value in bench.ports.writes) == b"abcd"
        if kind == "ins":
            assert bench.memory.read(0x31000, 5) == b"\x55" * 4 + b"\0"


def test_port_and_mmio_sizes() -> None:
    with Bench() as bench:
        bench.mmio.answer = bench.ports.answer = lambda offset, size: (1 << 8 * size) - 2 - offset
        code = bytes.fromhex(
            # mov ebx, 0xfe000000; mov al, [rbx+1]; mov cx, [rbx+2]; mov edx, [rbx+4];
            # mov rsi, [rbx+8]; mov [rbx+8], rsi; mov [rbx+3], al; in al, 0x82; out
            # 0x84, eax; in ax, 0x86; hlt
            "bb000000fe8a4301668b4b028b5304488b730848897308884303e482e78466e586f4"
        )
        assert bench.run(bench.long(), code).reason is StopReason.HALT
        # An access of 8 bytes is one or two on the bus; together they cover it.
        assert bench.mmio.reads[:3] == [(1, 1), (2, 2), (4, 4)]
        assert sum(size for _, size in bench.mmio.reads[3:]) == 8
        assert bench.mmio.writes[-1] == (3, 1, 0xFD)
        assert bench.ports.reads == [(2, 1), (6, 2)]
        assert bench.ports.writes == [(4, 4, 0xFC)]
        assert bench.cpu.get_state().gpr[1] & 0xFFFF == 0xFFFC


def test_unclaimed_addresses_read_all_ones() -> None:
    with Bench() as bench:
        code = bytes.fromhex(
            # mov ebx, 0xfe100000; mov eax, [rbx]; mov [rbx], eax; in al, 0x20; hlt
            "bb000010fe8b038903e420f4"
        )
        bench.run(bench.long(), code)
        assert bench.cpu.get_state().gpr[0] == 0xFFFF_FFFF
        assert bench.mmio_bus.unclaimed_reads == bench.mmio_bus.unclaimed_writes == 1
        assert bench.port_bus.unclaimed_reads == 1


def run_to_the_end(bench: Bench) -> None:
    while bench.cpu.run(10).reason is StopReason.BUDGET:
        pass


@pytest.mark.parametrize(
    "code",
    [
        bytes.fromhex(
            # in al, 0x80; hlt
            "e480f4"
        ),
        bytes.fromhex(
            # out 0x80, al; hlt
            "e680f4"
        ),
        bytes.fromhex(
            # mov ebx, 0xfe000000; mov eax, [rbx]; hlt
            "bb000000fe8b03f4"
        ),
        bytes.fromhex(
            # mov ebx, 0xfe000000; mov [rbx], eax; hlt
            "bb000000fe8903f4"
        ),
    ],
)
def test_a_failing_bus_is_raised_from_run(code: bytes) -> None:
    with Bench() as bench:

        def broken(*_: int) -> NoReturn:
            raise RuntimeError("device bug")

        bench.mmio.answer = bench.ports.answer = broken
        bench.mmio.on_write = bench.ports.on_write = broken
        bench.start(bench.long(), code)
        with pytest.raises(RuntimeError, match="device bug"):
            run_to_the_end(bench)


def test_reset_state_is_real_mode_at_the_reset_vector() -> None:
    with Bench() as bench:
        state = bench.cpu.get_state()
        assert (state.cs, state.rip) == (Segment(0xF000, 0xFFFF_0000, 0xFFFF, 0x9B00), 0xFFF0)
        assert state.rflags == 2
        assert state.cr0 == 0x6000_0010
        # There is no ROM: the fetch reaches nothing, and no handler exists.
        stop = bench.cpu.run(1000)
        assert stop.reason in (StopReason.SHUTDOWN, StopReason.BUDGET)


def test_reset_state_runs_code() -> None:
    with Bench() as bench:
        state = CpuState()
        state.cs, state.rip = Segment(0x2000, 0x20000, 0xFFFF, 0x9B00), 0
        assert (
            bench.run(
                state,
                bytes.fromhex(
                    # mov ax, 0x1234; hlt
                    "b83412f4"
                ),
            ).reason
            is StopReason.HALT
        )
        assert bench.cpu.get_state().gpr[0] == 0x1234


def test_executed_grows_with_blocks_and_exceptions() -> None:
    with Bench() as bench:
        bench.memory.write(0x10003, b"\x48\xcf")
        before = bench.cpu.executed
        bench.run(
            bench.long(),
            bytes.fromhex(
                # int3; hlt
                "ccf4"
            ),
        )
        assert bench.cpu.executed >= before + 4 + 64


def test_translate_and_read_linear() -> None:
    with Bench() as bench:
        state = bench.long()
        bench.put(0x4000, 0x30_0007, 0)  # WINDOW -> 3 MiB, the next page absent
        bench.cpu.set_state(state)
        bench.memory.write(0x30_0FF0, b"0123456789abcdef")
        assert bench.cpu.translate(0x20_0FF0) == 0x30_0FF0
        assert bench.cpu.translate(0x20_1000) is None
        assert bench.cpu.translate(1 << 63) is None
        assert bench.cpu.read_linear(0x20_0FF4, 100) == b"456789abcdef"
        assert bench.cpu.read_linear(MMIO, 4) == b""
        assert bench.cpu.read_linear(KERNEL_STACK - 8, 16) == bytes(16)


def test_a_gate_that_closes_in_a_run_is_obeyed_at_once() -> None:
    """Although the translation of the page behind it has just been used."""
    with Bench() as bench:
        bench.ports.on_write = lambda _offset, _size, value: bench.cpu.set_a20(bool(value))
        bench.memory.write(0x500, b"\x11")
        bench.memory.write(0x100500, b"\x22")
        state = bench.protected()
        state.gpr[6], state.gpr[7] = 0x100500, PORT
        code = bytes.fromhex(
            # mov edx, edi; mov bl, [rsi]; mov al, 0; out dx, al; jmp next; mov bh, [rsi]
            "89fa8a1eb000eeeb008a3e"
            # mov al, 1; out dx, al; jmp next; mov cl, [rsi]; hlt
            "b001eeeb008a0ef4"
        )
        assert bench.run(state, code).reason is StopReason.HALT
        gpr = bench.cpu.get_state().gpr
        assert (gpr[3] & 0xFFFF, gpr[1] & 0xFF) == (0x1122, 0x22)
