"""The capability list of a configuration space, and the capabilities that need no code.

Sources: PCI Local Bus Specification 3.0, section 6.7 and appendix H.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from devices.pci.contract import CONFIG_REGISTERS
from devices.pci.registers import Field

CAPABILITIES_START = 0x40
"""Where device-specific registers begin, and with them our capability list."""


class CapabilityId(enum.IntEnum):
    """Appendix H, as far as this project uses them."""

    POWER_MANAGEMENT = 0x01
    MSI = 0x05
    VENDOR_SPECIFIC = 0x09
    MSI_X = 0x11


@dataclass(frozen=True, slots=True)
class Capability:
    """One entry of the capability list (6.7).

    Attributes:
        id: what it is, see `CapabilityId`.
        length: in bytes with the two of the list itself, 2..192.
        fields: its registers, with offsets from its own start; bytes 0 and 1 (ID and pointer to
            the next) are not among them.
    """

    id: int
    length: int
    fields: tuple[Field, ...] = ()


def vendor_capability(body: bytes) -> Capability:
    """A vendor-specific capability of read-only bytes: its third byte is its length."""
    length = 3 + len(body)
    fields = [Field("length", 2, 1, reset=length)]
    fields += [Field(f"body {index}", 3 + index, 1, byte) for index, byte in enumerate(body)]
    return Capability(CapabilityId.VENDOR_SPECIFIC, length, tuple(fields))


def capability_fields(capabilities: Sequence[Capability]) -> list[Field]:
    """The capabilities laid out one after the other on dword borders, and linked."""
    fields = []
    start = CAPABILITIES_START
    for index, item in enumerate(capabilities):
        following = start + (item.length + 3) // 4 * 4
        if item.length < 2 or start + item.length > 4 * CONFIG_REGISTERS:
            raise ValueError(f"capability {item.id:#04x} of {item.length} bytes does not fit")
        last = index == len(capabilities) - 1
        fields.append(Field("capability id", start, 1, item.id))
        fields.append(Field("next capability", start + 1, 1, 0 if last else following))
        for part in item.fields:
            if not 2 <= part.offset <= item.length - part.width:
                raise ValueError(f"'{part.name}' lies outside its capability {item.id:#04x}")
            fields.append(
                Field(
                    part.name,
                    start + part.offset,
                    part.width,
                    part.reset,
                    part.writable,
                    part.clears,
                    part.volatile,
                )
            )
        start = following
    return fields
