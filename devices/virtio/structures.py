"""The virtio structures in the PCI capability list (4.1.4): where the driver finds what."""

from __future__ import annotations

from collections.abc import Callable

from devices.pci.capability import Capability, CapabilityId, walk_capabilities
from devices.pci.contract import CONFIG_REGISTERS
from devices.pci.registers import DWORD, Field

COMMON_CFG, NOTIFY_CFG, ISR_CFG, DEVICE_CFG, PCI_CFG = 1, 2, 3, 4, 5
"""The kinds, cfg_type."""


def structure(kind: int, bar: int, offset: int, length: int, *more: Field) -> Capability:
    """Struct virtio_pci_cap, all of it read-only, with `more` dwords after it."""
    size = 16 + 4 * len(more)
    return Capability(
        CapabilityId.VENDOR_SPECIFIC,
        size,
        (
            Field("cap_len", 2, 1, size),
            Field("cfg_type", 3, 1, kind),
            Field("bar", 4, 1, bar),
            Field("offset", 8, 4, offset),
            Field("length", 12, 4, length),
            *more,
        ),
    )


def pci_window() -> Capability:
    """4.1.4.9: struct virtio_pci_cfg_cap."""
    return Capability(
        CapabilityId.VENDOR_SPECIFIC,
        20,
        (
            Field("cap_len", 2, 1, 20),
            Field("cfg_type", 3, 1, PCI_CFG),
            Field("bar", 4, 1, writable=0xFF),
            Field("offset", 8, 4, writable=DWORD),
            Field("length", 12, 4, writable=DWORD),
            Field("pci_cfg_data", 16, 4, writable=DWORD),
        ),
    )


def fixed_registers(read_config: Callable[[int], int]) -> tuple[int, dict[int, int]]:
    """What tells a driver what the function is and where its registers are, which never changes.

    Returns:
        The dword of the window's capability, 0 if there is none; and for each dword of the
        configuration space that has such bits, the bits.
    """
    window = 0
    # Ids, the list's bit in Status, class, header type, subsystem, the list's start (6.1, 6.2).
    fixed = {0: DWORD, 1: 1 << 20, 2: DWORD, 3: 0xFF_0000, 11: DWORD, 13: 0xFF}
    for start, head in walk_capabilities(read_config):
        first, kind = start // 4, head & 0xFF
        fixed[first] = 0xFFFF
        if kind == CapabilityId.MSI_X:
            fixed[first + 1] = fixed[first + 2] = DWORD  # where table and pending bits are
        elif kind == CapabilityId.VENDOR_SPECIFIC:
            fixed[first] = DWORD
            if head >> 24 == PCI_CFG:
                window = window or first
            else:
                last = (start + (head >> 16 & 0xFF) - 1) // 4
                fixed |= dict.fromkeys(range(first + 1, min(last, CONFIG_REGISTERS - 1) + 1), DWORD)
    return window, fixed
