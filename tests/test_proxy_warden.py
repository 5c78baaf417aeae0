"""The warden: starts, ends and watches device processes; nothing is ever left behind."""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from proxy_helpers import Probe, Recorder, open_descriptors

from devices.errors import DeviceError
from proxy.device import ProxyDevice
from proxy.jail import JailMode, JailPlan, LayerState, plan_jail
from proxy.jail.layers import JailReport
from proxy.tube import pair
from proxy.warden import Warden
from proxy.warden_process import _Warden


class Hung(Probe):
    def __init__(self, host: Any, options: Any = None) -> None:
        time.sleep(60)


class Dies(Probe):
    def __init__(self, host: Any, options: Any = None) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Inner(Probe):
    """Tells what it sees from inside the jail."""

    def on_sandboxed(self) -> None:
        self.host.log("sandboxed")


class Escaping(Probe):
    """Makes a forbidden system call when it is written to."""

    def write(self, offset: int, size: int, value: int) -> None:
        if value == 1:
            os.open("/etc/passwd", os.O_RDONLY)
        elif value == 2:
            os.fork()
        else:
            socket.socket()


class EscapingAtStart(Probe):
    def on_sandboxed(self) -> None:
        os.kill(1, 9)


class Counting(Probe):
    """Counts its open descriptors from inside the jail."""

    def on_sandboxed(self) -> None:
        found = 0
        for fd in range(60):
            try:
                os.lseek(fd, 0, os.SEEK_CUR)
                found += 1
            except OSError as error:
                found += error.errno != errno.EBADF
        self.host.log(f"{found} open")

    def close(self) -> None:
        pass


class Meeting(Probe):
    """Starts only when another that holds the other end of its socket starts, too."""

    def __init__(self, host: Any, options: Any = None) -> None:
        super().__init__(host, options)
        fd = host.fds["meet"]
        os.write(fd, b"here")
        os.read(fd, 4)


FACTORIES = (Probe, Hung, Dies, Inner, Escaping, EscapingAtStart, Counting, Meeting)


@pytest.fixture(scope="module")
def plan() -> JailPlan:
    return plan_jail(JailMode.AUTO)


@pytest.fixture(scope="module")
def warden(plan: JailPlan) -> Iterator[Warden]:
    with Warden(FACTORIES, plan=plan, deadline=5) as made:
        yield made


