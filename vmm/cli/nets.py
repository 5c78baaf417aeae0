"""``--net LINK[,OPTION=VALUE]...``, or a ``[[net]]`` table of a machine file: a network card.

What it stands for is a device of the model ``net`` whose `link` is user, pair:NAME or tap:NAME.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from devices.errors import UserError
from vmm.cli.machine_file import Table
from vmm.config import OF_ANY_FUNCTION, DeviceConfig, device_from, split_options

NONE = "none"
OPTIONS = ("link", "forward", "mac", *OF_ANY_FUNCTION)


def nets(
    given: Sequence[str | Table], taken: Sequence[str], places: dict[str, Table] | None = None
) -> list[DeviceConfig]:
    """The cards; ``none`` stands for no card.

    ``forward`` may be given several times, or as a list. A card that shares its network with
    others gets an address of its own unless ``mac`` gives one.

    Args:
        taken: names of devices that are in use.
        places: gets the tables among them, by how messages on their devices begin.

    Raises:
        UserError: an option is wrong.
    """
    names, made = list(taken), []
    for each in given:
        if each == NONE:
            continue
        try:
            made.append(_card(_options(each), names))
        except UserError as error:
            where = each.where(str(error)) if isinstance(each, Table) else f"--net {each}"
            raise UserError(f"{where}: {error}") from error
        names.append(made[-1].name)
        if places is not None and isinstance(each, Table):
            places[f"device '{names[-1]}': "] = each
    return made


def _card(options: dict[str, Any], taken: Sequence[str]) -> DeviceConfig:
    for key in options:
        if key not in OPTIONS:
            raise UserError(f"a network card has no option '{key}'; it has {', '.join(OPTIONS)}")
    if options.get("link") in (None, "", NONE):
        raise UserError("a network card needs a 'link': user, pair:NAME or tap:NAME")
    if options["link"] != "user":
        options.setdefault("mac", _own_address())
    return device_from("a network card", "net", options, taken)


def _options(given: str | Table) -> dict[str, Any]:
    values: Mapping[str, Any]
    if isinstance(given, Table):
        values = given.values
        forward = values.get("forward")
        if isinstance(forward, list):
            values = {**values, "forward": "+".join(map(str, forward))}
        return dict(values)
    link, options = split_options(given, several="forward")
    if "link" in options:
        raise UserError("option 'link' is given twice")
    return {"link": link, **options}


def _own_address() -> str:
    """One of the block that QEMU and others use for virtual cards."""
    return "52:54:00:" + random.SystemRandom().randbytes(3).hex(":")
