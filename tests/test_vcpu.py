"""The vCPU loop: no interrupt that waits is forgotten, whatever else the CPU takes before it."""

from __future__ import annotations

import struct
from time import monotonic

import pytest

from vmm.boot.options import BootOptions, Mode
from vmm.machine import Machine
from vmm.outcome import Ending

NMI_HANDLER, IRQ_HANDLER = 0x7C40, 0x7C50
IRQ, VECTOR = 4, 0x24
GUEST = bytes.fromhex(
    "fa"  # cli
    "b011e620 b020e621 b004e621 b001e621 b000e621"  # the 8259: vectors from 0x20 on, all unmasked
    "ebfe"  # for ever
).ljust(NMI_HANDLER - 0x7C00, b"\x90")
GUEST += bytes.fromhex("fb90ebfe").ljust(IRQ_HANDLER - NMI_HANDLER, b"\x90")  # sti, and for ever
GUEST += bytes.fromhex("faf4")  # the guest is finished


def started(clock: str) -> Machine:
    machine = Machine(memory="16M", devices=(), clock=clock)
    machine.boot(GUEST, BootOptions(mode=Mode.REAL, load_addr=0x7C00))
    for vector, handler in ((2, NMI_HANDLER), (VECTOR, IRQ_HANDLER)):
        machine.parts.memory.write(4 * vector, struct.pack("<HH", handler, 0))
    return machine


@pytest.mark.parametrize("clock", ["real", "virtual"])
def test_an_interrupt_is_offered_in_the_handler_of_an_nmi(clock: str) -> None:
    """That enables interrupts and does not return; nothing else happens that ends a slice."""
    with started(clock) as machine:
        chip = machine.parts.board.irqchip

        def both() -> None:
            chip.set_irq(IRQ, True)
            chip.set_nmi(True)

        machine.parts.events.call_at(monotonic() + 0.2, both)
        assert machine.run(timeout=10).ending is Ending.HALTED
        assert machine.parts.cpu.get_state().rip == IRQ_HANDLER + 2


def test_an_interrupt_between_two_runs_ends_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is offered before the next one anyway."""
    with started("real") as machine:
        assert machine.run(steps=30).ending is Ending.PAUSED
        monkeypatch.setattr(machine.parts.cpu, "kick", lambda: pytest.fail("kicked"))
        machine.parts.board.irqchip.set_irq(IRQ, True)
        assert machine.parts.board.irqchip.pending()
        monkeypatch.undo()


def test_no_step_is_taken_between_a_resume_and_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time would stand still for it, and what came while the machine was suspended would wait."""
    with started("real") as machine:
        parts, paused = machine.parts, []
        step = parts.cpu.step
        monkeypatch.setattr(
            parts.cpu, "step", lambda n: paused.append(parts.clock._offset is None) or step(n)
        )
        for when, callback in enumerate((machine.suspend, machine.resume, machine.stop)):
            parts.events.call_at(monotonic() + 0.05 * (when + 1), callback)
        assert machine.run(steps=1 << 30).ending is Ending.QUIT
        assert paused
        assert not any(paused)
        monkeypatch.undo()
