"""A device process that works: life, upcalls and their order, input and output, config space."""

from __future__ import annotations

import mmap
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from proxy_helpers import SHAPE, Probe, Recorder, activate, child_of, open_descriptors

from devices.bus import BusType, Range
from devices.contract import NoOptions
from devices.errors import DeviceError, DeviceFailure, UserError
from devices.pci.contract import RegionRange
from proxy import messages as m
from proxy.commands import shape_of
from proxy.device import ProxyDevice
from proxy.errors import Misuse
from proxy.jail import JailMode
from proxy.session import State
from proxy.tube import Tube, pair
from proxy.warden import Warden


class Slow(Probe):
    def close(self) -> None:
        time.sleep(0.05)
        self.host.log("cleaned up")


class Broken(Probe):
    def __init__(self, host: Any, options: Any = None) -> None:
        raise DeviceError("probe", "cannot be built")


class Odd(Probe):
    def snapshot(self) -> Any:
        return {"pipe": object()} if self.state.value == 1 else "x" * m.MAX_MESSAGE

    def close(self) -> None:
        raise RuntimeError("cannot close")


FACTORIES = (Probe, Slow, Broken, Odd)


@pytest.fixture(scope="module")
def warden() -> Iterator[Warden]:
    with Warden(FACTORIES, jail=JailMode.OFF) as made:
        yield made


@pytest.fixture
def events() -> Recorder:
    return Recorder()


@pytest.fixture
def probe(warden: Warden, events: Recorder) -> Iterator[ProxyDevice]:
    child = warden.spawn("probe", "probe", {}, factory=0)
    with ProxyDevice(child, events, expected=SHAPE, deadline=10) as device:
        yield device


def press(device: ProxyDevice, button: int, value: int = 1) -> None:
    device.handlers()[0].write(button, 8, value)


def settle(device: ProxyDevice) -> None:
    """Let all posted writes be carried out, and hear what they led to."""
    device.get_ranges()
    while device.drain():
        pass


@pytest.mark.parametrize("size", range(1, 9))
def test_reads_give_what_was_written(probe: ProxyDevice, size: int) -> None:
    (handler,) = probe.handlers()
    value = 0x8877_6655_4433_2211 & (1 << 8 * size) - 1
    handler.write(0, size, value)
    assert handler.read(0, size) == value
    assert handler.read(0, 1) == 0x11


def test_posted_writes_come_before_any_later_command(probe: ProxyDevice) -> None:
    (handler,) = probe.handlers()
    for value in range(500):
        handler.write(0, 8, value)
    assert probe.snapshot() == {"value": 499, "taken": []}


def test_upcalls_of_a_read_are_handled_before_its_answer(
    probe: ProxyDevice, events: Recorder
) -> None:
    (handler,) = probe.handlers()
    handler.read(Probe.IRQ, 8)
    handler.read(Probe.MSI, 4)
    assert events.seen == [("irq", 2, True), ("msi", 0xFEE0_0000, Probe.MSI)]


def test_upcalls_of_posted_writes_ring_the_doorbell(probe: ProxyDevice, events: Recorder) -> None:
    press(probe, Probe.PAGES, 3)
    assert waits(probe.doorbell)
    while not events.seen:
        probe.drain()
    assert events.seen == [("pages", 3, 2)]
    assert not waits(probe.doorbell, 0)


def waits(fd: int, timeout: float = 10) -> bool:
    import select

    return bool(select.select([fd], [], [], timeout)[0])


def test_upcalls_keep_their_order(probe: ProxyDevice, events: Recorder) -> None:
    for value in range(40):
        press(probe, Probe.IRQ, value & 1)
        press(probe, Probe.MSI, value)
    settle(probe)
    expected = []
    for value in range(40):
        expected += [("irq", 2, bool(value & 1)), ("msi", 0xFEE0_0000, value)]
    assert events.seen == expected


def test_output_is_gathered_and_in_order(probe: ProxyDevice, events: Recorder) -> None:
    text = bytes(index * 7 & 0xFF for index in range(10_000))
    for byte in text:
        press(probe, Probe.OUTPUT, byte)
        probe.drain()
    probe.sleep()
    assert events.text == text + b"z"
    assert max(len(each[1]) for each in events.seen) <= m.MAX_BYTES


