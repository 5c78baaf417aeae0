"""Where guests and devices come from: names, files, classes and functions of a library user."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import guests
from devices import registry
from devices.contract import Device, DeviceHost
from devices.errors import UserError
from vmm.attachment import DeviceFactory
from vmm.boot.options import BootOptions, Mode


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
        kind = model
        return f"{model.__module__}:{model.__qualname__}", lambda host: kind(host, values)
    if options:
        raise UserError("options are for a model; a function knows its own")
    name = getattr(model, "__qualname__", type(model).__qualname__)
    return f"{getattr(model, '__module__', '')}:{name}", model


def factory_of(given: type[Device] | Callable[[DeviceHost], Device]) -> DeviceFactory:
    """How to make the device that a class or function stands for."""
    _, factory = model_and_factory(given, {})
    assert factory is not None
    return factory


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
