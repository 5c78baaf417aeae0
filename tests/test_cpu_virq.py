"""Interrupts that the engine delivers within a run: at the right instruction, once, like ours."""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import test_cpu_native as native_tests
from cpu_bench import CODE, GDT, HANDLERS, IDT, K_CODE64, KERNEL_STACK, MMIO, Bench
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmm.boot.options import BootOptions
from vmm.cpu import engine, virq
from vmm.cpu.engine import StopReason
from vmm.cpu.native import load
from vmm.cpu.state import CpuState, DescriptorTable
from vmm.machine import Machine
from vmm.outcome import Ending

pytestmark = pytest.mark.skipif(
    load() is None or engine.places() is None or virq.fields() is None,
    reason="on this host interrupts are delivered between runs",
)

VECTOR = 0x40
COUNTER = 0x30000


class Controller:
    """Raises an interrupt when the guest writes 1 to the port, and takes it back at 2."""

    def __init__(self, bench: Bench) -> None:
        self.waiting = self.raised = self.taken = 0
        self.bench = bench
        bench.ports.on_write = self.write
        bench.cpu.deliver_by(self.acknowledge)
        assert bench.cpu.delivers

    def write(self, _offset: int, _size: int, value: int) -> None:
        if value == 1:
            self.waiting += 1
            self.raised += 1
            assert self.bench.cpu.interrupt_waits()
        else:
            self.waiting -= 1
            self.raised -= 1
            self.bench.cpu.interrupt_withdrawn()

    def acknowledge(self) -> int:
        assert self.waiting > 0
        self.waiting -= 1
        self.taken += 1
        return VECTOR


def long(bench: Bench, interrupts: bool) -> CpuState:
    """The handler copies RCX to RDX and returns."""
    bench.memory.write(HANDLERS + VECTOR, bytes.fromhex("4889ca 48cf"))
    state = bench.long()
    state.rflags = 0x202 if interrupts else 2
    state.gpr[1], state.gpr[2] = 0, 99
    return state


RAISE, TAKE_BACK = "b001e680", "b002e680"
INC, JMP = "48ffc1", "eb00"
POPF = "68020200009d"  # push 0x202; popf
IRET = (  # push ss; rsp; flags; cs; behind; iretq
    "4889e0 6a10 50 6802020000 6a08 488d0503000000 50 48cf".replace(" ", "")
)


@pytest.mark.parametrize(
    ("code", "interrupts", "when"),
    [
        (RAISE + INC + JMP + INC * 2, True, 1),
        (RAISE + INC + JMP + INC + "fb" + INC * 2, False, 3),
        (RAISE + INC + POPF + INC * 2, False, 1),
        (RAISE + INC + "fb" + "fa" + INC, False, None),
        (RAISE + INC + TAKE_BACK + "fb" + INC * 3, False, None),
        (RAISE + INC + JMP + "8ed0" + INC * 2, True, 1),
    ],
    ids=["at once", "sti", "popf", "sti-cli", "withdrawn", "mov-ss"],
)
def test_at_the_instruction(code: str, interrupts: bool, when: int | None) -> None:
    with Bench(counts=False) as bench:
        controller = Controller(bench)
        bench.start(long(bench, interrupts), bytes.fromhex(code + "f4"))
        assert bench.cpu.run().reason is StopReason.HALT
        after = bench.cpu.get_state()
        assert after.rip == CODE + len(bytes.fromhex(code)) + 1
        assert after.gpr[1] == bytes.fromhex(code).count(bytes.fromhex(INC))
        assert after.gpr[2] == (99 if when is None else when)
        assert controller.taken == (when is not None)


def test_one_that_waits_before_the_run() -> None:
    with Bench(counts=False) as bench:
        controller = Controller(bench)
        controller.waiting = 1
        bench.start(long(bench, False), bytes.fromhex(INC + "fb" + INC * 2 + "f4"))
        assert bench.cpu.run(interrupt=True).reason is StopReason.HALT
        assert bench.cpu.get_state().gpr[2] == 2
        assert controller.taken == 1
        # It is forgotten with the run.
        bench.start(long(bench, True), bytes.fromhex(INC + "f4"))
        assert bench.cpu.run().reason is StopReason.HALT
        assert controller.taken == 1


