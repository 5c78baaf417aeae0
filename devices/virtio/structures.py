"""The virtio structures in the PCI capability list (4.1.4): where the driver finds what."""

from __future__ import annotations

from devices.pci.capability import Capability, CapabilityId
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
