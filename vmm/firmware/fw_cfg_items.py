"""What fw_cfg says about a machine, ready for `devices.platform.fw_cfg.FwCfg`."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

from devices.bus import Range
from devices.platform.fw_cfg import Key
from vmm.firmware.acpi import firmware_files
from vmm.firmware.platform import Platform

E820_RAM, E820_RESERVED = 1, 2
_E820_ENTRY = struct.Struct("<QQI")


def items(ram: Sequence[Range]) -> dict[int, bytes]:
    """The items that are no files, for one processor and this RAM."""
    size = sum(extent.length for extent in ram)
    return {
        Key.RAM_SIZE: struct.pack("<Q", size),
        Key.NO_GRAPHIC: struct.pack("<H", 0),
        Key.CPU_COUNT: struct.pack("<H", 1),
        Key.MAX_CPUS: struct.pack("<H", 1),
        Key.BOOT_MENU: struct.pack("<H", 0),
        # The timer's line 0 arrives at GSI 2.
        Key.IRQ0_OVERRIDE: b"\x01",
    }


def files(
    platform: Platform,
    ram: Sequence[Range],
    *,
    boot_order: Sequence[str] = (),
    extra: Mapping[str, bytes] | None = None,
) -> dict[str, bytes]:
    """The files: ACPI tables with their loader script, memory map, boot order.

    Args:
        ram: as the guest sees it; the firmware itself cuts the holes below 1 MiB.
        boot_order: Open Firmware device paths, the first choice first.
        extra: more files by name; they win over those made here.
    """
    made = firmware_files(platform)
    extents = [(extent, E820_RAM) for extent in ram] + [(platform.ecam, E820_RESERVED)]
    made["etc/e820"] = b"".join(
        _E820_ENTRY.pack(extent.start, extent.length, kind) for extent, kind in extents
    )
    if boot_order:
        made["bootorder"] = "\n".join(boot_order).encode("ascii") + b"\0"
    return {**made, **(extra or {})}
