"""An unmodified distribution kernel, from boot to power off.

The kernel comes from `guests.linux`: `.ci/run` makes it ready and names its directory in
VMM_TEST_LINUX. Elsewhere these tests are skipped, and say so.
"""

from __future__ import annotations

import ast
import hashlib
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from vmm.boot.options import BootOptions, KernelEntry, Module
from vmm.machine import Machine
from vmm.outcome import Ending

DIRECTORY = os.environ.get("VMM_TEST_LINUX", "")
pytestmark = [
    pytest.mark.skipif(
        not DIRECTORY,
        reason="NO LINUX: run 'python -m guests.linux DIR' and set VMM_TEST_LINUX=DIR",
    ),
    pytest.mark.timeout(400),
]
PROMPT = b"/ # "


def options(append: str = "", entry: KernelEntry = KernelEntry.AUTO) -> BootOptions:
    initramfs = (Path(DIRECTORY) / "initramfs.cpio.gz").read_bytes()
    return BootOptions(
        name="vmlinuz",
        cmdline=f"console=ttyS0 {append}".strip(),
        initrd=Module(initramfs),
        kernel_entry=entry,
    )


class Shell:
    """A machine with a Linux shell on its console."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def wait(self) -> str:
        outcome = self.machine.run(until=PROMPT, timeout=300)
        assert outcome.ending is Ending.PAUSED, (outcome, self.machine.output[-2000:].decode())
        return self.machine.output.decode(errors="replace")

    def ask(self, command: str) -> str:
        """What a command prints."""
        before = len(self.machine.output)
        self.machine.send(command + "\r")
        return self.wait()[before:]


@pytest.fixture
def machine() -> Iterator[Machine]:
    with Machine(memory="256M") as machine:
        yield machine


def boot(machine: Machine, append: str = "", entry: KernelEntry = KernelEntry.AUTO) -> Shell:
    machine.boot(Path(DIRECTORY) / "vmlinuz", options(append, entry))
    shell = Shell(machine)
    shell.wait()
    return shell


def test_to_a_shell_and_off(machine: Machine) -> None:
    shell = boot(machine)
    assert "IO-APIC" in shell.ask("cat /proc/interrupts")
    dmesg = shell.ask("dmesg")
    for complaint in ("BUG:", "Oops", "WARNING:", "ACPI Error", "ACPI BIOS Error", "unhandled"):
        assert complaint not in dmesg
    slept = shell.ask("time sleep 1")
    real = next(line for line in slept.splitlines() if line.startswith("real"))
    assert 1.0 <= float(real.split()[2].rstrip("s")) < 2.0, slept
    machine.send("poweroff -f\r")
    assert machine.run(timeout=60).ending is Ending.POWERED_OFF


@pytest.mark.parametrize(
    ("append", "entry", "controller"),
    [
        ("acpi=off", KernelEntry.AUTO, "XT-PIC"),
        ("noapic nolapic mitigations=off", KernelEntry.AUTO, "XT-PIC"),
        ("kaslr", KernelEntry.BZIMAGE, "IO-APIC"),
        # This CPU does not speculate, so Linux must be told to guard against it.
        ("pti=on spectre_v2=retpoline", KernelEntry.AUTO, "IO-APIC"),
    ],
)
def test_other_ways_to_boot(
    machine: Machine, append: str, entry: KernelEntry, controller: str
) -> None:
    shell = boot(machine, append, entry)
    assert controller in shell.ask("cat /proc/interrupts")
    if "pti=on" in append:
        dmesg = shell.ask("dmesg")
        assert "page tables isolation: enabled" in dmesg
        assert "Spectre V2 : Mitigation: Retpolines" in dmesg
    machine.send("reboot -f\r")
    outcome = machine.run(timeout=60)
    assert outcome.ending in (Ending.RESET, Ending.CRASHED), outcome


def test_reboot_has_a_status_of_its_own(machine: Machine) -> None:
    shell = boot(machine)
    shell.machine.send("reboot -f\r")
    outcome = machine.run(timeout=60)
    assert (outcome.ending, outcome.status) == (Ending.RESET, 12)


def test_panic_is_seen(machine: Machine) -> None:
    machine.boot(Path(DIRECTORY) / "vmlinuz", options("panic=-1 rdinit=/nothing root=/dev/none"))
    outcome = machine.run(timeout=300)
    assert outcome.ending is Ending.RESET
    assert b"Kernel panic" in machine.output
    assert outcome.detail.startswith("kernel panic: VFS: Unable to mount root fs")


# The virtual clock.


def digest(machine: Machine) -> tuple[str, bytes, int]:
    """All RAM, all registers, the count of executed bytes."""
    memory = machine.parts.memory
    summed = hashlib.blake2b()
    for offset, length in memory.extents():
        summed.update(memory.view[offset : offset + length])
    state = msgspec.json.encode(machine.parts.cpu.get_state())
    return summed.hexdigest(), state, machine.parts.cpu.executed


STOP_AT = 700_000_000
"""Bytes of code: in the middle of the boot, with timers and the console at work."""


def run_to(machine: Machine, executed: int) -> None:
    machine.run(budget=executed - machine.parts.cpu.executed)


def test_the_same_start_gives_the_same_run(tmp_path: Path) -> None:
    """Once straight, once with many stops, once through a snapshot into another process."""
    runs = []
    for stops in (0, 5):
        with Machine(memory="256M", clock="virtual") as machine:
            machine.boot(Path(DIRECTORY) / "vmlinuz", options())
            rng = random.Random(stops)
            for place in sorted(rng.randrange(STOP_AT) for _ in range(stops)):
                run_to(machine, place)
                machine.suspend()
                machine.resume()
            run_to(machine, STOP_AT)
            runs.append((digest(machine), machine.output))
    assert runs[0] == runs[1]
    with Machine(memory="256M", clock="virtual") as machine:
        machine.boot(Path(DIRECTORY) / "vmlinuz", options())
        run_to(machine, STOP_AT // 2)
        before = machine.output
        machine.snapshot(tmp_path / "saved")
    script = (
        "import sys\n"
        "sys.path.insert(0, sys.argv[3])\n"
        "import test_linux as t\n"
        "from vmm.machine import Machine\n"
        "with Machine.restore(sys.argv[1]) as m:\n"
        "    t.run_to(m, int(sys.argv[2]))\n"
        "    print(repr((t.digest(m), m.output)))\n"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            script,
            str(tmp_path / "saved"),
            str(STOP_AT),
            str(Path(__file__).parent),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    summed, after = ast.literal_eval(done.stdout)
    assert summed == runs[0][0]
    assert before + after == runs[0][1]


def test_snapshot_of_a_shell_goes_on_in_another_machine(machine: Machine, tmp_path: Path) -> None:
    shell = boot(machine)
    shell.ask("echo kept > /tmp/file; X=5")
    machine.snapshot(tmp_path / "saved")
    machine.close()
    with Machine.restore(tmp_path / "saved") as restored:
        again = Shell(restored)
        restored.send("\r")
        again.wait()
        assert "kept 5" in again.ask("echo $(cat /tmp/file) $X")
