"""Tables in device memory or nowhere, tasks in a circle, code over page borders: each has an end.

Every case is bounded by a budget, and its ending is one of those that it names.
"""

from __future__ import annotations

import os
from typing import ClassVar

import pytest
from cpu_bench import (
    CODE,
    GDT,
    HANDLERS,
    IDT,
    K_CODE32,
    K_DATA,
    KERNEL_STACK,
    MMIO,
    TSS,
    U_CODE32,
    WINDOW,
    WINDOW_TABLE,
    Bench,
)

from devices.bus import BusType
from devices.contract import Device, Region
from vmm.config import FailurePolicy, HostOptions
from vmm.cpu.engine import StopReason
from vmm.cpu.state import DescriptorTable
from vmm.machine import Machine
from vmm.outcome import Ending

BUDGET = 50_000
BOTH = pytest.mark.parametrize("native", [True, False])


def mirror(bench: Bench, start: int) -> None:
    """Let device memory hold what RAM holds from `start` on, both ways."""

    def answer(offset: int, size: int) -> int:
        return int.from_bytes(bench.memory.read(start + offset, size), "little")

    def on_write(offset: int, size: int, value: int) -> None:
        bench.memory.write(start + offset, value.to_bytes(size, "little"))

    bench.mmio.answer, bench.mmio.on_write = answer, on_write


@BOTH
@pytest.mark.parametrize("mode", ["long", "protected"])
@pytest.mark.parametrize(("table", "start"), [("gdtr", GDT), ("idtr", IDT)])
def test_good_tables_in_device_memory_work(table: str, start: int, mode: str, native: bool) -> None:
    with Bench(native=native) as bench:
        state = bench.long() if mode == "long" else bench.protected()
        mirror(bench, start)
        setattr(state, table, DescriptorTable(MMIO, 0xFFF))
        assert bench.run(state, b"\xcc", BUDGET).reason is StopReason.HALT
        assert bench.vector() == 3
        assert 0 < len(bench.mmio.reads) < 20


@BOTH
@pytest.mark.parametrize("mode", ["long", "protected"])
def test_a_good_tss_in_device_memory_works(mode: str, native: bool) -> None:
    with Bench(native=native) as bench:
        state = bench.long(user=True) if mode == "long" else bench.protected(user=True)
        mirror(bench, TSS)
        state.tr.base = MMIO
        bench.run(state, b"\x0f\x0b", BUDGET)
        assert bench.vector() == 6
        size, count = (8, 5) if mode == "long" else (4, 5)
        assert bench.cpu.get_state().gpr[4] == KERNEL_STACK - size * count


@BOTH
@pytest.mark.parametrize("base", [0x800_0000, 1 << 39, 1 << 62, (1 << 64) - 8])
@pytest.mark.parametrize("mode", ["long", "protected"])
def test_a_tss_outside_ram(base: int, mode: str, native: bool) -> None:
    """No stack can be read; so neither for the fault that this is: shutdown."""
    with Bench(native=native) as bench:
        state = bench.long(user=True) if mode == "long" else bench.protected(user=True)
        state.tr.base = base
        stop = bench.run(state, b"\x0f\x0b", BUDGET)
        assert stop.reason is StopReason.SHUTDOWN
        assert "#UD" in stop.detail
        assert "#DF" in stop.detail


@BOTH
@pytest.mark.parametrize("level", [0x1000, 0x2000, 0x3000])
def test_good_page_tables_in_device_memory_work(level: int, native: bool) -> None:
    """CR3, or an entry, points to a device that gives good entries; accessed bits reach it."""
    with Bench(native=native) as bench:
        state = bench.long()
        mirror(bench, level)
        if level == 0x1000:
            state.cr3 = MMIO
        else:
            bench.put(level - 0x1000, MMIO | 7)
        assert bench.run(state, b"\xcc", BUDGET).reason is StopReason.HALT
        assert bench.vector() == 3
        assert bench.mmio.writes
        assert bench.memory.read(level, 1)[0] & 0x20


@BOTH
@pytest.mark.parametrize("answer", [0, 1, 7, 0x87, (1 << 64) - 1, MMIO | 7, MMIO | 0x87])
@pytest.mark.parametrize("mode", ["long", "pae", "32-bit"])
def test_bad_page_tables_in_device_memory_end(answer: int, mode: str, native: bool) -> None:
    with Bench(native=native) as bench:
        state = bench.long()
        state.cr3 = MMIO
        if mode != "long":
            state.efer, state.cr4 = 0, 0x20 if mode == "pae" else 0x10
        bench.mmio.answer = lambda _offset, size: answer & (1 << 8 * size) - 1
        stop = bench.run(state, b"\xcc", 5000)
        assert stop.reason in (StopReason.SHUTDOWN, StopReason.BUDGET, StopReason.HALT)


