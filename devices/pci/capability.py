"""The capability list of a configuration space, and the capabilities that need no code.

Sources: PCI Local Bus Specification 3.0, section 6.7 and appendix H; PCI Bus Power Management
Interface Specification 1.2, section 3.2; the ECN "Advanced Capabilities for Conventional PCI".
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from devices.pci.contract import CONFIG_REGISTERS
from devices.pci.registers import Field

CAPABILITIES_START = 0x40
"""Where device-specific registers begin, and with them our capability list."""

_MOST_CAPABILITIES = (4 * CONFIG_REGISTERS - CAPABILITIES_START) // 4


class CapabilityId(enum.IntEnum):
    """Appendix H, as far as this project uses them."""

    POWER_MANAGEMENT = 0x01
    MSI = 0x05
    VENDOR_SPECIFIC = 0x09
    MSI_X = 0x11
    ADVANCED_FEATURES = 0x13


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


POWER_MANAGEMENT = Capability(
    CapabilityId.POWER_MANAGEMENT,
    8,
    (
        # Version 3, neither D1 nor D2, no PME#.
        Field("pmc", 2, 2, 3),
        # D0 or D3hot; No_Soft_Reset: what was set up in D0 is still there after D3hot.
        Field("pmcsr", 4, 2, 1 << 3, writable=0b11),
    ),
)
"""What `Header.power_management` adds."""

FUNCTION_RESET = Capability(
    CapabilityId.ADVANCED_FEATURES,
    6,
    # AF_CAP: transactions pending and function-level reset. AF_CTRL reads as zero, and since
    # a reset is over when the write is, so does AF_STATUS.
    (Field("length", 2, 1, 6), Field("af_cap", 3, 1, 0b11)),
)
"""What `Header.function_reset` adds."""


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


def capability_start(capabilities: Sequence[Capability], wanted: int) -> int | None:
    """The offset in bytes of the first one with this id, as `capability_fields` lays them out."""
    start = CAPABILITIES_START
    for item in capabilities:
        if item.id == wanted:
            return start
        start += (item.length + 3) // 4 * 4
    return None


def walk_capabilities(read_config: Callable[[int], int]) -> Iterator[tuple[int, int]]:
    """The offset and first dword of each capability, by walking the list of any function.

    A list that leaves the space of capabilities or never ends is followed as far as it makes sense.
    """
    if not read_config(1) >> 16 & 0x10:
        return
    start = read_config(13) & 0xFC
    for _ in range(_MOST_CAPABILITIES):
        if start < CAPABILITIES_START:
            break
        dword = read_config(start // 4)
        yield start, dword
        start = dword >> 8 & 0xFC


def find_capabilities(read_config: Callable[[int], int]) -> dict[int, int]:
    """The offset of the first capability of each id."""
    found: dict[int, int] = {}
    for start, dword in walk_capabilities(read_config):
        found.setdefault(dword & 0xFF, start)
    return found
