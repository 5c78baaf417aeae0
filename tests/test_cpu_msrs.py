"""RDMSR, WRMSR and MOV CR8: what the engine keeps, what we answer, and #GP for the rest.

Source: Intel SDM volume 2, "RDMSR", "WRMSR", "MOV - Move to/from Control Registers"; volume 3A,
10.8.6.1 and 10.12; volume 4, chapter 2.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from cpu_bench import CODE, HANDLERS, KERNEL_STACK, Bench
from test_cpu_debug import steps

from devices.irqchip.x2apic import MsrFault
from vmm.cpu import intercept
from vmm.cpu.engine import StopReason
from vmm.cpu.msrs import PASSED, READABLE

pytestmark = pytest.mark.usefixtures("both_paths")

RDMSR, WRMSR, HLT = b"\x0f\x32", b"\x0f\x30", b"\xf4"
NOBODYS = (
    *(0x2, 0x276, 0x1FFF, 0x2000, 0x4000_0000, 0xBFFF_FFFF, 0xC000_0105, 0xC000_1FFF, 0xC000_2000),
    *(0xC000_FFFF, 0xC001_0000, 0xC001_0010, 0xC001_1FFF, 0xC001_2000, 0xFFFF_FFFF),
)
"""Most are at the borders of what the engine's permission map has."""


@dataclass
class FakeApic:
    """One MSR that takes anything, and CR8."""

    values: dict[int, int] = field(default_factory=lambda: {0x1B: 0xFEE0_0900, 0x83F: 0})
    cr8: int = 0

    def read_msr(self, index: int) -> int:
        try:
            return self.values[index]
        except KeyError:
            raise MsrFault(f"none {index:#x}") from None

    def write_msr(self, index: int, value: int) -> None:
        self.read_msr(index)
        self.values[index] = value

    def read_cr8(self) -> int:
        return self.cr8

    def write_cr8(self, value: int) -> None:
        self.cr8 = value


def use(bench: Bench, code: bytes, number: int, value: int = 0) -> None:
    """Run one RDMSR or WRMSR, with marks in the upper halves, which must not matter."""
    state = bench.long()
    state.gpr[0] = 0xAAAA_0000_0000_0000 | value & 0xFFFF_FFFF
    state.gpr[1] = 0xBBBB_0000_0000_0000 | number
    state.gpr[2] = 0xCCCC_0000_0000_0000 | value >> 32
    bench.run(state, code + HLT)


def test_this_library_lets_us() -> None:
    assert intercept.available(), "the MSRs of the local APIC would be missing"


@pytest.mark.parametrize("number", NOBODYS)
@pytest.mark.parametrize("code", [RDMSR, WRMSR])
def test_what_is_not_there_is_a_fault_and_is_told(code: bytes, number: int) -> None:
    with Bench() as bench:
        told: list[tuple[str, int, int, int]] = []
        msrs = bench.cpu.traps.msrs
        msrs.on_unclaimed = lambda *what: told.append(what)
        use(bench, code, number, 0x1122_3344_5566_7788)
        assert bench.vector() == 13
        after = bench.cpu.get_state()
        error, rip = bench.words(KERNEL_STACK - 48, 2)
        assert (error, rip) == (0, CODE), "a fault: RIP is at the instruction"
        assert after.gpr[0] == 0xAAAA_0000_5566_7788
        assert after.gpr[2] == 0xCCCC_0000_1122_3344
        if code == RDMSR:
            assert told == [("read", number, 8, 0)]
        else:
            assert told == [("write", number, 8, 0x1122_3344_5566_7788)]
        assert (msrs.unclaimed_reads, msrs.unclaimed_writes) == (code == RDMSR, code == WRMSR)


@pytest.mark.parametrize("number", [0x174, 0x277, 0x2FF, 0xC000_0081, 0xC000_0102])
def test_what_the_engine_keeps_it_keeps(number: int) -> None:
    with Bench() as bench:
        use(bench, WRMSR, number, 0x0000_0601)
        assert bench.cpu.get_state().msrs[number] == 0x601
        use(bench, WRMSR + b"\x31\xc0\x31\xd2" + RDMSR, number, 0x0000_0601)
        after = bench.cpu.get_state()
        assert (after.gpr[2] << 32 | after.gpr[0]) == 0x601
        assert bench.cpu.traps.count == 0, "nobody was called for it"


@pytest.mark.parametrize("number", sorted({*READABLE, *PASSED}))
def test_what_the_engine_reads_is_read_without_us(number: int) -> None:
    with Bench() as bench:
        use(bench, RDMSR, number)
        assert bench.cpu.get_state().rip == CODE + 3
        assert bench.cpu.traps.count == 0
        use(bench, WRMSR, number, bench.long().efer)
        faults = number not in PASSED
        assert (bench.cpu.get_state().rip != CODE + 3) is faults