def test_halt_with_one_waiting() -> None:
    """STI; HLT: the interrupt is taken behind HLT, where the machine's loop delivers it."""
    with Bench(counts=False) as bench:
        controller = Controller(bench)
        bench.start(long(bench, False), bytes.fromhex(RAISE + "fbf4"))
        assert bench.cpu.run().reason is StopReason.HALT
        assert (controller.waiting, controller.taken) == (1, 0)
        assert bench.cpu.halted
        assert bench.cpu.interruptible()


def test_none_is_lost_or_taken_twice() -> None:
    """Interrupts on and off in every way, with kicks from another thread meanwhile."""
    chance = random.Random(5)
    body = ""
    for _ in range(200):
        body += chance.choice(
            (RAISE, RAISE, INC, INC + JMP, "fb", "fa", POPF, "9c9d", "fb90", "0fa2", IRET)
        )
    # Before another one is raised the last one must have been taken.
    body = body.replace(RAISE, "fb90" + RAISE)
    with Bench(counts=False) as bench:
        controller = Controller(bench)
        state = long(bench, True)
        state.gpr[8] = COUNTER
        # inc qword [r8+8]; iretq
        bench.memory.write(HANDLERS + VECTOR, bytes.fromhex("49ff4008 48cf"))
        code = bytes.fromhex("49ff00" + body)  # inc qword [r8]
        code += b"\xe9" + (-len(code) - 5 & 0xFFFF_FFFF).to_bytes(4, "little")
        bench.start(state, code)
        done = threading.Event()

        def kick() -> None:
            while not done.is_set():
                bench.cpu.kick()
                time.sleep(0.0005)

        thread = threading.Thread(target=kick)
        thread.start()
        try:
            while bench.words(COUNTER, 1)[0] < 300:
                assert bench.cpu.run(interrupt=bool(controller.waiting)).reason is (
                    StopReason.BUDGET
                )
                rounds, handled = bench.words(COUNTER, 2)
                assert 0 <= controller.taken - handled <= 1
                assert controller.raised - controller.taken == controller.waiting in (0, 1)
        finally:
            done.set()
            thread.join()
        assert controller.taken >= (rounds - 1) * body.count(RAISE)


def test_a_second_one_ends_the_run() -> None:
    """`VcpuLoop` arms it again."""
    with Bench(counts=False) as bench:
        taken = []

        def acknowledge() -> int:
            taken.append(VECTOR)
            bench.cpu.kick()
            return VECTOR

        bench.cpu.deliver_by(acknowledge)
        bench.start(long(bench, True), bytes.fromhex(INC * 4 + "ebfe"))
        assert bench.cpu.run(interrupt=True).reason is StopReason.BUDGET
        assert bench.cpu.get_state().rip == HANDLERS + VECTOR
        assert len(taken) == 1


def test_a_controller_that_fails_ends_the_run() -> None:
    with Bench(counts=False) as bench:

        def acknowledge() -> int:
            raise ZeroDivisionError

        bench.cpu.deliver_by(acknowledge)
        bench.start(long(bench, True), b"\xeb\xfe")
        with pytest.raises(ZeroDivisionError):
            bench.cpu.run(interrupt=True)


def test_a_cpu_that_counts_or_steps_does_not() -> None:
    with Bench() as bench:
        bench.cpu.deliver_by(lambda: VECTOR)
        assert not bench.cpu.delivers
    with Bench(counts=False) as bench:
        bench.cpu.deliver_by(lambda: VECTOR)
        assert not bench.cpu.interrupt_waits(), "no run goes on"
        bench.start(long(bench, True), bytes.fromhex(RAISE + INC * 2 + "f4"))
        answers = []
        bench.ports.on_write = lambda *_: answers.append(bench.cpu.interrupt_waits())
        bench.cpu.step(4)
        assert answers == [False]
        assert bench.cpu.get_state().gpr[2] == 99
        bench.cpu.run(10)
        assert not bench.cpu.delivers


def test_delivery_that_ends_in_a_triple_fault() -> None:
    with Bench(counts=False) as bench:
        Controller(bench)
        state = long(bench, True)
        state.idtr = DescriptorTable(0, 0)
        bench.start(state, bytes.fromhex(RAISE + "ebfe"))
        assert bench.cpu.run().reason is StopReason.SHUTDOWN


