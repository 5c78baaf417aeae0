"""A CPU that does not count its blocks: stops are as exact, and an HLT is told from a stop."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from cpu_bench import CODE, HANDLERS, Bench
from test_cpu_ports import user
from test_cpu_run import COUNT, COUNTER, assert_exact, counting

from vmm.cpu import engine, leaving, virq
from vmm.cpu.accelerator import available
from vmm.cpu.engine import StopReason
from vmm.cpu.native import load
from vmm.machine import Machine
from vmm.outcome import Ending
from vmm.vcpu import WINDOW_SECONDS

pytestmark = pytest.mark.skipif(
    not available() or load() is None or engine.places() is None,
    reason="on this host every CPU counts",
)


@contextmanager
def kicking(bench: Bench, pause: Callable[[], object]) -> Iterator[None]:
    """Another thread kicks, again and again, and repeats what was not heard."""
    done = threading.Event()

    def kicker() -> None:
        while not done.is_set():
            bench.cpu.kick()
            pause()
            while bench.cpu.unheard() and not done.is_set():
                bench.cpu.kick()
                time.sleep(0)

    thread = threading.Thread(target=kicker)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def kicked_at_work(bench: Bench) -> Iterator[None]:
    """One kick, when the counting program has come a while."""

    def kicker() -> None:
        begin = bench.words(COUNTER, 1)[0]
        while bench.words(COUNTER, 1)[0] < begin + 2000:
            time.sleep(0.001)
        bench.cpu.kick()
        while bench.cpu.unheard():
            bench.cpu.kick()
            time.sleep(0.001)

    thread = threading.Thread(target=kicker)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def test_nothing_is_counted() -> None:
    with Bench(counts=False) as bench:
        assert not bench.cpu.counts
        bench.start(counting(bench), COUNT)
        with kicked_at_work(bench):
            assert bench.cpu.run().reason is StopReason.BUDGET
        assert assert_exact(bench) > 1000
        assert bench.cpu.executed == 0


def test_kicks_are_exact() -> None:
    with Bench(counts=False) as bench:
        bench.start(counting(bench), COUNT)
        with kicking(bench, lambda: time.sleep(0)):
            for _ in range(20_000):
                assert bench.cpu.run().reason is StopReason.BUDGET
                if not _ % 500:
                    assert_exact(bench)
        assert assert_exact(bench) > 0


def test_an_early_kick_is_not_lost() -> None:
    with Bench(counts=False) as bench:
        bench.start(counting(bench), COUNT)
        bench.cpu.kick()
        assert bench.cpu.run().reason is StopReason.BUDGET
        assert assert_exact(bench) == 0


def test_a_kick_is_told_from_a_halt() -> None:
    """Each round has one HLT, and each of them must be seen, whatever kicks come."""
    code = bytes.fromhex(
        # l: inc qword [rbx]; sti; hlt; inc qword [rbx+8]; jmp l
        "48ff03fbf448ff4308ebf5"
    )
    with Bench(counts=False) as bench:
        bench.start(counting(bench), code)
        bench.memory.write(0x10040, b"\x48\xcf")  # IRETQ
        halts = stops = 0
        with kicking(bench, lambda: None):
            while stops < 500 or halts < 500:
                reason = bench.cpu.run().reason
                before, after = bench.words(COUNTER, 2)
                if bench.cpu.halted:
                    halts += 1
                    assert bench.cpu.get_state().rip == CODE + 5
                    assert (before, after) == (halts, halts - 1)
                    assert bench.cpu.inject(0x40) is None
                else:
                    assert reason is StopReason.BUDGET
                    stops += 1
                    assert before - after in (0, 1)
                    assert halts in (before, before - 1)


def test_a_stop_right_behind_a_halt_is_none() -> None:
    """Woken, and stopped where the halt had left it: the handler's last block was kicked."""
    with Bench(counts=False) as bench:
        bench.memory.write(0x10040, b"\xe6\x80\x48\xcf")  # out 0x80, al; iretq
        bench.ports.on_write = lambda *_: bench.cpu.kick()
        state = counting(bench)
        state.rflags = 0x202
        bench.start(state, b"\xf4\x90\xf4")  # hlt; nop; hlt
        assert bench.cpu.run().reason is StopReason.HALT
        assert bench.cpu.inject(0x40) is None
        assert bench.cpu.run().reason is StopReason.BUDGET
        assert bench.cpu.get_state().rip == CODE + 1
        assert not bench.cpu.halted


def test_a_kick_between_two_starts_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forbidden port access ends the engine's run, not ours; a kick may come just then."""
    with Bench(counts=False) as bench:
        refuse = bench.cpu.traps.refuse

        def late() -> None:
            refuse()
            bench.cpu._kicked = True

        monkeypatch.setattr(bench.cpu.traps, "refuse", late)
        bench.start(user(bench, "long"), b"\xec\xf4")  # in al, dx; hlt
        assert bench.cpu.run().reason is StopReason.BUDGET
        assert bench.cpu.get_state().rip == HANDLERS + 13


def test_endless_exceptions_end() -> None:
    with Bench(counts=False) as bench:
        state = bench.long()
        bench.memory.write(0x10006, b"\x48\xcf")  # the handler of #UD returns to the same UD2
        bench.start(state, b"\x0f\x0b")
        with kicking(bench, lambda: time.sleep(0.01)):
            assert bench.cpu.run().reason is StopReason.BUDGET