@pytest.mark.parametrize("number", [0x17, 0x8B, 0x1D9])
def test_inert_ones_read_zero_and_take_anything(number: int) -> None:
    with Bench() as bench:
        use(bench, WRMSR + RDMSR, number, (1 << 64) - 1)
        after = bench.cpu.get_state()
        assert (after.rip, after.gpr[0], after.gpr[2]) == (CODE + 5, 0, 0)
        assert after.gpr[1] == 0xBBBB_0000_0000_0000 | number


def test_the_time_stamp_counter() -> None:
    with Bench(tsc=lambda: 0xFEDC_BA98_7654_3210) as bench:
        use(bench, RDMSR, 0x10)
        after = bench.cpu.get_state()
        assert (after.gpr[0], after.gpr[2]) == (0x7654_3210, 0xFEDC_BA98)


RDTSC = b"\x0f\x31"


@pytest.mark.parametrize("value", [0, 5, 0xFEDC_BA98_7654_3210, (1 << 64) - 1])
def test_the_time_stamp_counter_can_be_set(value: int) -> None:
    clock = iter([1000, 1000 + 7, 1000 + 9, 1000 + 9]).__next__
    with Bench(tsc=clock) as bench:
        use(bench, WRMSR + RDTSC, 0x10, value)
        after = bench.cpu.get_state()
        assert after.gpr[2] << 32 | after.gpr[0] == value + 7 & (1 << 64) - 1
        assert after.tsc_offset == value - 1000
        bench.cpu.set_state(bench.long())
        after.rip, after.halted = CODE, False
        bench.run(after, RDTSC + HLT)
        after = bench.cpu.get_state()
        assert after.gpr[2] << 32 | after.gpr[0] == value + 9 & (1 << 64) - 1, "it is state"


def test_deadlines_are_in_the_time_of_the_counter() -> None:
    with Bench(tsc=lambda: 1_000_000) as bench:
        apic = bench.cpu.traps.msrs.apic = FakeApic()
        apic.values[0x6E0] = 0
        offset = 100 - 1_000_000

        def write(number: int, value: int) -> None:
            state = bench.long()
            state.tsc_offset = offset
            state.gpr[:3] = [value & 0xFFFF_FFFF, number, value >> 32]
            bench.run(state, WRMSR + RDMSR + HLT)

        for value, due in ((500, 500 - offset), (0, 0), (1 << 63, (1 << 63) - offset)):
            write(0x6E0, value)
            assert apic.values[0x6E0] == due
            after = bench.cpu.get_state()
            assert after.gpr[2] << 32 | after.gpr[0] == value
        # The counter is set: a deadline at 500 of it comes sooner or later than before.
        write(0x6E0, 500)
        write(0x10, 300)
        assert apic.values[0x6E0] == 1_000_000 + 200
        offset = 300 - 1_000_000
        write(0x10, 2000)
        assert apic.values[0x6E0] == 1_000_000 - 1500, "which is past"
        # One that would be before the beginning of time is past, and not far in the future.
        offset = 5_000_000
        write(0x6E0, 500)
        assert apic.values[0x6E0] == 1


def test_the_apic_is_asked() -> None:
    with Bench() as bench:
        apic = bench.cpu.traps.msrs.apic = FakeApic()
        use(bench, RDMSR, 0x1B)
        assert bench.cpu.get_state().gpr[0] == 0xFEE0_0900
        use(bench, WRMSR, 0x83F, 0x12_0000_0051)
        assert apic.values[0x83F] == 0x12_0000_0051
        for code in (RDMSR, WRMSR):
            use(bench, code, 0x802)
            assert bench.vector() == 13
        assert bench.cpu.traps.msrs.unclaimed_reads == 0, "the APIC's own fault is no stranger"


def test_without_an_apic_it_has_no_msrs() -> None:
    with Bench() as bench:
        use(bench, RDMSR, 0x1B)
        assert bench.vector() == 13


@pytest.mark.parametrize("mode", ["real", "protected", "compat", "long"])
@pytest.mark.parametrize("prefix", [b"", b"\x66", b"\xf2\x2e"])
def test_every_mode_and_prefix(mode: str, prefix: bytes) -> None:
    with Bench(tsc=lambda: 0x9) as bench:
        match mode:
            case "real":
                state = bench.real()
            case "protected":
                state = bench.protected()
            case _:
                state = bench.long(compat=mode == "compat")
        start = state.rip
        state.gpr[1] = 0x10
        bench.run(state, prefix + RDMSR + HLT)
        after = bench.cpu.get_state()
        assert (after.gpr[0], after.gpr[2], after.rip - start) == (9, 0, len(prefix) + 3)


@pytest.mark.parametrize("code", [RDMSR, WRMSR, b"\x44\x0f\x20\xc0", b"\x44\x0f\x22\xc0"])
def test_programs_may_not(code: bytes) -> None:
    with Bench() as bench:
        bench.cpu.traps.msrs.apic = FakeApic()
        state = bench.long(user=True)
        state.gpr[1] = 0x1B
        bench.run(state, code + HLT)
        assert bench.vector() == 13


