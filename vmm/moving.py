"""Other places on this host for what the devices of a snapshot have of it.

A socket, a forwarded port, a log can be had by one machine at a time, so a snapshot that names one
could not be restored twice side by side; and a file may have moved since. What the guest knows of
a device (its address, its size) stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from devices import registry
from devices.contract import Device
from devices.errors import UserError
from devices.files import host_options
from vmm.config import DeviceConfig, MachineConfig

Places = Mapping[str, Mapping[str, Any]]
"""By device name: options and their new values, as text or plain values."""


def moved(
    config: MachineConfig,
    places: Places,
    kind_of: Callable[[DeviceConfig], type[Device] | None],
) -> MachineConfig:
    """The same machine with other places.

    Args:
        kind_of: the model of a device; None if nobody knows its options.

    Raises:
        UserError: there is no such device, or the option is none that names a place.
    """
    names = [device.name for device in config.devices]
    for name in places:
        if name not in names:
            raise UserError(f"the snapshot has no device '{name}'; it has {', '.join(names)}")
    devices = (
        _moved(device, kind_of(device), places[device.name]) if device.name in places else device
        for device in config.devices
    )
    return replace(config, devices=tuple(devices))


def _moved(
    device: DeviceConfig, kind: type[Device] | None, wanted: Mapping[str, Any]
) -> DeviceConfig:
    where = f"device '{device.name}'"
    may = frozenset() if kind is None else host_options(kind.Options)
    options = {key.replace("-", "_"): value for key, value in device.options.items()}
    for key, value in wanted.items():
        name = key.replace("-", "_")
        if name not in may:
            known = ", ".join(sorted(may)).replace("_", "-") or "none"
            raise UserError(
                f"{where}: option '{key}' is no place on this host, so it stays as it was; "
                f"that can be changed: {known}"
            )
        options[name] = value
    if kind is not None:
        registry.parse_options(kind, options)
    return replace(device, options=options)
