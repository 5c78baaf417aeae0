"""Children that die, hang, lie or flood: one named failure each, and nothing else."""

from __future__ import annotations

import array
import json
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator

import pytest
from proxy_helpers import SHAPE, Probe, Recorder, activate, child_of, open_descriptors

from devices.bus import BusType
from devices.contract import Region
from devices.errors import DeviceError, DeviceFailure
from devices.pci.contract import BarInfo
from proxy import messages as m
from proxy.device import ProxyDevice
from proxy.jail import JailMode
from proxy.warden import Warden

Script = Callable[[socket.socket, int, memoryview | None], object]


@pytest.fixture(scope="module")
def warden() -> Iterator[Warden]:
    with Warden([Probe], jail=JailMode.OFF) as made:
        yield made


ACTIONS: dict[str, Callable[[ProxyDevice], object]] = {
    "read": lambda device: device.handlers()[0].read(0, 4),
    "write": lambda device: device.handlers()[0].write(0, 4, 1),
    "read_config": lambda device: device.read_config(0),
    "write_config": lambda device: device.write_config(1, 0, b"\x07\0"),
    "read_virtual_config": lambda device: device.read_virtual_config(0),
    "write_virtual_config": lambda device: device.write_virtual_config(0, 1),
    "get_ranges": lambda device: device.get_ranges(),
    "snapshot": lambda device: device.snapshot(),
    "restore": lambda device: device.restore({"value": 1, "taken": []}),
    "sleep": lambda device: device.sleep(),
    "wake": lambda device: device.wake(),
    "receive": lambda device: device.receive(b"abc"),
    "destroy": lambda device: device.destroy(),
    "sync": lambda device: device.sync(),
    "drain": lambda device: device.drain(),
    "check": lambda device: device.check(),
}
QUIET = {"read", "write", "read_config", "write_config", "read_virtual_config", "drain", "check"}
QUIET |= {"write_virtual_config", "sync"}
"""What the guest or the machine's loop does: these never raise."""


def do(device: ProxyDevice, action: str) -> object:
    """Do it; a failure of the device is fine, anything else is not."""
    try:
        return ACTIONS[action](device)
    except DeviceFailure:
        if action in QUIET:
            raise
        return None


def assert_failed(device: ProxyDevice, events: Recorder, *words: str) -> None:
    """It failed once, with these words, and answers as failed devices do."""
    assert device.failed is not None
    for word in words:
        assert word in str(device.failed)
    assert [str(each) for each in events.failures] == [str(device.failed)]
    assert events.failures[0].device == device.name
    before = device.stats().dropped_writes
    handler = device.handlers()[0]
    assert handler.read(0, 4) == 0xFFFF_FFFF
    assert handler.read(5, 1) == 0xFF
    handler.write(0, 4, 1)
    assert device.stats().dropped_writes == before + 1
    assert device.read_config(0) == 0xFFFF_FFFF
    assert not device.write_config(1, 0, b"\7\0")
    assert not device.drain()
    with pytest.raises(DeviceFailure):
        device.snapshot()
    with pytest.raises(DeviceFailure):
        device.sleep()
    device.shutdown()
    assert len(events.failures) == 1


@pytest.mark.parametrize("action", sorted(ACTIONS))
def test_killed_before_a_command(warden: Warden, action: str) -> None:
    events = Recorder()
    child = warden.spawn(f"killed-{action}", "probe", {}, factory=0)
    device = ProxyDevice(child, events)
    os.kill(device.pid, signal.SIGKILL)
    child.wait_end(10)
    do(device, action)
    do(device, "check")
    assert_failed(device, events, f"'killed-{action}'", "SIGKILL")


@pytest.mark.parametrize("action", sorted(ACTIONS))
def test_killed_after_a_command(warden: Warden, action: str) -> None:
    events = Recorder()
    device = ProxyDevice(warden.spawn("killed", "probe", {}, factory=0), events)
    do_any(device, action)
    os.kill(device.pid, signal.SIGKILL)
    assert warden.wait_obituary("killed", 10) is not None
    do(device, "check")
    assert_failed(device, events, "killed")


def do_any(device: ProxyDevice, action: str) -> None:
    if "config" not in action:  # the probe has no configuration space
        do(device, action)


