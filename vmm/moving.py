"""Other places on this host for what the devices of a snapshot have of it.

A socket, a forwarded port, a log can be had by one machine at a time, so a snapshot that names one
could not be restored twice side by side; and a file may have moved since. What the guest knows of
a device (its address, its size) stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from devices import registry
from devices.contract import Device
from devices.errors import UserError
from devices.files import host_details, host_files, host_options
from vmm.config import DeviceConfig, MachineConfig

Places = Mapping[str, Mapping[str, Any]]
"""By device name: options and their new values, as text or plain values."""


def moved(
    config: MachineConfig,
    places: Places,
    kind_of: Callable[[DeviceConfig], type[Device] | None],
    private: Collection[str] = (),
) -> MachineConfig:
    """The same machine with other places.

    Args:
        kind_of: the model of a device; None if nobody knows its options.
        private: disks (DEVICE.OPTION) that are made of what the snapshot has, so that no file which
            an option names is looked at.

    Raises:
        UserError: there is no such device, the option is none that names a place, it is that of a
            private disk, or a file would come or go with it, which the guest would see.
    """
    names = [device.name for device in config.devices]
    for name in places:
        if name not in names:
            raise UserError(f"the snapshot has no device '{name}'; it has {', '.join(names)}")
    devices = (
        _moved(device, kind_of(device), places[device.name], private)
        if device.name in places
        else device
        for device in config.devices
    )
    return replace(config, devices=tuple(devices))


def _moved(
    device: DeviceConfig,
    kind: type[Device] | None,
    wanted: Mapping[str, Any],
    private: Collection[str],
) -> DeviceConfig:
    where = f"device '{device.name}'"
    may = frozenset() if kind is None else host_options(kind.Options)
    details = {} if kind is None else host_details(kind.Options)
    old = {key.replace("-", "_"): value for key, value in device.options.items()}
    new = {key.replace("-", "_"): value for key, value in wanted.items()}
    for name, value in new.items():
        key = name.replace("_", "-")
        if name not in may:
            known = ", ".join(sorted(may)).replace("_", "-") or "none"
            raise UserError(
                f"{where}: option '{key}' is no place on this host, so it stays as it was; "
                f"that can be changed: {known}"
            )
        if f"{device.name}.{name}" in private:
            raise UserError(
                f"{where}: {key}={value}: would not be used, as this disk is a private copy of "
                "what the snapshot has; --disks original goes on with a file that has moved"
            )
    changed = {name for name, value in new.items() if value != old.get(name)}
    kept = {name: value for name, value in old.items() if details.get(name) not in changed}
    options = kept | new
    if kind is not None:
        before, after = (registry.parse_options(kind, each) for each in (old, options))
        for name in host_files(kind.Options):
            had, has = (bool(getattr(each, name)) for each in (before, after))
            if had != has:
                said, must = ("a file", "one") if had else ("no file", "none")
                raise UserError(
                    f"{where}: option '{name.replace('_', '-')}' named {said} when the snapshot "
                    f"was taken, and must name {must}: the guest knows of it"
                )
    return replace(device, options=options)
