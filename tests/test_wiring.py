"""Where what devices say goes, and the order in which they are put to sleep."""

from __future__ import annotations

from typing import Any, cast

import pytest
from fake_clock import FakeClock
from fakes import FakeHost

from devices.bus import Bus, BusType
from devices.contract import Device, Region
from devices.echo import Echo
from devices.errors import DeviceError, DeviceFailure
from devices.irqchip.pc import IrqChip
from vmm.attachment import Attachment
from vmm.config import DeviceConfig
from vmm.cpu.engine import Cpu
from vmm.machine import Machine
from vmm.wiring import Wiring


class Board:
    """A wiring with a real interrupt controller behind it."""

    def __init__(self) -> None:
        self.failures: list[DeviceFailure] = []
        self.wiring = Wiring(
            cast(Cpu, None),
            attention=lambda: None,
            guest_exit=lambda model, value: None,
            device_failed=self.failures.append,
        )
        self.levels: dict[int, bool] = {}
        self.chip = IrqChip(FakeHost(), FakeClock())
        self.wiring.irqchip = self.chip
        set_irq = self.chip.set_irq

        def spy(gsi: int, level: bool) -> None:
            set_irq(gsi, level)
            self.levels[gsi] = level

        cast(Any, self.chip).set_irq = spy

    def attach(self, name: str, irq: int | None) -> Attachment:
        made = Attachment(
            DeviceConfig(name, "echo"), Echo(FakeHost()), lines=() if irq is None else (irq,)
        )
        self.wiring.attached[name] = made
        return made


@pytest.fixture
def board() -> Board:
    return Board()


def test_a_failed_device_lets_go_of_its_line(board: Board) -> None:
    board.attach("dead", 5)
    board.wiring.irq("dead", 0, True)
    assert board.levels == {5: True}
    board.wiring.failed(DeviceFailure("dead", "is no more"))
    assert board.levels == {5: False}
    assert [failure.device for failure in board.failures] == ["dead"]


def test_a_failed_device_lets_go_of_nobody_elses_line(board: Board) -> None:
    board.attach("dead", 5)
    board.attach("alive", 5)
    board.wiring.irq("dead", 0, True)
    board.wiring.irq("alive", 0, True)
    board.wiring.failed(DeviceFailure("dead", "is no more"))
    assert board.levels == {5: True}


def test_a_shared_line_is_high_while_any_source_is(board: Board) -> None:
    board.attach("one", 5)
    board.attach("two", 5)
    seen = []
    for name, level in (
        ("one", True),
        ("two", True),
        ("one", False),
        ("one", False),
        ("two", False),
        ("two", True),
    ):
        board.wiring.irq(name, 0, level)
        seen.append(board.levels[5])
    assert seen == [True, True, True, True, False, True]
    board.wiring.isa_line(5, True)  # a PCI pin that is routed there
    board.wiring.irq("two", 0, False)
    assert board.levels[5]


@pytest.mark.parametrize("irq", [-3, -1, 2, 16, 24, 99, 1 << 40])
@pytest.mark.parametrize("pin", [-1, 0, 1, 255, 1 << 40])
def test_nothing_that_a_device_says_of_its_pins_raises(board: Board, irq: int, pin: int) -> None:
    board.attach("odd", irq)
    for level in (True, True, False, True):
        board.wiring.irq("odd", pin, level)
        board.wiring.irq("nobody", pin, level)
        board.wiring.isa_line(irq, level, "odd")
    board.wiring.failed(DeviceFailure("odd", "is odd"))
    board.wiring.failed(DeviceFailure("odd", "is odd"))
    assert not board.chip.pending()


def test_log_lines_from_before_somebody_listened_are_told(board: Board) -> None:
    heard: list[tuple[str, str]] = []
    board.wiring.log("pci", "early")
    board.wiring.log_sink = lambda name, text: heard.append((name, text))
    board.wiring.log("echo", "late")
    assert heard == [("pci", "early"), ("echo", "late")]
    assert board.wiring.log_lines == heard