@pytest.mark.parametrize("action", sorted(set(ACTIONS) - {"write", "destroy", "drain", "check"}))
def test_killed_while_the_machine_waits(action: str) -> None:
    """The child takes the command and dies without an answer."""

    def script(tube: socket.socket, bell: int, words: object) -> None:
        activate(tube)
        tube.recv(100)
        time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGKILL)

    events = Recorder()
    with child_of(script) as child:
        device = ProxyDevice(child, events)
        do(device, action)
        assert_failed(device, events, "'hostile'", "during")


def test_killed_in_a_burst_of_posted_writes(warden: Warden) -> None:
    events = Recorder()
    device = ProxyDevice(warden.spawn("burst", "probe", {}, factory=0), events)
    (handler,) = device.handlers()
    for value in range(20_000):
        if value == 5000:
            os.kill(device.pid, signal.SIGKILL)
        handler.write(0, 8, value)
    stats = device.stats()
    assert stats.dropped_writes > 0
    assert_failed(device, events, "burst", "SIGKILL")


def test_killed_while_nobody_asks_is_seen_by_pidfd(warden: Warden) -> None:
    events = Recorder()
    device = ProxyDevice(warden.spawn("idle", "probe", {}, factory=0), events)
    assert device.check()
    os.kill(device.pid, signal.SIGKILL)
    device._child.wait_end(10)
    assert not device.check()
    assert_failed(device, events, "idle", "SIGKILL")


def test_the_doorbell_of_a_dead_child_is_silent(warden: Warden) -> None:
    """A machine that goes on without the device must not be woken for ever."""
    events = Recorder()
    device = ProxyDevice(warden.spawn("silent", "probe", {}, factory=0), events)
    device.handlers()[0].write(Probe.IRQ, 1, 1)
    assert select.select([device.doorbell], [], [], 10)[0]
    os.kill(device.pid, signal.SIGKILL)
    assert warden.wait_obituary("silent", 10) is not None
    assert not device.check()
    assert not device.drain()
    assert not select.select([device.doorbell], [], [], 0)[0]
    assert events.seen == [("irq", 2, True)]
    device.shutdown()


def test_output_before_death_is_not_lost(warden: Warden) -> None:
    events = Recorder()
    device = ProxyDevice(warden.spawn("last", "probe", {}, factory=0), events)
    device.handlers()[0].write(Probe.OUTPUT, 1, 65)
    device.handlers()[0].write(Probe.BUG, 1, 0)
    assert warden.wait_obituary("last", 10) is not None
    assert device.handlers()[0].read(0, 1) == 0xFF
    assert events.text == b"A"
    assert_failed(device, events, "exited with status 70", "RuntimeError: a bug in the model")


@pytest.mark.parametrize("action", sorted(set(ACTIONS) - {"write", "destroy", "drain", "check"}))
def test_hung_child_fails_at_the_deadline(warden: Warden, action: str) -> None:
    events = Recorder()
    device = ProxyDevice(warden.spawn("hung", "probe", {}, factory=0), events, deadline=0.1)
    os.kill(device.pid, signal.SIGSTOP)
    do(device, action)
    assert_failed(device, events, "did not answer within 0.1 s", "during")
    obituary = warden.wait_obituary("hung", 10)
    assert obituary is not None
    assert obituary.signal == signal.SIGKILL


def test_hung_child_fails_when_posted_writes_find_no_room(warden: Warden) -> None:
    events = Recorder()
    device = ProxyDevice(warden.spawn("full", "probe", {}, factory=0), events, deadline=0.1)
    os.kill(device.pid, signal.SIGSTOP)
    for value in range(100_000):
        device.handlers()[0].write(0, 8, value)
        if device.failed:
            break
    assert_failed(device, events, "did not answer within 0.1 s", "Write")


def test_hung_child_does_not_hold_up_shutdown(warden: Warden) -> None:
    events = Recorder()
    device = ProxyDevice(warden.spawn("stuck", "probe", {}, factory=0), events, deadline=0.1)
    os.kill(device.pid, signal.SIGSTOP)
    device.shutdown()
    assert "Shutdown" in str(events.failures[0])
    assert warden.wait_obituary("stuck", 10) is not None