@pytest.mark.parametrize("register", range(16))
def test_cr8_to_and_from_every_register(register: int) -> None:
    rex, low = 0x44 | register >> 3, 0xC0 | register & 7
    with Bench() as bench:
        apic = bench.cpu.traps.msrs.apic = FakeApic(cr8=7)
        state = bench.long()
        state.gpr[register] = 0xB
        bench.run(state, bytes((rex, 0x0F, 0x22, low)) + HLT)
        assert apic.cr8 == 0xB
        state.gpr[register] = (1 << 64) - 1
        bench.run(state, bytes((rex, 0x0F, 0x20, low)) + HLT)
        assert bench.cpu.get_state().gpr[register] == 0xB
        assert bench.cpu.get_state().rip == CODE + 5


@pytest.mark.parametrize("value", [16, 1 << 32, 1 << 63])
def test_cr8_has_four_bits(value: int) -> None:
    with Bench() as bench:
        apic = bench.cpu.traps.msrs.apic = FakeApic(cr8=3)
        state = bench.long()
        state.gpr[3] = value
        bench.run(state, b"\x44\x0f\x22\xc3" + HLT)
        assert (bench.vector(), apic.cr8) == (13, 3)
        assert bench.words(KERNEL_STACK - 48, 2) == [0, CODE]


def test_the_other_control_registers_are_the_engines() -> None:
    with Bench() as bench:
        state = bench.long()
        bench.run(state, b"\x0f\x20\xc3\x0f\x22\xc3\x0f\x20\xd9\x0f\x22\xd9" + HLT)
        after = bench.cpu.get_state()
        assert (after.gpr[3], after.gpr[1]) == (state.cr0, state.cr3)
        assert bench.cpu.traps.count == 0


def test_a_software_interrupt_before_is_forgotten() -> None:
    """The engine keeps where INT n goes on, and would go there at the next intercept."""
    with Bench(tsc=lambda: 5) as bench:
        state = bench.long()
        bench.memory.write(HANDLERS + 0x80, b"\x48\xcf")  # iretq
        bench.gate64(0x80)
        state.gpr[1] = 0x10
        # int 0x80 twice, since the first one marks pages as accessed, which is Python's;
        # inc rbx; rdmsr; inc rbx
        code = b"\xcd\x80\xcd\x80\x48\xff\xc3" + RDMSR + b"\x48\xff\xc3" + HLT
        bench.run(state, code)
        after = bench.cpu.get_state()
        assert (after.gpr[0], after.gpr[3], after.rip) == (5, 2, CODE + len(code))
        assert bench.cpu.traps.count == (2 if bench.native else 3)


def test_a_single_step_stops_behind_it() -> None:
    assert steps(RDMSR + b"\x90", ((1, 0x17),))[:2] == [2, 3]


def test_steps_of_the_machine_count_it_as_one() -> None:
    with Bench() as bench:
        state = bench.long()
        state.gpr[1] = 0x17
        bench.start(state, RDMSR + b"\x90" + WRMSR + HLT)
        places = []
        for _ in range(3):
            bench.cpu.step()
            places.append(bench.cpu.get_state().rip - CODE)
        assert places == [2, 3, 5]
        assert bench.cpu.step().reason is StopReason.HALT


def test_the_shadow_of_sti_ends_behind_it() -> None:
    with Bench() as bench:
        state = bench.long()
        state.gpr[1] = 0x17
        bench.start(state, b"\xfb" + RDMSR + HLT)
        bench.cpu.step()
        assert bench.cpu.takes_nmi() is None
        bench.cpu.step()
        assert bench.cpu.takes_nmi()
        assert bench.cpu.interruptible()


def test_code_that_is_changed_meanwhile() -> None:
    """The engine executes what it translated, and we see something else there: no instruction."""
    with Bench() as bench:
        state = bench.long()
        state.gpr[1] = 0x17

        def change(*_: int) -> None:
            if len(bench.ports.writes) == 2:
                bench.memory.write(CODE + 2, b"\x90\x90")

        bench.ports.on_write = change
        bench.run(state, b"\xe6\x80" + RDMSR + b"\xeb\xfa")
        assert bench.vector() == 6


def test_what_nobody_asked_to_be_told_ends_the_run() -> None:
    with Bench() as bench:
        bench.start(bench.long(), b"\x9c" + HLT)  # pushfq
        context = bench.cpu._context
        context.save()
        context.words[intercept.instructions(context)] |= 1 << 16
        context.restore()
        stop = bench.cpu.run(1000)
        assert (stop.reason, stop.detail) == (StopReason.ERROR, "the engine raised event 0x170")


def test_it_lasts_through_states_modes_and_events() -> None:
    """A flag of the engine's carries it, and nothing of ours or the guest's may lose that."""
    with Bench() as bench:
        for state in (bench.real(), bench.protected(), bench.long(user=True), bench.long()):
            bench.run(state, b"\xcc" + HLT)  # int3, by a gate
            bench.cpu.set_state(bench.cpu.get_state())
        use(bench, RDMSR, NOBODYS[0])
        assert bench.vector() == 13
