"""DMA end to end: a guest executes what a device wrote, in-process, by tube and by lane."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from dma_device import BAD, BODY, DONE, GOOD, POSTED, SYNCED, DmaProbe, guest
from proxy_helpers import SEATS

from devices.bus import BusType
from devices.contract import Device
from proxy import lane
from proxy.placement import Seat
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
    """Have all that follows go through the lane, its child on a CPU of its own if there is one."""
    (proxy,) = machine.parts.proxies
    machine.parts.placement.places = {seat: int(seat is SEATS[0]) for seat in Seat}
    assert proxy.lane.open()


def execute(machine: Machine, synced: bool, rounds: int = 60) -> Outcome:
    machine.boot(guest(synced=synced, rounds=rounds))
    return machine.run(timeout=60)


@BOTH
@EVERYWHERE
def test_a_guest_executes_what_was_written(
    way: str, synced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.child.POLL_SPINS", 1 << 40)  # the lane stays open until it is used
    with machine_with(DmaProbe, way) as machine:
        if way == LANE:
            open_lane(machine)
        outcome = execute(machine, synced)
        assert (outcome.ending, outcome.guest_value) == (Ending.GUEST_EXIT, GOOD), outcome
        if way == LANE and not (synced and SEATS[0] is Seat.SHARED):
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


# Beside the guest, and across a suspend.


class Watcher(DmaProbe):
    """Puts what it reads from a pipe into guest memory at `BODY`, in a turn; stops at 4 bytes."""

    held = b""
    pipe = -1

    def watched(self) -> tuple[int, ...]:
        return (self.pipe,) if len(self.held) < 4 else ()

    def ready(self, fd: int) -> None:
        self.held += os.read(fd, 1)
        self.host.want_turn()

    def turn(self) -> None:
        if len(self.held) == 4:
            self.host.memory.write(DONE, self.held)
            self.held = b""


WAIT_FOR_DONE = bytes.fromhex(
    # l: cmp dword [0x280000], 0x64636261; jne l; mov al, 1; out 0xf4, al; hlt
    "813d000028006162636475f4b001e6f4f4"
)


def test_a_device_in_this_process_is_fed_while_the_guest_runs() -> None:
    reader, writer = os.pipe()
    with machine_with(type("Fed", (Watcher,), {"pipe": reader}), IN_PROCESS) as machine:
        machine.boot(WAIT_FOR_DONE)
        machine.run(budget=10_000_000)
        os.write(writer, b"ab")
        machine.run(budget=100_000_000)
        machine.suspend()
        os.write(writer, b"cd")
        machine.parts.events.poll(0.0)  # what the suspend itself left there
        assert not machine.parts.events.poll(0.05), "asleep, and fed"
        machine.resume()
        outcome = machine.run(timeout=30)
        assert outcome.guest_value == 1, outcome
    os.close(reader)
    os.close(writer)


@EVERYWHERE
def test_a_turn_that_is_owed_survives_a_snapshot(way: str, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    with machine_with(DmaProbe, way) as machine:
        machine.boot(guest(synced=False, rounds=10))
        bus = machine.parts.buses[BusType.PIO]
        bus.write(POSTED + 4, 4, 9)
        bus.write(POSTED, 4, BODY)
        machine.snapshot(saved)
        assert machine.parts.memory.read(BODY, 1) == bytes(1), "the turn was not taken yet"
        assert machine.run(timeout=30).guest_value == GOOD
    with Machine.restore(
        saved, models=[DmaProbe], host=HostOptions(fast_lane=way == LANE)
    ) as machine:
        assert machine.run(timeout=30).guest_value == GOOD


@EVERYWHERE
@pytest.mark.parametrize("address", [16 << 20, (16 << 20) - 5, 0xE000_0000, 0xFFFF_FFFF])
def test_an_address_outside_ram_is_the_guests_error(way: str, address: int) -> None:
    with machine_with(DmaProbe, way) as machine:
        machine.boot(guest(synced=True, rounds=2))
        bus = machine.parts.buses[BusType.PIO]
        bus.write(SYNCED, 4, address)
        assert bus.read(SYNCED + 8, 4) == 2
        assert machine.run(timeout=30).guest_value == GOOD


def test_only_dma_devices_get_memory() -> None:
    class Plain(DmaProbe):
        dma = False

    with machine_with(Plain, TUBE) as machine:
        machine.boot(guest(synced=True, rounds=2))
        assert not machine.parts.proxies[0].maps_memory
        assert machine.run(timeout=30).guest_value == BAD