def test_child_that_answers_shutdown_but_stays() -> None:
    def script(tube: socket.socket, bell: int, words: object) -> None:
        activate(tube)
        tube.recv(100)
        tube.send(m.Ok().encode())
        time.sleep(60)

    events = Recorder()
    with child_of(script) as child:
        device = ProxyDevice(child, events, deadline=0.1)
        pidfd = os.dup(child.pidfd)
        device.shutdown()
        assert "did not end after Shutdown" in str(events.failures[0])
        assert select.select([pidfd], [], [], 10)[0]
        os.close(pidfd)


def answer_read(data: bytes) -> Script:
    """Activate properly, then answer the first command with these bytes and stay."""

    def script(tube: socket.socket, bell: int, words: object) -> None:
        activate(tube)
        tube.recv(100)
        tube.send(data)
        time.sleep(60)

    return script


GOOD = m.ReadResult(4, 5).encode()
DEEP = b"[" * 20_000 + b"]" * 20_000


@pytest.mark.parametrize(
    "data",
    [
        b"\0",
        b"\x40",
        b"\x3f" * 16,
        b"\xff" * 16,
        GOOD[:-1],
        GOOD + b"\0",
        m.ReadResult(2, 5).encode(),
        m.ReadConfigResult(5).encode(),
        m.Refused("I do not want to").encode(),
        b"\x43\x04\x01" + GOOD[3:],
        bytes(40_000),
        b"\x84" + bytes(5000),
        b"\x83" + b"x" * 30_000,
        b"\xf0",
        b"\xf0\0\0\0" + struct.pack("<II", 100_000, 0) + bytes(20_000),
        b"\xf0\0\0\0" + struct.pack("<II", 0xFFFF_FFFF, 0) + bytes(20_000),
        b"\xf1\x01",
        b"\x80\x02\x00",
        b"\x82\x01\0\0\0" + b"\xff" * 16,
        m.SnapshotResult(5).encode(),
        b"\x49" + DEEP,
        m.Read(4, 0, 0, 0, 0).encode(),
    ],
    ids=lambda data: data[:6].hex(),
)
def test_wrong_answers_to_a_read(data: bytes) -> None:
    events = Recorder()
    with child_of(answer_read(data)) as child:
        device = ProxyDevice(child, events)
        assert device.handlers()[0].read(0, 4) == 0xFFFF_FFFF
        assert_failed(device, events, "broke the protocol")


CLAIM = b'{"ranges":[{"region":%s,"bus":"%s","range":{"start":0,"length":%d}}%s]}'


@pytest.mark.parametrize(
    ("action", "data"),
    [
        ("snapshot", b"\x49{}"),
        ("snapshot", b'\x49{"state":' + DEEP + b"}"),
        ("snapshot", b'\x49{"state":NaN}'),
        ("snapshot", b'\x49{"state":{"a":1}'),
        ("snapshot", b"\x49\xff\xfe"),
        ("snapshot", m.Ok().encode()),
        ("sleep", m.SnapshotResult(1).encode()),
        ("restore", b"\x40\0"),
        ("get_ranges", b"\x48" + CLAIM % (b"1", b"mmio", 0x1000, b"")),
        ("get_ranges", b"\x48" + CLAIM % (b"-1", b"mmio", 0x1000, b"")),
        ("get_ranges", b"\x48" + CLAIM % (b"0", b"pio", 0x1000, b"")),
        ("get_ranges", b"\x48" + CLAIM % (b"0", b"mmio", 0x2000, b"")),
        ("get_ranges", b"\x48" + CLAIM % (b"0.5", b"mmio", 0x1000, b"")),
        ("get_ranges", b"\x48" + CLAIM % (b"9" * 30, b"mmio", 0x1000, b"")),
        (
            "get_ranges",
            b"\x48"
            + CLAIM
            % (
                b"0",
                b"mmio",
                0x1000,
                b',{"region":0,"bus":"mmio","range":{"start":0,"length":4096}}',
            ),
        ),
        ("receive", m.InputResult(4).encode()),
        ("receive", m.InputResult(0xFFFF_FFFF).encode()),
        ("read_config", m.ReadResult(4, 0).encode()),
        ("write_config", b'\x45{"result":{"mmio_add":[[0,{"start":0,"length":4096}]]}}'),
        ("write_config", b'\x45{"result":{"removed_pci_devices":[8]}}'),
        ("write_config", b'\x45{"result":{"mmio_add":[[0]]}}'),
        ("write_config", b'\x45{"result":{"mmio_add":"all"}}'),
        ("read_virtual_config", m.ReadConfigResult(1).encode()),
        ("wake", m.Activated(SHAPE, True).encode()),
    ],
)
def test_wrong_answers_to_rare_commands(action: str, data: bytes) -> None:
    events = Recorder()
    with child_of(answer_read(data)) as child:
        device = ProxyDevice(child, events)
        do(device, action)
        assert_failed(device, events, "broke the protocol")


