"""fw_cfg: items by selector, the file directory, DMA, and what firmware finds in it."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import pytest
from fakes import FakeHost

from devices.bus import Range
from devices.errors import DeviceError
from devices.pci.ecam import ECAM
from devices.platform.fw_cfg import FwCfg
from vmm.firmware.fw_cfg_items import files, items
from vmm.firmware.platform import Platform
from vmm.memory import GuestMemory

RAM_SIZE = 1 << 20
SELECTOR, DATA, DMA_HIGH, DMA_LOW = 0, 1, 4, 8
ERROR, READ, SKIP, SELECT, WRITE = 1, 2, 4, 8, 16
DESCRIPTOR, BUFFER = 0x1000, 0x2FF8


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    made = GuestMemory(RAM_SIZE)
    yield made
    made.close()


class Guest:
    """Firmware that reads the items, by port or by DMA."""

    def __init__(self, memory: GuestMemory | None = None, **content: Any) -> None:
        self.host = FakeHost()
        self.memory = memory
        self.device = FwCfg(self.host, memory=memory, **content)

    def select(self, key: int) -> None:
        self.device.write(SELECTOR, 2, key)

    def take(self, count: int) -> bytes:
        return bytes(self.device.read(DATA, 1) for _ in range(count))

    def get(self, key: int, count: int) -> bytes:
        self.select(key)
        return self.take(count)

    def directory(self) -> dict[str, tuple[int, int]]:
        """(selector, size) of each file."""
        (count,) = struct.unpack(">I", self.get(0x19, 4))
        found = {}
        for _ in range(count):
            size, key, reserved, name = struct.unpack(">IHH56s", self.take(64))
            assert reserved == 0
            found[name.rstrip(b"\0").decode()] = (key, size)
        return found

    def file(self, name: str) -> bytes:
        key, size = self.directory()[name]
        return self.get(key, size)

    def dma(self, control: int, length: int, buffer: int, at: int = DESCRIPTOR) -> int:
        """Do one transfer; the control field afterwards."""
        assert self.memory is not None
        self.memory.write(at, struct.pack(">IIQ", control, length, buffer))
        self.start(at)
        return int.from_bytes(self.memory.read(at, 4), "big")

    def start(self, at: int) -> None:
        if at >> 32:
            self.device.write(DMA_HIGH, 4, swap(at >> 32))
        self.device.write(DMA_LOW, 4, swap(at & 0xFFFF_FFFF))


def swap(value: int) -> int:
    return int.from_bytes(value.to_bytes(4, "big"), "little")


# The traditional interface.


def test_signature_and_id() -> None:
    guest = Guest()
    (region,) = guest.device.regions()
    assert (region.start, region.length) == (0x510, 12)
    assert guest.get(0, 6) == b"QEMU\0\0"
    assert guest.get(1, 4) == b"\x01\0\0\0"


def test_selecting_rewinds() -> None:
    guest = Guest(items={5: b"abc"})
    assert guest.get(5, 2) == b"ab"
    assert guest.take(3) == b"c\0\0"
    assert guest.get(5, 3) == b"abc"
    assert guest.get(0x7777, 2) == b"\0\0"


def test_files_are_in_the_directory() -> None:
    content = {"opt/one": b"1", "etc/two": b"22", "etc/three": b""}
    guest = Guest(files=content)
    assert list(guest.directory()) == sorted(content)
    assert {key for key, _ in guest.directory().values()} == {0x20, 0x21, 0x22}
    assert {name: guest.file(name) for name in content} == content


@pytest.mark.parametrize(("offset", "size"), [(0, 1), (0, 2), (1, 2), (0, 4), (2, 1), (3, 1)])
def test_other_reads_give_all_ones_and_move_nothing(offset: int, size: int) -> None:
    guest = Guest(items={5: b"abc"})
    guest.select(5)
    assert guest.device.read(offset, size) == (1 << 8 * size) - 1
    assert guest.take(1) == b"a"


@pytest.mark.parametrize(("offset", "size"), [(0, 1), (1, 1), (0, 4), (2, 2), (4, 4), (8, 4)])
def test_other_writes_change_nothing(offset: int, size: int) -> None:
    guest = Guest(items={5: b"abc"})
    guest.select(5)
    guest.device.write(offset, size, 0)
    assert guest.take(3) == b"abc"


def test_without_memory_there_is_no_dma() -> None:
    guest = Guest()
    assert guest.device.read(DMA_HIGH, 4) == 0xFFFF_FFFF


@pytest.mark.parametrize("name", ["", "x" * 56, "ä", "a\0b"])
def test_impossible_file_names(name: str) -> None:
    with pytest.raises(ValueError, match="file name"):
        FwCfg(FakeHost(), files={name: b""})


def test_longest_file_name() -> None:
    assert list(Guest(files={"x" * 55: b""}).directory()) == ["x" * 55]


@pytest.mark.parametrize("key", [0, 1, 0x19, 0x20, 0x7FFF, -1, 0x10000])
def test_selectors_that_are_not_free(key: int) -> None:
    with pytest.raises(ValueError, match="selector"):
        FwCfg(FakeHost(), items={key: b""})


# DMA.


def test_dma_is_announced(memory: GuestMemory) -> None:
    guest = Guest(memory)
    assert guest.get(1, 4) == b"\x03\0\0\0"
    high, low = guest.device.read(DMA_HIGH, 4), guest.device.read(DMA_LOW, 4)
    assert struct.pack("<II", high, low) == b"QEMU CFG"
    assert guest.device.read(DMA_HIGH, 8) == int.from_bytes(b"QEMU CFG", "little")


def test_select_and_read_in_one_transfer(memory: GuestMemory) -> None:
    guest = Guest(memory, items={5: b"abcdefgh"})
    memory.write(BUFFER, b"\xff" * 16)
    assert guest.dma(5 << 16 | SELECT | READ, 4, BUFFER) == 0
    assert guest.dma(READ, 2, BUFFER + 4) == 0
    assert memory.read(BUFFER, 8) == b"abcdef\xff\xff"
    assert guest.take(3) == b"gh\0"


def test_skip(memory: GuestMemory) -> None:
    guest = Guest(memory, items={5: b"abcdefgh"})
    assert guest.dma(5 << 16 | SELECT | SKIP, 6, 0) == 0
    assert guest.take(2) == b"gh"
    for _ in range(3):
        assert guest.dma(SKIP, 0xFFFF_FFFF, 0) == 0
    assert guest.take(1) == b"\0"
    assert guest.device.state.offset == 1 << 32


def test_past_the_end_are_zeros(memory: GuestMemory) -> None:
    guest = Guest(memory, items={5: b"abc"})
    length = 200_000
    memory.view[BUFFER : BUFFER + length + 1] = b"\xff" * (length + 1)
    assert guest.dma(5 << 16 | SELECT | READ, length, BUFFER) == 0
    assert memory.read(BUFFER, length + 1) == b"abc" + bytes(length - 3) + b"\xff"


def test_pages_that_were_written_are_told(memory: GuestMemory) -> None:
    guest = Guest(memory, items={5: bytes(16)})
    guest.dma(5 << 16 | SELECT | READ, 16, BUFFER)  # across a page border
    told = [call[1:] for call in guest.host.calls if call[0] == "wrote_pages"]
    assert told == [(BUFFER >> 12, 2), (DESCRIPTOR >> 12, 1)]


def test_nothing_can_be_written(memory: GuestMemory) -> None:
    guest = Guest(memory, items={5: b"abc"})
    assert guest.dma(5 << 16 | SELECT | WRITE, 3, BUFFER) == ERROR
    assert guest.get(5, 3) == b"abc"


@pytest.mark.parametrize(
    ("length", "buffer"),
    [
        (1, RAM_SIZE),
        (9, RAM_SIZE - 8),
        (0xFFFF_FFFF, 0),
        (1, (1 << 64) - 1),
        (16, (1 << 64) - 8),
        (4, 0xFEE0_0000),
    ],
)
def test_buffer_outside_ram_is_an_error(memory: GuestMemory, length: int, buffer: int) -> None:
    guest = Guest(memory, items={5: b"abc"})
    memory.write(RAM_SIZE - 8, b"\xee" * 8)
    assert guest.dma(5 << 16 | SELECT | READ, length, buffer) == ERROR
    assert memory.read(RAM_SIZE - 8, 8) == b"\xee" * 8
    assert guest.take(1) == b"a"


@pytest.mark.parametrize(
    "at", [RAM_SIZE - 15, RAM_SIZE, 0xFFFF_FFF8, 1 << 32, (1 << 64) - 1, (1 << 64) - 16]
)
def test_descriptor_outside_ram_does_nothing(memory: GuestMemory, at: int) -> None:
    guest = Guest(memory)
    memory.write(0, bytes(8))
    guest.start(at)
    assert guest.host.calls == []
    assert list(memory.extents()) in ([], [(0, 4096)])


def test_high_half_counts_once(memory: GuestMemory) -> None:
    guest = Guest(memory, items={5: b"abc"})
    guest.start(1 << 32 | DESCRIPTOR)
    assert guest.dma(5 << 16 | SELECT | READ, 3, BUFFER) == 0
    assert memory.read(BUFFER, 3) == b"abc"


def test_buffer_over_the_descriptor_ends_with_the_result(memory: GuestMemory) -> None:
    guest = Guest(memory, items={5: b"\xff" * 16})
    assert guest.dma(5 << 16 | SELECT | READ, 16, DESCRIPTOR) == 0
    assert memory.read(DESCRIPTOR, 16) == bytes(4) + b"\xff" * 12


# State.


def test_a_restored_reader_goes_on(memory: GuestMemory) -> None:
    guest = Guest(memory, items={5: b"abcdef"})
    guest.get(5, 2)
    guest.device.write(DMA_HIGH, 4, swap(0x1234))
    saved = guest.device.snapshot()
    assert saved == {"selector": 5, "offset": 2, "dma_high": 0x1234}
    fresh = Guest(items={5: b"abcdef"})
    fresh.device.restore(saved)
    assert fresh.take(4) == b"cdef"
    for spoiled in ({"selector": 0x10000}, {"offset": -1}, {"offset": 1 << 33}, {"more": 1}):
        with pytest.raises(DeviceError):
            fresh.device.restore(saved | spoiled)


# What this machine's firmware finds.


def test_platform_items() -> None:
    ram = (Range(0, 0xC000_0000), Range(1 << 32, 0x4000_0000))
    guest = Guest(items=items(ram), files=files(Platform(), ram, boot_order=("/a", "/b")))
    assert guest.get(3, 8) == (4 << 30).to_bytes(8, "little")
    assert guest.get(5, 2) == guest.get(0x0F, 2) == b"\x01\0"
    assert guest.file("bootorder") == b"/a\n/b\0"
    e820 = [struct.unpack("<QQI", guest.file("etc/e820")[at : at + 20]) for at in (0, 20, 40)]
    reserved = (ECAM.start, ECAM.length, 2)
    assert e820 == [*((extent.start, extent.length, 1) for extent in ram), reserved]
    assert len(guest.file("etc/e820")) == 60
    assert guest.file("etc/acpi/rsdp")[:8] == b"RSD PTR "
    assert {"etc/acpi/tables", "etc/table-loader"} <= guest.directory().keys()


def test_extra_files_win() -> None:
    made = files(Platform(), (), extra={"etc/e820": b"mine", "etc/more": b"too"})
    assert (made["etc/e820"], made["etc/more"]) == (b"mine", b"too")
    assert "bootorder" not in made
