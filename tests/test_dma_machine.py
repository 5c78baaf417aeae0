"""DMA end to end: a guest executes what a device wrote, in-process, by tube and by lane."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from dma_device import BAD, GOOD, DmaProbe, guest

from devices.contract import Device
from proxy import lane
from vmm.config import ClockKind, HostOptions
from vmm.machine import Machine
from vmm.outcome import Ending, Outcome

IN_PROCESS, TUBE, LANE = "in-process", "tube", "lane"
WAYS = [
    IN_PROCESS,
    TUBE,
    pytest.param(LANE, marks=pytest.mark.skipif(not lane.supported(), reason="no lane here")),
]
BOTH = pytest.mark.parametrize("synced", [True, False], ids=["synced", "posted"])
EVERYWHERE = pytest.mark.parametrize("way", WAYS)


@contextmanager
def machine_with(
    kind: type[Device], way: str, clock: ClockKind = ClockKind.REAL, **host: Any
) -> Iterator[Machine]:
    options = HostOptions(fast_lane=way == LANE, **host)
    with Machine(memory="16M", devices=(), clock=clock, host=options) as machine:
        machine.add_device(kind, "probe", isolated=way != IN_PROCESS)
        machine.add_device("debug-exit", isolated=False, may_exit=True)
        yield machine


def open_lane(machine: Machine) -> None:
    """Have all that follows go through the lane."""
    (proxy,) = machine.parts.proxies
    assert proxy.lane.open()


def execute(machine: Machine, synced: bool, rounds: int = 60) -> Outcome:
    machine.boot(guest(synced=synced, rounds=rounds))
    return machine.run(timeout=60)


@BOTH
@EVERYWHERE
def test_a_guest_executes_what_was_written(way: str, synced: bool) -> None:
    with machine_with(DmaProbe, way) as machine:
        if way == LANE:
            open_lane(machine)
        outcome = execute(machine, synced)
        assert (outcome.ending, outcome.guest_value) == (Ending.GUEST_EXIT, GOOD), outcome
        if way == LANE:
            assert machine.parts.proxies[0].stats().lane_accesses > 0


@BOTH
@pytest.mark.parametrize("way", [IN_PROCESS, TUBE])
def test_the_test_can_fail(way: str, synced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what the device says of its pages the guest executes old code."""
    with machine_with(DmaProbe, way) as machine:
        monkeypatch.setattr(machine.parts.wiring, "wrote_pages", lambda *_: None)
        outcome = execute(machine, synced)
        assert (outcome.ending, outcome.guest_value) == (Ending.GUEST_EXIT, BAD), outcome


@BOTH
@pytest.mark.parametrize("way", [IN_PROCESS, TUBE])
def test_with_a_virtual_clock_every_run_is_the_same(way: str, synced: bool) -> None:
    runs = set()
    for _ in range(2):
        with machine_with(DmaProbe, way, ClockKind.VIRTUAL) as machine:
            outcome = execute(machine, synced)
            assert outcome.guest_value == GOOD
            runs.add((machine.parts.cpu.executed, machine.parts.cpu.get_state().rip))
    assert len(runs) == 1