def test_a_refusal_is_an_error_and_no_failure() -> None:
    with child_of(answer_read(m.Refused("not now").encode())) as child:
        events = Recorder()
        device = ProxyDevice(child, events, deadline=0.2)
        with pytest.raises(DeviceError, match="'hostile': not now"):
            device.sleep()
        assert device.failed is None
        device.shutdown()


REGION = Region("r", BusType.MMIO, 16)


@pytest.mark.parametrize(
    "shape",
    [
        m.Shape((Region("", BusType.MMIO, 16),)),
        m.Shape((Region("two\nlines", BusType.MMIO, 16),)),
        m.Shape((Region("\x1b[2J", BusType.MMIO, 16),)),
        m.Shape((Region("n" * 65, BusType.MMIO, 16),)),
        m.Shape((Region("big", BusType.PIO, 0x10001),)),
        m.Shape((Region("high", BusType.PIO, 8, 0xFFFF),)),
        m.Shape((Region("none", BusType.MMIO, 0),)),
        m.Shape((Region("negative", BusType.MMIO, 16, -16),)),
        m.Shape((REGION,) * 100),
        m.Shape((REGION,), True, (BarInfo(0, 1, BusType.MMIO, 16),)),
        m.Shape((REGION,), True, (BarInfo(0, 0, BusType.MMIO, 32),)),
        m.Shape((REGION,), True, (BarInfo(0, 0, BusType.PIO, 16),)),
        m.Shape((REGION,), False, (BarInfo(0, 0, BusType.MMIO, 16),)),
        m.Shape((Region("wired", BusType.MMIO, 16, 0, irq=99),)),
        m.Shape((Region("wired", BusType.MMIO, 16, 0, irq=-3),)),
        m.Shape((Region("wired", BusType.MMIO, 16, irq=2),)),
        m.Shape((REGION, Region("wired", BusType.MMIO, 16, irq=16)), True),
    ],
    ids=range(17),
)
def test_shapes_that_cannot_be(shape: m.Shape) -> None:
    def script(tube: socket.socket, bell: int, words: object) -> None:
        activate(tube, shape)
        time.sleep(60)

    with child_of(script) as child, pytest.raises(DeviceFailure, match="broke the protocol"):
        ProxyDevice(child, Recorder())


def test_activation_of_the_dead_the_silent_and_the_wrong() -> None:
    scripts: list[Script] = [
        lambda tube, bell, words: os._exit(0),
        lambda tube, bell, words: time.sleep(60),
        lambda tube, bell, words: (tube.send(m.Ok().encode()), time.sleep(60)),
        lambda tube, bell, words: (tube.send(b"\x42" + b"{" * 15_000), time.sleep(60)),
    ]
    for script in scripts:
        before = len(open_descriptors())
        with child_of(script) as child:
            events = Recorder()
            with pytest.raises(DeviceFailure, match="hostile"):
                ProxyDevice(child, events, deadline=0.1)
            assert not events.failures
        assert len(open_descriptors()) == before


def test_unsolicited_answers() -> None:
    def script(tube: socket.socket, bell: int, words: object) -> None:
        activate(tube)
        tube.send(GOOD)
        os.write(bell, b"!")
        time.sleep(60)

    events = Recorder()
    with child_of(script) as child:
        device = ProxyDevice(child, events)
        while device.failed is None:
            device.drain()
        assert_failed(device, events, "ReadResult that nobody asked for")