def test_a_large_output_is_split(probe: ProxyDevice, events: Recorder) -> None:
    press(probe, Probe.VOLUME, 50_000)
    probe.snapshot()
    assert events.text == bytes(index & 0xFF for index in range(50_000))


def test_output_comes_before_the_exit_request(probe: ProxyDevice, events: Recorder) -> None:
    press(probe, Probe.OUTPUT, 65)
    press(probe, Probe.EXIT, 3)
    settle(probe)
    assert events.seen == [("output", b"A"), ("exit", 3)]


def test_log_lines_are_made_harmless(probe: ProxyDevice, events: Recorder) -> None:
    press(probe, Probe.LOG, 5)
    settle(probe)
    assert events.seen == [("log", "value 5?[31m")]


def test_more_upcalls_than_the_tube_holds(probe: ProxyDevice, events: Recorder) -> None:
    """Both directions full: the child is stuck with upcalls, the machine with posted writes."""
    for _ in range(20):
        press(probe, Probe.STORM, 200)
        for value in range(200):
            probe.handlers()[0].write(0, 4, value)
    assert probe.handlers()[0].read(0, 4) == 199
    settle(probe)
    assert len(events.seen) == 20 * 200
    assert probe.failed is None


def test_input(probe: ProxyDevice, events: Recorder) -> None:
    data = bytes(index & 0xFF for index in range(10_000))
    assert probe.receive(data) == len(data)
    assert probe.snapshot()["taken"] == list(data)


def test_sleep_and_wake_are_idempotent(probe: ProxyDevice) -> None:
    probe.wake()
    probe.sleep()
    probe.sleep()
    assert probe.state is State.ASLEEP
    probe.wake()
    probe.wake()
    press(probe, 0, 9)
    assert probe.handlers()[0].read(0, 1) == 9


def test_accesses_to_a_sleeping_device_are_misuse(probe: ProxyDevice) -> None:
    probe.sleep()
    with pytest.raises(Misuse):
        probe.handlers()[0].read(0, 1)
    with pytest.raises(Misuse):
        probe.receive(b"x")
    assert probe.failed is None


def test_refused_sleep_is_an_error_with_the_devices_name(probe: ProxyDevice) -> None:
    press(probe, 0, 0xBAD)
    with pytest.raises(DeviceError, match=r"'probe': does not want to sleep"):
        probe.sleep()
    assert probe.failed is None
    assert probe.handlers()[0].read(0, 2) == 0xBAD


def test_snapshot_and_restore(probe: ProxyDevice) -> None:
    press(probe, 0, 1234)
    saved = probe.snapshot()
    press(probe, 0, 1)
    assert probe.snapshot() != saved
    probe.sleep()
    probe.restore(saved)
    assert probe.snapshot() == saved
    probe.wake()
    assert probe.handlers()[0].read(0, 8) == 1234


@pytest.mark.parametrize("state", ["text", None, {"value": "x"}, {"taken": 5}, [1]])
def test_restore_of_a_bad_state_changes_nothing(probe: ProxyDevice, state: object) -> None:
    press(probe, 0, 77)
    with pytest.raises(DeviceError, match="probe"):
        probe.restore(state)
    assert probe.snapshot()["value"] == 77


def test_restore_of_what_is_no_plain_value(probe: ProxyDevice) -> None:
    with pytest.raises(DeviceError, match="cannot restore"):
        probe.restore({"value": object()})
    assert probe.handlers()[0].read(0, 1) == 0


def test_a_long_state_travels_in_chunks(probe: ProxyDevice) -> None:
    state = {"value": 5, "taken": list(range(300_000))}
    probe.restore(state)
    assert probe.snapshot() == state


def test_ranges(probe: ProxyDevice) -> None:
    assert probe.get_ranges() == [m.ClaimedRange(0, BusType.MMIO, Range(0x1000_0000, 0x1000))]


def test_destroyed_device_stays_in_its_loop(probe: ProxyDevice, events: Recorder) -> None:
    probe.destroy()
    assert probe.handlers()[0].read(0, 4) == 0xFFFF_FFFF
    probe.handlers()[0].write(0, 4, 1)
    assert probe.get_ranges() == []
    probe.drain()
    assert events.text == b"closed"
    with pytest.raises(Misuse):
        probe.snapshot()
    probe.shutdown()
    assert events.text == b"closed"
    assert not events.failures


