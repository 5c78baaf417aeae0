"""Non-maskable interrupts: what holds them back, until when, and that it is state.

Source: Intel SDM volume 3A, sections 6.7.1 and 6.8.3.
"""

from __future__ import annotations

import pytest
from cpu_bench import CODE, HANDLERS, K_CODE64, K_DATA, Bench

from vmm.cpu.engine import STEP_COST, StopReason
from vmm.cpu.state import CpuState


def test_an_nmi_waits_for_the_shadow_of_mov_ss_and_sti() -> None:
    """SDM volume 3A, section 6.8.3: so that a stack switch is not torn apart."""
    with Bench() as bench:
        state = bench.long()
        state.gpr[0] = K_DATA
        bench.start(state, b"\x90\x8e\xd0\x90\xfb\x90\x90")
        seen = []
        for _ in range(6):
            seen.append(bench.cpu.takes_nmi())
            bench.cpu.step()
        assert seen == [True, True, None, True, None, True]
        # A budget of one byte ends behind the next instruction, too.
        bench.cpu.set_state(state)
        bench.cpu.step(2)
        assert bench.cpu.takes_nmi() is None
        assert bench.cpu.run(1).reason is StopReason.BUDGET
        assert bench.cpu.get_state().rip == CODE + 4
        assert bench.cpu.takes_nmi()


def nmis(bench: Bench, handler: bytes) -> CpuState:
    """An endless loop that counts in RCX, and a handler of NMIs."""
    state = bench.long()
    bench.memory.write(HANDLERS + 0x800, handler)
    at = HANDLERS + 0x800
    bench.put(0x9000 + 32, at & 0xFFFF | 8 << 16 | 0x8E << 40 | (at >> 16) << 48, 0)
    bench.start(state, b"\x48\xff\xc1\xeb\xfb")
    return state


@pytest.mark.parametrize("counts", [True, False])
def test_a_second_nmi_is_blocked_until_iret(counts: bool) -> None:
    """SDM volume 3A, section 6.7.1."""
    with Bench(counts=counts) as bench:
        # inc rbx; out 0x80, al; jmp next; mov eax, 5; iretq
        nmis(bench, b"\x48\xff\xc3\xe6\x80\xeb\0\xb8\x05\0\0\0\x48\xcf")
        cpu = bench.cpu
        seen: list[bool | None] = []

        def look(*_: int) -> None:
            cpu.stop_now()

        bench.ports.on_write = look
        assert cpu.takes_nmi()
        cpu.inject_nmi()
        assert cpu.takes_nmi() is False
        assert cpu.run(None if not counts else 10**6).reason is StopReason.REQUESTED
        seen.append(cpu.takes_nmi())
        for _ in range(20):
            before = cpu.get_state()
            cpu.step()
            seen.append(cpu.takes_nmi())
            if seen[-1]:
                break
        # The loop goes on where it was interrupted, and only now the next one is taken.
        assert (before.gpr[0], cpu.get_state().rip) == (5, CODE)
        assert False in seen
        assert cpu.get_state().gpr[3] == 1
        cpu.inject_nmi()
        assert cpu.takes_nmi() is False


@pytest.mark.parametrize("counts", [True, False])
def test_the_run_ends_at_the_iret_of_an_nmi(counts: bool) -> None:
    """So that one that waits is taken behind it, and not before: it would use the same stack."""
    with Bench(counts=counts) as bench:
        nmis(bench, b"\x48\xff\xc3\x48\xcf")  # inc rbx; iretq
        cpu = bench.cpu
        cpu.inject_nmi()
        assert cpu.run().reason is StopReason.BUDGET
        assert cpu.get_state().rip == HANDLERS + 0x803
        assert cpu.takes_nmi() is None
        assert cpu.get_state().nmi_blocked
        cpu.step()
        assert cpu.get_state().rip == CODE
        assert cpu.takes_nmi()
        assert not cpu.get_state().nmi_blocked


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("counts", [True, False])
def test_a_step_executes_the_iret(counts: bool, native: bool) -> None:
    with Bench(counts=counts, native=native) as bench:
        nmis(bench, b"\x48\xff\xc3\x48\xcf")  # inc rbx; iretq
        cpu = bench.cpu
        for count in (1, 3):
            cpu.inject_nmi()
            before = cpu.executed
            if count == 1:
                cpu.step()
                cpu.step()
                assert cpu.get_state().rip == CODE
                assert cpu.takes_nmi()
                cpu.step()
            else:
                cpu.step(3)
            assert cpu.get_state().rip == CODE + 3
            assert cpu.executed == before + 3 * STEP_COST
            cpu.step()
        assert cpu.get_state().gpr[1:4:2] == [2, 2]


