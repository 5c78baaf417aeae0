"""The fixed tables of ACPI: FADT and FACS.

Source: ACPI 5.0, 5.2.9 (FADT, revision 5), 5.2.10 (FACS), 5.2.3.1 (generic address structure).
"""

from __future__ import annotations

import struct
from enum import IntFlag

from devices.platform.rtc import CENTURY
from vmm.firmware.platform import SCI_IRQ, Platform

FADT_REVISION = 5
FADT_FACS, FADT_DSDT, FADT_X_DSDT = 36, 40, 140
"""Offsets of the pointers in the table, to be filled in."""
FACS_SIZE = 64
RESET_PORT, RESET_VALUE = 0xCF9, 0x06

_PROFILE_DESKTOP = 1
_NO_C2, _NO_C3 = 101, 1001
"""Latencies in microseconds above what the states may have: the states do not exist (5.2.9)."""
_SYSTEM_MEMORY, _SYSTEM_IO = 0, 1
_ACCESS_SIZES = {1: 1, 2: 2, 4: 3}
_EVENT_SIZE, _CONTROL_SIZE, _TIMER_SIZE = 4, 2, 4


class BootFlags(IntFlag):
    """IAPC_BOOT_ARCH (5.2.9.3)."""

    LEGACY_DEVICES = 1 << 0
    I8042 = 1 << 1
    NO_VGA = 1 << 2
    NO_MSI = 1 << 3
    NO_CMOS_RTC = 1 << 5


class Flags(IntFlag):
    """The feature flags (table 5-35)."""

    WBINVD = 1 << 0
    C1 = 1 << 2
    NO_POWER_BUTTON = 1 << 4
    NO_SLEEP_BUTTON = 1 << 5
    NO_RTC_WAKE_STATUS = 1 << 6
    TIMER_32_BITS = 1 << 8
    RESET_REGISTER = 1 << 10
    HARDWARE_REDUCED = 1 << 20


def address(port: int, size: int) -> bytes:
    """A generic address: one register of `size` bytes at an I/O port; port 0 means none."""
    if not port:
        return bytes(12)
    return struct.pack("<BBBBQ", _SYSTEM_IO, 8 * size, 0, _ACCESS_SIZES[size], port)


def memory_address(place: int, size: int) -> bytes:
    """A generic address in memory, accessed in any width."""
    return struct.pack("<BBBBQ", _SYSTEM_MEMORY, 8 * size, 0, 0, place)


def boot_flags(platform: Platform) -> BootFlags:
    flags = BootFlags.LEGACY_DEVICES
    if platform.keyboard_controller:
        flags |= BootFlags.I8042
    if not platform.vga:
        flags |= BootFlags.NO_VGA
    return flags


def feature_flags(platform: Platform) -> Flags:
    flags = (
        Flags.WBINVD
        | Flags.C1
        | Flags.NO_SLEEP_BUTTON
        | Flags.NO_RTC_WAKE_STATUS
        | Flags.RESET_REGISTER
    )
    if not platform.power_button:
        flags |= Flags.NO_POWER_BUTTON
    if platform.pm_timer_bits == 32:
        flags |= Flags.TIMER_32_BITS
    return flags


def fadt_body(platform: Platform) -> bytes:
    """The FADT behind its header; the pointers to FACS and DSDT are zero.

    There is no SMI command port: the platform is in ACPI mode from the start (5.2.9, SMI_CMD).
    The FACS is named by its 32-bit pointer alone, as both at once contradict the specification.
    """
    event, control, timer = platform.pm_base, platform.pm_base + 4, platform.pm_base + 8
    fixed = struct.pack("<IIBBHI4B", 0, 0, 0, _PROFILE_DESKTOP, SCI_IRQ, 0, 0, 0, 0, 0)
    # PM1a and PM1b event, PM1a and PM1b control, PM2 control, PM timer, GPE0, GPE1.
    blocks = struct.pack("<8I", event, 0, control, 0, 0, timer, 0, 0)
    sizes = struct.pack("<8B", _EVENT_SIZE, _CONTROL_SIZE, 0, _TIMER_SIZE, 0, 0, 0, 0)
    # Latencies; cache flush size and stride; duty cycle; alarm registers; century.
    misc = struct.pack("<4H5B", _NO_C2, _NO_C3, 0, 0, 0, 0, 0, 0, CENTURY)
    flags = struct.pack("<HBI", boot_flags(platform), 0, feature_flags(platform))
    reset = address(RESET_PORT, 1) + struct.pack("<BHB", RESET_VALUE, 0, 0)
    extended = struct.pack("<QQ", 0, 0) + b"".join(
        (
            address(event, _EVENT_SIZE),
            address(0, 0),
            address(control, _CONTROL_SIZE),
            address(0, 0),
            address(0, 0),
            address(timer, _TIMER_SIZE),
            address(0, 0),
            address(0, 0),
            address(0, 0),
            address(0, 0),
        )
    )
    return fixed + blocks + sizes + misc + flags + reset + extended


def facs() -> bytes:
    """The FACS: no waking vector, no global lock held, no S4BIOS."""
    return struct.pack("<4sI", b"FACS", FACS_SIZE) + bytes(24) + b"\x02" + bytes(31)
