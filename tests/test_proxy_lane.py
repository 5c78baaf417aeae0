"""The shared-memory lane: order, wake-ups, hostile pages; also on hosts with a single CPU."""

from __future__ import annotations

import mmap
import os
import random
import signal
import socket
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from proxy_helpers import SEATS, Only, Probe, Recorder, activate, child_of

from proxy import lane, machine_lane
from proxy import messages as m
from proxy.device import ProxyDevice
from proxy.jail import JailMode
from proxy.machine_lane import BURST, LOST_NS, MachineLane
from proxy.placement import Seat
from proxy.warden import Warden

pytestmark = pytest.mark.skipif(not lane.supported(), reason="no lane on this host")


@pytest.fixture(scope="module")
def warden() -> Iterator[Warden]:
    with Warden([Probe], jail=JailMode.OFF) as made:
        yield made


@pytest.fixture
def events() -> Recorder:
    return Recorder()


@pytest.fixture(params=SEATS, ids=lambda seat: f"{seat.name.lower()}-cpu")
def seat(request: pytest.FixtureRequest) -> Seat:
    """Where the polling child sits."""
    found: Seat = request.param
    return found


@pytest.fixture
def device(warden: Warden, events: Recorder, seat: Seat) -> Iterator[ProxyDevice]:
    child = warden.spawn("lane", "probe", {}, factory=0)
    with ProxyDevice(child, events, placement=Only(seat), deadline=20) as made:
        yield made
    assert not events.failures


def open_lane(device: ProxyDevice) -> None:
    assert device.lane.open()


def test_a_burst_opens_the_lane(device: ProxyDevice) -> None:
    (handler,) = device.handlers()
    for value in range(4000):
        handler.write(0, 8, value)
        assert handler.read(0, 8) == value
    stats = device.stats()
    assert stats.lane_openings > 0
    assert stats.lane_accesses > 0
    assert stats.tube_accesses + stats.lane_accesses == 8000


def test_a_few_accesses_do_not(device: ProxyDevice) -> None:
    for _ in range(BURST - 1):
        device.handlers()[0].read(0, 8)
    assert device.stats().lane_openings == 0


@pytest.mark.parametrize("size", range(1, 9))
def test_sizes(device: ProxyDevice, size: int) -> None:
    open_lane(device)
    (handler,) = device.handlers()
    handler.write(0, 8, 0x8877_6655_4433_2211)
    assert handler.read(0, size) == 0x8877_6655_4433_2211 & (1 << 8 * size) - 1


def test_commands_keep_their_order_across_both_lanes(device: ProxyDevice) -> None:
    (handler,) = device.handlers()
    chance = random.Random(1)
    value = 0
    for step in range(600):
        match chance.randrange(6):
            case 0:
                device.lane.open()
            case 1:
                device.lane.close()
            case 2:
                assert device.snapshot()["value"] == value, step
            case 3:
                for value in range(step, step + chance.randrange(1, 200)):
                    handler.write(0, 8, value)
            case 4:
                device.sleep()
                assert device.snapshot()["value"] == value, step
                device.wake()
            case 5:
                assert handler.read(0, 8) == value, step
    assert device.lane.openings > 5  # how often it comes to that is the scheduler's choice


def test_upcalls_keep_their_order(device: ProxyDevice, events: Recorder) -> None:
    (handler,) = device.handlers()
    expected = []
    for value in range(300):
        if value % 50 == 0:
            device.lane.open()
        handler.write(Probe.MSI, 4, value)
        expected.append(("msi", 0xFEE0_0000, value))
        if value % 3 == 0:
            handler.read(Probe.IRQ, 1)
            expected.append(("irq", 2, True))
            # All that the child did before its answer has been handled when the read returns.
            assert events.seen == expected
        if value % 70 == 0:
            device.get_ranges()
    device.snapshot()
    assert events.seen == expected


def test_more_upcalls_than_the_tube_holds(device: ProxyDevice, events: Recorder) -> None:
    (handler,) = device.handlers()
    for _ in range(10):
        device.lane.open()
        handler.write(Probe.STORM, 8, 2000)
        for value in range(200):
            handler.write(0, 8, value)
        assert handler.read(0, 8) == 199
    assert len(events.seen) == 20_000


