"""ACPI tables: sums and pointers by our own reader, the AML by ``iasl`` where it is at hand."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from fake_clock import FakeClock
from fakes import FakeHost

from devices.bus import Range
from devices.pci.ecam import ECAM
from devices.pci.intx import IntxRouter, Slot
from devices.platform.acpi_pm import AcpiPm
from devices.platform.hpet import BASE as HPET_BASE
from devices.platform.hpet import Hpet
from vmm.firmware import aml
from vmm.firmware.acpi import AcpiImage, firmware_files, link_tables, place_tables
from vmm.firmware.linker import Linker, Zone, checksum
from vmm.firmware.platform import COM1, Platform, SerialPort

FULL = Platform(fw_cfg=True, vga=True, serial=(COM1, SerialPort(0x2F8, 3)))
BARE = Platform(hpet=None, keyboard_controller=False, serial=(), power_button=False)
PLATFORMS = {"default": Platform(), "full": FULL, "bare": BARE}


class Memory:
    """The guest's RAM with one image in it, and a kernel that follows the pointers."""

    def __init__(self, pieces: dict[int, bytes]) -> None:
        self.pieces = pieces

    def read(self, address: int, length: int) -> bytes:
        for start, data in self.pieces.items():
            if start <= address and address + length <= start + len(data):
                return data[address - start : address - start + length]
        raise AssertionError(f"{address:#x}+{length:#x} is outside the tables")

    def table(self, address: int) -> bytes:
        signature, length = struct.unpack("<4sI", self.read(address, 8))
        table = self.read(address, length)
        if signature != b"FACS":
            assert sum(table) % 256 == 0, signature
        return table

    def tables(self, rsdp_address: int) -> dict[str, bytes]:
        """All tables by signature, reached as ACPI 5.0 section 5.2.1 describes."""
        assert rsdp_address % 16 == 0
        rsdp = self.read(rsdp_address, 36)
        assert rsdp[:8] == b"RSD PTR "
        assert rsdp[15] == 2
        assert sum(rsdp[:20]) % 256 == sum(rsdp) % 256 == 0
        rsdt_at, size, xsdt_at = struct.unpack_from("<IIQ", rsdp, 16)
        assert size == 36
        rsdt, xsdt = self.table(rsdt_at), self.table(xsdt_at)
        narrow = [at for (at,) in struct.iter_unpack("<I", rsdt[36:])]
        wide = [at for (at,) in struct.iter_unpack("<Q", xsdt[36:])]
        assert narrow == wide
        found = {"RSDT": rsdt, "XSDT": xsdt}
        listed = [self.table(at) for at in wide]
        facp = listed[0]
        assert facp[:4] == b"FACP", "the FADT comes first"
        facs_at, dsdt_at = struct.unpack_from("<II", facp, 36)
        assert facs_at % 64 == 0
        assert struct.unpack_from("<QQ", facp, 132) == (0, dsdt_at)
        for table in (*listed, self.table(facs_at), self.table(dsdt_at)):
            found[table[:4].decode()] = table
        return found


def read_image(image: AcpiImage) -> dict[str, bytes]:
    return Memory({image.start: image.data}).tables(image.rsdp)


@pytest.fixture(params=PLATFORMS)
def platform(request: pytest.FixtureRequest) -> Platform:
    return PLATFORMS[request.param]


@pytest.fixture
def tables() -> dict[str, bytes]:
    return read_image(place_tables(Platform()))


# Placing.


def test_all_tables_can_be_reached(platform: Platform) -> None:
    names = {"RSDT", "XSDT", "FACP", "FACS", "DSDT", "APIC", "MCFG"}
    expected = names if platform.hpet is None else names | {"HPET"}
    assert read_image(place_tables(platform)).keys() == expected


def test_configuration_space_is_where_the_root_has_it(tables: dict[str, bytes]) -> None:
    assert struct.unpack_from("<QHBB", tables["MCFG"], 44) == (ECAM.start, 0, 0, 255)
    assert len(tables["MCFG"]) == 60
    taken = bytes((0x86, 9, 0, 1)) + struct.pack("<II", ECAM.start, ECAM.length)
    assert taken in tables["DSDT"], "the board's own resources have it"