# Attachments.


class Lined(Device):
    model = "lined"
    line: Any = None

    def regions(self) -> tuple[Region, ...]:
        return (Region("r", BusType.PIO, 8, start=0xE00, irq=self.line),)


@pytest.mark.parametrize("irq", [-3, 2, 16, 99, "5"])
def test_a_device_without_a_process_with_an_impossible_line(irq: Any) -> None:
    kind = type("Kind", (Lined,), {"line": irq})
    with pytest.raises(DeviceError, match=r"device 'lined'.*(line|failed)"):
        Attachment(DeviceConfig("lined", "x"), kind(FakeHost())).place(
            {BusType.PIO: Bus(BusType.PIO, 1 << 16)}
        )


class Timid(Device):
    """Fails at what it is told to by `wrong`."""

    model = "timid"
    wrong = ""
    order: list[str] | None = None

    def _do(self, what: str) -> None:
        if what == self.wrong:
            raise RuntimeError("cannot\x1b[31m")

    def regions(self) -> tuple[Region, ...]:
        self._do("regions")
        return (Region("r", BusType.PIO, 8, start=0xE00),)

    def handlers(self) -> Any:
        self._do("handlers")
        return (self,)

    def sleep(self) -> None:
        self._do("sleep")

    def wake(self) -> None:
        self._do("wake")

    def snapshot(self) -> Any:
        self._do("snapshot")
        return {}

    def restore(self, saved: Any) -> None:
        self._do("restore")

    def receive(self, data: bytes) -> int:
        self._do("receive")
        return len(data)


def _lead_a_life(device: Device) -> None:
    attachment = Attachment(DeviceConfig("mine", "x"), device)
    attachment.place({BusType.PIO: Bus(BusType.PIO, 1 << 16)})
    attachment.sleep()
    attachment.wake()
    attachment.snapshot()
    attachment.restore({})
    taker = attachment.input()
    assert taker is not None
    taker.receive(b"x")


@pytest.mark.parametrize(
    "wrong", ["handlers", "regions", "sleep", "wake", "snapshot", "restore", "receive"]
)
def test_what_a_device_without_a_process_raises_names_it(wrong: str) -> None:
    device = Timid(FakeHost())
    device.wrong = wrong
    with pytest.raises(DeviceError, match=r"device 'mine'.*cannot") as raised:
        _lead_a_life(device)
    assert raised.value.device == "mine"
    assert "\x1b" not in str(raised.value)
    assert isinstance(raised.value.__cause__, RuntimeError)


def test_sleep_port_bus_first_each_once_and_wake_in_reverse() -> None:
    story: list[str] = []

    class Sleeper(Device):
        model = "sleeper"
        name = ""
        places: tuple[Region, ...] = ()

        def regions(self) -> tuple[Region, ...]:
            return self.places

        def handlers(self) -> Any:
            return (self,) * len(self.places)

        def sleep(self) -> None:
            story.append(f"{self.name} sleeps")

        def wake(self) -> None:
            story.append(f"{self.name} wakes")

    def kind(name: str, *places: tuple[BusType, int]) -> type[Device]:
        regions = tuple(Region(f"r{at}", bus, 4, start=at) for bus, at in places)
        return type(name, (Sleeper,), {"name": name, "places": regions})

    with Machine(memory="16M", devices=()) as machine:
        for each in (
            kind("nowhere"),
            kind("memory", (BusType.MMIO, 0xE000_0000)),
            kind("both", (BusType.MMIO, 0xE000_1000), (BusType.PIO, 0xE10)),
            kind("ports", (BusType.PIO, 0xE00), (BusType.PIO, 0xE08)),
        ):
            machine.add_device(each, each.__name__, isolated=False)
        machine.suspend()
        machine.suspend()
        assert story == [f"{n} sleeps" for n in ("ports", "both", "memory", "nowhere")]
        story.clear()
        machine.resume()
        machine.resume()
        assert story == [f"{n} wakes" for n in ("nowhere", "memory", "both", "ports")]