def test_output_through_the_lane(device: ProxyDevice, events: Recorder) -> None:
    text = bytes(index * 11 & 0xFF for index in range(9000))
    for index, byte in enumerate(text):
        if index % 500 == 0:
            device.lane.open()
        device.handlers()[0].write(Probe.OUTPUT, 1, byte)
    device.sleep()
    assert events.text == text + b"z"


def test_output_is_sent_when_the_guest_is_done(device: ProxyDevice, events: Recorder) -> None:
    open_lane(device)
    device.handlers()[0].write(Probe.OUTPUT, 1, 65)
    end = time.monotonic() + 10
    while not events.text and time.monotonic() < end:
        device.drain()
    assert events.text == b"A"


@pytest.mark.parametrize("calls", range(8))
def test_output_is_sent_before_a_child_dozes(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """The quiet time may end between the look whether to send and that whether to doze."""
    real = time.perf_counter_ns
    still, left = real() + 500_000_000, calls

    def clock() -> int:
        """Stands still for a while, and for some calls more."""
        nonlocal left
        if real() < still:
            return 0
        left -= 1
        return 0 if left >= 0 else 1 << 60

    monkeypatch.setattr("proxy.child.time.perf_counter_ns", clock)
    events = Recorder()
    with Warden([Probe], jail=JailMode.OFF) as made:
        child = made.spawn("lane", "probe", {}, factory=0)
        monkeypatch.undo()
        with ProxyDevice(child, events, placement=Only(Seat.SHARED), deadline=20) as device:
            open_lane(device)
            device.handlers()[0].write(Probe.OUTPUT, 1, 65)
            end = time.monotonic() + 5
            while not events.text and time.monotonic() < end:
                device.drain()
            assert events.text == b"A"


def test_no_wakeup_is_lost(device: ProxyDevice) -> None:
    """Bursts with gaps around the time at which the child falls asleep; each value is compared."""
    (handler,) = device.handlers()
    chance = random.Random(2)
    value = 0
    for _ in range(400):
        device.lane.open()
        for _ in range(chance.randrange(1, 20)):
            value += 1
            handler.write(0, 8, value)
            if chance.random() < 0.5:
                assert handler.read(0, 8) == value
        gap = chance.choice((0, 20e-6, 50e-6, 100e-6, 1e-3, 1.2e-3)) * chance.random()
        end = time.perf_counter() + gap
        while time.perf_counter() < end:
            pass
        if chance.random() < 0.3:
            assert device.snapshot()["value"] == value
    assert handler.read(0, 8) == value


def test_posted_writes_reach_a_sleeping_child_without_another_access(
    device: ProxyDevice, events: Recorder
) -> None:
    for index in range(30):
        device.lane.open()
        time.sleep(0.002 if index % 2 else 0.0001)
        device.handlers()[0].write(Probe.IRQ, 1, index & 1)
        end = time.monotonic() + 10
        while len(events.seen) <= index and time.monotonic() < end:
            device.drain()
        assert events.seen[-1] == ("irq", 2, bool(index & 1))


def test_an_idle_lane_uses_no_cpu(device: ProxyDevice) -> None:
    open_lane(device)
    device.handlers()[0].read(0, 1)
    end = time.monotonic() + 10
    while not device.lane.idle() and time.monotonic() < end:
        device.lane.open()  # on a busy host it may have been given up
        time.sleep(0.001)
    assert device.lane.idle()
    time.sleep(0.01)
    with open(f"/proc/{device.pid}/stat") as file:
        assert file.read().rpartition(")")[2].split()[0] == "S"


def test_a_device_is_scheduled_in_the_group_of_its_machine() -> None:
    """`sched_yield` gives way to processes of one's own session only (autogroup, sched(7))."""
    with Warden([Probe], jail=JailMode.AUTO) as jailed:
        child = jailed.spawn("device", "probe", {}, factory=0)
        try:
            assert os.getsid(child.pid) == os.getsid(0)
            assert os.getpgid(child.pid) == child.pid
        finally:
            child.close()


def test_one_place_two_devices(warden: Warden, events: Recorder, seat: Seat) -> None:
    placement = Only(seat)
    with (
        ProxyDevice(warden.spawn("a", "probe", {}, factory=0), events, placement=placement) as a,
        ProxyDevice(warden.spawn("b", "probe", {}, factory=0), events, placement=placement) as b,
    ):
        for value in range(3000):
            for device in (a, b):
                device.handlers()[0].write(0, 8, value)
                assert device.handlers()[0].read(0, 8) == value
            assert not (a.lane.is_open and b.lane.is_open)
        assert a.lane.openings + b.lane.openings > 0


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("action", ["read", "write"])
def test_death_and_hanging_are_seen_on_the_lane(
    warden: Warden, sign: signal.Signals, action: str, seat: Seat
) -> None:
    events = Recorder()
    child = warden.spawn("dead", "probe", {}, factory=0)
    device = ProxyDevice(child, events, placement=Only(seat), deadline=0.2)
    (handler,) = device.handlers()
    open_lane(device)
    assert handler.read(0, 1) == 0
    device.lane.open()
    os.kill(device.pid, sign)
    while device.failed is None:
        if action == "read":
            assert handler.read(0, 4) in (0, 0xFFFF_FFFF)
        else:
            handler.write(0, 4, 0)
    assert handler.read(0, 4) == 0xFFFF_FFFF
    dropped = device.stats().dropped_writes
    handler.write(0, 4, 1)
    assert device.stats().dropped_writes == dropped + 1
    assert len(events.failures) == 1
    device.shutdown()


@pytest.mark.parametrize(
    ("word", "value"),
    [
        (lane.TAIL, 1 << 40),
        (lane.TAIL, (1 << 64) - 1),
        (lane.UPCALLS, 5),
        (lane.UPCALLS, (1 << 64) - 1),
        (lane.STATE, (1 << 64) - 1),
        (lane.STATE, 3),
        (lane.HEAD, 77),
    ],
)
@pytest.mark.parametrize("action", ["read", "write"])
def test_scribbling_on_the_page(word: int, value: int, action: str, seat: Seat) -> None:
    """The child answers nothing properly; the machine is never led astray, and ends the wait."""

    def script(tube: socket.socket, bell: int, words: memoryview | None) -> None:
        assert words is not None
        activate(tube, has_lane=True)
        tube.recv(100)
        while True:
            if word == lane.UPCALLS:
                words[lane.VALUE] = (1 << 64) - 2
                words[lane.TAIL] = words[lane.HEAD]
            words[word] = value

    events = Recorder()
    with child_of(script, shared=True) as child:
        device = ProxyDevice(child, events, placement=Only(seat), deadline=0.2)
        open_lane(device)
        (handler,) = device.handlers()
        for _ in range(200):
            if action == "read":
                assert handler.read(0, 1) in (0xFE, 0xFF)
            else:
                handler.write(0, 1, 1)
            device.lane.open()
        if device.failed is None:
            # Posted writes alone need no answer; the next command finds out.
            assert device.read_config(0) == 0xFFFF_FFFF
        assert device.failed is not None
        assert len(events.failures) == 1
        device.shutdown()


def test_random_scribbling(seat: Seat) -> None:
    def script(tube: socket.socket, bell: int, words: memoryview | None) -> None:
        assert words is not None
        activate(tube, has_lane=True)
        chance = random.Random(3)
        while True:
            words[chance.randrange(16)] = chance.choice(
                (0, 1, 2, 3, words[0], words[0] - 1 & (1 << 64) - 1, chance.getrandbits(64))
            )
            tube.setblocking(False)
            try:
                tube.recv(100)
                tube.send(m.ReadResult(4, 1).encode())
            except BlockingIOError:
                pass

    events = Recorder()
    with child_of(script, shared=True) as child:
        device = ProxyDevice(child, events, placement=Only(seat), deadline=0.2)
        (handler,) = device.handlers()
        for _ in range(500):
            device.lane.open()
            assert 0 <= handler.read(0, 4) <= 0xFFFF_FFFF
            handler.write(0, 4, 1)
        assert len(events.failures) == 1
        device.shutdown()


def test_the_page_cannot_shrink_under_the_machine() -> None:
    fd = lane.create_page("sealed")
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)
    lane.check_sealed(fd, lane.LANE_BYTES)
    with pytest.raises(ValueError, match="too small"):
        lane.check_sealed(fd, 1 << 20)
    os.close(fd)
    open_fd = os.memfd_create("open", os.MFD_ALLOW_SEALING)
    os.ftruncate(open_fd, mmap.PAGESIZE)
    with pytest.raises(ValueError, match="shrink"):
        lane.check_sealed(open_fd, lane.LANE_BYTES)
    os.close(open_fd)


