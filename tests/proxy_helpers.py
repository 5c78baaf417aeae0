"""What the proxy tests share: a recorder of events, device models, hand-made children."""

from __future__ import annotations

import gc
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from devices.bus import BusType
from devices.contract import Device, DeviceHost, Region
from devices.errors import DeviceError, DeviceFailure
from proxy import lane
from proxy import messages as m
from proxy.child_interface import ChildInterface
from proxy.placement import Placement, Seat
from proxy.tube import pair

SHAPE = m.Shape(regions=(Region("registers", BusType.MMIO, 0x1000, 0x1000_0000),), takes_input=True)


class Recorder:
    """A `ProxyEvents` that keeps all it is told."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []
        self.text = b""
        self.failures: list[DeviceFailure] = []

    def irq(self, name: str, pin: int, level: bool) -> None:
        self.seen.append(("irq", pin, level))

    def msi(self, name: str, address: int, data: int) -> None:
        self.seen.append(("msi", address, data))

    def wrote_pages(self, name: str, runs: Sequence[tuple[int, int]]) -> None:
        self.seen += [("pages", *run) for run in runs]

    def want_turn(self, name: str) -> None:
        self.seen.append(("turn",))

    def output(self, name: str, data: bytes) -> None:
        self.text += data
        self.seen.append(("output", data))

    def input_wanted(self, name: str) -> None:
        self.seen.append(("input_wanted",))

    def exit_request(self, name: str, value: int) -> None:
        self.seen.append(("exit", value))

    def log(self, name: str, text: str) -> None:
        self.seen.append(("log", text))

    def failed(self, failure: DeviceFailure) -> None:
        self.failures.append(failure)


@dataclass
class ProbeState:
    value: int = 0
    taken: list[int] = field(default_factory=list)


class Probe(Device):
    """Does on request what a device may do; offset 0 is a register, the others are buttons."""

    model: ClassVar[str] = "probe"
    State = ProbeState
    state: ProbeState

    IRQ, OUTPUT, EXIT, LOG, MSI, PAGES, BUG, WANT, STORM, VOLUME = range(8, 88, 8)

    def __init__(self, host: DeviceHost, options: Any = None) -> None:
        super().__init__(host, options)
        self.room = 1 << 30
        self.refuse_sleep = False

    def regions(self) -> tuple[Region, ...]:
        return SHAPE.regions

    def read(self, offset: int, size: int) -> int:
        if offset:
            self.press(offset, offset)
        return self.state.value

    def write(self, offset: int, size: int, value: int) -> None:
        if offset:
            self.press(offset, value)
        else:
            self.state.value = value

    def press(self, button: int, value: int) -> None:
        host = self.host
        if button == self.IRQ:
            host.set_irq(bool(value), 2)
        elif button == self.OUTPUT:
            host.output(bytes([value & 0xFF]))
        elif button == self.EXIT:
            host.request_exit(value)
        elif button == self.LOG:
            host.log(f"value {value}\x1b[31m")
        elif button == self.MSI:
            host.send_msi(0xFEE0_0000, value)
        elif button == self.PAGES:
            host.wrote_pages(value, 2)
        elif button == self.BUG:
            raise RuntimeError("a bug in the model")
        elif button == self.WANT:
            host.input_wanted()
        elif button == self.STORM:
            for index in range(value):
                host.send_msi(index, value)
        elif button == self.VOLUME:
            host.output(bytes(index & 0xFF for index in range(value)))

    def receive(self, data: bytes) -> int:
        taken = data[: self.room]
        self.state.taken += taken
        return len(taken)

    def sleep(self) -> None:
        if self.state.value == 0xBAD:
            raise DeviceError(self.model, "does not want to sleep")
        self.host.output(b"z")
        super().sleep()

    def close(self) -> None:
        self.host.output(b"closed")


@contextmanager
def child_of(
    script: Callable[[socket.socket, int, memoryview | None], object], shared: bool = False
) -> Iterator[ChildInterface]:
    """A process that does nothing but `script`(tube, doorbell, lane) with its raw end."""
    here, there = pair()
    heard, doorbell = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    page = lane.create_page("test") if shared else -1
    pid = os.fork()
    if pid == 0:
        try:
            here.close()
            os.close(heard)
            words = memoryview(lane.map_page(page)).cast("Q") if shared else None
            script(there, doorbell, words)
        except OSError:
            pass
        finally:
            os._exit(0)
    there.close()
    os.close(doorbell)
    pidfd = os.pidfd_open(pid)
    child = ChildInterface("hostile", pid, here, pidfd, heard, lane=page)
    try:
        yield child
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        child.close()


def activate(tube: socket.socket, shape: m.Shape = SHAPE, has_lane: bool = False) -> None:
    """A hand-made child's part of the activation."""
    tube.recv(100)
    tube.send(m.Activated(shape, has_lane).encode())


def open_descriptors() -> set[str]:
    """This process's open descriptors and what they are."""
    gc.collect()  # what an earlier test left to the collector
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}")
        except OSError:
            continue
    return found


class Only(Placement):
    """A placement that has one seat of one kind; `SEATS` are those that this host has."""

    def __init__(self, seat: Seat) -> None:
        super().__init__()
        self.places = {kind: int(kind is seat) for kind in Seat}


SEATS = tuple(Seat) if len(os.sched_getaffinity(0)) > 1 else (Seat.SHARED,)