def test_default_place_is_where_kernels_look() -> None:
    image = place_tables(Platform())
    assert image.rsdp == image.start == 0xE0000
    assert image.start + len(image.data) <= 0xF0000


def test_other_windows() -> None:
    image = place_tables(Platform(), Range(0x7FF0_0000, 0x10000))
    assert image.rsdp == 0x7FF0_0000
    assert "DSDT" in read_image(image)
    size = len(image.data)
    assert place_tables(Platform(), Range(0xE0000, size)).data
    with pytest.raises(ValueError, match="do not fit"):
        place_tables(Platform(), Range(0xE0000, size - 1))
    with pytest.raises(ValueError, match="aligned"):
        place_tables(Platform(), Range(0xE0010, 0x10000))


def test_same_platform_same_bytes() -> None:
    assert place_tables(Platform()) == place_tables(Platform())


# Contents.


def test_fadt(tables: dict[str, bytes]) -> None:
    facp = tables["FACP"]
    assert (len(facp), facp[8]) == (268, 5)
    sci, smi = struct.unpack_from("<HI", facp, 46)
    assert (sci, smi) == (9, 0)
    assert struct.unpack_from("<8I", facp, 56) == (0x600, 0, 0x604, 0, 0, 0x608, 0, 0)
    assert list(facp[88:96]) == [4, 2, 0, 4, 0, 0, 0, 0]
    assert facp[108] == 0x32
    reset = struct.unpack_from("<BBBBQB", facp, 116)
    assert reset == (1, 8, 0, 1, 0xCF9, 6)
    for offset, size, port in ((148, 4, 0x600), (172, 2, 0x604), (208, 4, 0x608)):
        kind, bits, _, _, address = struct.unpack_from("<BBBBQ", facp, offset)
        assert (kind, bits, address) == (1, 8 * size, port)
    for offset in (160, 184, 196, 220, 232, 244, 256):
        assert facp[offset : offset + 12] == bytes(12)


@pytest.mark.parametrize(
    ("platform", "boot", "on", "off"),
    [
        (Platform(), 0b111, 1 << 10, 1 << 8 | 1 << 4 | 1 << 20),
        (FULL, 0b011, 1 << 10, 1 << 8 | 1 << 4 | 1 << 20),
        (BARE, 0b101, 1 << 10 | 1 << 4, 1 << 8 | 1 << 20),
        (Platform(pm_timer_bits=32), 0b111, 1 << 10 | 1 << 8, 1 << 4 | 1 << 20),
    ],
)
def test_fadt_flags(platform: Platform, boot: int, on: int, off: int) -> None:
    facp = read_image(place_tables(platform))["FACP"]
    arch, _, flags = struct.unpack_from("<HBI", facp, 109)
    assert arch == boot
    assert (flags & on, flags & off) == (on, 0)


def test_tables_agree_with_the_devices(tables: dict[str, bytes]) -> None:
    clock = FakeClock()
    hpet = Hpet(FakeHost(), clock, lambda line, level: None)
    identity, kind, bits, _, _, address = struct.unpack_from("<IBBBBQ", tables["HPET"], 36)
    assert (identity, kind, bits, address) == (hpet.capabilities, 0, 64, HPET_BASE)
    pm = AcpiPm(FakeHost(), clock, lambda: None)
    starts = [region.start for region in pm.regions()]
    assert starts == [struct.unpack_from("<I", tables["FACP"], at)[0] for at in (56, 64, 76)]
    clock.advance(10_000_000_000)
    _, _, timer = pm.handlers()
    is_32_bits = struct.unpack_from("<I", tables["FACP"], 112)[0] >> 8 & 1
    assert (timer.read(0, 4) >= 1 << 24) == is_32_bits


