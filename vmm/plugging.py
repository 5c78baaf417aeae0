"""Plugs the PCI functions of a machine into its root, each where its ``slot=`` says.

A function without ``slot=`` becomes the lowest free device of the root bus. The order of the
configuration does not matter: bridges come before what is behind them, function 0 before others.
"""

from __future__ import annotations

from collections.abc import Sequence

from devices.errors import DeviceError, Subject, UserError
from devices.pci.contract import PciConfig
from devices.pci.host_bridge import PciRoot
from devices.pci.intx import Slot
from vmm.attachment import Attachment
from vmm.places import Place


def plug_in(root: PciRoot, attachments: Sequence[Attachment]) -> None:
    """Plug all PCI functions into `root`.

    Raises:
        UserError: a slot that is taken or not there.
        DeviceError: a function that cannot be.
    """
    functions = [(each, function) for each in attachments if (function := each.pci_function())]
    places = _places([each for each, _ in functions])
    buses = {"": 0}
    left = sorted(functions, key=lambda item: places[item[0].name].function)
    while left:
        ready = [item for item in left if places[item[0].name].bridge in buses]
        for each, function in ready or left[:1]:
            place = places[each.name]
            if place.bridge not in buses:
                raise UserError(
                    f"device '{each.name}': slot={place} is behind '{place.bridge}', which is no "
                    "bridge that leads to the root bus",
                    Subject("slot", each.name),
                )
            _plug(root, each, function, place, buses[place.bridge])
            behind = root.bus_behind(each.name)
            if behind is not None:
                buses[each.name] = behind
        left = [item for item in left if item not in ready]


def _places(attachments: Sequence[Attachment]) -> dict[str, Place]:
    """The place of each by its name."""
    places = {
        each.name: Place.parse(str(each.config.slot))
        for each in attachments
        if each.config.slot is not None
    }
    taken = {place.device for place in places.values() if not place.bridge}
    for each in attachments:
        if each.name not in places:
            free = next((number for number in range(1, 32) if number not in taken), None)
            if free is None:
                problem = "all 31 PCI slots are taken"
                raise UserError(f"device '{each.name}': {problem}", Subject(device=each.name))
            taken.add(free)
            places[each.name] = Place("", free, 0)
    return places


def _plug(root: PciRoot, each: Attachment, function: PciConfig, place: Place, bus: int) -> None:
    slot = Slot(place.device, place.function, bus)
    owners = dict(root.slots())
    where, about = f"device '{each.name}': slot {place}", Subject("slot", each.name)
    if slot in owners:
        other = owners[slot]
        raise UserError(f"{where} is taken by '{other}'", about, Subject("slot", other))
    if slot.function and slot._replace(function=0) not in owners:
        raise UserError(f"{where} needs a function 0 beside it", about)
    each.slot = slot
    each.regions()  # that they can be is looked at before they are used
    try:
        root.add(slot, function, each.name, each.handlers, each.bars())
    except ValueError as error:
        raise DeviceError(each.name, f"cannot be plugged in: {error}") from error