def test_upcalls_of_a_sleeping_child() -> None:
    def script(tube: socket.socket, bell: int, words: object) -> None:
        activate(tube)
        tube.recv(100)
        tube.send(m.Ok().encode())
        tube.send(m.IrqLevel(True, 0).encode())
        time.sleep(60)

    events = Recorder()
    with child_of(script) as child:
        device = ProxyDevice(child, events)
        device.sleep()
        while device.failed is None:
            device.drain()
        assert not events.seen
        assert_failed(device, events, "IrqLevel while it is asleep")


def flood(tube: socket.socket, bell: int, words: object) -> None:
    activate(tube)
    while True:
        tube.send(m.IrqLevel(True, 0).encode())


def test_endless_upcalls_instead_of_an_answer() -> None:
    events = Recorder()
    with child_of(flood) as child:
        device = ProxyDevice(child, events, deadline=0.2)
        assert device.handlers()[0].read(0, 4) == 0xFFFF_FFFF
        assert_failed(device, events, "did not answer within 0.2 s")


def test_endless_upcalls_do_not_keep_the_machine() -> None:
    events = Recorder()
    with child_of(flood) as child:
        device = ProxyDevice(child, events, deadline=0.2)
        while not device.drain():
            events.seen.clear()
        assert device.failed is None
        assert len(events.seen) == 256


def test_endless_upcalls_and_posted_writes() -> None:
    events = Recorder()
    with child_of(flood) as child:
        device = ProxyDevice(child, events, deadline=0.2)
        while device.failed is None:
            device.handlers()[0].write(0, 8, 1)
        assert_failed(device, events, "did not answer within 0.2 s", "Write")


def trickle(tube: socket.socket, bell: int, words: object) -> None:
    activate(tube)
    while True:
        tube.send(m.IrqLevel(True, 0).encode())
        time.sleep(0.03)


def test_a_trickle_of_upcalls_does_not_put_the_deadline_off() -> None:
    events = Recorder()
    with child_of(trickle) as child:
        device = ProxyDevice(child, events, deadline=0.2)
        with pytest.raises(DeviceFailure):
            device.snapshot()
        assert_failed(device, events, "did not answer within 0.2 s", "Snapshot")


def send_fds(tube: socket.socket, data: bytes, count: int) -> None:
    fds = array.array("i", [os.dup(0) for _ in range(count)])
    tube.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])


@pytest.mark.parametrize("count", [1, 2, 200])
@pytest.mark.parametrize("action", ["snapshot", "drain", "read"])
def test_descriptors_from_a_child_are_never_held(action: str, count: int) -> None:
    def script(tube: socket.socket, bell: int, words: object) -> None:
        activate(tube)
        if action != "drain":
            tube.recv(100)
        send_fds(tube, m.Log("a gift").encode(), count)
        send_fds(tube, m.ReadResult(4, 1).encode(), count)
        os.write(bell, b"!")
        time.sleep(60)

    before = open_descriptors()
    with child_of(script) as child:
        events = Recorder()
        device = ProxyDevice(child, events)
        during = open_descriptors()
        while device.failed is None and action == "drain":
            device.drain()
        do(device, action)
        assert len(open_descriptors()) < len(during)
        assert_failed(device, events, "descriptors")
    assert len(open_descriptors()) == len(before)


def test_closing_the_tube_is_a_failure_of_a_living_child() -> None:
    def script(tube: socket.socket, bell: int, words: object) -> None:
        activate(tube)
        tube.close()
        time.sleep(60)

    events = Recorder()
    with child_of(script) as child:
        device = ProxyDevice(child, events)
        device.handlers()[0].read(0, 1)
        assert_failed(device, events, "closed its tube")


def test_a_snapshot_of_the_largest_size_is_taken_and_a_larger_one_refused() -> None:
    body = b'{"state":"' + b"x" * (m.MAX_MESSAGE - 13) + b'"}'

    def script(tube: socket.socket, bell: int, words: object) -> None:
        from proxy.tube import send

        activate(tube)
        tube.recv(100)
        send(tube, b"\x49" + body)
        tube.recv(100)
        send(tube, b"\x49" + body.replace(b'"}', b'xx"}'))
        time.sleep(60)

    assert len(body) + 1 == m.MAX_MESSAGE
    events = Recorder()
    with child_of(script) as child:
        device = ProxyDevice(child, events)
        assert device.snapshot() == json.loads(body)["state"]
        do(device, "snapshot")
        assert_failed(device, events, "broke the protocol", "Snapshot")
