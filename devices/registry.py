"""The models by name, and how text options become a model's options.

Models are imported only when they are asked for, so that the command line starts fast. A name of
the form ``package.module:Class`` names a model that is not in this table.
"""

from __future__ import annotations

import base64
import dataclasses
import importlib
import typing
from collections.abc import Mapping
from typing import Any

import msgspec

from devices.contract import Device, FileBytes
from devices.errors import OptionError, Subject, UserError
from devices.options import wanted

MODELS: dict[str, str] = {
    "serial": "devices.serial:Serial",
    "echo": "devices.echo:Echo",
    "config-space": "devices.pci.config_space:ConfigSpaceDevice",
    "pci-bridge": "devices.pci.bridge:PciBridge",
    "debug-exit": "devices.debug_exit:DebugExit",
    "9p": "devices.virtio.p9.device:P9",
    "ata": "devices.ata.controller:Ata",
    "balloon": "devices.virtio.balloon:Balloon",
    "blk": "devices.virtio.blk:Blk",
    "console": "devices.virtio.console:Console",
    "net": "devices.virtio.net:Net",
    "pvpanic": "devices.pvpanic:PvPanic",
    "rng": "devices.virtio.rng:Rng",
    "vsock": "devices.virtio.vsock.device:Vsock",
}

LARGEST_FILE = 512 << 10
"""Bytes of a file that an option may name: it travels to the device process with its options."""


def load(model: str) -> type[Device]:
    """The class of a model.

    Raises:
        UserError: there is no such model, or its module cannot be imported.
    """
    target, about = MODELS.get(model, model), Subject("model", model)
    module_name, _, class_name = target.partition(":")
    if not (module_name and class_name):
        known = ", ".join(sorted(MODELS))
        raise UserError(f"unknown device model '{model}'; there are {known}", about)
    try:
        found: Any = importlib.import_module(module_name)
        for part in class_name.split("."):
            found = getattr(found, part)
    except Exception as error:
        # Not only ImportError: a module from elsewhere fails in ways of its own.
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"device model '{model}' cannot be loaded: {text}", about) from error
    if not (isinstance(found, type) and issubclass(found, Device)):
        problem = "is not a subclass of devices.contract.Device"
        raise UserError(f"device model '{model}' {problem}", about)
    return found


def parse_options(model: type[Device], given: Mapping[str, Any]) -> Any:
    """Make a model's `Options` from text or plain values.

    Numbers may be written in any base that Python reads (``0x3f8``).

    Raises:
        UserError: an option that the model does not have, or a value of the wrong kind.
    """
    hints = typing.get_type_hints(model.Options, include_extras=True)
    names = [field.name for field in dataclasses.fields(model.Options)]
    values: dict[str, Any] = {}
    for key, value in given.items():
        name = key.replace("-", "_")
        if name not in names:
            known = ", ".join(n.replace("_", "-") for n in names) or "no options"
            problem = f"has no option '{key}'; it has {known}"
            raise UserError(f"device '{model.model}' {problem}", Subject(key, model.model))
        try:
            values[name] = _convert(value, hints[name])
        except (ValueError, TypeError) as error:
            words = wanted(hints[name])
            problem = f" is not {words}" if words else f": {error}"
            where = f"device '{model.model}': option {key}={_shown(value)}"
            raise UserError(f"{where}{problem}", Subject(key, model.model)) from error
    try:
        return model.Options(**values)
    except (ValueError, TypeError) as error:
        wrong = error.options if isinstance(error, OptionError) else ()
        about = [Subject(option, model.model) for option in wrong]
        raise UserError(f"device '{model.model}': {error}", *about) from error


def switches(model: type[Device]) -> tuple[str, ...]:
    """The options that are true or false, as they are written."""
    hints = typing.get_type_hints(model.Options)
    return tuple(name.replace("_", "-") for name, hint in hints.items() if hint is bool)


def _shown(value: Any) -> str:
    """As a user writes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def adjusted(
    model: type[Device], options: Mapping[str, Any], wanted: Mapping[str, Any]
) -> dict[str, Any]:
    """The changed options of a device that runs, by name, from text or plain values.

    Args:
        options: all that it was given.

    Raises:
        UserError: one that cannot be changed then, or a value that cannot be.
    """
    names = {key: key.replace("-", "_") for key in wanted}
    may: frozenset[str] = getattr(model, "adjustable", frozenset())
    for key, name in names.items():
        if name not in may:
            known = ", ".join(sorted(may)).replace("_", "-") or "none"
            raise UserError(
                f"device '{model.model}': option '{key}' cannot be changed while it runs; "
                f"that can be: {known}"
            )
    whole = parse_options(model, {**options, **wanted})
    return {name: getattr(whole, name) for name in names.values()}


def inline_files(model: type[Device], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with the files that they name read in: options of the type `FileBytes`.

    What a device process could not open itself becomes part of the configuration, as base64 text.

    Raises:
        UserError: a file that cannot be read, or is larger than `LARGEST_FILE`.
    """
    hints = typing.get_type_hints(model.Options, include_extras=True)
    inlined = dict(options)
    for key, value in options.items():
        if hints.get(key.replace("-", "_")) != FileBytes or not isinstance(value, str):
            continue
        where, about = f"device '{model.model}': {key}={value}", Subject(key, model.model)
        try:
            with open(value, "rb") as file:
                data = file.read(LARGEST_FILE + 1)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{where}: {reason}", about) from error
        if len(data) > LARGEST_FILE:
            raise UserError(f"{where}: it has more than {LARGEST_FILE >> 10} KiB", about)
        inlined[key] = base64.b64encode(data).decode()
    return inlined


def _convert(value: Any, kind: Any) -> Any:
    if isinstance(value, str):
        try:
            return msgspec.convert(int(value, 0), kind)
        except (ValueError, msgspec.ValidationError):
            pass
    return msgspec.convert(value, kind, strict=False)
