"""``--disk FILE[,OPTION=VALUE]...``, or a ``[[disk]]`` table of a machine file: a disk in one word.

What it stands for is a device: ``if=virtio`` (the default) the model ``blk``, one for each disk;
``if=ide`` a drive of the one model ``ata``, in the order given: first and second drive of the
primary channel, then of the secondary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from devices.errors import UserError
from vmm.cli.given import Given, Places
from vmm.config import OF_ANY_FUNCTION, DeviceConfig, device_from

VIRTIO, IDE = "virtio", "ide"
INTERFACES = (VIRTIO, IDE)
DRIVES = 4
"""Of the ATA controller: two channels with two drives each."""
_OF_BOTH = ("file", "readonly", "serial")
_WRITTEN = {"path": "file"}
"""What the user calls an option of `blk`."""
_OF_VIRTIO = ("queues", "direct", *OF_ANY_FUNCTION)


def disks(
    given: Sequence[Given], taken: Sequence[str], places: Places | None = None
) -> list[DeviceConfig]:
    """The devices that the disks stand for.

    Args:
        taken: names of devices that are in use.
        places: is told where each was given.

    Raises:
        UserError: an option is wrong, or a fifth disk is to be an IDE drive.
    """
    places = Places() if places is None else places
    names, drives, made = list(taken), [], []
    for each in given:
        if _interface(each) == IDE:
            drives.append(each)
            continue
        options = {"name": _free("disk", names), **_options(each)}
        options["path"] = options.pop("file")
        made.append(_device(each, "blk", options, names))
        names.append(made[-1].name)
        places.add(each, names[-1], _WRITTEN)
    if len(drives) > DRIVES:
        raise drives[DRIVES].error(f"if=ide has room for {DRIVES} disks; give it if={VIRTIO}", "if")
    if drives:
        options = {"name": _free("ide", names)}
        for number, each in enumerate(drives):
            written = {("disk" if key == "file" else key) + str(number): key for key in _OF_BOTH}
            values = _options(each)
            options |= {key: values[word] for key, word in written.items() if word in values}
            # One by one, so that what is wrong is told of the disk that it is wrong with.
            controller = _device(each, "ata", options, names, written)
            places.add(each, controller.name, written)
        made.append(controller)
    return made


def _device(
    disk: Given,
    model: str,
    options: Mapping[str, Any],
    taken: Sequence[str],
    written: Mapping[str, str] = _WRITTEN,
) -> DeviceConfig:
    try:
        return device_from("a disk", model, options, taken)
    except UserError as error:
        raise disk.error(error, written=written) from error


def _free(base: str, taken: Sequence[str]) -> str:
    names = (base if n == 1 else f"{base}-{n}" for n in range(1, len(taken) + 2))
    return next(name for name in names if name not in taken)


def _interface(disk: Given) -> str:
    """What it is to be, all of its options checked."""
    interface = disk.values.get("if", VIRTIO)
    if interface not in INTERFACES:
        raise disk.error(f"if={interface} is not one of {', '.join(INTERFACES)}", "if")
    for key in disk.values:
        if key not in (*_OF_BOTH, "if", *_OF_VIRTIO):
            known = ", ".join(("file", "if", *_OF_BOTH[1:], *_OF_VIRTIO))
            raise disk.error(f"a disk has no option '{key}'; it has {known}", key)
        if interface == IDE and key in _OF_VIRTIO:
            raise disk.error(f"option '{key}' is for if={VIRTIO} alone", key)
    file = disk.values.get("file")
    if not isinstance(file, str) or not file:
        raise disk.error("a disk needs a 'file'", "file")
    return str(interface)


def _options(disk: Given) -> dict[str, Any]:
    return {key: value for key, value in disk.values.items() if key != "if"}