def test_a_failing_device_ends_the_run() -> None:
    def fail(_offset: int, _size: int) -> int:
        raise ZeroDivisionError

    with Bench(counts=False) as bench:
        bench.ports.answer = fail
        state = bench.long()
        state.gpr[2] = 0x80
        bench.start(state, b"\xec\xeb\xfe")  # in al, dx; jmp self
        with pytest.raises(ZeroDivisionError):
            bench.cpu.run()


def test_a_budget_makes_it_count() -> None:
    with Bench(counts=False) as bench:
        bench.start(counting(bench), COUNT)
        with kicked_at_work(bench):
            bench.cpu.run()  # translated without a count
        for budget in (1, 100, 1000):
            before = bench.cpu.executed
            assert bench.cpu.run(budget).reason is StopReason.BUDGET
            assert budget <= bench.cpu.executed - before < budget + len(COUNT)
            assert_exact(bench)
        assert bench.cpu.counts


def test_steps() -> None:
    with Bench(counts=False) as bench:
        bench.start(counting(bench), COUNT)
        bench.cpu.step(5)
        assert assert_exact(bench) == 1
        with kicked_at_work(bench):
            assert bench.cpu.run().reason is StopReason.BUDGET
        assert assert_exact(bench) > 1000


def test_a_kick_under_way_does_not_reach_a_counted_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kicker is interrupted before it touches the engine, and the vCPU begins to count."""
    with Bench(counts=False) as bench:
        bench.start(counting(bench), COUNT)
        under_way, go_on, reached = threading.Event(), threading.Event(), []
        leave = leaving.Leaving.leave

        def late(fields: leaving.Leaving) -> None:
            under_way.set()
            go_on.wait(0.2)
            reached.append(bench.cpu._running)
            leave(fields)

        monkeypatch.setattr(leaving.Leaving, "leave", late)
        kicker = threading.Thread(target=bench.cpu.kick)
        kicker.start()
        under_way.wait()
        bench.cpu._kicked = False  # as after a run that ended in this moment
        stop = bench.cpu.run(200_000_000)  # goes on for longer than the kicker waits
        go_on.set()
        kicker.join()
        assert stop.reason is StopReason.BUDGET
        assert reached == [False]
        assert_exact(bench)


def test_a_kick_after_the_end_touches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with Bench(counts=False) as bench:
        touched: list[leaving.Leaving] = []

        def leave(fields: leaving.Leaving) -> None:
            touched.append(fields)

        monkeypatch.setattr(leaving.Leaving, "leave", leave)
    bench.cpu.kick()
    bench.cpu.stop_now()
    assert not touched


def test_it_is_found_at_the_end_of_the_heap(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read of the CPU's structure goes beyond it, where there may be no memory."""
    pread, found = os.pread, (leaving.places(), virq.fields())
    monkeypatch.setattr(os, "pread", lambda fd, size, at: pread(fd, min(size, 0xA000), at))
    leaving.places.cache_clear()
    virq.fields.cache_clear()
    assert (leaving.places(), virq.fields()) == found
    assert None not in found


def test_where_it_cannot_be_seen_blocks_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaving, "places", lambda: None)
    with Bench(counts=False) as bench:
        assert bench.cpu.counts
        assert bench.run(bench.long(), b"\x90\xf4").reason is StopReason.HALT


@pytest.mark.parametrize("clock", ["real", "virtual"])
def test_machines_count_with_a_virtual_clock(clock: str) -> None:
    with Machine(memory="16M", clock=clock) as machine:
        machine.boot("counter")
        assert machine.run(until="counter 3\n", timeout=20).ending is Ending.PAUSED
        assert machine.parts.cpu.counts is (clock == "virtual")
        assert machine.run(budget=1000).ending is Ending.PAUSED
        assert machine.parts.cpu.counts
        assert machine.run(until="counter 5\n", timeout=20).ending is Ending.PAUSED


@pytest.mark.parametrize("clock", ["real", "virtual"])
def test_an_nmi_in_a_shadow_is_delivered_soon(clock: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Machine(memory="16M", devices=(), clock=clock) as machine:
        machine.boot(b"\xeb\xfe")  # for ever; there is no handler, so an NMI is a triple fault
        answers, looks = iter([None]), []
        events = machine.parts.events
        look_within = events.look_within
        monkeypatch.setattr(events, "look_within", lambda s: looks.append(s) or look_within(s))
        monkeypatch.setattr(machine.parts.cpu, "takes_nmi", lambda: next(answers, True))
        machine.parts.board.irqchip.set_nmi(True)
        assert machine.run(timeout=20).ending is Ending.CRASHED
        assert looks == [WINDOW_SECONDS]


def test_a_pending_interrupt_is_offered_again_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    with Machine(memory="16M", devices=()) as machine:
        machine.boot(b"\xeb\xfe")  # for ever; there is no handler, so it is a triple fault
        parts = machine.parts
        parts.cpu._virq = None  # as where the engine does not deliver by itself
        answers, looks = iter([False]), []
        look_within = parts.events.look_within
        monkeypatch.setattr(
            parts.events, "look_within", lambda s: looks.append(s) or look_within(s)
        )
        monkeypatch.setattr(parts.cpu, "interruptible", lambda: next(answers, True))
        monkeypatch.setattr(parts.board.irqchip, "pending", lambda: True)
        monkeypatch.setattr(parts.board.irqchip, "acknowledge", lambda: 0x20)
        assert machine.run(timeout=20).ending is Ending.CRASHED
        assert looks[0] == WINDOW_SECONDS
