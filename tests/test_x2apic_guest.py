"""The local APIC by MSRs in a whole machine, and what is told of MSRs that are not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from devices.irqchip.apic_registers import ApicMode
from vmm.cli.aids import UnclaimedTrace
from vmm.machine import Machine
from vmm.outcome import Ending

LINES = [
    "x2apic: #GP where there is nothing",
    "x2apic: an interrupt to itself, held back by CR8",
    "x2apic: ten deadlines kept",
    "x2apic: a deadline kept while it looks at the clock",
    "x2apic: a deadline that was past",
    "x2apic: a counter that was set",
    "x2apic: NMIs one after the other",
]


@pytest.mark.parametrize("clock", ["real", "virtual"])
def test_the_guest_x2apic(clock: str) -> None:
    with Machine(memory="16M", clock=clock) as machine:
        trace = UnclaimedTrace(machine.parts.spaces())
        machine.boot("x2apic")
        outcome = machine.run(timeout=60)
        assert machine.output.decode().splitlines() == LINES
        assert (outcome.ending, outcome.guest_value) == (Ending.GUEST_EXIT, 0)
        assert sorted(line for line in trace.lines() if "msr" in line.lower()) == [
            "unclaimed msr read of 8 at 0x1234: 1 times",
            "unclaimed msr write of 8 at 0x1234: 1 times",
        ]


def test_who_reads_the_time_needs_no_watcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy host the thread that looks for alarms may get no CPU for long."""
    with Machine(memory="16M") as machine:
        events, irqchip = machine.parts.events, machine.parts.board.irqchip
        watch = events.watch
        # An NMI behind the next instruction is its business.
        monkeypatch.setattr(events, "watch", lambda: irqchip.nmi_pending() and watch())
        machine.boot("x2apic")
        outcome = machine.run(timeout=60)
        assert (outcome.ending, outcome.guest_value) == (Ending.GUEST_EXIT, 0)
        assert machine.output.decode().splitlines() == LINES


def test_virtual_time_needs_no_watcher_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """An NMI behind an IRET comes by the count, or no two runs would be the same."""
    executed = []
    for watched in (True, False):
        with Machine(memory="16M", clock="virtual") as machine:
            if not watched:
                monkeypatch.setattr(machine.parts.events, "look_within", lambda _: None)
            machine.boot("x2apic")
            outcome = machine.run(timeout=60)
            assert (outcome.ending, outcome.guest_value) == (Ending.GUEST_EXIT, 0)
            executed.append(machine.parts.cpu.executed)
    assert executed[0] == executed[1]


@pytest.mark.parametrize("executed", [2500, 3500, 5500])
def test_a_snapshot_between_its_steps(executed: int, tmp_path: Path) -> None:
    """The mode, the deadline and CR8 are state like any."""
    with Machine(memory="16M", clock="virtual") as machine:
        machine.boot("x2apic")
        assert machine.run(budget=executed, timeout=60).ending is Ending.PAUSED
        assert machine.parts.board.irqchip.lapic.state.mode is ApicMode.X2APIC
        machine.snapshot(f"{tmp_path}/snapshot")
    with Machine.restore(f"{tmp_path}/snapshot") as machine:
        outcome = machine.run(timeout=60)
        assert (outcome.ending, outcome.guest_value) == (Ending.GUEST_EXIT, 0)
        assert machine.output.decode().splitlines()[-1:] == LINES[-1:]


def test_where_msrs_cannot_be_had_it_says_so() -> None:
    assert UnclaimedTrace({}).lines() == [
        "unclaimed MSRs: not known, this build of the CPU engine does not tell of them "
        "(unknown ones read 0)"
    ]
