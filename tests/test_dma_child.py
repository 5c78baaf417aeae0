"""What a device process does beside commands: watched descriptors, slow work, turns; and memory."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any, ClassVar

import pytest
from dma_device import BODY, DONE, RESULT, VALUE, DmaProbe
from proxy_helpers import SEATS, Only, Recorder

from devices.bus import BusType
from devices.contract import Device, DeviceHost, Region
from proxy import lane
from proxy.device import GuestRam, ProxyDevice
from proxy.jail import JailMode
from proxy.placement import Placement, Seat
from proxy.shape import MemoryRegion
from proxy.warden import Warden
from vmm.memory import GuestMemory

PATIENCE = 20.0
RAM = 4 << 20

SHARED = pytest.mark.parametrize(
    "shared",
    [None, *(SEATS if lane.supported() else ())],
    ids=lambda seat: "tube" if seat is None else f"lane-{seat.name.lower()}-cpu",
)


class Feeder(Device):
    """Passes bytes of a pipe on, in turns; does work that a write asks for."""

    model: ClassVar[str] = "feeder"
    ROOM = 8

    def __init__(self, host: DeviceHost, options: Any = None) -> None:
        super().__init__(host, options)
        self.held = b""
        self.stuck = False

    def regions(self) -> tuple[Region, ...]:
        return (Region("registers", BusType.MMIO, 16, 0x1000_0000),)

    def read(self, offset: int, size: int) -> int:
        return len(self.held)

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == 0:
            self.host.want_work()
        else:
            self.stuck = bool(value)
            if not self.stuck:
                self.host.want_turn()

    def work(self) -> None:
        self.held += b"w"
        self.host.want_turn()

    def watched(self) -> tuple[int, ...]:
        return (self.host.fds["pipe"],) if len(self.held) < self.ROOM else ()

    def ready(self, fd: int) -> None:
        self.held += os.read(fd, self.ROOM - len(self.held))
        self.host.want_turn()

    def turn(self) -> None:
        if not self.stuck:
            self.host.output(self.held)
            self.held = b""


@pytest.fixture(scope="module")
def warden() -> Iterator[Warden]:
    with Warden([Feeder, DmaProbe], jail=JailMode.AUTO) as made:
        yield made


class Fed:
    """A feeder's proxy and the pipe that feeds it."""

    def __init__(self, device: ProxyDevice, pipe: int, events: Recorder) -> None:
        self.device, self.pipe, self.events = device, pipe, events

    def listen(self) -> None:
        """Hear what it says next, waiting for a while, as the machine's loop does."""
        poll = select.poll()
        poll.register(self.device.doorbell, select.POLLIN)
        poll.poll(100)
        self.device.drain()

    def wait_turn(self) -> None:
        """Wait until it asks for a turn, and give it."""
        end = monotonic() + PATIENCE
        while ("turn",) not in self.events.seen:
            assert monotonic() < end, "it asked for no turn"
            self.listen()
        self.events.seen.remove(("turn",))
        self.device.sync()

    def expect(self, text: bytes) -> None:
        """Give it turns until it has said this."""
        end = monotonic() + PATIENCE
        while self.events.text != text:
            assert monotonic() < end, self.events.text
            self.listen()
            if ("turn",) in self.events.seen:
                self.wait_turn()


@contextmanager
def fed(warden: Warden, shared: Seat | None) -> Iterator[Fed]:
    reader, writer = os.pipe()
    events = Recorder()
    child = warden.spawn("feeder", "feeder", {}, factory=0, fds={"pipe": reader})
    os.close(reader)
    try:
        with ProxyDevice(
            child, events, placement=Only(shared or Seat.SHARED), deadline=20
        ) as device:
            if shared is not None:
                assert device.lane.open()
            yield Fed(device, writer, events)
    finally:
        os.close(writer)
    assert events.failures == []


