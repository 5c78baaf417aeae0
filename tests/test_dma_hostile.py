"""Devices with DMA that mean harm: what they say of pages, how often they want a turn, the RAM."""

from __future__ import annotations

import errno
import os
from typing import Any, ClassVar

import pytest
from dma_device import GOOD, DmaProbe, guest
from test_dma_machine import TUBE, machine_with

from devices.bus import BusType
from devices.contract import Device, Region
from proxy import messages as m
from vmm.memory import PAGE, GuestMemory
from vmm.outcome import Ending

COUNT = bytes.fromhex(
    # mov dx, 0xe00; out dx, al; mov ecx, 30000000; l: dec ecx; jnz l; mov al, 1; out 0xf4, al; hlt
    "66ba000eeeb980c3c9014975fdb001e6f4f4"
)


class Liar(DmaProbe):
    """Says that it wrote what is not there, and more than there is."""

    def carry_out(self, address: int) -> None:
        for first, count in (
            (1 << 51, 1),
            ((1 << 52) - 1, 1),
            (0, (1 << 32) - 1),
            (RAM_PAGES - 1, 5),
            (RAM_PAGES, 1),
            (5, 0),
            (0xC0000, 0x40000),
        ):
            self.host.wrote_pages(first, count)
        super().carry_out(address)


RAM_PAGES = (16 << 20) // PAGE


@pytest.mark.parametrize("synced", [True, False], ids=["synced", "posted"])
def test_lies_about_pages_harm_nobody(synced: bool) -> None:
    with machine_with(Liar, TUBE) as machine:
        machine.boot(guest(synced=synced, rounds=20))
        outcome = machine.run(timeout=60)
        assert (outcome.ending, outcome.guest_value) == (Ending.GUEST_EXIT, GOOD), outcome


def test_pages_past_the_end_of_the_address_space_are_a_fault() -> None:
    class Wild(DmaProbe):
        def carry_out(self, address: int) -> None:
            host: Any = self.host
            host._send(m.Log("before"))
            host._end.send(m.WrotePages(((1, 1),)).encode()[:13] + b"\xff" * 8)

    with machine_with(Wild, TUBE) as machine:
        machine.boot(guest(synced=True, rounds=20))
        outcome = machine.run(timeout=60)
        assert outcome.ending is Ending.DEVICE_FAILED
        assert "malformed WrotePages" in outcome.detail


class Flooder(Device):
    """Once it is written to it wants turns without end: in its turns, and beside the guest."""

    model: ClassVar[str] = "flooder"
    dma: ClassVar[bool] = True

    def regions(self) -> tuple[Region, ...]:
        return (Region("register", BusType.PIO, 1, 0xE00),)

    def write(self, offset: int, size: int, value: int) -> None:
        self.host.want_work()
        self.host.want_turn()

    def turn(self) -> None:
        self.host.want_turn()

    def work(self) -> None:
        host: Any = self.host
        for _ in range(1000):
            host._send(self.word())
        host.want_work()

    def word(self) -> m.Message:
        return m.WantTurn()


class PageFlooder(Flooder):
    def word(self) -> m.Message:
        return m.WrotePages(((0, (1 << 32) - 1),))


class LineFlooder(Flooder):
    level = False

    def word(self) -> m.Message:
        self.level = not self.level
        return m.IrqLevel(self.level, 0)


@pytest.mark.parametrize("kind", [Flooder, PageFlooder, LineFlooder])
def test_a_flood_does_not_stop_the_guest(kind: type[Device]) -> None:
    with machine_with(kind, TUBE) as machine:
        machine.boot(COUNT)
        outcome = machine.run(timeout=60)
        assert (outcome.ending, outcome.guest_value) == (Ending.GUEST_EXIT, 1), outcome
        assert machine.parts.proxies[0].stats().upcalls > 0


def test_a_turn_without_end_is_a_failure_with_a_name() -> None:
    class Endless(DmaProbe):
        def turn(self) -> None:
            while True:
                pass

    with machine_with(Endless, TUBE, deadline=0.5) as machine:
        machine.boot(guest(synced=False, rounds=2))
        outcome = machine.run(timeout=60)
        assert outcome.ending is Ending.DEVICE_FAILED
        assert "did not answer within 0.5 s" in outcome.detail
        assert "Sync" in outcome.detail


def test_guest_memory_cannot_be_taken_from_under_the_machine() -> None:
    memory = GuestMemory(1 << 20, rom=PAGE)
    try:
        for size in (0, PAGE, (1 << 20), (2 << 20)):
            with pytest.raises(OSError, match="not permitted") as caught:
                os.ftruncate(memory.fd, size)
            assert caught.value.errno == errno.EPERM
        with pytest.raises(OSError, match="not permitted"):
            os.posix_fallocate(memory.fd, 0, 4 << 20)
        import fcntl

        with pytest.raises(OSError, match="not permitted"):
            fcntl.fcntl(memory.fd, fcntl.F_ADD_SEALS, 0x0008)  # F_SEAL_WRITE
        memory.write(0, b"still there")
        assert memory.read(0, 11) == b"still there"
    finally:
        memory.close()
