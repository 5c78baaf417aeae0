"""What Linux and its lspci make of the PCI functions of a machine, against what was configured.

As in ``test_linux.py`` the guest comes from `guests.linux`, here with ``--with pciutils``.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_linux import DIRECTORY, Shell, boot

from devices.bus import BusType
from guests import cpio
from vmm.config import MachineConfig, default_devices, parse_device
from vmm.machine import Machine

pytestmark = [
    pytest.mark.skipif(
        not DIRECTORY,
        reason="NO LINUX: run 'python -m guests.linux --with pciutils DIR' and set "
        "VMM_TEST_LINUX=DIR",
    ),
    pytest.mark.timeout(400),
]


def rom_image() -> bytes:
    """A ROM of 3 KiB as Linux wants to see one (PCI 3.0, 6.3.1): signature, data structure."""
    data = struct.pack("<4sHHHHB3sHHBB", b"PCIR", 0x1234, 0xC501, 0, 0x18, 0, b"", 6, 0, 0, 0x80)
    head = b"\x55\xaa".ljust(0x18, b"\0") + struct.pack("<H", 0x1C)
    return (head.ljust(0x1C, b"\0") + data).ljust(3072, b"\x5a")


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    packed = Path(DIRECTORY, "initramfs.cpio.gz").read_bytes()
    if not any(entry.name.endswith("bin/lspci") for entry in cpio.unpack(gzip.decompress(packed))):
        pytest.skip(f"NO lspci in {DIRECTORY}: run 'python -m guests.linux --with pciutils DIR'")
    rom = tmp_path_factory.mktemp("rom") / "boot.rom"
    rom.write_bytes(rom_image())
    devices = list(default_devices())
    for text in (
        "config-space,name=f0,slot=6",
        "config-space,name=f1,slot=6.1,ram_size=0x100000",
        "pci-bridge,name=br1,slot=4",
        f"config-space,name=near,slot=br1:3,rom={rom}",
        "pci-bridge,name=br2,slot=br1:5",
        "config-space,name=far,slot=br2:0",
        "pci-bridge,name=empty,slot=9",
    ):
        devices.append(parse_device(text, [each.name for each in devices]))
    with Machine(MachineConfig(memory=256 << 20, devices=tuple(devices))) as machine:
        yield boot(machine)
        for name, line in machine.parts.wiring.log_lines:
            raise AssertionError(f"{name}: {line}")


def asked(shell: Shell, command: str) -> list[str]:
    """The lines that a command prints, without its echo and the prompt."""
    lines = [line.strip("\r") for line in shell.ask(command).split("\n")]
    return lines[1:-1]


def lspci(shell: Shell, where: str = "") -> dict[str, list[str]]:
    """The lines of ``lspci -vvv -n`` by function; of one function all lines."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in asked(shell, f"lspci -vvv -n {where} 2>/dev/null"):
        if re.match(r"[0-9a-f]{2}:[0-9a-f]{2}\.[0-7] ", line):
            lines = found[line.split()[0]] = []
        lines.append(line.strip())
    return found


def test_linux_finds_what_was_configured_and_complains_of_nothing(shell: Shell) -> None:
    functions = {where: lines[0].split()[1:3] for where, lines in lspci(shell).items()}
    example, bridge = ["ff00:", "1234:c501"], ["0604:", "1234:0604"]
    assert functions == {
        "00:00.0": ["0600:", "1234:0600"],
        "00:01.0": example,
        "00:04.0": bridge,
        "00:06.0": example,
        "00:06.1": example,
        "00:09.0": bridge,
        "01:03.0": example,
        "01:05.0": bridge,
        "02:00.0": example,
    }
    dmesg = shell.ask("dmesg")
    assert "PCI: MMCONFIG for domain 0000 [bus 00-ff] at [mem 0xd0000000-0xdfffffff]" in dmesg
    assert "MMCONFIG at [mem 0xd0000000-0xdfffffff] reserved in" in dmesg
    for complaint in ("can't assign", "can't claim", "no space", "conflict", "failed to assign"):
        assert complaint not in dmesg
    assert "bridge window [mem size" not in dmesg, "a window that Linux had to move"


