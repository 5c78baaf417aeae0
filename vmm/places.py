"""PCI slots as a user writes them.

``slot=3`` is device 3 of the root bus, ``slot=3.1`` its function 1, and ``slot=br1:3.1`` the same
behind the bridge that is named br1.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from devices.errors import UserError

_FORM = re.compile(r"(?:([a-z0-9][a-z0-9._-]*):)?(0x[0-9a-f]+|[0-9]+)(?:\.([0-9]+))?")


@dataclass(frozen=True, slots=True)
class Place:
    """A slot as the user writes it.

    Attributes:
        bridge: the name of the bridge; "" is the root.
    """

    bridge: str
    device: int
    function: int

    @classmethod
    def parse(cls, text: str) -> Place:
        """From ``[BRIDGE:]DEVICE[.FUNCTION]``.

        Raises:
            UserError: it is none; the text does not say whose.
        """
        match = _FORM.fullmatch(text)
        if match is None:
            raise UserError(f"slot={text} is not [BRIDGE:]DEVICE[.FUNCTION]")
        place = cls(match[1] or "", int(match[2], 0), int(match[3] or 0))
        first = 0 if place.bridge else 1
        if not first <= place.device <= 31:
            raise UserError(f"slot={text} is not from {first} to 31")
        if place.function > 7:
            raise UserError(f"slot={text}: a device has functions 0 to 7")
        return place

    def __str__(self) -> str:
        bridge = f"{self.bridge}:" if self.bridge else ""
        function = f".{self.function}" if self.function else ""
        return f"{bridge}{self.device}{function}"