@SHARED
def test_what_it_watches_wakes_it(warden: Warden, shared: Seat | None) -> None:
    with fed(warden, shared) as feeder:
        for index in range(20):
            os.write(feeder.pipe, b"%d" % (index % 10))
            feeder.wait_turn()
        feeder.expect(b"01234567890123456789")
        if shared is not None:
            assert feeder.device.lane.is_open


@pytest.mark.skipif(Seat.OWN not in SEATS or not lane.supported(), reason="one CPU")
def test_it_is_fed_while_it_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it looks at an empty ring before it dozes."""
    monkeypatch.setattr("proxy.child.POLL_SPINS", 1 << 60)
    with Warden([Feeder], jail=JailMode.OFF) as made, fed(made, Seat.OWN) as feeder:
        monkeypatch.undo()
        os.write(feeder.pipe, b"x")
        feeder.wait_turn()
        (handler,) = feeder.device.handlers()
        handler.write(0, 4, 1)
        feeder.wait_turn()
        feeder.device.sleep()
        assert feeder.events.text == b"xw"


@SHARED
def test_it_is_fed_while_commands_commands_keep_coming(warden: Warden, shared: Seat | None) -> None:
    with fed(warden, shared) as feeder:
        (handler,) = feeder.device.handlers()
        os.write(feeder.pipe, b"ab")
        end = monotonic() + PATIENCE
        while handler.read(0, 4) != 2:
            assert monotonic() < end


@SHARED
def test_a_full_buffer_stops_the_watching(warden: Warden, shared: Seat | None) -> None:
    with fed(warden, shared) as feeder:
        (handler,) = feeder.device.handlers()
        handler.write(8, 4, 1)
        os.write(feeder.pipe, b"0123456789abcdef")
        end = monotonic() + PATIENCE
        while handler.read(0, 4) != Feeder.ROOM:
            assert monotonic() < end
        feeder.wait_turn()
        before = feeder.device.stats().upcalls
        for _ in range(200):
            assert handler.read(0, 4) == Feeder.ROOM
        assert feeder.device.stats().upcalls == before
        handler.write(8, 4, 0)
        feeder.expect(b"0123456789abcdef")


@SHARED
def test_asleep_it_is_not_fed_and_loses_nothing(warden: Warden, shared: Seat | None) -> None:
    with fed(warden, shared) as feeder:
        feeder.device.sleep()
        os.write(feeder.pipe, b"late")
        # A word of a sleeping device would be its failure, see the end of `fed`.
        poll = select.poll()
        poll.register(feeder.device.doorbell, select.POLLIN)
        assert poll.poll(50) == []
        feeder.device.wake()
        feeder.expect(b"late")


@SHARED
def test_work_is_done_when_no_command_waits(warden: Warden, shared: Seat | None) -> None:
    with fed(warden, shared) as feeder:
        (handler,) = feeder.device.handlers()
        for _ in range(5):
            handler.write(0, 4, 1)
            feeder.wait_turn()
        feeder.expect(b"wwwww")


def test_a_feeder_that_is_destroyed_is_quiet(warden: Warden) -> None:
    with fed(warden, None) as feeder:
        os.write(feeder.pipe, b"x")
        feeder.device.destroy()
        feeder.device.sync()


# Guest memory.


@contextmanager
def probe(
    warden: Warden,
    regions: tuple[MemoryRegion, ...] | None,
    shared: Seat | None = None,
    placement: Placement | None = None,
) -> Iterator[tuple[ProxyDevice, GuestMemory, Recorder]]:
    memory, events = GuestMemory(RAM, rom=1 << 20), Recorder()
    ram = memory.for_devices() if regions is None else GuestRam(memory.fd, regions)
    child = warden.spawn("probe", "dma-probe", {}, factory=1, guest_memory=RAM)
    with ProxyDevice(
        child,
        events,
        placement=placement or Only(shared or Seat.SHARED),
        deadline=20,
        memory=ram,
    ) as device:
        if shared is not None:
            assert device.lane.open()
        yield device, memory, events
    assert events.failures == []
    memory.close()


@SHARED
def test_a_synced_write_is_done_and_told_when_it_returns(
    warden: Warden, shared: Seat | None
) -> None:
    with probe(warden, None, shared) as (device, memory, events):
        synced, _ = device.handlers()
        for value in range(300):
            synced.write(VALUE, 4, value)
            synced.write(0, 4, BODY)
            assert memory.read(BODY, 6) == b"\xb8" + value.to_bytes(4, "little") + b"\xc3"
            told = [("pages", BODY >> 12, 1), ("pages", DONE >> 12, 1)]
            assert events.seen == told
            events.seen.clear()
        stats = device.stats()
        # On a shared CPU it goes by the tube.
        assert bool(stats.lane_accesses) >= (shared is Seat.OWN)
        assert stats.dropped_writes == 0


@pytest.mark.skipif(Seat.OWN not in SEATS or not lane.supported(), reason="one CPU")
def test_turns_in_a_burst_open_the_lane(warden: Warden) -> None:
    with probe(warden, None, placement=Only(Seat.OWN)) as (device, memory, _):
        synced, _ = device.handlers()
        end = monotonic() + PATIENCE
        while device.stats().lane_accesses < 10:
            assert monotonic() < end, device.stats()
            synced.write(0, 4, BODY)
        assert memory.read(BODY, 1) == b"\xb8"


def test_turns_leave_a_shared_cpu_to_the_child(warden: Warden) -> None:
    with probe(warden, None, placement=Only(Seat.SHARED)) as (device, _, _):
        for _ in range(300):
            device.handlers()[0].write(0, 4, BODY)
        assert device.stats().lane_openings == 0


@pytest.mark.skipif(Seat.OWN not in SEATS, reason="one CPU")
def test_who_waits_for_a_turn_stays_on_its_cpu_meanwhile(warden: Warden) -> None:
    with probe(warden, None, placement=Placement(lanes=False)) as (device, _, events):
        free, during = os.sched_getaffinity(0), []
        assert len(free) > 1
        events.wrote_pages = (  # type: ignore[method-assign]
            lambda *_: during.append(os.sched_getaffinity(0))
        )
        device.handlers()[0].write(0, 4, BODY)
        assert [len(cpus) for cpus in during] == [1]
        assert os.sched_getaffinity(device.pid) == during[0]
        assert os.sched_getaffinity(0) == free
        os.sched_setaffinity(0, {min(free)})  # it may be somebody else's wish, too
        try:
            device.handlers()[0].write(0, 4, BODY)
            assert os.sched_getaffinity(0) == {min(free)}
        finally:
            os.sched_setaffinity(0, free)


def test_a_posted_write_waits_for_its_turn(warden: Warden) -> None:
    with probe(warden, None) as (device, memory, events):
        _, posted = device.handlers()
        posted.write(VALUE, 4, 7)
        posted.write(0, 4, BODY)
        device.snapshot()
        assert memory.read(BODY, 6) == bytes(6)
        assert events.seen == [("turn",)]
        device.sync()
        assert memory.read(BODY, 2) == b"\xb8\x07"
        assert events.seen[1:] == [("pages", BODY >> 12, 1), ("pages", DONE >> 12, 1)]
        device.sync()
        assert len(events.seen) == 3


@pytest.mark.parametrize("address", [RAM, RAM - 5, 0xFFFF_0000, 0xFFFF_FFFC])
def test_what_is_not_ram_is_a_fault_of_the_guest(warden: Warden, address: int) -> None:
    with probe(warden, None) as (device, memory, events):
        synced, _ = device.handlers()
        synced.write(0, 4, address)
        assert synced.read(RESULT, 4) == 2
        assert events.seen == []
        assert not any(memory.view[:])


def test_a_device_that_was_given_none_has_none(warden: Warden) -> None:
    with probe(warden, ()) as (device, _, _):
        synced, _ = device.handlers()
        synced.write(0, 4, 0)
        assert synced.read(RESULT, 4) == 2
