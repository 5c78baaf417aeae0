"""What a device looks like to the machine: its regions, and where they are."""

from __future__ import annotations

import msgspec

from devices.bus import ADDRESS_LIMIT, BusType, Range
from devices.contract import Region
from devices.pci.contract import BarInfo
from devices.virtio.granted import MOST_QUEUES
from devices.virtio.ring import LARGEST_QUEUE

MAX_REGIONS = 64
MAX_NAME = 64
"""Characters of a region's name."""
ISA_LINES = frozenset(range(16)) - {2}
"""The interrupt lines that a device may be wired to; 2 is the wire between the two 8259."""

_SPACE = {BusType.PIO: 1 << 16, BusType.MMIO: ADDRESS_LIMIT}


class Shape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a device looks like from outside; it never changes in the device's life."""

    regions: tuple[Region, ...] = ()
    is_pci: bool = False
    bars: tuple[BarInfo, ...] = ()
    takes_input: bool = False
    dma: bool = False
    virtqueues: tuple[int, ...] = ()
    """The largest size of each, of a model that takes grants."""


class MemoryRegion(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One stretch of guest memory.

    Attributes:
        start: guest-physical address.
        size: in bytes; like the others a multiple of 4 KiB.
        offset: where it begins in the descriptor that comes with it.
    """

    start: int
    size: int
    offset: int


class ClaimedRange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a region of the device is decoded at the moment."""

    region: int
    bus: BusType
    range: Range


def wrong_shape(shape: Shape, expected: Shape | None = None) -> str:
    """Why no device can be of this shape; "" if one can.

    Args:
        expected: the only shape that will do, if there is one.
    """
    if expected is not None and shape != expected:
        return "it is not of the shape that its model declares"
    if len(shape.regions) > MAX_REGIONS:
        return f"{len(shape.regions)} regions"
    for region in shape.regions:
        # As Python writes it: the name is the device's, the terminal is ours.
        name, space = repr(region.name)[:40], _SPACE[region.bus]
        if not (region.name.isprintable() and 0 < len(region.name) <= MAX_NAME):
            return f"region {name} has no plain name of 1 to {MAX_NAME} characters"
        if not 0 < region.length <= space:
            return f"region {name} of {region.length} bytes"
        if region.start is not None and not 0 <= region.start <= space - region.length:
            return f"region {name} leaves its space"
        if region.irq is not None and region.irq not in ISA_LINES:
            return f"region {name} wants interrupt line {region.irq}"
    if len(shape.virtqueues) > MOST_QUEUES:
        return f"{len(shape.virtqueues)} virtqueues"
    for size in shape.virtqueues:
        if not 1 <= size <= LARGEST_QUEUE:
            return f"a virtqueue of {size} entries"
    for info in shape.bars:
        if not 0 <= info.region < len(shape.regions) or not shape.is_pci:
            return f"BAR {info.bar} maps no region"
        mapped = shape.regions[info.region]
        if (mapped.bus, mapped.length) != (info.bus, info.size):
            return f"BAR {info.bar} is not like its region"
    return ""
