"""A machine and devices that do not behave: impossible lines, silence, and no process at all."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest

from devices.bus import BusType
from devices.contract import Device, Region
from devices.errors import DeviceError, UserError
from devices.pci.config_space import ConfigSpaceDevice
from proxy.jail import JailMode, JailUnavailable
from vmm.config import (
    ClockKind,
    DeviceConfig,
    HostOptions,
    MachineConfig,
    debug_exit,
    default_devices,
    parse_device,
)
from vmm.machine import Machine
from vmm.outcome import Ending

IN_AND_EXIT = bytes.fromhex("66ba000eed66baf400ee")  # in eax, 0xe00; out 0xf4, al
OUT_AND_SPIN = bytes.fromhex("66ba000eeeebfe")
OUT_AND_HALT = bytes.fromhex("66ba000eeefbf4ebfd")  # sti; hlt; again


class Lined(Device):
    model: ClassVar[str] = "lined"
    line: ClassVar[Any] = None

    def regions(self) -> tuple[Region, ...]:
        return (Region("r", BusType.PIO, 8, start=0xE00, irq=self.line),)

    def read(self, offset: int, size: int) -> int:
        for pin in (0, 1, 255):
            self.host.set_irq(True, pin)
        return 5


@pytest.mark.parametrize("isolated", [True, False])
@pytest.mark.parametrize("line", [-3, 2, 16, 99])
def test_an_impossible_line_is_that_devices_failure(line: int, isolated: bool) -> None:
    with Machine(memory="16M") as machine:
        machine.add_device(type("Odd", (Lined,), {"line": line}), "odd", isolated=isolated)
        with pytest.raises(DeviceError, match=r"device 'odd'.*line"):
            machine.boot(IN_AND_EXIT)


class LinedFunction(ConfigSpaceDevice):
    def regions(self) -> tuple[Region, ...]:
        return tuple(Region(r.name, r.bus, r.length, irq=99) for r in super().regions())


@pytest.mark.parametrize("isolated", [True, False])
def test_so_it_is_of_a_pci_function(isolated: bool) -> None:
    with Machine(memory="16M") as machine:
        machine.add_device(LinedFunction, "odd", isolated=isolated)
        with pytest.raises(DeviceError, match=r"device 'odd'.*line"):
            machine.build()


class DoubledBars(ConfigSpaceDevice):
    def bars(self) -> Any:
        bars = super().bars()
        return (*bars, bars[0])


@pytest.mark.parametrize("isolated", [True, False])
def test_impossible_bars_are_that_devices_failure(isolated: bool) -> None:
    with Machine(memory="16M") as machine:
        machine.add_device(DoubledBars, "odd", isolated=isolated)
        with pytest.raises(DeviceError, match="device 'odd'"):
            machine.build()


@pytest.mark.parametrize("isolated", [True, False])
def test_pins_that_lead_nowhere_are_harmless(isolated: bool) -> None:
    with Machine(memory="16M") as machine:
        machine.add_device(type("Odd", (Lined,), {"line": 5}), "odd", isolated=isolated)
        machine.boot(IN_AND_EXIT)
        assert machine.run(timeout=30).guest_value == 5


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("echo,irq=2", "irq=2"),
        ("echo,irq=-1", "irq=-1"),
        (":x", "unknown device model ':x'|cannot be loaded"),
        ("..x:y", "cannot be loaded"),
        ("x:", "unknown device model"),
        ("", "unknown device model"),
    ],
)
def test_device_texts_that_cannot_be(text: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        parse_device(text, [])


def test_a_model_whose_module_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_model.py").write_text("def:\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"broken_model:X.*cannot be loaded"):
        parse_device("broken_model:X", [])


def test_a_pci_function_takes_no_isa_line() -> None:
    config = MachineConfig(16 << 20, (parse_device("config-space,irq=3", []),))
    with pytest.raises(UserError, match=r"'config-space'.*irq="), Machine(config) as machine:
        machine.build()


def test_a_pci_function_may_not_take_a_board_devices_name() -> None:
    config = MachineConfig(16 << 20, (parse_device("config-space,name=pit", []),))
    with pytest.raises(UserError, match="part of the board"), Machine(config) as machine:
        machine.build()


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Machine(jail="bogus"), "bogus"),
        (lambda: Machine(host=HostOptions(jail="bogus")), "bogus"),  # type: ignore[arg-type]
        (lambda: Machine(clock="sundial"), "sundial"),
        (lambda: Machine(memory=1.5), "memory"),  # type: ignore[arg-type]
        (lambda: Machine(host=HostOptions(deadline=0)), "deadline"),
        (lambda: Machine().add_device("echo", addr="0x600"), "addr"),  # type: ignore[arg-type]
        (lambda: Machine().add_device("echo", irq="5"), "irq"),  # type: ignore[arg-type]
        (lambda: Machine().add_device("echo", slot=1.0), "slot"),  # type: ignore[arg-type]
    ],
)
def test_arguments_of_the_wrong_kind(make: Any, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        make()


def test_a_jail_mode_as_text_is_that_mode() -> None:
    assert HostOptions(jail="strict").jail is JailMode.STRICT  # type: ignore[arg-type]


# Silence.


class Stuck(Device):
    """Never comes back from a write."""

    model: ClassVar[str] = "stuck"

    def regions(self) -> tuple[Region, ...]:
        return (Region("r", BusType.PIO, 8, start=0xE00),)

    def write(self, offset: int, size: int, value: int) -> None:
        while True:
            time.sleep(1)


@pytest.mark.parametrize("guest", [OUT_AND_SPIN, OUT_AND_HALT], ids=["spins", "halts"])
def test_a_device_stuck_in_a_write_is_named_though_nobody_asks_it(guest: bytes) -> None:
    with Machine(memory="16M", host=HostOptions(deadline=1)) as machine:
        machine.add_device(Stuck)
        machine.boot(guest)
        # At the end of a run it would come out in any case.
        late: list[str] = []
        machine.parts.events.call_at(time.monotonic() + 20, lambda: late.append("late"))
        outcome = machine.run(timeout=30)
    assert outcome.ending is Ending.DEVICE_FAILED
    assert outcome.device == "stuck"
    assert "did not answer within 1 s" in outcome.detail
    assert not late


def test_a_machine_that_idles_is_left_alone() -> None:
    with Machine(memory="16M", host=HostOptions(deadline=0.8)) as machine:
        machine.boot(OUT_AND_HALT.replace(b"\0\x0e", b"\xc0\x0e"))  # to echo
        assert machine.run(timeout=2).ending is Ending.TIMEOUT
        # One wait ends with the look after what was posted, one with the time-out.
        assert 2 <= machine.parts.vcpu.stats.idle_waits < 10


def test_a_suspended_device_is_not_asked() -> None:
    with Machine(memory="16M", host=HostOptions(deadline=1)) as machine:
        machine.boot(OUT_AND_SPIN.replace(b"\0\x0e", b"\xc0\x0e"))
        machine.run(budget=2000)
        machine.suspend()
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            machine.parts.events.poll(0.05)
        machine.resume()
        assert machine.run(timeout=1.5).ending is Ending.TIMEOUT


# No process of its own.


class InProcess(Lined):
    model: ClassVar[str] = "in-process"


def test_a_device_without_a_process_is_never_silent() -> None:
    with Machine(memory="16M") as machine:
        machine.build()
        assert "debug-exit" not in machine.parts.jail_line
    with Machine(memory="16M") as machine:
        machine.add_device("echo", "mine", isolated=False, addr=0x700)
        machine.add_device(InProcess, "other", isolated=False)
        machine.build()
        assert "'mine', 'other'" in machine.parts.jail_line
        assert "debug-exit" not in machine.parts.jail_line


@pytest.mark.parametrize("model", ["echo", "no_such_module:AtAll"])
def test_strict_refuses_a_device_without_a_process(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.jail.plan.JailPlan.check", lambda self: None)
    devices = (debug_exit(), DeviceConfig("mine", model, isolated=False))
    with (
        pytest.raises(JailUnavailable, match=r"strict.*'mine'") as refused,
        Machine(MachineConfig(16 << 20, devices), jail="strict") as machine,
    ):
        machine.build()
    assert "debug-exit" not in str(refused.value)


def test_a_jail_that_cannot_be_had_has_its_exit_status() -> None:
    assert JailUnavailable("no", ()).exit_status == 10


class Unsavable(InProcess):
    def snapshot(self) -> Any:
        return object()


class Bottomless(InProcess):
    def snapshot(self) -> Any:
        value: list[Any] = []
        for _ in range(100_000):
            value = [value]
        return value


class Circular(InProcess):
    def snapshot(self) -> Any:
        value: dict[str, Any] = {}
        value["self"] = value
        return value


@pytest.mark.parametrize("kind", [Unsavable, Bottomless, Circular])
def test_a_state_that_is_no_plain_value_is_that_devices_error(
    kind: type[Device], tmp_path: Path
) -> None:
    with Machine(memory="16M") as machine:
        machine.add_device(kind, "mine", isolated=False)
        machine.boot("hello")
        with pytest.raises(DeviceError, match=r"device 'mine'.*save"):
            machine.snapshot(tmp_path / "saved")
        assert not list(tmp_path.iterdir())
        assert machine.run(timeout=30).ending is Ending.HALTED


class Clumsy(InProcess):
    def sleep(self) -> None:
        raise RuntimeError("tangled")

    def close(self) -> None:
        raise RuntimeError("cannot close")


def test_a_failing_sleep_or_close_leaves_no_process_behind() -> None:
    with Machine(memory="16M") as machine:
        machine.add_device(Clumsy, "mine", isolated=False)
        machine.boot("hello")
        with pytest.raises(DeviceError, match=r"device 'mine'.*tangled"):
            machine.suspend()
        assert machine.run(timeout=30).ending is Ending.HALTED
        pids = [proxy.pid for proxy in machine.parts.proxies]
        log = machine.parts.wiring.log_lines
    assert any("cannot close" in text for name, text in log if name == "mine")
    for _ in range(200):
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            break
        time.sleep(0.01)
    else:
        raise AssertionError("device processes are left")


FEW_FILES = """
import resource, sys
from vmm.config import DeviceConfig, MachineConfig
from vmm.machine import Machine
from devices.errors import DeviceError, UserError
devices = tuple(DeviceConfig(f"e{n}", "echo", addr=0x1000 + 16 * n) for n in range(40))
machine = Machine(MachineConfig(16 << 20, devices), jail="off")
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[1])))
try:
    machine.build()
