"""A model that writes to a descriptor as fast as that takes it: in its own process and in ours."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from fakes import FakeHost
from network_rig import event_loop
from proxy_helpers import SEATS, Only, Recorder

from devices.bus import BusType
from devices.contract import Device, DeviceHost, Region, WaitsForRoom
from proxy import lane
from proxy.device import ProxyDevice
from proxy.placement import Seat
from proxy.warden import Warden
from vmm.local import LocalTurns


class Filler(Device):
    """Writes as many bytes to a pipe as it was told; counts how often it was called for that."""

    model: ClassVar[str] = "filler"

    def __init__(self, host: DeviceHost, options: Any = None) -> None:
        super().__init__(host, options)
        self.left = 0
        self.calls = 0

    def regions(self) -> tuple[Region, ...]:
        return (Region("registers", BusType.MMIO, 16, 0x1000_0000),)

    def read(self, offset: int, size: int) -> int:
        return self.left if offset == 0 else self.calls

    def write(self, offset: int, size: int, value: int) -> None:
        self.left = value

    def watched(self) -> tuple[int, ...]:
        return (self.host.fds["other"],)

    def full(self) -> tuple[int, ...]:
        return (self.host.fds["pipe"],) if self.left else ()

    def ready(self, fd: int) -> None:
        assert fd == self.host.fds["pipe"]
        self.calls += 1
        self.left -= os.write(fd, bytes(min(self.left, 1 << 16)))


class Pipes:
    """The pipe that is filled, of which 64 KiB fit, and one that is only watched."""

    def __init__(self) -> None:
        self.reader, writer = os.pipe()
        os.set_blocking(writer, False)
        other, self.keep = os.pipe()
        self.fds = {"pipe": writer, "other": other}

    def take(self) -> int:
        return len(os.read(self.reader, 1 << 16))

    def close(self) -> None:
        for fd in (self.reader, self.keep, *self.fds.values()):
            os.close(fd)


@pytest.fixture
def pipes() -> Iterator[Pipes]:
    made = Pipes()
    yield made
    made.close()


def test_the_contract() -> None:
    assert isinstance(Filler(FakeHost()), WaitsForRoom)


@pytest.mark.parametrize(
    "shared",
    [None, *(SEATS if lane.supported() else ())],
    ids=lambda seat: "tube" if seat is None else f"lane-{seat.name.lower()}-cpu",
)
def test_in_a_process_of_its_own(pipes: Pipes, shared: Seat | None) -> None:
    total = 10 << 16
    with Warden([Filler]) as warden:
        child = warden.spawn("filler", "filler", {}, factory=0, fds=pipes.fds)
        with ProxyDevice(
            child, Recorder(), placement=Only(shared or Seat.SHARED), deadline=20
        ) as device:
            if shared is not None:
                assert device.lane.open()
            (handler,) = device.handlers()
            handler.write(0, 4, total)
            got = 0
            while got < total:
                got += pipes.take()  # waits for it
            assert handler.read(0, 4) == 0
            handler.write(0, 4, total)
            while handler.read(0, 4) > total - (1 << 16):
                pass
            calls = handler.read(8, 4)
            for _ in range(1000):
                handler.read(0, 4)
            assert handler.read(8, 4) == calls, "there is no room, and it is called"
            device.sleep()
            pipes.take()
            device.wake()
            assert device.failed is None


def test_in_this_process(pipes: Pipes) -> None:
    total = 10 << 16
    host = FakeHost(pipes.fds)
    device = Filler(host)
    with event_loop() as loop:
        turns = LocalTurns(device, host.turns, loop)
        (handler,) = turns.handlers([device], device.regions())
        handler.write(0, 4, total)
        got = 0
        while got < total:
            assert loop.poll(10)
            got += pipes.take()
        calls = device.calls
        handler.write(0, 4, total)
        assert loop.poll(10)
        assert device.calls == calls + 1
        assert not loop.poll(0.05), "there is no room, and it is called"
        turns.sleep()
        pipes.take()
        assert not loop.poll(0.05), "asleep, and called"
        turns.wake()
        assert loop.poll(10)
        assert device.calls == calls + 2
        turns.sleep()
