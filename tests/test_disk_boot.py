"""Firmware that boots from a disk: SeaBIOS with a boot sector of ours, and with a boot loader."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from cli_rig import given
from test_firmware import SEABIOS, needs_seabios
from test_linux import DIRECTORY, PROMPT

from vmm.cli.disks import disks
from vmm.config import MachineConfig, default_devices
from vmm.machine import Machine
from vmm.outcome import Ending
from vmm.pc import DEBUG_CONSOLE

SBIN = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
TOOLS = [shutil.which(name, path=SBIN) for name in ("mkfs.fat", "mcopy", "syslinux")]
needs_syslinux = pytest.mark.skipif(
    not all(TOOLS), reason="NO BOOT LOADER: install syslinux, mtools and dosfstools"
)
EITHER = pytest.mark.parametrize("interface", ["ide", "virtio"])
pytestmark = [needs_seabios, pytest.mark.timeout(400)]

SECTOR = 512
BOOT = (
    bytes.fromhex(
        "31c0 8ed8 8ec0"  # xor ax, ax; mov ds, ax; mov es, ax
        "be3c7c e82200"  # mov si, text; call puts
        "b80102 b90200 b600 bb007e cd13"  # int 13h, AH=2: one sector, the second, to 0x7E00
        "720d"  # jc fail
        "89de e80e00"  # mov si, bx; call puts
        "b80103 b90300 cd13"  # int 13h, AH=3: the same, to the third
        "0f92c0 e6f4 f4"  # fail: setc al; out 0xf4, al; hlt
        "52 baf803"  # puts: push dx; mov dx, 0x3f8
        "ac 84c0 7403 ee ebf8"  # next: lodsb; test al, al; jz end; out dx, al; jmp next
        "5a c3"  # end: pop dx; ret
    )
    + b"boot sector\n\0"
)


def machine(image: Path, interface: str, memory: int) -> Machine:
    devices = default_devices()
    found = disks(given("disk", f"{image},if={interface}"), [device.name for device in devices])
    return Machine(MachineConfig(memory, (*devices, *found), rom=SEABIOS.stat().st_size))


@EITHER
def test_a_boot_sector_reads_and_writes_by_int_13h(tmp_path: Path, interface: str) -> None:
    image = tmp_path / "disk.img"
    second = b"second sector\n\0".ljust(SECTOR, b"\xee")
    image.write_bytes((BOOT.ljust(510, b"\0") + b"\x55\xaa" + second).ljust(1 << 20, b"\0"))
    with machine(image, interface, 64 << 20) as vm:
        vm.boot_firmware(SEABIOS.read_bytes())
        outcome = vm.run(timeout=60)
        said = bytes(vm.parts.consoles[DEBUG_CONSOLE].output)
        assert vm.output == b"boot sector\nsecond sector\n", said[-2000:]
        assert outcome.guest_value == 0
    assert image.read_bytes()[2 * SECTOR : 3 * SECTOR] == second
    if interface == "ide":
        assert b"ata0-0: JAILED-VMM ATA DISK ATA-6 Hard-Disk (1 MiBytes)" in said
    else:
        assert b"found virtio-blk" in said


def boot_disk(image: Path, config: str, *files: tuple[Path, str]) -> None:
    """A FAT file system with SYSLINUX on it, made without root."""
    mkfs, mcopy, syslinux = map(str, TOOLS)
    image.touch()
    os.truncate(image, 40 << 20)
    menu = image.with_suffix(".cfg")
    menu.write_text(f"serial 0 115200\n{config}")
    for command in (
        [mkfs, "-F", "16", str(image)],
        [syslinux, "--install", str(image)],
        *(
            [mcopy, "-i", str(image), str(path), f"::{name}"]
            for path, name in ((menu, "syslinux.cfg"), *files)
        ),
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, (command, done.stderr)


@needs_syslinux
@EITHER
def test_a_boot_loader(tmp_path: Path, interface: str) -> None:
    """It reads its configuration and what that names; which is no kernel."""
    file = tmp_path / "file"
    file.write_bytes(b"no kernel" * 10000)
    boot_disk(tmp_path / "disk.img", "default x\nlabel x\nkernel afile\n", (file, "afile"))
    with machine(tmp_path / "disk.img", interface, 64 << 20) as vm:
        vm.boot_firmware(SEABIOS.read_bytes())
        outcome = vm.run(until=b"Booting kernel failed", timeout=60)
        assert outcome.ending is Ending.PAUSED, vm.output[-2000:]
        assert b"SYSLINUX" in vm.output
        assert b"Loading afile... ok\r\n" in vm.output


@needs_syslinux
@pytest.mark.skipif(not DIRECTORY, reason="NO LINUX: see test_linux")
def test_firmware_boot_loader_and_linux(tmp_path: Path) -> None:
    """The whole way of a PC; by virtio, since a kernel by PIO takes its time."""
    boot_disk(
        tmp_path / "disk.img",
        "default linux\nlabel linux\nkernel vmlinuz\ninitrd initrd.gz\nappend console=ttyS0\n",
        (Path(DIRECTORY) / "vmlinuz", "vmlinuz"),
        (Path(DIRECTORY) / "initramfs.cpio.gz", "initrd.gz"),
    )
    with machine(tmp_path / "disk.img", "virtio", 256 << 20) as vm:
        vm.boot_firmware(SEABIOS.read_bytes())
        assert vm.run(until=PROMPT, timeout=350).ending is Ending.PAUSED, vm.output[-2000:]
        assert b"Loading initrd.gz...ok" in vm.output
