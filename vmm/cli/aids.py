"""What helps to find out why a guest does not run: symbols, accesses that nobody answered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Protocol

from devices.errors import Subject, UserError
from vmm.boot import elf
from vmm.parts import MSRS

_KEPT = 4096
"""Different places that are told apart; a guest that scans an address space has more."""


class Unclaimed(Protocol):
    """An address space: a bus, or the MSRs."""

    on_unclaimed: Callable[[str, int, int, int], None] | None


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
                f"symbols {name}: line {number} is not 'address type name', and it is no ELF file",
                Subject("symbols"),
            ) from None
        found.append((address, 0, symbol))
    return sorted(found)


class UnclaimedTrace:
    """Counts the accesses that nobody answered, by place, size and direction.

    Args:
        spaces: by name; "msr" may be missing, which the lines then say.
    """

    def __init__(self, spaces: Mapping[str, Unclaimed]) -> None:
        self._counts: Counter[tuple[str, str, int, int]] = Counter()
        self._others = 0
        self._all = MSRS in spaces
        for name, space in spaces.items():
            space.on_unclaimed = self._listener(name)

    def _listener(self, space: str) -> Callable[[str, int, int, int], None]:
        def listen(direction: str, address: int, size: int, _value: int) -> None:
            key = (space, direction, address, size)
            if key in self._counts or len(self._counts) < _KEPT:
                self._counts[key] += 1
            else:
                self._others += 1

        return listen

    def lines(self) -> list[str]:
        """One line for each place, the most used first, and one on what cannot be known."""
        lines = [
            f"unclaimed {space} {direction} of {size} at {address:#x}: {count} times"
            for (space, direction, address, size), count in self._counts.most_common()
        ]
        if self._others:
            lines.append(f"unclaimed: {self._others} accesses elsewhere")
        if not self._all:
            lines.append(
                "unclaimed MSRs: not known, this build of the CPU engine does not tell of them "
                "(unknown ones read 0)"
            )
        return lines