@BOTH
@pytest.mark.parametrize("first", [6, 8])
def test_tasks_in_a_circle_end(first: int, native: bool) -> None:
    """#UD enters a task through a gate, which raises #UD again: its TSS is busy then. #GP, whose
    gate is another task, which does the same; then nothing is left."""
    with Bench(native=native) as bench:
        state = bench.protected()
        bench.memory.write(HANDLERS + 0x500, b"\x0f\x0b")
        for number, vector in enumerate((first, 13)):
            task, selector = 0xB000 + 0x100 * number, 0x58 + 8 * number
            bench.put(GDT + selector, 0x0000_8900_0000_0067 | task << 16)
            bench.put(IDT + 8 * vector, selector << 16 | 0x85 << 40)
            fields = {0x20: HANDLERS + 0x500, 0x24: 2, 0x38: KERNEL_STACK - 0x1000}
            fields |= {0x48 + 4 * i: K_CODE32 if i == 1 else K_DATA for i in range(6)}
            bench.memory.write(task, bytes(104))
            for at, value in fields.items():
                bench.memory.write(task + at, value.to_bytes(4, "little"))
        if first == 8:
            bench.memory.write(IDT + 6 * 8 + 5, b"\0")
        state.gdtr.limit = 0x6F
        stop = bench.run(state, b"\x0f\x0b", BUDGET)
        if first == 6:
            # A #GP for a #GP is a double fault, which has a handler of the ordinary kind.
            assert stop.reason is StopReason.HALT
            assert bench.vector() == 8
        else:
            assert stop.reason is StopReason.SHUTDOWN
            assert "#DF" in stop.detail


@BOTH
def test_two_tasks_that_call_each_other_for_ever_are_bounded(native: bool) -> None:
    """Each returns by IRET to the other's INT, so no TSS stays busy."""
    with Bench(native=native) as bench:
        state = bench.protected()
        bench.put(GDT + 0x58, 0x0000_8900_B000_0067)
        bench.put(IDT + 8 * 0x40, 0x58 << 16 | 0x85 << 40)
        fields = {0x20: HANDLERS + 0x500, 0x24: 2, 0x38: KERNEL_STACK - 0x1000}
        fields |= {0x48 + 4 * i: K_CODE32 if i == 1 else K_DATA for i in range(6)}
        bench.memory.write(0xB000, bytes(104))
        for at, value in fields.items():
            bench.memory.write(0xB000 + at, value.to_bytes(4, "little"))
        bench.memory.write(HANDLERS + 0x500, b"\xcf\xeb\xfd")  # iret; and when called again: iret
        state.gdtr.limit = 0x5F
        bench.start(state, b"\xcd\x40\xeb\xfc")
        for _ in range(3):
            assert bench.cpu.run(5000).reason is StopReason.BUDGET
        assert CODE <= bench.cpu.get_state().rip < CODE + 4 or (
            HANDLERS + 0x500 <= bench.cpu.get_state().rip < HANDLERS + 0x503
        )


@BOTH
def test_an_instruction_over_a_page_border_that_is_rewritten(native: bool) -> None:
    """Five bytes, one on the first page: a store to the second page must be seen."""
    with Bench(native=native) as bench:
        state = bench.long()
        at = CODE + 0xFFF
        bench.memory.write(at, b"\xb8\x01\0\0\0\xc3")  # mov eax, 1; ret
        state.gpr[3] = at
        # call rbx; mov esi, eax; mov byte [rbx+1], 7; call rbx; hlt
        bench.run(state, b"\xff\xd3\x89\xc6\xc6\x43\x01\x07\xff\xd3\xf4", BUDGET)
        after = bench.cpu.get_state()
        assert (after.gpr[6], after.gpr[0]) == (1, 7)