# Barriers.


@pytest.mark.parametrize("shared", [False, True], ids=["tube", "lane"])
def test_sync_waits_for_what_was_posted(
    device: ProxyDevice, events: Recorder, shared: bool
) -> None:
    (handler,) = device.handlers()
    expected = []
    for value in range(100):
        if shared and value % 20 == 0:
            device.lane.open()
        for step in range(3):
            handler.write(Probe.MSI, 4, 3 * value + step)
            expected.append(("msi", 0xFEE0_0000, 3 * value + step))
        device.sync()
        assert events.seen == expected
    assert bool(device.stats().lane_accesses) >= shared


@pytest.mark.parametrize("shared", [False, True], ids=["tube", "lane"])
def test_an_interrupt_of_a_synced_write_is_there_when_it_returns(
    warden: Warden, events: Recorder, shared: bool, seat: Seat
) -> None:
    child = warden.spawn("synced", "probe", {}, factory=0)
    with ProxyDevice(child, events, placement=Only(seat), deadline=20, synced=True) as device:
        (handler,) = device.handlers()
        for value in range(50):
            if shared:
                device.lane.open()
            handler.write(Probe.IRQ, 1, value & 1)
            assert events.seen[-1] == ("irq", 2, bool(value & 1))
            assert len(events.seen) == value + 1
        handler.write(0, 4, 77)
        assert handler.read(0, 4) == 77
        assert bool(device.stats().lane_accesses) >= (shared and seat is Seat.OWN)
    assert not events.failures


