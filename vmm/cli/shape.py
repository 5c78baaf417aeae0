"""What a machine is to be made of, from the options of `vmm.cli.groups.add_machine_options`."""

from __future__ import annotations

import argparse
from difflib import get_close_matches

from devices.errors import UserError
from vmm.cli.disks import disks
from vmm.cli.given import Given, Places, read_words
from vmm.cli.nets import nets
from vmm.config import (
    ClockKind,
    DeviceConfig,
    MachineConfig,
    debug_exit,
    default_devices,
    device_from,
    parse_size,
)


def machine_config(args: argparse.Namespace, places: Places, rom: int = 0) -> MachineConfig:
    """The machine that was asked for.

    Args:
        places: is told where each device was given.
        rom: bytes of firmware.

    Raises:
        UserError: a device or disk or card that cannot be.
    """
    devices = [debug_exit()] if args.no_default_devices else list(default_devices())
    for given in _given("device", args.device):
        devices.append(_device(given, [device.name for device in devices]))
        places.add(given, devices[-1].name)
    devices += disks(_given("disk", args.disk), [device.name for device in devices], places)
    devices += nets(_given("net", args.net), [device.name for device in devices], places)
    return MachineConfig(parse_size(args.mem), tuple(devices), ClockKind(args.clock), rom)


def _given(option: str, texts: list[str | Given]) -> list[Given]:
    return [read_words(option, each) if isinstance(each, str) else each for each in texts]


def _device(given: Given, taken: list[str]) -> DeviceConfig:
    options = dict(given.values)
    model = options.pop("model", None)
    if not isinstance(model, str):
        problem = 'a device needs a model, for example model = "echo"'
        if model is not None:
            raise given.error(f"{problem}; {model} is no text", "model")
        for meant in get_close_matches("model", options, 1):
            raise given.error(f"{problem}; it has '{meant}'", meant)
        raise given.error(problem, "model")
    try:
        return device_from(f"device '{model}'", model, options, taken)
    except UserError as error:
        raise given.error(error) from error
