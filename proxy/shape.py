"""What a device looks like to the machine: its regions, and where they are."""

from __future__ import annotations

import msgspec

from devices.bus import BusType, Range
from devices.contract import Region
from devices.pci.contract import BarInfo


class Shape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a device looks like from outside; it never changes in the device's life."""

    regions: tuple[Region, ...] = ()
    is_pci: bool = False
    bars: tuple[BarInfo, ...] = ()
    takes_input: bool = False


class ClaimedRange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a region of the device is decoded at the moment."""

    region: int
    bus: BusType
    range: Range