@pytest.mark.parametrize("shared", [False, True], ids=["tube", "lane"])
def test_a_child_that_hangs_in_a_write_is_found_by_a_look(
    warden: Warden, shared: bool, seat: Seat
) -> None:
    events = Recorder()
    child = warden.spawn("stuck", "probe", {}, factory=0)
    device = ProxyDevice(child, events, placement=Only(seat), deadline=0.2)
    (handler,) = device.handlers()
    if shared:
        open_lane(device)
    handler.read(0, 1)
    os.kill(device.pid, signal.SIGSTOP)
    device.look_after()
    assert device.failed is None  # it owes nothing
    handler.write(0, 4, 1)
    device.look_after()
    assert "did not answer within 0.2 s" in str(device.failed)
    device.look_after()
    assert len(events.failures) == 1
    device.shutdown()


def test_the_first_posted_write_after_each_look_is_told(device: ProxyDevice) -> None:
    told: list[int] = []
    device.watch_writes(lambda: told.append(len(told)))
    (handler,) = device.handlers()
    handler.read(0, 4)
    device.look_after()
    assert told == []
    for look in range(1, 4):
        for value in range(50):
            handler.write(0, 4, value)
            handler.read(0, 4)
        assert len(told) == look
        device.look_after()
    assert len(told) == 3


def test_looks_at_devices_that_sleep_or_are_gone(device: ProxyDevice) -> None:
    (handler,) = device.handlers()
    handler.write(0, 4, 1)
    device.sleep()
    device.look_after()
    device.wake()
    handler.write(0, 4, 1)
    device.destroy()
    handler.write(0, 4, 1)
    device.look_after()
    assert device.failed is None