def gone(pid: int, timeout: float = 10) -> bool:
    """Whether the process ends in time; a zombie that its new parent will reap counts."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] in "ZX":
                    return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.005)
    return False


@pytest.mark.parametrize("model", ["echo", "serial", "config-space", "debug-exit"])
def test_models_work_in_the_jail(warden: Warden, model: str) -> None:
    events = Recorder()
    with ProxyDevice(warden.spawn(model, model, {}), events) as device:
        for handler in device.handlers():
            handler.write(0, 1, 0x15)
            assert 0 <= handler.read(0, 1) <= 0xFF
        if device.is_pci:
            device.write_config(15, 0, b"\x05")
            assert device.read_config(15) & 0xFF == 5
        if device.takes_input:
            assert device.receive(b"x") <= 1
        saved = device.snapshot()
        device.sleep()
        device.restore(saved)
        assert device.snapshot() == saved
        device.wake()
        while device.drain():
            pass
    assert not events.failures
    obituary = warden.wait_obituary(model, 10)
    assert obituary is not None
    assert (obituary.status, obituary.syscall) == (0, None)


def test_the_jail_report_comes_with_the_child(warden: Warden, plan: JailPlan) -> None:
    import msgspec

    child = warden.spawn("report", "probe", {}, factory=3)
    report = msgspec.convert(child.jail_report, JailReport)
    assert report.mode == "auto"
    for layer in report.layers:
        expected = LayerState.ENFORCED if plan.has(layer.name) else LayerState.MISSING
        assert layer.state is expected, layer
    events = Recorder()
    with ProxyDevice(child, events) as device:
        assert device.jail_report == child.jail_report
    assert events.seen[0] == ("log", "sandboxed")


@pytest.mark.parametrize(
    ("value", "names"), [(1, {"openat", "open"}), (2, {"clone", "fork", "clone3"}), (3, {"socket"})]
)
def test_forbidden_system_call_is_named(warden: Warden, value: int, names: set[str]) -> None:
    if not warden.plan.has("notify"):
        pytest.skip("this host cannot name system calls")
    events = Recorder()
    device = ProxyDevice(warden.spawn("bad", "probe", {}, factory=4), events)
    (handler,) = device.handlers()
    handler.write(0, 1, value)
    assert handler.read(0, 1) == 0xFF
    obituary = warden.wait_obituary("bad", 10)
    assert obituary is not None
    assert obituary.syscall in names
    assert "'bad'" in str(events.failures[0])
    assert f"forbidden system call '{obituary.syscall}'" in str(events.failures[0])
    device.shutdown()


def test_forbidden_system_call_while_starting(warden: Warden) -> None:
    with pytest.raises(DeviceError, match=r"'early': cannot be started: .*kill"):
        warden.spawn("early", "probe", {}, factory=5)


def test_a_device_that_does_not_start_in_time() -> None:
    with Warden(FACTORIES, jail=JailMode.OFF, deadline=0.2) as warden:
        with pytest.raises(DeviceError, match=r"'slow'.*did not start within 0.2 s"):
            warden.spawn("slow", "probe", {}, factory=1)
        with pytest.raises(DeviceError, match=r"'dead'.*SIGKILL while it started"):
            warden.spawn("dead", "probe", {}, factory=2)
        warden.spawn("fine", "probe", {}, factory=0)


def test_devices_that_were_ordered_start_side_by_side() -> None:
    with Warden(FACTORIES, jail=JailMode.OFF, deadline=30) as warden:
        slow = warden.order("slow", "probe", {}, factory=1)
        one, other = socket.socketpair()
        with one, other:
            first = warden.order("first", "probe", {}, factory=7, fds={"meet": one.fileno()})
            second = warden.order("second", "probe", {}, factory=7, fds={"meet": other.fileno()})
            dead = warden.order("dead", "probe", {}, factory=2)
            starts = (second, first)  # in another order than they were ordered
            children = [each.wait() for each in starts]
        assert [child.name for child in children] == ["second", "first"]
        assert len({child.pid for child in children}) == 2
        assert second.wait() is children[0]
        for _ in range(2):
            with pytest.raises(DeviceError, match=r"'dead'.*SIGKILL while it started"):
                dead.wait()
        assert not slow.settled


def test_more_orders_than_may_start_at_once() -> None:
    with Warden(FACTORIES, jail=JailMode.OFF) as warden:
        starts = [warden.order(f"n{i}", "probe", {}, factory=0) for i in range(25)]
        assert sum(not start.settled for start in starts) <= 8
        assert [start.wait().name for start in starts] == [f"n{i}" for i in range(25)]


def test_a_start_that_nobody_waits_for_is_ended_with_the_warden() -> None:
    before = open_descriptors()
    warden = Warden(FACTORIES, jail=JailMode.OFF)
    events = Recorder()
    used = ProxyDevice(warden.spawn("used", "probe", {}, factory=0), events)
    starts = [warden.order(f"n{i}", "probe", {}, factory=i % 2) for i in range(4)]
    used.shutdown()
    warden.close()
    assert not os.path.exists(f"/proc/{warden.pid}")
    for start in starts:
        with pytest.raises(DeviceError, match="the warden is gone"):
            start.wait()
    assert open_descriptors() == before


def test_orders_of_a_dead_warden_fail_by_name() -> None:
    warden = Warden(FACTORIES, jail=JailMode.OFF)
    starts = [warden.order(name, "probe", {}, factory=1) for name in ("one", "two")]
    os.kill(warden.pid, signal.SIGKILL)
    for start in starts:
        with pytest.raises(DeviceError, match=f"'{start.name}': cannot be started: the warden"):
            start.wait()
    warden.close()


def test_obituaries_are_told_once_and_wake_the_loop(warden: Warden) -> None:
    warden.obituaries()
    pids = {}
    for name in ("one", "two"):
        child = warden.spawn(name, "probe", {}, factory=0)
        pids[name] = child.pid
        os.kill(child.pid, signal.SIGKILL)
    seen: list[Any] = []
    while len(seen) < 2:
        assert select.select([warden], [], [], 10)[0]
        seen += warden.obituaries()
    assert {each.name: each.pid for each in seen} == pids
    assert {each.text() for each in seen} == {"was killed by SIGKILL"}
    assert warden.obituaries() == []
    assert warden.wait_obituary("one", 0) is not None
    assert warden.wait_obituary("nobody", 0) is None


def test_a_child_holds_only_what_it_was_given(warden: Warden, tmp_path: Any) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    with secret.open() as file:
        os.set_inheritable(file.fileno(), True)
        events = Recorder()
        child = warden.spawn("held", "probe", {}, factory=6, fds={"given": file.fileno()})
        ProxyDevice(child, events).shutdown()
    # Standard streams (of the null device), tube, doorbell, the start's socket, the given one.
    assert events.seen == [("log", "7 open")]


def test_close_leaves_nothing_behind() -> None:
    before = open_descriptors()
    warden = Warden(FACTORIES, jail=JailMode.OFF)
    proxies = [
        ProxyDevice(warden.spawn(f"d{i}", "probe", {}, factory=0), Recorder()) for i in range(3)
    ]
    idle = warden.spawn("idle", "probe", {}, factory=0)
    os.kill(proxies[0].pid, signal.SIGSTOP)
    pids = [warden.pid, idle.pid, *(each.pid for each in proxies)]
    warden.close()
    warden.close()
    for pid in pids:
        assert not os.path.exists(f"/proc/{pid}")
    for proxy in proxies:
        proxy.shutdown()
    assert open_descriptors() == before
    with pytest.raises(DeviceError, match="the warden is gone"):
        warden.spawn("late", "probe", {}, factory=0)


def test_death_of_the_warden_is_the_failure_of_its_devices() -> None:
    events = Recorder()
    warden = Warden(FACTORIES, jail=JailMode.OFF)
    device = ProxyDevice(warden.spawn("orphan", "probe", {}, factory=0), events)
    os.kill(warden.pid, signal.SIGKILL)
    assert select.select([device.pidfd], [], [], 10)[0]
    assert not device.check()
    assert "'orphan'" in str(events.failures[0])
    assert device.handlers()[0].read(0, 2) == 0xFFFF
    assert warden.obituaries() == []
    assert warden.dead
    with pytest.raises(DeviceError, match="the warden is gone"):
        warden.spawn("late", "probe", {}, factory=0)
    warden.close()
    device.shutdown()
    assert gone(device.pid)


@pytest.mark.parametrize("mode", ["off", "auto"])
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
def test_death_of_the_machine_ends_all(plan: JailPlan, mode: str, sign: signal.Signals) -> None:
    """A machine in a process of its own is killed; warden and children go with it."""
    here, there = socket.socketpair()
    machine = os.fork()
    if machine == 0:
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            made = Warden(FACTORIES, plan=plan if mode == "auto" else JailPlan(JailMode.OFF))
            running = ProxyDevice(made.spawn("a", "probe", {}, factory=0), Recorder())
            waiting = made.spawn("b", "probe", {}, factory=0)
            stuck = ProxyDevice(made.spawn("c", "probe", {}, factory=0), Recorder())
            os.kill(stuck.pid, signal.SIGSTOP)
            pids = [made.pid, running.pid, waiting.pid, stuck.pid]
            there.send(" ".join(map(str, pids)).encode())
            time.sleep(60)
        finally:
            os._exit(1)
    pids = [int(each) for each in here.recv(200).split()]
    os.kill(machine, sign)
    os.waitpid(machine, 0)
    assert len(pids) == 4
    for pid in pids:
        assert gone(pid), pid
    here.close()
    there.close()


def test_an_event_of_a_closed_descriptor_is_not_that_of_its_successor() -> None:
    """A batch of events may hold one for a number that meanwhile belongs to something else."""
    control, machine_end = pair()
    events, others = pair()
    watching = _Warden(control, events, (), JailPlan(JailMode.OFF), 1.0)
    first, second = os.pipe(), os.pipe()
    made: list[int] = []
    wrong: list[str] = []

    def replace_second() -> None:
        watching._unwatch(first[0])
        watching._unwatch(second[0])
        os.close(second[0])
        made.extend(os.pipe())
        watching._watch(made[0], lambda: wrong.append("called"))

    watching._watch(first[0], replace_second)
    watching._watch(second[0], lambda: wrong.append("not there any more"))
    for pipe in (first, second):
        os.write(pipe[1], b"x")
    machine_end.close()  # ends it after this batch
    machine = os.pidfd_open(os.getpid())
    watching.run(machine)
    assert made[0] == second[0]
    assert wrong == []
    for fd in (machine, *first, second[1], *made):
        os.close(fd)
    for end in (control, events, others):
        end.close()


def test_the_terminal_does_not_interrupt_devices(warden: Warden) -> None:
    child = warden.spawn("interrupted", "probe", {}, factory=0)
    for pid in (warden.pid, child.pid):
        os.kill(pid, signal.SIGINT)
    assert os.getpgid(warden.pid) != os.getpgid(0)
    with ProxyDevice(child, Recorder()) as device:
        device.handlers()[0].write(0, 1, 7)
        assert device.handlers()[0].read(0, 1) == 7


def test_many_devices(warden: Warden) -> None:
    events = Recorder()
    proxies = [ProxyDevice(warden.spawn(f"n{i}", "echo", {}), events) for i in range(12)]
    for index, proxy in enumerate(proxies):
        proxy.handlers()[0].write(0, 8, index)
    for index, proxy in enumerate(proxies):
        assert proxy.handlers()[0].read(0, 8) == index
        proxy.shutdown()
    assert not events.failures


def test_one_that_was_never_made_is_dropped_silently() -> None:
    """A signal may come before its first line."""
    Warden.__new__(Warden).__del__()
