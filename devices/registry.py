"""The models by name, and how text options become a model's options.

Models are imported only when they are asked for, so that the command line starts fast. A name of
the form ``package.module:Class`` names a model that is not in this table.
"""

from __future__ import annotations

import dataclasses
import importlib
import typing
from collections.abc import Mapping
from typing import Any

import msgspec

from devices.contract import Device
from devices.errors import UserError

MODELS: dict[str, str] = {
    "serial": "devices.serial:Serial",
    "echo": "devices.echo:Echo",
    "config-space": "devices.pci.config_space:ConfigSpaceDevice",
    "debug-exit": "devices.debug_exit:DebugExit",
}


def load(model: str) -> type[Device]:
    """The class of a model.

    Raises:
        UserError: there is no such model, or its module cannot be imported.
    """
    target = MODELS.get(model, model)
    module_name, _, class_name = target.partition(":")
    if not (module_name and class_name):
        raise UserError(f"unknown device model '{model}'; there are {', '.join(sorted(MODELS))}")
    try:
        found: Any = importlib.import_module(module_name)
        for part in class_name.split("."):
            found = getattr(found, part)
    except Exception as error:
        # Not only ImportError: a module from elsewhere fails in ways of its own.
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"device model '{model}' cannot be loaded: {text}") from error
    if not (isinstance(found, type) and issubclass(found, Device)):
        raise UserError(f"device model '{model}' is not a subclass of devices.contract.Device")
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
            raise UserError(f"device '{model.model}' has no option '{key}'; it has {known}")
        try:
            values[name] = _convert(value, hints[name])
        except (ValueError, TypeError) as error:
            raise UserError(f"device '{model.model}': option {key}={value}: {error}") from error
    try:
        return model.Options(**values)
    except (ValueError, TypeError) as error:
        raise UserError(f"device '{model.model}': {error}") from error


def _convert(value: Any, kind: Any) -> Any:
    if isinstance(value, str):
        try:
            return msgspec.convert(int(value, 0), kind)
        except (ValueError, msgspec.ValidationError):
            pass
    return msgspec.convert(value, kind, strict=False)
