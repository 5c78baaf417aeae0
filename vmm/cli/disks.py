"""``--disk FILE[,OPTION=VALUE]...``, or a ``[[disk]]`` table of a machine file: a disk in one word.

What it stands for is a device: ``if=virtio`` (the default) the model ``blk``, one for each disk;
``if=ide`` a drive of the one model ``ata``, in the order given: first and second drive of the
primary channel, then of the secondary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from devices.errors import UserError
from vmm.cli.machine_file import Table
from vmm.config import OF_ANY_FUNCTION, DeviceConfig, device_from, split_options

VIRTIO, IDE = "virtio", "ide"
INTERFACES = (VIRTIO, IDE)
DRIVES = 4
"""Of the ATA controller: two channels with two drives each."""
_COMMAS = " (the name of a file with a comma has its place in a machine file, see --config)"
_OF_BOTH = ("file", "if", "readonly", "serial")
_OF_VIRTIO = ("queues", "direct", *OF_ANY_FUNCTION)


@dataclass(frozen=True)
class Disk:
    """One disk as the user gave it.

    Attributes:
        where: begins the message of what is wrong with it.
        table: the same as a table of a machine file, which knows lines.
        options: without "if".
    """

    where: str
    table: Table | None
    interface: str
    options: Mapping[str, Any]

    def error(self, problem: str) -> UserError:
        if self.table is not None:
            return UserError(f"{self.table.where(problem)}: {problem}")
        return UserError(f"{self.where}: {problem}")


def disks(
    given: Sequence[str | Table], taken: Sequence[str], places: dict[str, Table] | None = None
) -> list[DeviceConfig]:
    """The devices that the disks stand for.

    Args:
        taken: names of devices that are in use.
        places: gets the tables among them, by how messages on their devices begin.

    Raises:
        UserError: an option is wrong, or a fifth disk is to be an IDE drive.
    """
    names, drives, made = list(taken), [], []
    places = {} if places is None else places
    for each in map(_parse, given):
        if each.interface == IDE:
            drives.append(each)
            continue
        options = {"name": _free("disk", names), **each.options}
        options["path"] = options.pop("file")
        made.append(_device(each, "blk", options, names))
        names.append(made[-1].name)
        if each.table is not None:
            places[f"device '{names[-1]}': "] = each.table
    if len(drives) > DRIVES:
        raise drives[DRIVES].error(f"if=ide has room for {DRIVES} disks; give it if={VIRTIO}")
    if drives:
        options = {"name": _free("ide", names)}
        for number, each in enumerate(drives):
            named = {"disk": each.options["file"], **each.options}
            del named["file"]
            options |= {f"{key}{number}": value for key, value in named.items()}
            # One by one, so that what is wrong is told of the disk that it is wrong with.
            controller = _device(each, "ata", options, names)
            if each.table is not None:
                places[f"device '{controller.name}': disk{number}="] = each.table
        made.append(controller)
    return made


def _device(
    disk: Disk, model: str, options: Mapping[str, Any], taken: Sequence[str]
) -> DeviceConfig:
    try:
        return device_from("a disk", model, options, taken)
    except UserError as error:
        raise disk.error(str(error)) from error


def _free(base: str, taken: Sequence[str]) -> str:
    names = (base if n == 1 else f"{base}-{n}" for n in range(1, len(taken) + 2))
    return next(name for name in names if name not in taken)


def _parse(given: str | Table) -> Disk:
    if isinstance(given, str):
        where = f"--disk {given}"
        try:
            file, options = split_options(given, alone="readonly")
        except UserError as error:
            raise UserError(f"{where}: {error}{_COMMAS}") from error
        if "file" in options:
            raise UserError(f"{where}: option 'file' is given twice")
        return _checked(Disk(where, None, "", {"file": file, **options}))
    return _checked(Disk("", given, "", dict(given.values)))


def _checked(disk: Disk) -> Disk:
    options = dict(disk.options)
    interface = options.pop("if", VIRTIO)
    if interface not in INTERFACES:
        raise disk.error(f"if={interface} is not one of {', '.join(INTERFACES)}")
    for key in options:
        if key not in (*_OF_BOTH, *_OF_VIRTIO):
            known = ", ".join((*_OF_BOTH, *_OF_VIRTIO))
            raise disk.error(f"a disk has no option '{key}'; it has {known}")
        if interface == IDE and key in _OF_VIRTIO:
            raise disk.error(f"option '{key}' is for if={VIRTIO} alone")
    file = options.get("file")
    if not isinstance(file, str) or not file:
        raise disk.error("a disk needs a 'file'")
    return Disk(disk.where, disk.table, interface, options)
