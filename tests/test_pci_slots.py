"""Where functions are plugged in, as the user writes it, up to a machine that is driven by ECAM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from devices.bus import BusType, Range
from devices.errors import UserError
from devices.pci.ecam import ECAM, Ecam
from vmm.config import DeviceConfig, MachineConfig, parse_device
from vmm.machine import Machine
from vmm.places import Place

NOBODY = 0xFFFF_FFFF
FUNCTION, BRIDGE = 0xC501_1234, 0x0604_1234


def machine(*texts: str) -> Machine:
    devices: list[DeviceConfig] = []
    for text in texts:
        devices.append(parse_device(f"{text},isolation=none", [each.name for each in devices]))
    return Machine(memory="16M", devices=tuple(devices))


def slots(made: Machine) -> dict[str, str]:
    found = made.parts.pci.slots()
    return {owner: str(slot) for slot, owner in found if owner != "pci-host-bridge"}


# The text.


@pytest.mark.parametrize(
    ("text", "place", "again"),
    [
        ("3", Place("", 3, 0), "3"),
        ("0x1f", Place("", 31, 0), "31"),
        ("3.0", Place("", 3, 0), "3"),
        ("3.7", Place("", 3, 7), "3.7"),
        ("br1:0", Place("br1", 0, 0), "br1:0"),
        ("a.b-2:31.1", Place("a.b-2", 31, 1), "a.b-2:31.1"),
    ],
)
def test_places(text: str, place: Place, again: str) -> None:
    assert Place.parse(text) == place
    assert str(place) == again
    assert DeviceConfig("x", "config-space", slot=text).slot == again


@pytest.mark.parametrize(
    "text", ["", "x", "0", "32", "-1", "3.8", "3.", ".1", "br1:32", "br1:", ":3", "1:2:3", "3.1.1"]
)
def test_texts_that_are_no_place(text: str) -> None:
    with pytest.raises(UserError, match="device 'x': slot="):
        DeviceConfig("x", "config-space", slot=text)


def test_numbers_are_places_too() -> None:
    config = DeviceConfig("x", "config-space", slot=9)
    assert config == DeviceConfig("x", "config-space", slot="9.0")
    with pytest.raises(UserError, match="no slot"):
        DeviceConfig("x", "config-space", slot=True)


# Plugging.


def test_the_order_of_the_configuration_does_not_matter() -> None:
    with machine(
        "config-space,name=deep,slot=br2:0.1",
        "config-space,name=f1,slot=3.1",
        "config-space,name=auto",
        "pci-bridge,name=br2,slot=br1:7",
        "config-space,name=deep0,slot=br2:0",
        "config-space,name=f0,slot=3",
        "pci-bridge,name=br1",
    ) as made:
        assert slots(made) == {
            "auto": "00:01.0",
            "br1": "00:02.0",
            "f0": "00:03.0",
            "f1": "00:03.1",
            "br2": "01:07.0",
            "deep0": "02:00.0",
            "deep": "02:00.1",
        }


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        (["config-space,slot=3.1"], "slot 3.1 needs a function 0"),
        (["config-space,name=a,slot=3", "config-space,name=b,slot=3.0"], "taken by 'a'"),
        (["config-space,slot=br1:3"], "is behind 'br1', which is no bridge"),
        (["config-space,name=br1", "config-space,slot=br1:3"], "is behind 'br1', which is no"),
        (["pci-bridge,name=a,slot=b:1", "pci-bridge,name=b,slot=a:1"], "is no bridge that leads"),
        (["echo,slot=br1:3"], "no PCI function"),
    ],
)
def test_plugs_that_do_not_fit(texts: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told), machine(*texts) as made:
        made.build()


def test_a_snapshot_is_restored_with_its_bridges(tmp_path: Path) -> None:
    texts = ("pci-bridge,name=br1", "config-space,name=f,slot=br1:3")
    devices = tuple(parse_device(text, []) for text in texts)
    with Machine(MachineConfig(memory=16 << 20, devices=devices)) as made:
        made.boot("counter")
        before = [(e.owner, e.range) for bus in made.parts.buses.values() for e in bus]
        assert any(owner == "f" for owner, _ in before)
        made.snapshot(tmp_path / "saved")
    with Machine.restore(tmp_path / "saved") as again:
        assert [(e.owner, e.range) for bus in again.parts.buses.values() for e in bus] == before
        assert slots(again) == {"br1": "00:01.0", "f": "01:03.0"}


# ECAM.


class Window:
    """The ECAM window of a machine and its function at 00:03.1, driven over the bus."""

    def __init__(self, made: Machine) -> None:
        self.mmio = made.parts.buses[BusType.MMIO]
        self.root = made.parts.pci

    def at(self, device: int, function: int, offset: int, bus: int = 0) -> int:
        return ECAM.start + (bus << 20 | device << 15 | function << 12 | offset)


def test_ecam_is_the_same_configuration_space() -> None:
    with machine("config-space,slot=3", "config-space,slot=3.1") as made:
        window = Window(made)
        read, write, at = window.mmio.read, window.mmio.write, window.at
        assert read(at(3, 1, 0), 4) == FUNCTION
        assert read(at(3, 2, 0), 4) == read(at(3, 1, 0, bus=1), 4) == NOBODY
        assert read(at(3, 0, 0xE), 1) == read(at(3, 1, 0xE), 1) == 0x80
        for number, offset in ((3 << 3 | 1, 0x3C), (3 << 3, 4)):
            function = number & 7
            for lane in range(2):
                write(at(3, function, offset + lane), 1, 1 + lane)
            expected = window.root.read_config(number, offset // 4)
            assert read(at(3, function, offset), 4) == expected
            assert [read(at(3, function, offset + i), 1) for i in range(4)] == list(
                expected.to_bytes(4, "little")
            )
            assert read(at(3, function, offset + 2), 2) == expected >> 16
        write(at(3, 1, 0x10), 4, 0xE123_4000)
        write(at(3, 1, 4), 2, 2)
        assert window.mmio.find(0xE123_4000, 4) is not None


def test_extended_space_is_zero_and_odd_accesses_are_nobodys() -> None:
    with machine("config-space,slot=3") as made:
        window = Window(made)
        read, write, at = window.mmio.read, window.mmio.write, window.at
        assert read(at(3, 0, 0x100), 4) == read(at(3, 0, 0xFFC), 4) == 0
        assert read(at(4, 0, 0x100), 4) == NOBODY
        write(at(3, 0, 0x100), 4, 0x1234)
        assert read(at(3, 0, 0x100), 4) == 0
        assert read(at(3, 0, 0), 8) == (1 << 64) - 1
        assert read(at(3, 0, 3), 2) == 0xFFFF
        before = read(at(3, 0, 0x3C), 4)
        write(at(3, 0, 0x38), 8, (1 << 64) - 1)
        write(at(3, 0, 0x3B), 2, 0xFFFF)
        assert read(at(3, 0, 0x3C), 4) == before
        assert made.parts.buses[BusType.MMIO].find(ECAM.end - 4, 4) is not None


def test_ecam_numbers_functions_as_the_specification_does() -> None:
    seen: list[Any] = []

    def read_config(number: int, register: int) -> int:
        seen.append((number, register))
        return 0x0403_0201

    window = Ecam(read_config, lambda *args: seen.append(args))
    assert window.read(0xAB << 20 | 0x1D << 15 | 5 << 12 | 0x123, 1) == 4
    window.write(0xAB << 20 | 0x1D << 15 | 5 << 12 | 0x122, 2, 0x1234)
    number = 0xAB << 8 | 0x1D << 3 | 5
    assert seen == [(number, 0x48), (number, 0x48, 2, b"\x34\x12")]
    assert Range(ECAM.start, ECAM.length).length == 256 << 20


def test_bridges_are_numbered_before_the_guest_starts() -> None:
    with machine("pci-bridge,name=br1,slot=4", "config-space,slot=br1:3") as made:
        made.boot("counter")
        window = Window(made)
        assert window.mmio.read(window.at(4, 0, 0), 4) == BRIDGE
        assert window.mmio.read(window.at(3, 0, 0, bus=1), 4) == FUNCTION