@BOTH
def test_code_rewritten_through_another_address(native: bool) -> None:
    """The same page at a second linear address; and a second page put under the first."""
    with Bench(native=native) as bench:
        state = bench.long()
        bench.put(WINDOW_TABLE, 0x30_0007, 0x30_0007)
        bench.memory.write(0x30_0000, b"\xb8\x01\0\0\0\xc3")
        bench.memory.write(0x31_0000, b"\xb8\x09\0\0\0\xc3")
        state.gpr[3], state.gpr[5] = WINDOW, WINDOW + 0x1000
        state.gpr[2], state.gpr[7] = WINDOW_TABLE, 0x31_0007
        # call rbx; mov r8d, eax; mov byte [rbp+1], 7; call rbx; mov r9d, eax;
        # mov [rdx], rdi; invlpg [rbx]; call rbx; hlt
        code = bytes.fromhex("ffd34189c0c6450107ffd34189c148893a0f013bffd3f4")
        bench.run(state, code, BUDGET)
        after = bench.cpu.get_state()
        assert (after.gpr[8], after.gpr[9], after.gpr[0]) == (1, 7, 9)


@BOTH
def test_an_instruction_that_ends_on_a_page_that_is_not_there(native: bool) -> None:
    """The fault is at the second page's address, and RIP at the instruction's first byte."""
    with Bench(native=native) as bench:
        state = bench.long()
        bench.put(WINDOW_TABLE, WINDOW | 7, 0)
        bench.memory.write(WINDOW + 0xFFE, b"\xb8\x01")
        state.gpr[3] = WINDOW + 0xFFE
        bench.run(state, b"\xff\xe3", BUDGET)
        assert bench.vector() == 14
        after = bench.cpu.get_state()
        assert after.cr2 == WINDOW + 0x1000
        assert bench.words(after.gpr[4], 2) == [0x10, WINDOW + 0xFFE]


@BOTH
def test_a_handler_in_ring_3_that_faults_again(native: bool) -> None:
    """Exceptions handled in ring 3 need no TSS, and may go on for ever: the budget ends them."""
    with Bench(native=native) as bench:
        state = bench.protected(user=True)
        bench.gate32(6, selector=U_CODE32)
        bench.memory.write(HANDLERS + 6, b"\x0f\x0b")
        bench.start(state, b"\x0f\x0b")
        stops = [bench.cpu.run(3000).reason for _ in range(4)]
        assert set(stops) == {StopReason.BUDGET}


# Tables and stacks in a jailed device.

AT = 0xFD00_0000
GUEST = bytes.fromhex(
    # 32-bit: a gate for #BP into the device, LIDT there, ESP = its end; int3; the handler checks
    # the EIP that it pops, and puts 1 out to the debug-exit port if it is right.
    "bc00000800e8000000005d8d4534bf180000fd668907668cca6689570266c74704008ec1e810668947066800"
    "0000fd6668ff0f0f011c24bc001000fdccf4598d5d3339d90f94c066baf400eeebfe"
)


class Store(Device):
    """4 KiB of bytes that die at the `dies`-th access, if that is set."""

    model: ClassVar[str] = "store"
    dies = 0

    def __init__(self, host: object, options: object = None) -> None:
        super().__init__(host, options)  # type: ignore[arg-type]
        self._bytes = bytearray(0x1000)
        self._count = 0

    def regions(self) -> tuple[Region, ...]:
        return (Region("bytes", BusType.MMIO, 0x1000, start=AT),)

    def _account(self) -> None:
        self._count += 1
        if self._count == self.dies:
            os._exit(1)

    def read(self, offset: int, size: int) -> int:
        self._account()
        return int.from_bytes(self._bytes[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        self._account()
        self._bytes[offset : offset + size] = value.to_bytes(size, "little")


def dying(number: int) -> type[Store]:
    return type("Dying", (Store,), {"dies": number})


def test_delivery_through_a_jailed_device() -> None:
    with Machine(memory="16M") as machine:
        machine.add_device(Store)
        machine.boot(GUEST)
        outcome = machine.run(timeout=30)
        assert outcome.guest_value == 1, outcome


@pytest.mark.parametrize("policy", list(FailurePolicy))
@pytest.mark.parametrize("number", [5, 6, 7, 8])
def test_a_jailed_device_that_dies_in_the_middle_of_a_delivery(
    number: int, policy: FailurePolicy
) -> None:
    """Four writes make the gate; 5 is its read, 6 and 7 the frame, 8 the handler's own POP."""
    with Machine(memory="16M", host=HostOptions(on_failure=policy)) as machine:
        machine.add_device(dying(number), "store")
        machine.boot(GUEST)
        outcome = machine.run(timeout=30)
        if policy is FailurePolicy.STOP:
            assert outcome.ending is Ending.DEVICE_FAILED
            assert "store" in str(outcome)
        else:
            # A gate of all ones cannot be used; a frame that was dropped gives a wrong EIP.
            assert outcome.ending is Ending.CRASHED or outcome.guest_value in (0, 1)