def test_lspci_tells_bars_capabilities_and_interrupts(shell: Shell) -> None:
    near = "\n".join(lspci(shell, "-s 1:3.0")["01:03.0"])
    root = shell.machine.parts.pci
    config = [root.read_config(1 << 8 | 3 << 3, register) for register in range(64)]
    for pattern in (
        rf"Region 0: Memory at {config[4]:08x} \(32-bit, non-prefetchable\) \[size=4K\]",
        rf"Region 2: Memory at {config[6] & ~15:x} \(64-bit, prefetchable\) \[size=64K\]",
        rf"Region 4: I/O ports at {config[8] & ~3:x} \[size=16\]",
        rf"Expansion ROM at {config[12]:08x} \[disabled\] \[size=4K\]",
        r"Vendor Specific Information: Len=09",
        r"Power Management version 3",
        r"Status: D0 NoSoftRst\+",
        r"AFCap: TP\+ FLR\+",
        r"MSI-X: Enable- Count=4 Masked-\n",
        r"Vector table: BAR=0 offset=00000800\nPBA: BAR=0 offset=00000c00",
    ):
        assert re.search(pattern, near), (pattern, near)
    assert "size=1M" in "\n".join(lspci(shell, "-s 0:6.1")["00:06.1"])
    # Behind br2 (device 5) behind br1 (device 4): INTA# of device 0 is PIRQ (0 + 5 + 4) mod 4.
    far = "\n".join(lspci(shell, "-s 2:0.0")["02:00.0"])
    assert "Interrupt: pin A routed to IRQ 11" in far
    bridge = "\n".join(lspci(shell, "-s 0:4.0")["00:04.0"])
    assert "primary=00, secondary=01, subordinate=02" in bridge
    # Each sort of memory behind it has a window, and Linux leaves both where they were put.
    values = [root.read_config(4 << 3, register) for register in range(64)]
    base, limit = (values[9] & 0xFFF0) << 16, values[9] | 0xF_FFFF
    assert f"Prefetchable memory behind bridge: {base:08x}-{limit:08x} [size=2M]" in bridge
    assert base <= config[6] & ~15 <= limit
    base, limit = (values[8] & 0xFFF0) << 16, values[8] | 0xF_FFFF
    assert f"Memory behind bridge: {base:08x}-{limit:08x} [size=2M]" in bridge
    assert base <= config[4] <= limit
    for width in ("", " 64bit pref"):
        assert re.search(
            rf"pci 0000:00:04\.0:   bridge window \[mem 0x[0-9a-f]+-0x[0-9a-f]+{width}\]",
            shell.ask("dmesg"),
        )
    raw = asked(shell, "hexdump -ve '1/4 \"%08x\\n\"' /proc/bus/pci/01/03.0")
    assert [int(dword, 16) for dword in raw] == config


def test_everything_is_reachable_where_linux_says(shell: Shell) -> None:
    assert shell.machine.parts.pci.problems() == []
    for where in ("00:06.0", "01:03.0", "02:00.0"):
        lines = asked(shell, f"cat /sys/bus/pci/devices/0000:{where}/resource")
        start, end, _ = (int(word, 16) for word in lines[0].split())
        entry = shell.machine.parts.buses[BusType.MMIO].find(start, 4)
        assert entry is not None
        assert (entry.start, entry.end) == (start, end + 1)
        assert shell.machine.parts.buses[BusType.MMIO].read(start, 4) == 0x4346_4753


def test_resets_that_linux_does(shell: Shell) -> None:
    shell.ask("D=/sys/bus/pci/devices/0000:02:00.0")
    assert asked(shell, "cat $D/reset_method") == ["af_flr bus"]
    before = asked(shell, "setpci -s 2:0.0 10.l COMMAND")
    buses = shell.machine.parts.buses
    place = int(before[0], 16)
    for method in ("af_flr", "bus"):
        buses[BusType.MMIO].write(place + 4, 4, 0x1234)
        assert buses[BusType.MMIO].read(place + 4, 4) == 0x1234
        assert asked(shell, f"echo {method} >$D/reset_method; echo 1 >$D/reset; echo $?") == ["0"]
        assert asked(shell, "setpci -s 2:0.0 10.l COMMAND") == before
        assert buses[BusType.MMIO].read(place + 4, 4) == 0


def test_power_states_rom_and_a_move_by_linux(shell: Shell) -> None:
    shell.ask("D=/sys/bus/pci/devices/0000:01:03.0")
    shell.ask("setpci -s 1:3.0 CAP_PM+4.w=3")
    assert any(line.startswith("Status: D3") for line in lspci(shell, "-s 1:3.0")["01:03.0"])
    shell.ask("setpci -s 1:3.0 CAP_PM+4.w=0")
    summed = asked(shell, "echo 1 >$D/rom; md5sum $D/rom")[-1].split()[0]
    assert summed == hashlib.md5(rom_image()[:3072], usedforsecurity=False).hexdigest()

    def places() -> set[int]:
        return {entry.start for entry in shell.machine.parts.buses[BusType.MMIO]}

    # Linux has the same ideas as we about where BARs belong, so one is moved behind its back.
    elsewhere = int(asked(shell, "setpci -s 1:3.0 10.l")[0], 16) + 0x8000
    for written in ("COMMAND=0:3", f"10.l={elsewhere:x}", "COMMAND=3:3"):
        shell.ask(f"setpci -s 1:3.0 {written}")
    assert elsewhere in places()
    shell.ask("echo 1 >$D/remove; echo 1 >/sys/bus/pci/rescan")
    assert lspci(shell, "-s 1:3.0")
    assert shell.machine.parts.pci.problems() == []
    assert elsewhere not in places()
    assert int(asked(shell, "cat $D/resource")[0].split()[0], 16) in places()
