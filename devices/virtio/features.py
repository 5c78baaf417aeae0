"""Feature bits and device status of virtio 1.2, as far as every device shares them."""

from __future__ import annotations

import enum


class Feature(enum.IntFlag):
    """Reserved feature bits (chapter 6)."""

    INDIRECT_DESC = 1 << 28
    EVENT_IDX = 1 << 29
    VERSION_1 = 1 << 32
    RING_PACKED = 1 << 34
    IN_ORDER = 1 << 35
    RING_RESET = 1 << 40


TRANSPORT = int(
    Feature.INDIRECT_DESC
    | Feature.EVENT_IDX
    | Feature.VERSION_1
    | Feature.RING_PACKED
    | Feature.RING_RESET
)
"""What every device here offers. Not among them: NOTIFICATION_DATA, which tells the device nothing
that it does not look up anyway, and ACCESS_PLATFORM: guest-physical addresses are what we take."""


class Status(enum.IntFlag):
    """The device status (2.1)."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    NEEDS_RESET = 64
    FAILED = 128


DRIVER_BITS = int(
    Status.ACKNOWLEDGE | Status.DRIVER | Status.DRIVER_OK | Status.FEATURES_OK | Status.FAILED
)
"""Those that the driver sets; it can clear none but by a reset (2.1.1)."""
LIVE = int(Status.DRIVER_OK | Status.NEEDS_RESET | Status.FAILED)
"""Requests are served while of these DRIVER_OK alone is set."""

NO_VECTOR = 0xFFFF
"""VIRTIO_MSI_NO_VECTOR (4.1.5.1.2): this event interrupts nobody."""