def test_an_iret_without_an_nmi_before_it_ends_nothing() -> None:
    with Bench(counts=False) as bench:
        # push 0x10; push rsp; pushfq; push 8; push CODE + 0x20; iretq
        state = bench.long()
        bench.memory.write(CODE + 0x20, b"\xf4")
        bench.start(state, b"\x6a\x10\x54\x9c\x6a\x08\x68\x20\0\x02\0\x48\xcf")
        assert bench.cpu.run().reason is StopReason.HALT
        assert bench.cpu.traps.count == 0


def test_the_block_is_state() -> None:
    with Bench() as bench:
        nmis(bench, b"\x48\xcf")
        bench.cpu.inject_nmi()
        saved = bench.cpu.get_state()
        assert saved.nmi_blocked
        bench.cpu.set_state(bench.long())
        assert bench.cpu.takes_nmi()
        bench.cpu.set_state(saved)
        assert bench.cpu.takes_nmi() is False
        bench.cpu.run(10**6)
        bench.cpu.set_state(bench.cpu.get_state())
        assert bench.cpu.takes_nmi() is False, "IRET has not been executed"
        bench.cpu.run(10**6)
        bench.cpu.step()
        assert bench.cpu.takes_nmi()


def test_another_state_at_the_same_place_is_not_blocked() -> None:
    with Bench() as bench:
        nmis(bench, b"\x48\xcf")
        bench.cpu.inject_nmi()
        bench.cpu.run(10**6)
        state = bench.cpu.get_state()
        state.nmi_blocked = False
        bench.cpu.set_state(state)
        assert bench.cpu.takes_nmi()


@pytest.mark.parametrize(("rip", "used"), [(HANDLERS + 0x803, 40), (CODE, 0)])
def test_behind_the_iret_is_another_place(rip: int, used: int) -> None:
    """The same instruction on another stack, or another one on the same stack."""
    with Bench() as bench:
        nmis(bench, b"\x48\xff\xc3\x48\xcf")  # inc rbx; iretq
        cpu = bench.cpu
        cpu.inject_nmi()
        stack = cpu.get_state().gpr[4]
        bench.put(stack, rip, K_CODE64, 2, stack + used, K_DATA)
        cpu.run(10**6)
        assert cpu.takes_nmi() is None
        cpu.step()
        after = cpu.get_state()
        assert (after.rip, after.gpr[4]) == (rip, stack + used)
        assert cpu.takes_nmi()


def test_a_fault_of_the_iret_ends_it_as_well() -> None:
    with Bench() as bench:
        nmis(bench, b"\x48\xff\xc3\x48\xcf")
        cpu = bench.cpu
        cpu.inject_nmi()
        stack = cpu.get_state().gpr[4]
        bench.put(stack, CODE, 0xFFF8)
        cpu.run(10**6)
        assert cpu.takes_nmi() is None
        cpu.step()
        assert cpu.takes_nmi()
        cpu.run(10**6)
        assert bench.vector() == 13


@pytest.mark.parametrize("mode", ["real", "protected"])
def test_iret_ends_it_in_every_mode(mode: str) -> None:
    with Bench() as bench:
        state = bench.real() if mode == "real" else bench.protected()
        bench.memory.write(HANDLERS + 2, b"\xcf")
        bench.start(state, b"\xeb\xfe", state.cs.base + state.rip)
        bench.cpu.inject_nmi()
        assert bench.cpu.takes_nmi() is False
        bench.cpu.step()
        bench.cpu.step()
        assert bench.cpu.takes_nmi()
