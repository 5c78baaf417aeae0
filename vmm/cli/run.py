"""``boot`` and ``restore``: from the command line to a machine that is ready to run."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from devices.errors import Subject, UserError
from proxy.jail import JailMode
from vmm.boot import firmware
from vmm.boot.options import BootOptions, KernelEntry, Mode, Module
from vmm.cli.files import read_file
from vmm.cli.given import Places
from vmm.cli.output import clean, disk_progress
from vmm.cli.session import Session, SnapshotPlan
from vmm.cli.shape import machine_config
from vmm.config import FailurePolicy, HostOptions, split_options
from vmm.machine import Machine

DEFAULT_GUEST = "default"


def boot(args: argparse.Namespace) -> int:
    """``python -m vmm boot``."""
    places = args.places or Places()
    with places.named():
        return _boot(args, places)


def _boot(args: argparse.Namespace, places: Places) -> int:
    plan = SnapshotPlan.parse(args)
    rom = b"" if args.firmware is None else read_file(args.firmware, "firmware")
    if args.firmware is not None:
        firmware.check(rom, f"firmware {args.firmware}")
        if args.image is not None:
            problem = "--firmware starts by itself: give no image"
            raise UserError(problem, Subject("firmware"), Subject("image"))
    image, name = _read_image(args.image)
    options = BootOptions(
        load_addr=args.load_addr,
        mode=None if args.mode is None else Mode(args.mode),
        cmdline=args.append,
        modules=tuple(_read_module(text, index=n) for n, text in enumerate(args.module)),
        name=name,
        initrd=None if args.initrd is None else _read_module(args.initrd, "initrd"),
        kernel_entry=KernelEntry(args.kernel_entry),
    )
    config = machine_config(args, places, len(rom))
    with Machine(config, host=_host_options(args)) as machine:
        if rom:
            machine.boot_firmware(rom, args.firmware)
        elif isinstance(image, str):
            machine.boot(image, _unless_default(options, name))
        else:
            machine.boot(image, options)
        return Session(machine, args, plan).run()


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
            "(python -m vmm guests)",
            Subject("image"),
        )
    return read_file(image, "image"), image


def _read_module(text: str, what: str = "module", index: int = 0) -> Module:
    path, _, name = text.partition(",")
    return Module(read_file(path, what, index), name or path)