except (UserError, DeviceError) as error:
    print(error)
"""


@pytest.mark.parametrize("limit", [60, 61, 62, 63, 64, 100])
def test_too_many_open_files_is_said_in_these_words(limit: int) -> None:
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 100
    done = subprocess.run(
        [sys.executable, "-c", FEW_FILES, str(limit)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "too many open files" in done.stdout.lower(), done
    assert done.stdout.lower().count("cannot be started") <= 1
    assert not done.stderr


def test_a_virtual_clock_does_not_depend_on_the_deadline() -> None:
    outputs = []
    for deadline in (1.0, 5.0):
        config = MachineConfig(16 << 20, default_devices(), ClockKind.VIRTUAL)
        with Machine(config, host=HostOptions(deadline=deadline)) as machine:
            machine.boot("stress")
            machine.run(timeout=60)
            outputs.append((machine.output, machine.parts.cpu.executed))
    assert outputs[0] == outputs[1]


def test_a_device_that_hangs_is_given_up_at_the_time_out_and_ends_the_next_run() -> None:
    class Hangs(Device):
        model: ClassVar[str] = "hangs"

        def regions(self) -> tuple[Region, ...]:
            return (Region("r", BusType.PIO, 4, start=0xE00),)

        def read(self, offset: int, size: int) -> int:
            time.sleep(3600)
            return 0

    with Machine(memory="16M", host=HostOptions(deadline=3600)) as machine:
        machine.add_device(Hangs, "hangs")
        machine.boot(IN_AND_EXIT)
        outcome = machine.run(timeout=0.5)
        assert outcome.ending is Ending.TIMEOUT
        outcome = machine.run(timeout=10)
        assert (outcome.ending, outcome.device) == (Ending.DEVICE_FAILED, "hangs")
