"""The console (5.3): a terminal, and a second port with the control queues."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from virtio_driver import F_PACKED, F_VERSION_1, Driver, LocalRig

from devices.virtio import console
from devices.virtio.console import (
    CONSOLE_PORT,
    CONTROL_RX,
    CONTROL_TX,
    DEVICE_ADD,
    DEVICE_READY,
    F_EMERG_WRITE,
    F_MULTIPORT,
    F_SIZE,
    MOST_INPUT,
    PORT_NAME,
    PORT_OPEN,
    PORT_READY,
    RESIZE,
    RX0,
    TX0,
    TX1,
    Console,
)
from vmm.machine import Machine


@pytest.fixture(params=[0, F_PACKED], ids=["split", "packed"])
def plain(request: pytest.FixtureRequest) -> Driver:
    driver = Driver(LocalRig(Console, {"columns": 132, "rows": 43}))
    driver.start(F_VERSION_1 | F_SIZE | request.param)
    return driver


def device(driver: Driver) -> Any:
    return driver.rig.device  # type: ignore[attr-defined]


def printed(driver: Driver) -> bytes:
    return bytes(driver.rig.host.printed)  # type: ignore[attr-defined]


def test_output(plain: Driver) -> None:
    plain.queues[TX0].ask([b"hel", b"lo"])
    assert printed(plain) == b"hello"


def test_input_fills_what_buffers_there_are(plain: Driver) -> None:
    queue = plain.queues[RX0]
    assert device(plain).receive(b"abcdefgh") == 8
    requests = [queue.send([], [3]) for _ in range(2)]
    plain.rig.settle()
    plain.rig.replace(plain.rig.snapshot())
    requests.append(queue.send([], [30]))
    plain.rig.settle()
    queue.collect()
    assert [request.written(plain.ram) for request in requests] == [b"abc", b"def", b"gh"]
    waiting = queue.send([], [30])
    plain.rig.settle()
    assert queue.collect() == []
    device(plain).receive(b"x")
    plain.rig.settle()
    assert queue.collect() == [waiting]


def test_input_before_the_driver_and_too_much_of_it() -> None:
    driver = Driver(LocalRig(Console))
    assert device(driver).receive(b"y" * (MOST_INPUT + 5)) == MOST_INPUT
    assert device(driver).receive(b"z") == 0
    driver.start()
    request = driver.queues[RX0].ask([], [MOST_INPUT + 9])
    assert request.written(driver.ram) == b"y" * MOST_INPUT
    assert driver.rig.host.count("input_wanted") == 1  # type: ignore[attr-defined]
    assert device(driver).receive(b"z") == 1


def test_size(plain: Driver) -> None:
    assert (plain.config(0, 2), plain.config(2, 2)) == (132, 43)
    device(plain).resize(80, 24)
    assert plain.isr() & 2
    assert (plain.config(0, 2), plain.config(2, 2)) == (80, 24)


def test_emergency_write_works_without_a_driver() -> None:
    driver = Driver(LocalRig(Console))
    assert driver.offered() & F_EMERG_WRITE
    assert not driver.offered() & F_MULTIPORT
    driver.set_config(8, 4, 0x1234_5621)
    assert printed(driver) == b"!"


def test_a_request_larger_than_any(plain: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "MOST_OUTPUT", 10)
    plain.queues[TX0].ask([b"x" * 11])
    assert printed(plain) == b"x" * 10


@pytest.fixture
def ports() -> Iterator[tuple[Driver, int]]:
    fd = os.memfd_create("log")
    driver = Driver(LocalRig(Console, {"log": "log"}, {"log": fd}))
    driver.start(F_VERSION_1 | F_MULTIPORT | F_SIZE)
    yield driver, fd
    os.close(fd)


def say(driver: Driver, port: int, event: int, value: int = 1) -> None:
    driver.queues[CONTROL_TX].ask([struct.pack("<IHH", port, event, value)])


def heard(driver: Driver, how_many: int) -> list[tuple[int, int, bytes]]:
    found = []
    for _ in range(how_many):
        data = driver.queues[CONTROL_RX].ask([], [32]).written(driver.ram)
        port, event, _ = struct.unpack_from("<IHH", data)
        found.append((port, event, data[8:]))
    return found


def test_ports(ports: tuple[Driver, int]) -> None:
    driver, fd = ports
    assert driver.config(4, 4) == 2
    say(driver, 0, DEVICE_READY)
    assert heard(driver, 2) == [(0, DEVICE_ADD, b""), (1, DEVICE_ADD, b"")]
    say(driver, 0, PORT_READY)
    size = struct.pack("<HH", 80, 25)
    expected = [(0, CONSOLE_PORT, b""), (0, RESIZE, size), (0, PORT_OPEN, b"")]
    driver.rig.replace(driver.rig.snapshot())
    assert heard(driver, 3) == expected
    say(driver, 1, PORT_READY)
    assert heard(driver, 2) == [(1, PORT_NAME, b"log"), (1, PORT_OPEN, b"")]
    device(driver).resize(100, 50)
    assert heard(driver, 1) == [(0, RESIZE, struct.pack("<HH", 100, 50))]
    driver.queues[TX1].ask([b"one "])
    driver.rig.replace(driver.rig.snapshot())
    driver.queues[TX1].ask([b"two"])
    assert os.pread(fd, 100, 0) == b"one two"
    assert printed(driver) == b""


def test_a_log_is_made_and_begins_empty(tmp_path: Path) -> None:
    """When the guest begins to run: whoever is refused before that has lost nothing."""
    log = tmp_path / "log"
    before = b""
    for _ in range(2):
        with Machine(memory="16M", devices=()) as machine:
            machine.add_device("console", log=str(log))
            machine.build()
            assert machine.parts.host_files.held["console"] == [f"log ({log}, write)"]
            assert log.read_bytes() == before
            machine.boot("spin")
            assert log.read_bytes() == before
            machine.run(budget=100)
            assert log.read_bytes() == b""
            before = b"of a run before"
            log.write_bytes(before)
            machine.run(budget=100)
            assert log.read_bytes() == before, "once"


def test_without_a_serial_port_it_has_the_terminal() -> None:
    for devices, name in (((), "console"), (("serial",), "serial")):
        with Machine(memory="16M", devices=()) as machine:
            for device in devices:
                machine.add_device(device)
            machine.add_device("console")
            machine.build()
            assert machine.parts.console_name == name
            assert machine.parts.wiring.consoles[name] is machine.console
            assert (
                machine.parts.console_device
                is machine.parts.attachments[-1 if not devices else 0].input()
            )
            assert ("console" in machine.parts.wiring.consoles) == (name == "console")


def test_nonsense_on_the_control_queue(ports: tuple[Driver, int]) -> None:
    driver, _ = ports
    driver.queues[CONTROL_TX].ask([b"short"])
    for port, event in ((7, PORT_READY), (0, 99), (0xFFFF_FFFF, PORT_READY)):
        say(driver, port, event)
    for _ in range(100):
        say(driver, 0, DEVICE_READY)
    assert len(device(driver).state.messages) == 64
    assert driver.rig.logs == []