def test_shutdown_cleans_up_first_then_the_child_exits(warden: Warden) -> None:
    events = Recorder()
    device = ProxyDevice(warden.spawn("slow", "probe", {}, factory=1), events)
    device.shutdown()
    device.shutdown()
    assert events.seen == [("log", "cleaned up")]
    obituary = warden.wait_obituary("slow", 10)
    assert obituary is not None
    assert (obituary.status, obituary.signal) == (0, None)
    assert not os.path.exists(f"/proc/{device.pid}")
    assert not events.failures


def test_dropping_a_proxy_is_a_shutdown(warden: Warden) -> None:
    import gc

    events = Recorder()
    device = ProxyDevice(warden.spawn("dropped", "probe", {}, factory=1), events)
    del device
    gc.collect()
    assert events.seen == [("log", "cleaned up")]
    obituary = warden.wait_obituary("dropped", 10)
    assert obituary is not None
    assert obituary.status == 0


def test_a_child_nobody_activated_ends_with_its_tube(warden: Warden) -> None:
    warden.spawn("unused", "probe", {}, factory=0).close()
    obituary = warden.wait_obituary("unused", 10)
    assert obituary is not None
    assert obituary.status == 0


def test_activation_only_once(warden: Warden, events: Recorder) -> None:
    child = warden.spawn("once", "probe", {}, factory=0)
    tube = child.tube.dup()
    with ProxyDevice(child, events):
        with pytest.raises(Misuse):
            ProxyDevice(child, events)
        # Someone kept a copy of the tube: that the child refuses is what counts.
        tube.send(m.Activate().encode())
        obituary = warden.wait_obituary("once", 10)
        assert obituary is not None
        assert obituary.status == 76
    tube.close()
    assert "Activate for a device that is active" in str(events.failures)


def test_child_interface_is_shipped_to_another_process(warden: Warden) -> None:
    """The other process activates it and answers with what it read."""
    here, there = pair()
    child = warden.spawn("shipped", "probe", {}, factory=0)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            from proxy.child_interface import ChildInterface

            here.close()
            child.close()
            mine = ChildInterface.receive_over(Tube(there, 1 << 16))
            with ProxyDevice(mine, Recorder()) as device:
                device.handlers()[0].write(0, 8, 4242)
                there.send(str(device.handlers()[0].read(0, 8)).encode())
            status = 0
        finally:
            os._exit(status)
    there.close()
    child.send_over(Tube(here, 1 << 16))
    assert here.recv(100) == b"4242"
    assert os.waitpid(pid, 0)[1] == 0
    here.close()
    with pytest.raises(Misuse):
        ProxyDevice(child, Recorder())
    obituary = warden.wait_obituary("shipped", 10)
    assert obituary is not None
    assert obituary.status == 0


def test_device_of_another_shape_is_refused(warden: Warden, events: Recorder) -> None:
    child = warden.spawn("shape", "probe", {}, factory=0)
    with pytest.raises(DeviceFailure, match="shape"):
        ProxyDevice(child, events, expected=m.Shape())
    assert warden.wait_obituary("shape", 10) is not None


def test_shape_of_an_in_process_model_is_the_childs(probe: ProxyDevice) -> None:
    assert probe.shape == shape_of(Probe(None, NoOptions()))  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [1, 2])
def test_snapshot_that_cannot_be_sent_is_refused(warden: Warden, value: int) -> None:
    events = Recorder()
    with ProxyDevice(warden.spawn("odd", "probe", {}, factory=3), events) as device:
        press(device, 0, value)
        with pytest.raises(DeviceError, match="'odd'"):
            device.snapshot()
        assert device.handlers()[0].read(0, 1) == value
    assert events.seen[-1] == ("log", "clean-up failed: RuntimeError: cannot close")
    assert not events.failures


def test_a_model_that_cannot_be_built(warden: Warden) -> None:
    with pytest.raises(DeviceError, match=r"'bad': cannot be started: cannot be built"):
        warden.spawn("bad", "probe", {}, factory=2)
    with pytest.raises(UserError, match="unknown device model 'nothing'"):
        warden.spawn("bad", "nothing", {})
    with pytest.raises(UserError, match="no option 'colour'"):
        warden.spawn("bad", "echo", {"colour": "red"})
    with pytest.raises(UserError, match="factory"):
        warden.spawn("bad", "probe", {}, factory=99)


