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
MAKE_X = "(echo 1; cat /bin/busybox; echo 2; cat /bin/busybox) >/x"
"""A file of 4 MB; random numbers would cost a second, for which the guest gathers entropy."""


def options(
    append: str = "", entry: KernelEntry = KernelEntry.AUTO, directory: Path | None = None
) -> BootOptions:
    initramfs = ((directory or Path(DIRECTORY)) / "initramfs.cpio.gz").read_bytes()
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


@pytest.fixture(scope="module")
def booted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A snapshot of a machine with a shell: for tests that care for what comes after the boot."""
    place = tmp_path_factory.mktemp("booted") / "saved"
    with Machine(memory="256M") as machine:
        boot(machine)
        machine.snapshot(place)
    return place


@pytest.fixture
def shell(booted: Path) -> Iterator[Shell]:
    with Machine.restore(booted) as machine:
        yield Shell(machine)


def dmesg(shell: Shell, *words: str) -> str:
    """What the kernel said with one of these words in it; all of it takes seconds to print."""
    # Without the words as such, which the echo of the command would show.
    patterns = "|".join(f"{word[:-1]}[{word[-1]}]" for word in words)
    return shell.ask(f"dmesg | grep -E '{patterns}'")


def assert_a_second_takes_a_second(shell: Shell) -> None:
    """By the guest's own clock, whichever timer wakes it."""
    slept = shell.ask("time sleep 1")
    real = next(line for line in slept.splitlines() if line.startswith("real"))
    assert 1.0 <= float(real.split()[2].rstrip("s")) < 2.0, slept


def test_to_a_shell_and_off(machine: Machine) -> None:
    shell = boot(machine)
    assert "IO-APIC" in shell.ask("cat /proc/interrupts")
    complaints = ("BUG:", "Oops", "WARNING:", "ACPI Error", "ACPI BIOS Error", "unhandled")
    said = dmesg(shell, "Linux version", *complaints)
    assert "Linux version" in said
    for complaint in complaints:
        assert complaint not in said
    assert_a_second_takes_a_second(shell)
    machine.send("poweroff -f\r")
    assert machine.run(timeout=60).ending is Ending.POWERED_OFF


def test_ctrl_c_ends_what_runs_in_the_shell(shell: Shell) -> None:
    machine = shell.machine
    machine.send("echo begun; while :; do :; done\r")
    assert machine.run(until="\nbegun", timeout=60).ending is Ending.PAUSED
    machine.send("\x03")
    shell.wait()
    assert "\nafter" in shell.ask("echo after")


@pytest.mark.parametrize(
    ("append", "entry", "controller", "timer"),
    [
        ("acpi=off", KernelEntry.AUTO, "XT-PIC", "pit"),
        ("noapic nolapic mitigations=off", KernelEntry.AUTO, "XT-PIC", "hpet"),
        ("kaslr", KernelEntry.BZIMAGE, "IO-APIC", "lapic-deadline"),
        # This CPU does not speculate, so Linux must be told to guard against it.
        (
            "pti=on spectre_v2=retpoline lapic=notscdeadline",
            KernelEntry.AUTO,
            "IO-APIC",
            "lapic",
        ),
    ],
)
def test_other_ways_to_boot(
    machine: Machine, append: str, entry: KernelEntry, controller: str, timer: str
) -> None:
    shell = boot(machine, append, entry)
    assert controller in shell.ask("cat /proc/interrupts")
    if "pti=on" in append:
        said = dmesg(shell, "isolation", "Spectre V2")
        assert "page tables isolation: enabled" in said
        assert "Spectre V2 : Mitigation: Retpolines" in said
    shell.ask("mount -t sysfs sys /sys")
    place = "/sys/devices/system/clockevents/clockevent0"
    assert f"\n{timer}\r" in shell.ask(f"cat {place}/current_device")
    assert_a_second_takes_a_second(shell)
    machine.send("reboot -f\r")
    outcome = machine.run(timeout=60)
    assert outcome.ending in (Ending.RESET, Ending.CRASHED), outcome


def test_reboot_has_a_status_of_its_own(shell: Shell) -> None:
    shell.machine.send("reboot -f\r")
    outcome = shell.machine.run(timeout=60)
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


def test_snapshot_of_a_shell_goes_on_in_another_machine(shell: Shell, tmp_path: Path) -> None:
    shell.ask("echo kept > /tmp/file; X=5")
    shell.machine.snapshot(tmp_path / "saved")
    shell.machine.close()
    with Machine.restore(tmp_path / "saved") as restored:
        again = Shell(restored)
        restored.send("\r")
        again.wait()
        assert "kept 5" in again.ask("echo $(cat /tmp/file) $X")


READY = b"linux-guest: ready"


def command(*arguments: str, typed: bytes = b"") -> tuple[int, bytes]:
    """Status and output of one ``python -m vmm``."""
    done = subprocess.run(
        [sys.executable, "-m", "vmm", *arguments],
        input=typed,
        capture_output=True,
        check=False,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
    )
    assert b"Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout


def test_the_command_line_saves_in_mid_boot_and_goes_on_elsewhere(tmp_path: Path) -> None:
    """Three processes; the console is byte by byte that of a run in one."""
    place = Path(DIRECTORY)
    start = ["boot", str(place / "vmlinuz"), "--initrd", str(place / "initramfs.cpio.gz")]
    start += ["--append", "console=ttyS0", "--mem", "256M", "--clock", "virtual"]
    outputs = []
    for name, how, when in (
        ("whole", start, READY),
        ("early", start, b"Trying to unpack rootfs"),
        ("late", ["restore", str(tmp_path / "early")], READY),
    ):
        status, output = command(
            *how, "--snapshot", str(tmp_path / name), "--snapshot-at", when.decode(),
            "--snapshot-then", "quit",
        )  # fmt: skip
        assert (status, when in output) == (0, True), output[-1000:]
        outputs.append(output)
    whole, early, late = outputs
    assert READY not in early
    assert (early + late).partition(READY)[0] == whole.partition(READY)[0]
    status, output = command("restore", str(tmp_path / "late"), typed=b"poweroff -f\r")
    assert (status, b"reboot: Power down" in output) == (0, True), output


def test_stops_at_random_points_change_nothing_in_real_time(machine: Machine) -> None:
    """Suspend and resume while Linux boots and works; the lines that it prints are the same."""
    rng = random.Random(7)
    machine.boot(Path(DIRECTORY) / "vmlinuz", options())
    for _ in range(25):
        machine.run(budget=rng.randrange(1, 100_000_000))
        machine.suspend()
        machine.resume()
    shell = Shell(machine)
    shell.wait()
    numbers = shell.ask("i=0; while [ $i -lt 300 ]; do i=$((i+1)); echo $i; done").split()
    assert [n for n in numbers if n.isdigit()][-300:] == [str(n) for n in range(1, 301)]
    machine.send("i=0; while [ $i -lt 2000 ]; do i=$((i+1)); echo n$i.; done\r")
    before = len(machine.output)
    for _ in range(25):
        machine.run(budget=rng.randrange(1, 3_000_000))
        machine.suspend()
        machine.resume()
    printed = shell.wait()[before:].replace("\r", "").split("\n")
    counted = [line for line in printed if line.startswith("n") and line.endswith(".")]
    assert counted == [f"n{n}." for n in range(1, 2001)]
