"""Firmware from the reset vector, and guests that only draw on the text screen."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_rig import run

from devices.errors import UserError
from vmm.boot.options import BootOptions, Mode
from vmm.config import MachineConfig, default_devices
from vmm.machine import Machine
from vmm.outcome import Ending
from vmm.pc import DEBUG_CONSOLE

SEABIOS = Path("/usr/share/seabios/bios-256k.bin")
needs_seabios = pytest.mark.skipif(
    not SEABIOS.exists(), reason="NO FIRMWARE: install Debian's package 'seabios'"
)


def _machine(rom: bytes) -> Machine:
    return Machine(MachineConfig(64 << 20, default_devices(), rom=len(rom)))


@needs_seabios
def test_seabios_runs_to_its_end() -> None:
    rom = SEABIOS.read_bytes()
    with _machine(rom) as machine:
        machine.boot_firmware(rom)
        console = machine.parts.consoles[DEBUG_CONSOLE]
        console.watch(b"No bootable device", machine.stop)
        outcome = machine.run(timeout=60)
        said = bytes(console.output)
        assert outcome.ending is Ending.QUIT, said[-2000:]
        assert said.startswith(b"SeaBIOS (version ")
        assert b"ACPI: parse DSDT" in said
        assert b"Found 1 serial ports" in said


@needs_seabios
def test_seabios_boots_from_a_disk(tmp_path: Path) -> None:
    """Its boot sector asks the BIOS for the next sector and exits with the first byte of it."""
    code = bytes.fromhex(
        # xor ax, ax; mov ds, ax; mov es, ax; mov ax, 0x201; mov cx, 2; mov dh, 0; mov bx, 0x7e00
        "31c08ed88ec0b80102b90200b600bb007e"
        # int 0x13; mov al, [0x7e00]; out 0xf4, al; cli; hlt
        "cd13a0007ee6f4faf4"
    )
    disk = tmp_path / "disk.img"
    disk.write_bytes(code.ljust(510, b"\0") + b"\x55\xaa" + b"\x2a" * 512 + bytes(1 << 20))
    status, _, err = run("boot", "--firmware", str(SEABIOS), "--disk", str(disk), "--timeout", "60")
    assert status == 0x2A << 1 | 1, err


@needs_seabios
def test_firmware_through_a_snapshot(tmp_path: Path) -> None:
    rom = SEABIOS.read_bytes()
    with _machine(rom) as machine:
        machine.boot_firmware(rom)
        machine.run(budget=500_000)
        machine.snapshot(tmp_path / "saved")
    with Machine.restore(tmp_path / "saved") as machine:
        console = machine.parts.consoles[DEBUG_CONSOLE]
        console.watch(b"No bootable device", machine.stop)
        assert machine.run(timeout=60).ending is Ending.QUIT, bytes(console.output)[-2000:]


def test_a_rom_of_our_own_starts_at_the_reset_vector() -> None:
    rom = bytearray(b"\xf4" * (64 << 10))
    rom[0xFFF0:0xFFF5] = bytes.fromhex("ea00e000f0")  # jmp 0xf000:0xe000
    rom[0xE000:0xE005] = bytes.fromhex("b02ae6f4f4")  # mov al, 42; out 0xf4, al; hlt
    with _machine(bytes(rom)) as machine:
        machine.boot_firmware(bytes(rom))
        assert machine.run(timeout=30).guest_value == 42


@pytest.mark.parametrize("size", [0, 100, (64 << 10) + 4096, 32 << 20])
def test_what_is_no_rom(size: int) -> None:
    with pytest.raises(UserError), _machine(bytes(size)) as machine:
        machine.boot_firmware(bytes(size))


DRAW = bytes.fromhex(
    "b800b8"  # mov ax, 0xb800
    "8ec0"  # mov es, ax
    "26c70600004807"  # mov word [es:0], 'H' white on black
    "26c70602006907"  # mov word [es:2], 'i'
    "26c706a0002107"  # mov word [es:160], '!': the second line
    "faf4"  # cli; hlt
)


def test_what_is_drawn_can_be_seen() -> None:
    sector = DRAW.ljust(510, b"\0") + b"\x55\xaa"
    with Machine(memory="16M") as machine:
        assert machine.boot(sector).format == "boot-sector"
        assert machine.run(timeout=30).ending is Ending.HALTED
        assert machine.parts.board.screen_lines() == ["Hi", "!"]
    with Machine(memory="16M") as machine:
        machine.boot(DRAW, BootOptions(mode=Mode.REAL))
        machine.run(timeout=30)
        assert machine.parts.board.screen_lines() == ["Hi", "!"]
