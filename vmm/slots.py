"""Which PCI slot a device gets."""

from __future__ import annotations

from devices.errors import DeviceError, UserError
from devices.pci.contract import PciConfig
from devices.pci.host_bridge import PciRoot
from devices.pci.intx import Slot
from vmm.attachment import Attachment
from vmm.config import DeviceConfig, MachineConfig


def plug_in(
    root: PciRoot, attachment: Attachment, function: PciConfig, config: MachineConfig
) -> None:
    """Put a PCI function into the slot that it wants, or the lowest that nobody wants.

    Raises:
        UserError: there is no such slot.
        DeviceError: its BARs cannot be.
    """
    device = attachment.config
    if device.irq is not None:
        raise UserError(f"device '{device.name}' is a PCI function: it takes no irq=")
    attachment.slot = slot = _free_slot(root, device, config)
    attachment.regions()  # that they can be is looked at before they are used
    bars = attachment.bars()
    try:
        root.add(Slot(slot), function, device.name, attachment.handlers, bars)
    except ValueError as error:
        raise DeviceError(device.name, f"cannot be plugged in: {error}") from error


def _free_slot(root: PciRoot, device: DeviceConfig, config: MachineConfig) -> int:
    taken = {slot.device: owner for slot, owner in root.slots()}
    wished = {other.slot for other in config.devices if other is not device}
    if device.slot is None:
        for number in range(1, 32):
            if number not in taken and number not in wished:
                return number
        raise UserError(f"device '{device.name}': all 31 PCI slots are taken")
    if device.slot in taken:
        raise UserError(
            f"device '{device.name}': slot {device.slot} is taken by '{taken[device.slot]}'"
        )
    return device.slot