def test_an_upcall_may_be_met_before_the_child_has_counted_it(seat: Seat) -> None:
    """The child was stopped between sending an upcall and counting it in the page."""

    def script(tube: socket.socket, bell: int, words: memoryview | None) -> None:
        assert words is not None
        activate(tube, has_lane=True)
        tube.recv(100)
        while words[lane.HEAD] == 0:
            pass
        tube.send(m.Log("said, and not counted").encode())
        time.sleep(0.05)  # the machine's slow wait meets it now
        words[lane.VALUE] = 42
        words[lane.TAIL] = words[lane.HEAD]
        tube.recv(100)

    events = Recorder()
    with child_of(script, shared=True) as child:
        device = ProxyDevice(child, events, placement=Only(seat), deadline=2)
        open_lane(device)
        assert device.handlers()[0].read(0, 4) == 42
        assert device.failed is None


def test_a_page_that_says_asleep_at_each_opening(
    seat: Seat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time that the lane is opened its child seems to sleep, and to have closed it before."""

    def script(tube: socket.socket, bell: int, words: memoryview | None) -> None:
        activate(tube, has_lane=True)
        while data := tube.recv(100):
            if data[0] == m.Read.opcode:
                tube.send(m.ReadResult(data[1], 7).encode())

    real = MachineLane.open

    def scribbling(self: MachineLane) -> bool:
        assert self.words is not None
        self.words[lane.CLOSED] = self._generation
        is_open = real(self)
        self.words[lane.STATE] = self.dozing
        return is_open

    monkeypatch.setattr(MachineLane, "open", scribbling)
    monkeypatch.setattr(machine_lane, "QUICK_NS", 1 << 40)  # wake-ups are slow on some idle hosts
    with child_of(script, shared=True) as child:
        device = ProxyDevice(child, Recorder(), placement=Only(seat), deadline=2)
        for _ in range(20 * BURST):
            assert device.handlers()[0].read(0, 4) == 7
        assert device.failed is None
        assert device.lane.openings > 1


@pytest.mark.parametrize(("apart", "stays"), [(1_000_000, False), (20_000_000, True)])
def test_slow_waits_close_a_lane_if_they_come_thick(
    device: ProxyDevice, monkeypatch: pytest.MonkeyPatch, apart: int, stays: bool
) -> None:
    """Now and then every process waits for a CPU; a child that gets none is no good at polling."""
    open_lane(device)
    (handler,) = device.handlers()
    now = time.perf_counter_ns()

    def clock() -> int:
        nonlocal now
        now += apart
        return now

    monkeypatch.setattr("proxy.machine_lane.perf_counter_ns", clock)
    for _ in range(20):
        device.lane._lose(LOST_NS // 4)
    assert device.lane.is_open is stays
    monkeypatch.undo()
    handler.write(0, 8, 7)
    assert handler.read(0, 8) == 7


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP])
def test_death_and_hanging_are_seen_in_a_turn(
    warden: Warden, sign: signal.Signals, seat: Seat
) -> None:
    events = Recorder()
    child = warden.spawn("turns", "probe", {}, factory=0)
    device = ProxyDevice(child, events, placement=Only(seat), deadline=0.2, synced=True)
    (handler,) = device.handlers()
    open_lane(device)
    handler.write(0, 4, 1)
    device.lane.open()
    os.kill(device.pid, sign)
    handler.write(0, 4, 2)
    assert device.failed is not None
    assert device.stats().dropped_writes == 1
    assert len(events.failures) == 1
    assert not device.lane.is_open
    device.shutdown()


@pytest.mark.parametrize(("each", "opens"), [(1_400_000, True), (1_600_000, False)])
def test_turns_that_follow_each_other_open_the_lane(
    each: int, opens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU of its own, for those of up to 1.5 ms."""
    now, seats = [1 << 40], list[Any]()
    monkeypatch.setattr(machine_lane, "perf_counter_ns", lambda: now[0])
    link: Any = SimpleNamespace(failed=None)
    shared = MachineLane(link, -1, None)
    monkeypatch.setattr(shared, "open", seats.append)
    shared.tick_turns()
    assert not seats, "they follow nothing"
    now[0] += each * machine_lane.TURNS
    shared.tick_turns()
    assert seats == [(Seat.OWN,)] * opens
    link.failed = "it is gone"
    shared.tick_turns()
    assert len(seats) == opens
