"""The AML of this board: PCI root with its windows and interrupt routing, ISA devices, power off.

Sources: ACPI 5.0, chapter 6 (device configuration), 6.2.12 (_PRT), 7.3.4 (\\_S5); the PNP ids are
those of Microsoft's list "Plug and Play Vendor IDs and Device IDs".
"""

from __future__ import annotations

from devices.pci.host_bridge import CONFIG_ADDRESS
from devices.platform.acpi_pm import S5
from vmm.firmware import aml
from vmm.firmware.platform import Platform

PM_BLOCK_SIZE = 12
_EVERY_FUNCTION = 0xFFFF
_HPET_SIZE = 0x400
_COMPATIBILITY_PORTS = ((0x170, 0x177), (0x1F0, 0x1F7), (0x374, 0x377), (0x3F4, 0x3F7))
"""Where a PCI IDE function in compatibility mode is (PCI IDE Controller Specification 1.0, 2.1):
the root must pass them on, or kernels do not take them for its own. Of the last two only one port
is used, but Linux overlooks windows of one."""


def dsdt_body(platform: Platform) -> bytes:
    """The definition block without its table header."""
    power_off = aml.package(*(aml.integer(value) for value in (S5, S5, 0, 0)))
    return aml.scope("\\_SB", _pci_root(platform), *_isa_devices(platform)) + aml.name(
        "\\_S5", power_off
    )


def _pci_root(platform: Platform) -> bytes:
    mmio, io = platform.mmio_window, platform.io_window
    windows = aml.resources(
        aml.bus_numbers(0, 0xFF),
        aml.ports(CONFIG_ADDRESS, 8),
        *(aml.port_window(first, last) for first, last in _COMPATIBILITY_PORTS),
        aml.port_window(io.start, io.end - 1),
        aml.memory_window(mmio.start, mmio.end - 1),
    )
    # A source of zero: no link device, the index is a global system interrupt.
    routing = aml.package(
        *(
            aml.package(
                aml.integer(slot << 16 | _EVERY_FUNCTION),
                aml.integer(pin),
                aml.integer(0),
                aml.integer(gsi),
            )
            for slot, pin, gsi in platform.pci_interrupts()
        )
    )
    return aml.device(
        "PCI0",
        aml.name("_HID", aml.eisa_id("PNP0A03")),
        aml.name("_UID", aml.integer(0)),
        aml.name("_CRS", windows),
        aml.name("_PRT", routing),
    )


def _isa_devices(platform: Platform) -> list[bytes]:
    devices = [
        _device("PIC", "PNP0000", aml.ports(0x20, 2), aml.ports(0xA0, 2), aml.irq(2)),
        _device("TIMR", "PNP0100", aml.ports(0x40, 4), aml.irq(0)),
        _device("SPKR", "PNP0800", aml.ports(0x61, 1)),
        _device("RTC", "PNP0B00", aml.ports(0x70, 2), aml.irq(8)),
        _motherboard(platform),
    ]
    if platform.keyboard_controller:
        keyboard = (aml.ports(0x60, 1), aml.ports(0x64, 1), aml.irq(1))
        devices.append(_device("KBD", "PNP0303", *keyboard))
    if platform.hpet is not None:
        registers = aml.memory(platform.hpet, _HPET_SIZE, writable=False)
        devices.append(_device("HPET", "PNP0103", registers))
    for number, serial in enumerate(platform.serial, 1):
        place = (aml.ports(serial.port, 8), aml.irq(serial.irq))
        devices.append(_device(f"COM{number}", "PNP0501", *place, uid=number))
    if platform.fw_cfg:
        devices.append(_device("FWCF", "QEMU0002", aml.ports(0x510, 12)))
    return devices


def _motherboard(platform: Platform) -> bytes:
    """What is taken and belongs to no device that a driver would bind to."""
    taken = ((0x80, 1), (0x92, 1), (0x4D0, 2), (platform.pm_base, PM_BLOCK_SIZE))
    ports = (aml.ports(first, length) for first, length in taken)
    # The PCI Firmware Specification wants the mapped configuration space here (4.1.2).
    ecam = aml.memory(platform.ecam.start, platform.ecam.length)
    return _device("MBRD", "PNP0C02", *ports, ecam)


def _device(name: str, hardware_id: str, *descriptors: bytes, uid: int | None = None) -> bytes:
    # Only seven-character ids have the compressed form.
    is_eisa = len(hardware_id) == 7
    terms = [
        aml.name("_HID", aml.eisa_id(hardware_id) if is_eisa else aml.string(hardware_id)),
        aml.name("_CRS", aml.resources(*descriptors)),
    ]
    if uid is not None:
        terms.insert(1, aml.name("_UID", aml.integer(uid)))
    return aml.device(name, *terms)