def test_pci_function(warden: Warden, events: Recorder) -> None:
    with ProxyDevice(warden.spawn("pci", "config-space", {}), events) as device:
        assert device.is_pci
        assert device.bars()
        info = device.bars()[0]
        size = info.size
        bar, command = 4 + info.bar, 1
        device.write_config(bar, 0, b"\xff\xff\xff\xff")
        assert device.read_config(bar) & ~0xF == (1 << 32) - size
        device.write_config(bar, 0, (0xE000_0000).to_bytes(4, "little"))
        result = device.write_config(command, 0, b"\x03\x00")
        place = Range(0xE000_0000, size)
        assert RegionRange(info.region, place) in result.mmio_add
        assert m.ClaimedRange(info.region, info.bus, place) in device.get_ranges()
        assert device.read_virtual_config(1) == 0
        device.write_virtual_config(1, 1)
        saved = device.snapshot()
        device.write_config(command, 0, b"\x00\x00")
        assert device.get_ranges() == []
        device.sleep()
        device.restore(saved)
        assert m.ClaimedRange(info.region, info.bus, place) in device.get_ranges()
        assert device.read_config(command) & 3


def test_mapped_config_needs_no_message_and_is_current(warden: Warden, events: Recorder) -> None:
    with (
        ProxyDevice(warden.spawn("mapped", "config-space", {}), events) as mapped,
        ProxyDevice(warden.spawn("asked", "config-space", {}), events, map_config=False) as asked,
    ):
        for device in (mapped, asked):
            device.write_config(4, 0, b"\0\0\0\xd0")
            device.write_config(1, 0, b"\x02\0")
            device.write_config(15, 0, b"\x2a")
        assert [mapped.read_config(r) for r in range(64)] == [
            asked.read_config(r) for r in range(64)
        ]
        os.kill(mapped.pid, 19)  # stopped: only shared memory can answer
        assert mapped.read_config(15) & 0xFF == 0x2A
        os.kill(mapped.pid, 18)


def test_a_mapped_read_does_not_overtake_posted_writes() -> None:
    """The mapping is older than what the child says once the write is done."""
    shape = m.Shape(regions=SHAPE.regions, is_pci=True)

    def script(tube: socket.socket, bell: int, words: memoryview | None) -> None:
        activate(tube, shape)
        tube.recv(100)
        _, (fd,), _, _ = socket.recv_fds(tube, 100, 1)
        registers = memoryview(mmap.mmap(fd, 256)).cast("I")
        registers[0] = 1
        tube.send(m.MappingResult(True).encode())
        while data := tube.recv(100):
            if data[0] == m.ReadConfig.opcode:
                tube.send(m.ReadConfigResult(2).encode())
            if data[0] == m.Shutdown.opcode:
                tube.send(m.Ok().encode())
                return

    with child_of(script) as child:
        device = ProxyDevice(child, Recorder(), deadline=5)
        assert device.read_config(0) == 1
        device.handlers()[0].write(0, 4, 5)
        assert device.read_config(0) == 2
        assert device.read_config(0) == 1  # its answer settled the write
        device.shutdown()


def test_no_descriptor_is_left(warden: Warden, events: Recorder) -> None:
    before = open_descriptors()
    for _ in range(3):
        with ProxyDevice(warden.spawn("fds", "config-space", {}), events) as device:
            device.sleep()
    import gc

    del device
    gc.collect()
    assert len(open_descriptors()) == len(before)


def test_descriptors_are_given_by_name(tmp_path: Any) -> None:
    class Writer(Probe):
        def close(self) -> None:
            os.write(self.host.fds["target"], b"written by the child")

    path = tmp_path / "out"
    with path.open("wb") as file, Warden([Writer], jail=JailMode.OFF) as warden:
        child = warden.spawn("writer", "probe", {}, factory=0, fds={"target": file.fileno()})
        ProxyDevice(child, Recorder()).shutdown()
    assert path.read_bytes() == b"written by the child"


def test_hot_path_of_two_threads_is_not_promised_but_other_threads_may_wait(
    probe: ProxyDevice,
) -> None:
    """A watcher thread may block on the doorbell while this thread makes accesses."""
    heard = threading.Event()
    watcher = threading.Thread(target=lambda: waits(probe.doorbell) and heard.set())
    watcher.start()
    for value in range(100):
        press(probe, 0, value)
    press(probe, Probe.IRQ)
    assert heard.wait(10)
    watcher.join()
