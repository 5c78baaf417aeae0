"""The MP tables, read as a kernel reads them."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import pytest

from devices.pci.intx import IntxRouter, Slot
from vmm.firmware.mptable import ADDRESS, build_mptable
from vmm.firmware.platform import Platform

SIZES = {0: 20, 1: 8, 2: 8, 3: 8, 4: 8}
ISA, PCI = "ISA", "PCI"
LEVEL_LOW = 0xF


@dataclass
class Found:
    """What a kernel knows once it has read them."""

    lapic: int = 0
    processors: list[tuple[int, int]] = field(default_factory=list)
    buses: dict[int, str] = field(default_factory=dict)
    ioapics: list[tuple[int, int, int]] = field(default_factory=list)
    interrupts: dict[tuple[str, int], tuple[int, int, int, int]] = field(default_factory=dict)
    local: list[tuple[int, int, int]] = field(default_factory=list)


def read(data: bytes, address: int) -> Found:
    """Find the pointer, check all sums, walk the entries (MP 1.4, chapter 4)."""
    signature, table, paragraphs, revision = struct.unpack_from("<4sIBB", data)
    assert (signature, paragraphs, revision) == (b"_MP_", 1, 4)
    assert sum(data[:16]) % 256 == 0
    assert data[11:16] == bytes(5)  # a configuration table is there; virtual wire mode
    body = data[table - address :]
    signature, size, revision = struct.unpack_from("<4sHB", body)
    assert (signature, revision) == (b"PCMP", 4)
    assert len(body) == size
    assert sum(body) % 256 == 0
    count, found = struct.unpack_from("<H", body, 34)[0], Found()
    found.lapic = struct.unpack_from("<I", body, 36)[0]
    position, kinds = 44, []
    for _ in range(count):
        entry = body[position : position + SIZES[body[position]]]
        position += len(entry)
        kinds.append(entry[0])
        take(entry, found)
    assert position == size
    assert kinds == sorted(kinds), "entries are in the order of their types (4.3)"
    return found


def take(entry: bytes, found: Found) -> None:
    match entry[0]:
        case 0:
            found.processors.append((entry[1], entry[3]))
        case 1:
            found.buses[entry[1]] = entry[2:].decode().rstrip()
        case 2:
            found.ioapics.append((entry[1], entry[3], struct.unpack_from("<I", entry, 4)[0]))
        case 3:
            kind, flags, bus, source, apic, pin = struct.unpack("<xBHBBBB", entry)
            key = (found.buses[bus], source)
            assert key not in found.interrupts
            found.interrupts[key] = (kind, flags, apic, pin)
        case 4:
            kind, _, bus, _, apic, pin = struct.unpack("<xBHBBBB", entry)
            assert found.buses[bus] == ISA
            found.local.append((kind, apic, pin))


@pytest.fixture(scope="module")
def found() -> Found:
    return read(build_mptable(Platform()), ADDRESS)


def test_one_processor_and_its_interrupt_controllers(found: Found) -> None:
    assert found.processors == [(0, 3)]
    assert found.lapic == 0xFEE0_0000
    assert found.ioapics == [(1, 1, 0xFEC0_0000)]
    assert sorted(found.buses.values()) == [ISA, PCI]


def test_isa_lines_go_to_the_input_of_their_number_but_for_the_timer(found: Found) -> None:
    isa = {source: entry for (bus, source), entry in found.interrupts.items() if bus == ISA}
    assert sorted(isa) == [0, 1, 3, 4, 5, 6, 7, 8, 9, 12, 13, 14, 15]
    for line, (kind, flags, apic, pin) in isa.items():
        assert (kind, apic) == (0, 1)
        assert pin == (2 if line == 0 else line)
        assert flags == (LEVEL_LOW if line == 9 else 0)


def test_pci_pins_go_where_the_router_drives_them(found: Found) -> None:
    router = IntxRouter(lambda irq, level: None)
    pci = {source: entry for (bus, source), entry in found.interrupts.items() if bus == PCI}
    assert pci == {
        device << 2 | pin: (0, LEVEL_LOW, 1, router.irq_for(Slot(device), pin))
        for device in range(1, 32)
        for pin in range(4)
    }


def test_local_interrupts(found: Found) -> None:
    assert found.local == [(3, 0xFF, 0), (1, 0xFF, 1)]


def test_other_places() -> None:
    platform = Platform(ioapic=0xFEC1_0000, ioapic_id=5, lapic=0xFEF0_0000, pirqs=(5, 7, 10, 11))
    found = read(build_mptable(platform, 0x9FC00), 0x9FC00)
    assert (found.lapic, found.ioapics) == (0xFEF0_0000, [(5, 1, 0xFEC1_0000)])
    assert (ISA, 5) not in found.interrupts
    assert found.interrupts[PCI, 1 << 2 | 3] == (0, LEVEL_LOW, 5, 5)


def test_pointer_needs_its_alignment() -> None:
    with pytest.raises(ValueError, match="0xf0008"):
        build_mptable(Platform(), 0xF0008)


def test_it_fits_below_one_mebibyte() -> None:
    assert ADDRESS + len(build_mptable(Platform())) <= 0x100000
