"""``--net LINK[,OPTION=VALUE]...``, or a ``[[net]]`` table of a machine file: a network card.

What it stands for is a device of the model ``net`` whose `link` is user, pair:NAME or tap:NAME.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from devices.errors import Subject, UserError
from vmm.cli.given import Given, Places
from vmm.config import OF_ANY_FUNCTION, DeviceConfig, device_from

NONE = "none"
OPTIONS = ("link", "forward", "mac", *OF_ANY_FUNCTION)


def nets(
    given: Sequence[Given], taken: Sequence[str], places: Places | None = None
) -> list[DeviceConfig]:
    """The cards; ``none`` stands for no card.

    ``forward`` may be given several times, or as a list. A card that shares its network with
    others gets an address of its own unless ``mac`` gives one.

    Args:
        taken: names of devices that are in use.
        places: is told where each was given.

    Raises:
        UserError: an option is wrong.
    """
    names, made = list(taken), []
    for each in given:
        if dict(each.values) == {"link": NONE}:
            continue
        try:
            made.append(_card(dict(each.values), names))
        except UserError as error:
            raise each.error(error) from error
        names.append(made[-1].name)
        if places is not None:
            places.add(each, names[-1])
    return made


def _card(options: dict[str, Any], taken: Sequence[str]) -> DeviceConfig:
    for key in options:
        if key not in OPTIONS:
            problem = f"a network card has no option '{key}'; it has {', '.join(OPTIONS)}"
            raise UserError(problem, Subject(key))
    if options.get("link") in (None, "", NONE):
        problem = "a network card needs a 'link': user, pair:NAME or tap:NAME"
        raise UserError(problem, Subject("link"))
    if isinstance(options.get("forward"), list):
        options["forward"] = "+".join(map(str, options["forward"]))
    if options["link"] != "user":
        options.setdefault("mac", _own_address())
    return device_from("a network card", "net", options, taken)


def _own_address() -> str:
    """One of the block that QEMU and others use for virtual cards."""
    return "52:54:00:" + random.SystemRandom().randbytes(3).hex(":")