def test_madt(tables: dict[str, bytes]) -> None:
    madt = tables["APIC"]
    assert struct.unpack_from("<II", madt, 36) == (0xFEE0_0000, 1)
    entries, position = [], 44
    while position < len(madt):
        size = madt[position + 1]
        entries.append(madt[position : position + size])
        position += size
    assert position == len(madt)
    assert entries == [
        struct.pack("<BBBBI", 0, 8, 0, 0, 1),
        struct.pack("<BBBBII", 1, 12, 1, 0, 0xFEC0_0000, 0),
        struct.pack("<BBBBIH", 2, 10, 0, 0, 2, 0),
        struct.pack("<BBBBIH", 2, 10, 0, 9, 9, 0xF),
        struct.pack("<BBBHB", 4, 6, 0xFF, 0, 1),
    ]


def test_dsdt_has_soft_off_and_the_routing_of_the_router(tables: dict[str, bytes]) -> None:
    dsdt = tables["DSDT"]
    assert dsdt[8] == 2
    assert b"\\_S5_\x12\x08\x04\x0a\x05\x0a\x05\x00\x00" in dsdt
    router = IntxRouter(lambda irq, level: None)
    for device in range(1, 32):
        for pin in range(4):
            route = (device << 16 | 0xFFFF, pin, 0, router.irq_for(Slot(device), pin))
            assert aml.package(*map(aml.integer, route)) in dsdt
    assert aml.integer(0xFFFF) + b"\x00\x00" not in dsdt  # the host bridge has no interrupt


def test_windows_are_told() -> None:
    platform = Platform(mmio_window=Range(0xD000_0000, 0x1000_0000), io_window=Range(0x8000, 0x800))
    dsdt = read_image(place_tables(platform))["DSDT"]
    assert struct.pack("<IIII", 0, 0xD000_0000, 0xDFFF_FFFF, 0) in dsdt
    assert struct.pack("<HHHHH", 0, 0x8000, 0x87FF, 0, 0x800) in dsdt


# Firmware does the same by the loader script.


def run_script(files: dict[str, bytes], places: dict[str, int]) -> Memory:
    """What SeaBIOS does with ``etc/table-loader``."""
    loaded: dict[str, bytearray] = {}
    script = files["etc/table-loader"]
    assert len(script) % 128 == 0
    for at in range(0, len(script), 128):
        entry = script[at : at + 128]
        (command,) = struct.unpack_from("<I", entry)
        name = entry[4:60].rstrip(b"\0").decode()
        if command == 1:
            align, zone = struct.unpack_from("<IB", entry, 60)
            assert places[name] % align == 0
            assert zone == (2 if name == "etc/acpi/rsdp" else 1)
            assert name not in loaded
            loaded[name] = bytearray(files[name])
        elif command == 2:
            source = entry[60:116].rstrip(b"\0").decode()
            offset, size = struct.unpack_from("<IB", entry, 116)
            assert source in loaded
            value = int.from_bytes(loaded[name][offset : offset + size], "little")
            loaded[name][offset : offset + size] = (value + places[source]).to_bytes(size, "little")
        else:
            assert command == 3
            offset, start, length = struct.unpack_from("<III", entry, 60)
            total = sum(loaded[name][start : start + length])
            loaded[name][offset] = loaded[name][offset] - total & 0xFF
    return Memory({places[name]: bytes(data) for name, data in loaded.items()})


def test_loader_script_gives_the_same_tables(platform: Platform) -> None:
    places = {"etc/acpi/rsdp": 0xF5A40, "etc/acpi/tables": 0x3FF_F540}
    memory = run_script(firmware_files(platform), places)
    tables = memory.tables(places["etc/acpi/rsdp"])
    assert tables["DSDT"] == read_image(place_tables(platform))["DSDT"]
    done = link_tables(platform).resolve(places)
    assert {places[name]: data for name, data in done.items()} == memory.pieces


def test_linker_says_what_does_not_fit() -> None:
    linker = Linker()
    file = linker.file("a", 16, Zone.HIGH)
    file.add(bytes(4))
    file.point(0, 4, file, 0)
    assert linker.resolve({"a": 0xFFFF_FFF0})["a"] == b"\xf0\xff\xff\xff"
    with pytest.raises(ValueError, match="4 bytes"):
        linker.resolve({"a": 1 << 32})
    with pytest.raises(ValueError, match="aligned"):
        linker.resolve({"a": 8})
    with pytest.raises(ValueError, match="aligned"):
        file.add(b"", 32)


