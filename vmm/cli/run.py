"""``boot`` and ``restore``: from the command line to a machine that is ready to run."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from devices.errors import UserError
from proxy.jail import JailMode
from vmm.boot import firmware
from vmm.boot.options import BootOptions, KernelEntry, Mode, Module
from vmm.cli.disks import disks
from vmm.cli.files import read_file
from vmm.cli.given import Given, Places, read_words
from vmm.cli.nets import nets
from vmm.cli.output import clean, disk_progress
from vmm.cli.session import Session, SnapshotPlan
from vmm.config import (
    ClockKind,
    DeviceConfig,
    FailurePolicy,
    HostOptions,
    MachineConfig,
    debug_exit,
    default_devices,
    device_from,
    parse_size,
    split_options,
)
from vmm.machine import Machine

DEFAULT_GUEST = "default"


def boot(args: argparse.Namespace) -> int:
    """``python -m vmm boot``."""
    plan = SnapshotPlan.parse(args)
    rom = b"" if args.firmware is None else read_file(args.firmware, "firmware")
    if args.firmware is not None:
        firmware.check(rom, f"firmware {args.firmware}")
        if args.image is not None:
            raise UserError("--firmware starts by itself: give no image")
    image, name = _read_image(args.image)
    options = BootOptions(
        load_addr=args.load_addr,
        mode=None if args.mode is None else Mode(args.mode),
        cmdline=args.append,
        modules=tuple(_read_module(text) for text in args.module),
        name=name,
        initrd=None if args.initrd is None else _read_module(args.initrd, "initrd"),
        kernel_entry=KernelEntry(args.kernel_entry),
    )
    devices = [debug_exit()] if args.no_default_devices else list(default_devices())
    places = Places()
    for given in _given("device", args.device):
        devices.append(_device(given, [device.name for device in devices]))
        places.add(given, f"device '{devices[-1].name}': ")
    devices += disks(_given("disk", args.disk), [device.name for device in devices], places)
    devices += nets(_given("net", args.net), [device.name for device in devices], places)
    memory, clock = parse_size(args.mem), ClockKind(args.clock)
    with places.named():
        config = MachineConfig(memory, tuple(devices), clock, len(rom))
    with Machine(config, host=_host_options(args)) as machine:
        with places.named():
            machine.build()
        if rom:
            machine.boot_firmware(rom, args.firmware)
        elif isinstance(image, str):
            machine.boot(image, _unless_default(options, name))
        else:
            machine.boot(image, options)
        return Session(machine, args, plan).run()


def _given(option: str, texts: list[str | Given]) -> list[Given]:
    return [read_words(option, each) if isinstance(each, str) else each for each in texts]


def _device(given: Given, taken: list[str]) -> DeviceConfig:
    options = dict(given.values)
    model = options.pop("model", None)
    if not isinstance(model, str):
        raise given.error('a device needs a model, for example model = "echo"')
    try:
        return device_from(f"device '{model}'", model, options, taken)
    except UserError as error:
        raise given.error(error) from error


def restore(args: argparse.Namespace) -> int:
    """``python -m vmm restore``."""
    plan = SnapshotPlan.parse(args)
    with Machine.restore(
        args.directory,
        host=_host_options(args),
        models=args.allow_model,
        disks=args.disks,
        places=_places(args.device),
        progress=disk_progress(_say_nothing if args.json else _say),
    ) as machine:
        return Session(machine, args, plan).run()


def _places(given: list[str]) -> dict[str, dict[str, Any]]:
    places: dict[str, dict[str, Any]] = {}
    for text in given:
        try:
            name, options = split_options(text, several="forward")
        except UserError as error:
            raise UserError(f"--device {text}: {error}") from error
        if not options:
            raise UserError(f"--device {text}: write NAME,OPTION=VALUE: a device of the snapshot")
        earlier = places.setdefault(name, {})
        if twice := earlier.keys() & options.keys():
            raise UserError(f"--device {text}: option '{min(twice)}' is given twice")
        earlier |= options
    return places


def _say(text: str) -> None:
    print(f"vmm: {clean(text)}", file=sys.stderr, flush=True)


def _say_nothing(_text: str) -> None:
    pass


def _unless_default(options: BootOptions, name: str) -> BootOptions | None:
    return None if options == BootOptions(name=name) else options


def _host_options(args: argparse.Namespace) -> HostOptions:
    return HostOptions(
        jail=JailMode(args.jail),
        deadline=args.deadline,
        on_failure=FailurePolicy(args.on_failure),
        fast_lane=args.lane == "auto",
    )


def _read_image(image: str | None) -> tuple[str | bytes, str]:
    import guests

    if image is None:
        return DEFAULT_GUEST, DEFAULT_GUEST
    if image and not os.path.exists(image):
        if image in guests.GUESTS:
            return image, image
        raise UserError(
            f"image {image}: there is no such file, and no built-in guest of that name "
            "(python -m vmm guests)"
        )
    return read_file(image, "image"), image


def _read_module(text: str, what: str = "module") -> Module:
    path, _, name = text.partition(",")
    return Module(read_file(path, what), name or path)
