"""The machine as a library: run, stop, isolate, watch, type, and the devices of one's own."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest

import guests
from devices.bus import BusType
from devices.contract import Device, Region
from devices.errors import DeviceError, UserError
from devices.registry import load, switches
from vmm.boot.options import BootOptions
from vmm.config import (
    DeviceConfig,
    FailurePolicy,
    HostOptions,
    MachineConfig,
    default_devices,
    parse_device,
    parse_size,
)
from vmm.machine import Machine
from vmm.outcome import Ending, Outcome
from vmm.vcpu import VcpuStats

EXIT_WITH_PORT = "66ba{port}ed66baf400ee"
"""32-bit code: in eax from a port (little-endian hexadecimal), out to the debug-exit port."""


def _pid(machine: Machine, name: str) -> int:
    return next(proxy.pid for proxy in machine.parts.proxies if proxy.name == name)


def _gone(pid: int) -> bool:
    for _ in range(200):
        if not Path(f"/proc/{pid}").exists():
            return True
        time.sleep(0.01)
    return False


def test_hello_in_three_lines() -> None:
    with Machine(memory="16M") as machine:
        machine.boot("hello")
        outcome = machine.run(timeout=30)
    assert outcome.ending is Ending.HALTED
    assert outcome.status == 0
    assert machine.output == b"Hello from the guest!\n"


def test_every_device_process_is_gone_after_close() -> None:
    with Machine(memory="16M") as machine:
        machine.boot("hello")
        pids = [proxy.pid for proxy in machine.parts.proxies] + [machine.parts.warden.pid]
        assert len(pids) == 4
        assert not any(_gone_now(pid) for pid in pids)
        machine.run(timeout=30)
    assert all(map(_gone, pids))


def _gone_now(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def test_run_until_output_and_on() -> None:
    with Machine(memory="16M") as machine:
        machine.boot(guests.patched("counter", delay=3_000_000))
        assert machine.run(until="counter 3\n", timeout=30).ending is Ending.PAUSED
        assert b"counter 3\n" in machine.output
        assert machine.run(until=b"counter 9\n", timeout=30).ending is Ending.PAUSED
    lines = machine.output.decode().splitlines()
    assert lines[:9] == [f"counter {n}" for n in range(1, 10)]


def test_timeout_comes_back_and_the_guest_can_go_on() -> None:
    with Machine(memory="16M") as machine:
        machine.boot(guests.patched("counter", limit=5, delay=1000))
        outcome = machine.run(timeout=0.001)
        while outcome.ending is Ending.TIMEOUT:
            outcome = machine.run(timeout=0.05)
    assert outcome.ending is Ending.HALTED
    assert machine.output.decode() == "".join(f"counter {n}\n" for n in range(1, 6))


def test_budget_pauses_within_a_block_of_it() -> None:
    with Machine(memory="16M") as machine:
        machine.boot("counter")
        assert machine.run(budget=1_000_000).ending is Ending.PAUSED
        assert 1_000_000 <= machine.parts.cpu.executed < 1_010_000


def test_steps_are_exact() -> None:
    with Machine(memory="16M") as machine:
        machine.boot(bytes.fromhex("40" * 20 + "f4"))  # inc eax, 20 times
        machine.run(steps=7)
        assert machine.parts.cpu.get_state().gpr[0] - 7 == 0
        machine.run(steps=5)
        assert machine.parts.cpu.get_state().gpr[0] == 12


@pytest.mark.parametrize("value", [0, 1, 42, 127, 128, 255])
def test_guest_exit_status(value: int) -> None:
    with Machine(memory="16M") as machine:
        machine.boot(bytes([0xB0, value, 0x66, 0xBA, 0xF4, 0, 0xEE, 0xEB, 0xFE]))
        outcome = machine.run(timeout=30)
    assert outcome.guest_value == value
    assert outcome.status == (value << 1 | 1) & 0xFF


def test_nothing_of_the_guest_runs_after_its_exit() -> None:
    # out 0xf4; then a byte to the serial port, in the same translated block
    with Machine(memory="16M") as machine:
        machine.boot(bytes.fromhex("66baf400ee66baf803b058eef4"))
        assert machine.run(timeout=30).ending is Ending.GUEST_EXIT
    assert machine.output == b""


def test_triple_fault_is_a_crash_with_a_report() -> None:
    with Machine(memory="16M") as machine:
        machine.boot("crash")
        outcome = machine.run(timeout=30)
    assert outcome.ending is Ending.CRASHED
    assert outcome.status == 4
    assert "triple fault" in outcome.detail
    assert outcome.detail.count("triple fault") == 1
    assert "rip" in outcome.report.lower()
    assert "ud2" in outcome.report


@pytest.mark.parametrize("guest", ["serial-echo", "serial-poll"])
def test_typing(guest: str) -> None:
    with Machine(memory="16M") as machine:
        machine.boot(guest)
        machine.send("first line\r")
        machine.run(until="first line", timeout=30)
        machine.send("quit\r")
        outcome = machine.run(timeout=30)
    assert outcome.ending is Ending.HALTED, outcome
    assert b"first line" in machine.output


def test_much_input_arrives_whole_and_in_order() -> None:
    text = "".join(f"line {n:04}\r" for n in range(1500))  # four times the device's backlog
    with Machine(memory="16M") as machine:
        machine.boot("serial-poll")
        machine.send(text + "quit\r")
        assert machine.run(timeout=60).ending is Ending.HALTED
        assert not machine.console.pending
    answers = machine.output.decode().split("You said: line ")[1:]
    assert [int(answer[:4]) for answer in answers] == list(range(1500))


def test_a_killed_device_stops_the_machine_and_is_named() -> None:
    with Machine(memory="16M") as machine:
        machine.boot("stress")
        machine.run(budget=50_000)
        os.kill(_pid(machine, "echo"), signal.SIGKILL)
        outcome = machine.run(timeout=30)
    assert outcome.ending is Ending.DEVICE_FAILED
    assert outcome.device == "echo"
    assert outcome.status == 6
    assert "SIGKILL" in outcome.detail


def test_an_idle_device_that_dies_is_noticed_without_an_access() -> None:
    with Machine(memory="16M") as machine:
        machine.boot(guests.patched("spin", rounds=0xFFFF_FFFF))
        machine.run(budget=50_000)
        os.kill(_pid(machine, "echo"), signal.SIGKILL)
        outcome = machine.run(timeout=30)
    assert outcome.ending is Ending.DEVICE_FAILED
    assert outcome.device == "echo"


def test_a_hung_device_is_named_at_the_deadline() -> None:
    with Machine(memory="16M", host=HostOptions(deadline=1)) as machine:
        machine.boot("stress")
        machine.run(budget=50_000)
        os.kill(_pid(machine, "echo"), signal.SIGSTOP)
        outcome = machine.run(timeout=30)
    assert outcome.ending is Ending.DEVICE_FAILED
    assert outcome.device == "echo"
    assert "did not answer" in outcome.detail


def test_isolate_goes_on_without_the_device() -> None:
    with Machine(memory="16M", host=HostOptions(on_failure=FailurePolicy.ISOLATE)) as machine:
        machine.boot("stress")
        machine.run(budget=50_000)
        os.kill(_pid(machine, "echo"), signal.SIGKILL)
        outcome = machine.run(timeout=30)
    assert outcome.guest_value == 1  # the guest read all-ones and said so
    assert b"mismatch" in machine.output


def test_a_failed_pci_function_leaves_the_bus() -> None:
    with Machine(memory="16M", host=HostOptions(on_failure=FailurePolicy.ISOLATE)) as machine:
        machine.boot("hello")
        mmio = machine.parts.buses[BusType.MMIO]
        assert any(entry.owner == "config-space" for entry in mmio)
        os.kill(_pid(machine, "config-space"), signal.SIGKILL)
        assert _gone(_pid(machine, "config-space"))
        machine.run(timeout=30)
        assert not any(entry.owner == "config-space" for entry in mmio)


def test_warden_death_is_a_named_failure() -> None:
    with Machine(memory="16M") as machine:
        machine.boot(guests.patched("spin", rounds=0xFFFF_FFFF))
        os.kill(machine.parts.warden.pid, signal.SIGKILL)
        assert machine.run(timeout=30).ending is Ending.DEVICE_FAILED


@dataclass
class _TallyState:
    reads: int = 0


class Tally(Device):
    """Counts reads; raises its line on the third."""

    model: ClassVar[str] = "tally"
    State = _TallyState

    def regions(self) -> tuple[Region, ...]:
        return (Region("count", BusType.PIO, 4, start=0x540),)

    def read(self, offset: int, size: int) -> int:
        self.state.reads += 1
        return int(self.state.reads)


@pytest.mark.parametrize("isolated", [True, False])
def test_a_device_of_ones_own(isolated: bool) -> None:
    with Machine(memory="16M") as machine:
        name = machine.add_device(Tally, isolated=isolated)
        machine.boot(bytes.fromhex("66ba4005ededed66baf400ee"))
        assert machine.run(timeout=30).guest_value == 3
        assert name == "tally"


def test_a_device_made_by_a_function_may_hold_what_it_likes() -> None:
    start = 40

    def make(host: object) -> Device:
        device = Tally(host)  # type: ignore[arg-type]
        device.state.reads = start
        return device

    with Machine(memory="16M") as machine:
        machine.add_device(make, "made")
        machine.boot(bytes.fromhex(EXIT_WITH_PORT.format(port="4005")))
        assert machine.run(timeout=30).guest_value == start + 1


class Bomb(Device):
    model: ClassVar[str] = "bomb"

    def __init__(self, host: object, options: object = None) -> None:
        raise RuntimeError("wet fuse")


@pytest.mark.parametrize("isolated", [True, False])
def test_a_device_that_cannot_be_built_is_named(isolated: bool) -> None:
    with Machine(memory="16M") as machine:
        machine.add_device(Bomb, isolated=isolated)
        with pytest.raises(DeviceError, match=r"bomb.*wet fuse"):
            machine.build()


class Quitter(Device):
    """Asks for the end of the run without having the right to."""

    model: ClassVar[str] = "quitter"

    def regions(self) -> tuple[Region, ...]:
        return (Region("quit", BusType.PIO, 1, start=0x550),)

    def write(self, offset: int, size: int, value: int) -> None:
        self.host.request_exit(value)


def test_only_devices_with_the_right_end_the_run() -> None:
    code = bytes.fromhex("66ba5005eefaf4")  # out 0x550; cli; hlt
    with Machine(memory="16M") as machine:
        machine.add_device(Quitter)
        machine.boot(code)
        assert machine.run(timeout=30).ending is Ending.HALTED
        assert any("no right" in text for _, text in machine.parts.wiring.log_lines)
    with Machine(memory="16M") as machine:
        machine.add_device(Quitter, may_exit=True)
        machine.boot(b"\xb0\x09" + code[:-2] + b"\xeb\xfe")
        assert machine.run(timeout=30).guest_value == 9


def test_time_goes_on_after_a_suspend_inside_a_run(tmp_path: Path) -> None:
    seen: list[int] = []

    def meddle() -> None:
        if not seen:
            machine.suspend()
            machine.resume()
            machine.snapshot(tmp_path / "saved")
            seen.append(machine.parts.clock.now())

    with Machine(memory="16M") as machine:
        machine.boot("counter")
        machine.between = meddle
        machine.parts.request_attention()
        machine.run(timeout=0.3)
        assert seen
        assert machine.parts.clock.now() - seen[0] > 100_000_000
        still = machine.parts.clock.now()
        time.sleep(0.05)
        assert machine.parts.clock.now() == still  # it stands still while the machine does not run


def test_where_the_time_went_is_known_while_the_guest_runs() -> None:
    """The run that goes on is no start-up: all of its parts are in its total."""
    seen: list[VcpuStats] = []

    def look() -> None:
        seen.append(replace(machine.parts.vcpu.stats))
        if len(seen) < 3:
            machine.parts.request_attention()
        else:
            machine.stop(Outcome(Ending.QUIT))

    with Machine(memory="16M") as machine:
        machine.boot("counter")
        machine.between = look
        machine.parts.request_attention()
        machine.run(timeout=30)
        end = machine.parts.vcpu.stats
    assert [each.total for each in seen] == sorted({each.total for each in seen})
    assert all(each.total >= each.executing + each.idle > 0 for each in [*seen[1:], end])
    assert end.total >= seen[-1].total > 0


def test_stop_from_a_callback() -> None:
    with Machine(memory="16M") as machine:
        machine.boot("counter")
        machine.console.watch(b"counter 2", lambda: machine.stop(Outcome(Ending.QUIT, "enough")))
        outcome = machine.run(timeout=30)
    assert (outcome.ending, outcome.detail) == (Ending.QUIT, "enough")


def test_ctrl_c_is_a_keyboard_interrupt_even_in_a_guest_that_never_stops() -> None:
    with Machine(memory="16M") as machine:
        machine.boot(guests.patched("spin", rounds=0xFFFF_FFFF))
        machine.parts.events.call_at(
            time.monotonic() + 0.1, lambda: os.kill(os.getpid(), signal.SIGINT)
        )
        with pytest.raises(KeyboardInterrupt):
            machine.run(timeout=30)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_two_machines_at_once() -> None:
    with Machine(memory="16M") as one, Machine(memory="16M") as two:
        one.boot("hello")
        two.boot("echo")
        assert two.run(timeout=30).guest_value == 0
        assert one.run(timeout=30).ending is Ending.HALTED
    assert one.output != two.output


def test_a_closed_machine_says_so() -> None:
    machine = Machine(memory="16M")
    machine.close()
    machine.close()
    with pytest.raises(UserError, match="closed"):
        machine.boot("hello")


# Configuration.


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("64M", 64 << 20),
        ("1G", 1 << 30),
        ("0x100000", 1 << 20),
        ("4096k", 4 << 20),
        ("16MiB", 16 << 20),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "12X", "-1", "1.5G", "64 M B"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UserError, match="size"):
        parse_size(text)


@pytest.mark.parametrize("memory", [0, 4096, (1 << 20) + 1, 1 << 60])
def test_memory_that_cannot_be(memory: int) -> None:
    with pytest.raises(UserError, match="memory"), Machine(memory=memory) as machine:
        machine.build()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("nonsense", "unknown device model 'nonsense'"),
        ("echo,color=red", "no option 'color'"),
        ("echo,addr=zz", "not a number"),
        ("echo,addr", "not option=value"),
        ("echo,addr=1,addr=2", "given twice"),
        ("echo,irq=99", "irq"),
        ("echo,isolation=maybe", "isolation"),
        ("echo,name=Bad/Name", "device name"),
        ("echo,bus=isa", "bus"),
        ("no.such.module:Thing", "cannot be loaded"),
        ("devices.bus:Bus", "not a subclass"),
        ("serial,port=com9", "port"),
    ],
)
def test_devices_that_cannot_be(text: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        parse_device(text, [])


def test_what_is_true_or_false_may_stand_alone() -> None:
    for text in ("9p,path=/a,readonly", "9p,path=/a,readonly=true", "9p,readonly,path=/a"):
        assert parse_device(text, []).options == {"path": "/a", "readonly": "true"}
    assert parse_device("ata,disk0=a,readonly0", []).options["readonly0"] == "true"
    for text in ("9p,path", "blk,path=a,serial", "9p,isolation,path=a"):
        with pytest.raises(UserError, match="not option=value"):
            parse_device(text, [])
    with pytest.raises(UserError, match="given twice"):
        parse_device("9p,path=a,readonly,readonly", [])
    assert switches(load("config-space")) == ()


def test_general_options_of_devices() -> None:
    device = parse_device("echo,addr=0xF00,irq=5,name=mine,isolation=none,bus=pio", [])
    assert device == DeviceConfig("mine", "echo", {"bus": "pio"}, isolated=False, addr=0xF00, irq=5)
    assert parse_device("echo", ["echo", "echo-2"]).name == "echo-3"


@pytest.mark.parametrize(
    ("extra", "complaint"),
    [
        (DeviceConfig("again", "echo"), "overlaps 'echo'"),
        (DeviceConfig("far", "echo", addr=0xFFFC), "leaves the space"),
        (DeviceConfig("slotted", "echo", addr=0xF00, slot=4), "no PCI function"),
        (DeviceConfig("moved", "config-space", addr=0xF00), "no single bus region"),
    ],
)
def test_devices_that_do_not_fit(extra: DeviceConfig, complaint: str) -> None:
    config = MachineConfig(16 << 20, (*default_devices(), extra))
    with pytest.raises(UserError, match=complaint), Machine(config) as machine:
        machine.build()


def test_two_functions_in_one_slot() -> None:
    devices = tuple(parse_device(f"config-space,slot=5,name=f{n}", []) for n in (1, 2))
    with (
        pytest.raises(UserError, match="slot 5 is taken by 'f1'"),
        Machine(MachineConfig(16 << 20, devices)) as machine,
    ):
        machine.build()


def test_two_devices_of_one_name() -> None:
    with pytest.raises(UserError, match="device 'echo': another one has this name"):
        MachineConfig(devices=(DeviceConfig("echo", "echo"), DeviceConfig("echo", "echo")))


def test_second_serial_port_and_second_function() -> None:
    devices = (
        *default_devices(),
        parse_device("serial,port=com2,name=second", []),
        parse_device("config-space,slot=7,name=other", []),
    )
    with Machine(MachineConfig(16 << 20, devices)) as machine:
        machine.boot("default")
        assert machine.run(timeout=30).ending is Ending.HALTED
        lines = {a.name: a.lines for a in machine.parts.attachments}
    assert lines["serial"] == (4,)
    assert lines["second"] == (3,)
    assert b"00:07.0" in machine.output
    assert b"3 functions" in machine.output


def test_kernels_find_the_bios_data_that_they_look_for() -> None:
    """Xen, for one, puts its trampoline below what these say, and nowhere good without them."""
    with Machine(memory="16M") as machine:
        machine.boot("multiboot")
        memory = machine.parts.memory
        assert int.from_bytes(memory.read(0x40E, 2), "little") << 4 == 0x9FC00
        assert int.from_bytes(memory.read(0x413, 2), "little") == 639


@pytest.mark.parametrize("clock", ["real", "virtual"])
def test_halted_for_good_although_an_interrupt_waits(clock: str) -> None:
    code = bytes.fromhex(
        # The 8259 begins at vector 0x20 and takes IRQ 0 alone: ICW1 to 4, mask.
        "b011e620 b020e621 b004e621 b001e621 b0fee621"
        # The 8254 counts to 256; then long enough with interrupts off.
        "b034e643 b000e640 b001e640"
        # mov ecx, 3000000; l: dec ecx; jnz l; cli; hlt
        "b9c0c62d00 4975fd fa f4"
    )
    with Machine(memory="16M", devices=(), clock=clock) as machine:
        machine.boot(code, BootOptions())
        assert machine.run(timeout=20).ending is Ending.HALTED
        assert machine.parts.board.irqchip.pending()
