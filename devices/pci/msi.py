"""MSI: up to 32 messages to one address, told in configuration space alone.

Source: PCI Local Bus Specification 3.0, section 6.8.1. Functions here have the longest form of the
capability: a 64-bit address and a mask and pending bit for each message. Message n is sent as the
data that the guest gave with its low bits replaced by n; if the guest has enabled fewer messages
than the function has, message n goes out as n modulo their number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from devices.pci.capability import Capability, CapabilityId
from devices.pci.registers import DWORD, Field, RegisterFile

MAX_MESSAGES = 32

_ENABLE = 1 << 16
_ENABLED_SHIFT = 16 + 4
_ENABLED_MASK = 0b111
"""In the capability's first dword: bit 0 and bits 4 to 6 of Message Control."""
_ADDRESS, _UPPER, _DATA, _MASK, _PENDING = 1, 2, 3, 4, 5
"""Dwords of the capability."""


@dataclass(frozen=True, slots=True)
class MsiLayout:
    """A function that has MSI.

    Attributes:
        messages: how many it asks for: 1, 2, 4, 8, 16 or 32.
    """

    messages: int = 1

    def check(self) -> None:
        """See whether it can be.

        Raises:
            ValueError: it cannot.
        """
        if self.messages not in (1, 2, 4, 8, 16, 32):
            raise ValueError(f"MSI with {self.messages} messages: a power of two up to 32")

    def capability(self) -> Capability:
        """The entry in the capability list."""
        asked = self.messages.bit_length() - 1
        all_messages = (1 << self.messages) - 1
        per_message_masks, wide_address = 1 << 8, 1 << 7
        control = per_message_masks | wide_address | asked << 1
        return Capability(
            CapabilityId.MSI,
            24,
            (
                Field("msi control", 2, 2, control, writable=0b111_0001),
                Field("msi address", 4, 4, writable=DWORD & ~0b11),
                Field("msi upper address", 8, 4, writable=DWORD),
                Field("msi data", 12, 2, writable=0xFFFF),
                Field("msi mask", 16, 4, writable=all_messages),
                Field("msi pending", 20, 4, volatile=all_messages),
            ),
        )


class Msi:
    """The messages of one function; none if it has no `layout`.

    Args:
        registers: the configuration space, where all its state is.
        start: the capability's dword there.
        may_send: whether the function may write to memory.
        send: sends a message (address, data).
    """

    def __init__(
        self,
        layout: MsiLayout | None,
        registers: RegisterFile,
        start: int,
        may_send: Callable[[], bool],
        send: Callable[[int, int], None],
    ) -> None:
        self.messages = layout.messages if layout else 0
        self._registers, self._start = registers, start
        self._may_send, self._send = may_send, send

    @property
    def enabled(self) -> bool:
        """Whether the guest has switched MSI on; the pin is silent then."""
        return bool(self.messages and self._registers.values[self._start] & _ENABLE)

    def trigger(self, message: int) -> None:
        """Interrupt the guest; nothing while MSI is not `enabled`.

        Raises:
            ValueError: the function has no such message.
        """
        if not 0 <= message < self.messages:
            raise ValueError(f"no MSI message {message}: there are {self.messages}")
        if self.enabled:
            message &= self._enabled_messages() - 1
            self._registers.update(self._start + _PENDING, 1 << message, 1 << message)
            self.retry()

    def retry(self) -> None:
        """What holds messages back may have changed: send what waits and may go."""
        if not self.enabled:
            return
        values, start = self._registers.values, self._start
        ready = values[start + _PENDING] & ~values[start + _MASK]
        if not ready or not self._may_send():
            return
        address = values[start + _ADDRESS] | values[start + _UPPER] << 32
        enabled = self._enabled_messages()
        data = values[start + _DATA] & 0xFFFF & ~(enabled - 1)
        for message in range(enabled):
            if ready >> message & 1:
                self._registers.update(start + _PENDING, 1 << message, 0)
                self._send(address, data | message)

    def _enabled_messages(self) -> int:
        asked = self._registers.values[self._start] >> _ENABLED_SHIFT & _ENABLED_MASK
        return min(1 << asked, self.messages)
