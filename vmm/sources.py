"""Where guests and devices come from: names, files, classes and functions of a library user."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import guests
from devices import registry
from devices.contract import Device, DeviceHost
from devices.errors import UserError
from vmm.boot.options import BootOptions, Mode
from vmm.config import NAME, MachineConfig
from vmm.local import DeviceFactory, ModelFactory


def model_and_factory(
    model: str | type[Device] | DeviceFactory, options: Mapping[str, Any]
) -> tuple[str, DeviceFactory | None]:
    """A name for the configuration, and how to make the device if the name is not enough.

    Raises:
        UserError: an unknown model, or options that it does not have.
    """
    if isinstance(model, str):
        registry.parse_options(registry.load(model), options)
        return model, None
    if isinstance(model, type):
        values = registry.parse_options(model, options)
        return f"{model.__module__}:{model.__qualname__}", ModelFactory(model, values)
    if options:
        raise UserError("options are for a model; a function knows its own")
    name = getattr(model, "__qualname__", type(model).__qualname__)
    return f"{getattr(model, '__module__', '')}:{name}", model


def free_name(model: str, taken: Collection[str]) -> str:
    """A name for a device of this model that is not among `taken`."""
    base = model.rpartition(":")[2].rpartition(".")[2].lower()
    base = base if NAME.fullmatch(base) else "device"
    numbered = (f"{base}-{n}" for n in itertools.count(2))
    return next(n for n in itertools.chain([base], numbered) if n not in taken)


def factory_of(given: type[Device] | Callable[[DeviceHost], Device]) -> DeviceFactory:
    """How to make the device that a class or function stands for."""
    _, factory = model_and_factory(given, {})
    assert factory is not None
    return factory


def trusted_factories(
    config: MachineConfig,
    given: Mapping[str, DeviceFactory | type[Device]],
    models: Iterable[str | type[Device]],
) -> dict[str, DeviceFactory]:
    """How to make those devices of a snapshot that are not made from a model's name.

    A snapshot may come from anywhere, and to import a module is to run it, before any jail. So it
    only gets models of `devices.registry` and those that the caller names.

    Args:
        given: how to make a device, by the device's name.
        models: ``package.module:Class`` of models that may be imported, or the classes.

    Raises:
        UserError: a device of another model; options that its class does not have.
    """
    factories = {name: factory_of(each) for name, each in given.items()}
    allowed: dict[str, type[Device] | None] = {}
    for model in models:
        if isinstance(model, str):
            allowed.setdefault(model, None)
        else:
            allowed[f"{model.__module__}:{model.__qualname__}"] = model
    for device in config.devices:
        if device.name in factories or device.model in registry.MODELS:
            continue
        if device.model not in allowed:
            raise UserError(
                f"the snapshot's device '{device.name}' is of the model {device.model!r}, which is "
                "not one of vmm's own; if you trust its code, allow it: models=[...] or "
                f"--allow-model {device.model}"
            )
        kind = allowed[device.model]
        if kind is not None:
            _, factory = model_and_factory(kind, device.options)
            assert factory is not None
            factories[device.name] = factory
    return factories


def read_image(image: str | Path | bytes, options: BootOptions | None) -> tuple[bytes, BootOptions]:
    """The bytes of a guest, and the options it needs if it is a built-in one.

    Raises:
        UserError: the file cannot be read.
    """
    if isinstance(image, bytes):
        return image, options or BootOptions()
    if isinstance(image, str) and image in guests.GUESTS:
        guest = guests.GUESTS[image]
        given = options or BootOptions()
        chosen = replace(
            given,
            name=image,
            load_addr=guest.load_addr if given.load_addr is None else given.load_addr,
            mode=Mode(guest.mode) if given.mode is None and guest.mode else given.mode,
        )
        return guests.image(image), chosen
    try:
        data = Path(image).read_bytes()
    except OSError as error:
        raise UserError(f"image {image}: {error.strerror}") from error
    return data, options or BootOptions(name=str(image))