def test_checksum_makes_the_sum_zero() -> None:
    for data in (b"", b"\x01", b"\xff\xff", bytes(range(256)) * 3):
        assert (sum(data) + checksum(data)) % 256 == 0


# AML.


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        (0, "00"),
        (1, "01"),
        (2, "0a02"),
        (0xFF, "0aff"),
        (0x100, "0b0001"),
        (0xFFFF_FFFF, "0cffffffff"),
        (1 << 32, "0e0000000001000000"),
        ((1 << 64) - 1, "ff"),
    ],
)
def test_integers(value: int, encoded: str) -> None:
    assert aml.integer(value).hex() == encoded


@pytest.mark.parametrize("value", [-1, 1 << 64])
def test_integers_that_are_none(value: int) -> None:
    with pytest.raises(ValueError, match="AML integer"):
        aml.integer(value)


@pytest.mark.parametrize(
    ("text", "encoded"),
    [
        ("A", b"A___"),
        ("\\_SB", b"\\_SB_"),
        ("_SB.PCI0", b"\x2e_SB_PCI0"),
        ("\\_SB.PCI0.COM1", b"\\\x2f\x03_SB_PCI0COM1"),
    ],
)
def test_names(text: str, encoded: bytes) -> None:
    assert aml.path(text) == encoded


@pytest.mark.parametrize("text", ["", "TOOLONG", "1ABC", "ab", "A..B", "A.", "^A"])
def test_names_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="AML name"):
        aml.path(text)


def test_eisa_ids() -> None:
    assert aml.eisa_id("PNP0A03").hex() == "0c41d00a03"
    for wrong in ("PNP0A0", "pnp0A03", "PNP0A0G", "QEMU0002"):
        with pytest.raises(ValueError, match="EISA"):
            aml.eisa_id(wrong)


@pytest.mark.parametrize("size", [0, 50, 58, 59, 70, 4000, 4085, 4086, 4100, 70_000, (1 << 20) + 9])
def test_package_lengths_count_themselves(size: int) -> None:
    encoded = aml.scope("A", bytes(size))
    lead = encoded[1]
    more = lead >> 6
    length = lead & 0x3F if not more else lead & 0xF
    for index in range(more):
        length |= encoded[2 + index] << 4 + 8 * index
    assert length == len(encoded) - 1
    assert encoded.endswith(b"A___" + bytes(size))


def test_what_is_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match="too many"):
        aml.package(*[b"\0"] * 256)
    with pytest.raises(ValueError, match="interrupt"):
        aml.irq(16)


# By the ACPI CA tools.


def iasl(directory: Path, *arguments: str) -> str:
    tool = shutil.which("iasl")
    if tool is None:
        pytest.skip("NOT TESTED: there is no iasl here (package acpica-tools)")
    done = subprocess.run(
        [tool, *arguments],
        cwd=directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_iasl_takes_every_table_apart(tmp_path: Path, platform: Platform) -> None:
    for name, table in read_image(place_tables(platform)).items():
        (tmp_path / f"{name}.dat").write_bytes(table)
        said = iasl(tmp_path, "-d", f"{name}.dat")
        assert "rror" not in said, said
        assert "arning" not in said, said
        text = (tmp_path / f"{name}.dsl").read_text()
        for complaint in ("Invalid", "Unknown", "incorrect", "Unexpected", "ERROR"):
            assert complaint not in text, f"{name}: {complaint}"


def test_iasl_makes_the_same_dsdt_of_its_own_reading(tmp_path: Path, platform: Platform) -> None:
    dsdt = read_image(place_tables(platform))["DSDT"]
    (tmp_path / "dsdt.dat").write_bytes(dsdt)
    iasl(tmp_path, "-d", "dsdt.dat")
    said = iasl(tmp_path, "-oa", "dsdt.dsl")
    assert "0 Errors, 0 Warnings, 0 Remarks" in said
    # The header tells who made the table and its sum.
    assert (tmp_path / "dsdt.aml").read_bytes()[36:] == dsdt[36:]
