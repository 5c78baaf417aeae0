"""16-bit mode: flat binaries, boot sectors, firmware ROMs."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

from devices.bus import Bus, BusType, Range
from devices.errors import UserError
from vmm.boot import firmware
from vmm.boot.loader import load
from vmm.boot.options import BootOptions, BootResult, Mode
from vmm.cpu.engine import Cpu, StopReason
from vmm.cpu.state import CpuState
from vmm.memory import MAX_ROM, GuestMemory

MIB = 1 << 20
KIB = 1 << 10
RDX, RSP = 2, 4
HLT = b"\xf4"
SIXTEEN = Mode.REAL


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    ram = GuestMemory(2 * MIB)
    yield ram
    ram.close()


def sector(code: bytes) -> bytes:
    return code.ljust(510, b"\0") + b"\x55\xaa"


def run(memory: GuestMemory, result: BootResult) -> tuple[str, CpuState]:
    """How the program ends and in what state."""
    mmio = Bus(BusType.MMIO, 1 << 40)
    for region in memory.regions:
        mmio.reserve(Range(region.start, region.size))
    cpu = Cpu(memory, Bus(BusType.PIO, 0x10000), mmio)
    try:
        cpu.set_state(result.state)
        for _ in range(100):
            stop = cpu.run(4096)
            if stop.reason is not StopReason.BUDGET:
                return stop.reason.value, cpu.get_state()
        raise AssertionError("it does not end")
    finally:
        cpu.close()


# Flat binaries.


@pytest.mark.parametrize(
    ("address", "cs", "ip"),
    [
        (None, 0, 0x7C00),
        (0x500, 0, 0x500),
        (0xFFFF, 0, 0xFFFF),
        (0x10000, 0x1000, 0),
        (0x12345, 0x1234, 5),
        (0x9FFF8, 0x9FFF, 8),
        (0xFFFFF, 0xFFFF, 0xF),
    ],
)
def test_flat(memory: GuestMemory, address: int | None, cs: int, ip: int) -> None:
    result = load(memory, HLT, BootOptions(load_addr=address, mode=SIXTEEN))
    state = result.state
    assert (result.format, state.cs.selector, state.cs.base, state.rip) == ("real", cs, cs * 16, ip)
    assert memory.read(cs * 16 + ip, 1) == HLT
    for segment in (state.ds, state.es, state.fs, state.gs):
        assert (segment.selector, segment.base, segment.limit) == (cs, cs * 16, 0xFFFF)
    assert (state.ss.selector, state.ss.base, state.gpr[RSP]) == (0x8000, 0x80000, 0xFFF0)
    assert (state.cr0 & 1, state.efer, state.rflags) == (0, 0, 2)
    assert (state.idtr.base, state.idtr.limit) == (0, 0x3FF)
    ending, after = run(memory, result)
    assert (ending, after.rip, after.cs.selector) == ("halt", ip + 1 & 0x1FFFF, cs)


def test_it_runs_in_16_bit_mode(memory: GuestMemory) -> None:
    # mov ax, 0x1234; push ax; pop bx; call +1; hlt; mov cx, cs; ret
    code = bytes.fromhex("b83412 50 5b e80100 f4 8cc9 c3")
    ending, state = run(memory, load(memory, code, BootOptions(load_addr=0x20000, mode=SIXTEEN)))
    assert ending == "halt"
    assert (state.gpr[0], state.gpr[3], state.gpr[1]) == (0x1234, 0x1234, 0x2000)
    assert state.gpr[RSP] == 0xFFF0


# Boot sectors.


def test_boot_sector(memory: GuestMemory) -> None:
    result = load(memory, sector(HLT), BootOptions())
    state = result.state
    assert (result.format, state.cs.selector, state.rip) == ("boot-sector", 0, 0x7C00)
    assert (state.ss.selector, state.gpr[RSP], state.gpr[RDX]) == (0, 0x7C00, 0x80)
    assert memory.read(0x7C00, 512) == sector(HLT)
    assert run(memory, result)[0] == "halt"


@pytest.mark.parametrize(
    ("image", "options", "format"),
    [
        (sector(HLT) + b"\0", BootOptions(), "flat"),
        (sector(HLT)[1:], BootOptions(), "flat"),
        (bytes(512), BootOptions(), "flat"),
        (sector(HLT), BootOptions(mode=Mode.PROTECTED), "flat"),
        (sector(HLT), BootOptions(load_addr=0x10000), "flat"),
        (sector(HLT), BootOptions(mode=SIXTEEN), "real"),
    ],
)
def test_what_is_a_boot_sector(
    memory: GuestMemory, image: bytes, options: BootOptions, format: str
) -> None:
    assert load(memory, image, options).format == format


# Interrupts that nobody handles.


@pytest.mark.parametrize(
    ("code", "vector"),
    [
        (b"\xcd\x10", 0x10),
        (b"\xcd\x13", 0x13),
        (b"\xcd\x00", 0),
        (b"\xcd\xff", 0xFF),
        (b"\xcc", 3),
        (b"\x31\xc9\xf7\xf1", 0),
        (b"\x0f\x0b", 6),
    ],
)
def test_a_missing_bios_is_seen(memory: GuestMemory, code: bytes, vector: int) -> None:
    """The guest ends in a triple fault, and CS says which vector it was."""
    ending, state = run(memory, load(memory, sector(code), BootOptions()))
    assert ending == "shutdown"
    assert state.cs.selector == 0xF000 + vector


def test_own_vectors_work(memory: GuestMemory) -> None:
    # mov word [0x40], 0x7C0B; mov word [0x42], 0; int 0x10 -> hlt
    code = bytes.fromhex("c706 4000 0f7c c706 4200 0000 cd10 90 f4")
    ending, state = run(memory, load(memory, sector(code), BootOptions()))
    assert (ending, state.rip) == ("halt", 0x7C10)


@pytest.mark.parametrize(
    ("image", "options", "text"),
    [
        (bytes(9), BootOptions(load_addr=MIB, mode=SIXTEEN), "of 0x9 bytes at 0x100000 does not"),
        (bytes(9), BootOptions(load_addr=MIB - 8, mode=SIXTEEN), "does not fit below 1 MiB"),
        (bytes(MIB), BootOptions(mode=SIXTEEN), "does not fit below 1 MiB"),
        (bytes(9), BootOptions(load_addr=-1, mode=SIXTEEN), "does not fit below 1 MiB"),
        (bytes(9), BootOptions(load_addr=0x3FF, mode=SIXTEEN), "overlaps the interrupt vectors"),
        (bytes(9), BootOptions(load_addr=0x8FFFF, mode=SIXTEEN), "overlaps the boot stack"),
        (bytes(9), BootOptions(load_addr=0xFFF50, mode=SIXTEEN), "overlaps the interrupt stub"),
        (bytes(9), BootOptions(mode=SIXTEEN, cmdline="x"), "a flat binary takes no command line"),
        (sector(b""), BootOptions(cmdline="x"), "a boot sector takes no command line"),
    ],
)
def test_errors(memory: GuestMemory, image: bytes, options: BootOptions, text: str) -> None:
    with pytest.raises(UserError) as caught:
        load(memory, image, options)
    assert text in str(caught.value)


# Firmware.


def rom(size: int) -> bytes:
    """Jumps from the reset vector to its last 64 KiB below 1 MiB and says where it was."""
    image = bytearray(b"\xcc" * size)
    # mov ax, cs; hlt
    image[-0x10000:-0xFFFD] = b"\x8c\xc8\xf4"
    image[-16:-11] = b"\xea" + struct.pack("<HH", 0, 0xF000)
    return bytes(image)


@pytest.mark.parametrize("size", [64 * KIB, 128 * KIB, 256 * KIB, 512 * KIB, MAX_ROM])
def test_firmware(size: int) -> None:
    image = rom(size)
    memory = GuestMemory(4 * MIB, size)
    try:
        result = firmware.load(memory, image)
        assert (result.format, result.state) == ("firmware", CpuState())
        assert memory.read((1 << 32) - size, size) == image
        low = min(size, 256 * KIB)
        assert memory.read(MIB - low, low) == image[-low:]
        assert memory.read(MIB - low - 16, 16) == bytes(16)
        ending, state = run(memory, result)
        assert (ending, state.cs.selector, state.gpr[0]) == ("halt", 0xF000, 0xF000)
        assert state.rip == 3
    finally:
        memory.close()


def test_firmware_starts_at_the_top_of_4_gib() -> None:
    memory = GuestMemory(4 * MIB, 64 * KIB)
    try:
        result = firmware.load(memory, rom(64 * KIB))
        memory.write(MIB - 16, b"\x0f\x0b")
        memory.write((1 << 32) - 16, HLT)
        ending, state = run(memory, result)
        assert (ending, state.rip, state.cs.base) == ("halt", 0xFFF1, 0xFFFF_0000)
    finally:
        memory.close()


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "the file is empty"),
        (1, "a firmware ROM of 1 bytes: it must have a multiple of 64 KiB, at most 16 MiB"),
        (96 * KIB, "98304 bytes"),
        (MAX_ROM + 64 * KIB, "at most 16 MiB"),
        (128 * KIB, "of 0x20000 bytes; the machine was made for one of 0x10000"),
    ],
)
def test_bad_firmware(size: int, text: str) -> None:
    memory = GuestMemory(2 * MIB, 64 * KIB)
    try:
        with pytest.raises(UserError) as caught:
            firmware.load(memory, bytes(size), "bios.bin")
        assert str(caught.value).startswith("bios.bin: ")
        assert text in str(caught.value)
    finally:
        memory.close()


def test_no_room_for_firmware(memory: GuestMemory) -> None:
    with pytest.raises(UserError, match="made for one of 0x0"):
        firmware.load(memory, bytes(64 * KIB))


# The ROM's region.


def test_rom_region() -> None:
    memory = GuestMemory(5 << 30, MIB)
    try:
        starts = [(region.start, region.size, region.offset) for region in memory.regions]
        assert starts == [
            (0, 3 << 30, 0),
            ((1 << 32) - MIB, MIB, 5 << 30),
            (1 << 32, 2 << 30, 3 << 30),
        ]
        assert [region.start for region in memory.ram] == [0, 1 << 32]
        memory.write((1 << 32) - MIB, b"rom")
        memory.write(1 << 32, b"ram")
        assert list(memory.extents()) == [(3 << 30, 4096), (5 << 30, 4096)]
        assert bytes(memory.view[5 << 30 : (5 << 30) + 3]) == b"rom"
    finally:
        memory.close()


@pytest.mark.parametrize("size", [-4096, 1, MAX_ROM + 4096])
def test_rom_sizes(size: int) -> None:
    with pytest.raises(UserError, match="firmware ROM"):
        GuestMemory(MIB, size)


def test_nothing_is_loaded_into_the_rom() -> None:
    memory = GuestMemory(MIB, 64 * KIB)
    try:
        with pytest.raises(UserError, match="outside RAM"):
            load(memory, b"x", BootOptions(load_addr=(1 << 32) - 64 * KIB))
    finally:
        memory.close()
