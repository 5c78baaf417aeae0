"""What helps to find out why a guest does not run: symbols, accesses that nobody answered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

from devices.bus import Bus, BusType
from devices.errors import UserError
from vmm.boot import elf

_KEPT = 4096
"""Different places that are told apart; a guest that scans an address space has more."""


def read_symbols(name: str, data: bytes) -> list[tuple[int, int, str]]:
    """(address, size, name) from an ELF file or the output of ``nm`` (System.map).

    Raises:
        UserError: it is neither.
    """
    if data.startswith(elf.MAGIC):
        return elf.symbols(data)
    found = []
    for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), 1):
        fields = line.split()
        try:
            address = int(fields[0], 16)
            symbol = fields[2]
        except (IndexError, ValueError):
            raise UserError(
                f"symbols {name}: line {number} is not 'address type name', and it is no ELF file"
            ) from None
        found.append((address, 0, symbol))
    return sorted(found)


class UnclaimedTrace:
    """Counts the accesses that no device answered, by place, size and direction."""

    def __init__(self, buses: Mapping[BusType, Bus]) -> None:
        self._counts: Counter[tuple[str, str, int, int]] = Counter()
        self._others = 0
        for kind, bus in buses.items():
            bus.on_unclaimed = self._listener(kind)

    def _listener(self, bus: BusType) -> Callable[[str, int, int, int], None]:
        def listen(direction: str, address: int, size: int, _value: int) -> None:
            key = (str(bus), direction, address, size)
            if key in self._counts or len(self._counts) < _KEPT:
                self._counts[key] += 1
            else:
                self._others += 1

        return listen

    def lines(self) -> list[str]:
        """One line for each place, the most used first, and one on what cannot be known."""
        lines = [
            f"unclaimed {bus} {direction} of {size} at {address:#x}: {count} times"
            for (bus, direction, address, size), count in self._counts.most_common()
        ]
        if self._others:
            lines.append(f"unclaimed: {self._others} accesses elsewhere")
        lines.append(
            "unclaimed MSRs: not known, the CPU engine does not tell of them (unknown ones read 0)"
        )
        return lines