def test_a_gate_that_is_not_there() -> None:
    """The engine's fault is an ordinary one of ours."""
    with Bench(counts=False) as bench:
        Controller(bench)
        state = long(bench, True)
        bench.put(IDT + 16 * VECTOR, 0)
        bench.start(state, bytes.fromhex(RAISE + "ebfe"))
        assert bench.cpu.run().reason is StopReason.HALT
        after = bench.cpu.get_state()
        assert after.rip == HANDLERS + 13 + 1
        # Processors say 8 * vector + 3; see docs/cpu.md.
        assert bench.words(after.gpr[4], 1)[0] == VECTOR * 16 + 2
        assert after.gpr[4] < KERNEL_STACK


def seen(by_engine: bool, user: bool, change: Callable[[Any], Any]) -> tuple[Any, ...] | None:
    """What an interrupt leaves behind; None if it was not simply delivered."""
    with Bench(native_tests.SIZE, counts=not by_engine) as bench:
        what = native_tests.scene(bench, user)
        what.state.rflags |= 0x200
        change(what)
        what.state.rflags |= 0x200
        if what.entry(GDT + K_CODE64) & 0xFF00_00FF_FFFF_0000:
            return None  # the engine adds the base of a 64-bit code segment, see docs/cpu.md
        if MMIO - 0x1000 < what.state.tr.base < MMIO + 0x1000:
            return None  # it reads eight bytes of a device in two halves
        bench.memory.write(CODE, b"\xeb\xfe")
        cpu = bench.cpu
        cpu.set_state(what.state)
        if by_engine:
            cpu.deliver_by(lambda: 0x21)
            timer = threading.Timer(0.3, cpu.kick)
            timer.start()
            stop = cpu.run(interrupt=True)
            timer.cancel()
            timer.join()
        else:
            cpu.inject(0x21)
            stop = cpu.run(3000)
        state = cpu.get_state()
        if stop.reason is not StopReason.HALT or state.rip != HANDLERS + 0x22:
            return None
        return state, hashlib.sha256(bench.memory.read(0, native_tests.SIZE)).hexdigest()


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(st.booleans(), st.lists(native_tests._changes, min_size=0, max_size=3))
def test_like_ours(user: bool, changes: list[Callable[[Any], None]]) -> None:
    """Whatever the tables say: nothing breaks, and what we deliver it delivers in the same way."""

    def change(s: Any) -> None:
        for each in changes:
            each(s)

    ours, theirs = seen(False, user, change), seen(True, user, change)
    if ours is not None:
        assert theirs == ours


@pytest.mark.parametrize("name", native_tests.HOSTILE)
def test_odd_tables(name: str) -> None:
    user, change = native_tests.HOSTILE[name]
    ours, theirs = seen(False, user, change), seen(True, user, change)
    if ours is not None:
        assert theirs == ours


@pytest.mark.parametrize("clock", ["real", "virtual"])
def test_a_machine_counts_interrupts_either_way(clock: str) -> None:
    code = bytes.fromhex(
        # The 8259 begins at vector 0x20 and takes IRQ 0 alone, ending each by itself.
        "b011e620 b020e621 b004e621 b003e621 b0fee621"
        # Real-mode vector 0x20 is an IRET at 0x600: mov word [0x80], 0x600; mov word [0x82], 0
        "c70680000006 c70682000000 c6060006cf"
        # The 8254 counts to 1024, again and again.
        "b034e643 b000e640 b004e640"
        # mov cx, 200; l: sti; hlt; cli; dec cx; jnz l; hlt
        "b9c800 fb f4 fa 49 75fa f4"
    )
    with Machine(memory="16M", devices=(), clock=clock) as machine:
        machine.boot(code, BootOptions(mode=16))
        assert machine.run(timeout=60).ending is Ending.HALTED
        assert machine.parts.cpu.delivers is (clock == "real")
        # Where the host is late, two may come for one HLT.
        taken = machine.parts.vcpu.stats.interrupts
        assert taken == 200 if clock == "virtual" else taken >= 200
