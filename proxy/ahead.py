"""Reading ahead: a port of data costs one exchange for a block instead of one for each word.

A drive's data port (`Region.ahead`) is read word by word, thousands of times, and nothing but the
last word of a block does more than move a position. So, once the guest reads on and on, the device
is asked for the bytes that come next, and reads are answered here. Before *anything* else is asked
of the device (another access, a command, a snapshot) it is told how many were taken, and then it
is where it would be without all this: the guest sees no difference, and a snapshot has none.

The child is believed no more than by `Read`: it could give the guest any bytes there, too.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

from devices.contract import Region
from devices.errors import DeviceFailure
from proxy import messages as m
from proxy.accesses import RegionHandler
from proxy.link import Link

RUN = 4
"""Reads of a port in a row after which its device is asked for what comes next."""
_WORD, _DWORD = 2, 4
"""Widths of data that are read ahead, in bytes."""


def read_ahead(link: Link, regions: Sequence[Region], handlers: Sequence[RegionHandler]) -> None:
    """Have the accesses of a device with such a port go by here.

    Like those of `proxy.accesses` the functions are closures over local variables, for speed.

    Args:
        handlers: of all regions; they are changed.
    """
    words: tuple[int, ...] = ()
    """What the device has given in advance, of the port of region `source`; -1: nothing."""
    source = -1
    taken = run = 0

    def ask(region: int, count: int, wanted: bool) -> bytes:
        try:
            answer = link.ask(m.TakeAhead(wanted, region, count))
        except DeviceFailure:
            return b""
        assert isinstance(answer, m.Ahead)
        return answer.data

    def settle() -> None:
        """Tell the device what was taken, before anything else is asked of it."""
        nonlocal source, taken, run
        run = 0
        if source >= 0:
            region, count = source, taken * _WORD
            source, taken = -1, 0
            if count:
                ask(region, count, False)

    def reader(index: int, read: Callable[[int, int], int]) -> Callable[[int, int], int]:
        def read_port(offset: int, size: int) -> int:
            nonlocal words, source, taken, run
            if source == index and not offset and link.failed is None:
                at = taken
                if size == _WORD and at < len(words):
                    taken = at + 1
                    return words[at]
                if size == _DWORD and at + 1 < len(words):
                    taken = at + 2
                    return words[at] | words[at + 1] << 16
            before = run
            settle()
            value = read(offset, size)
            if not offset and size in (_WORD, _DWORD):
                run = before + 1
                if not run % RUN:  # and again, if a block is longer than what is given at once
                    data = ask(index, 0, True)
                    words = struct.unpack_from(f"<{len(data) // _WORD}H", data)
                    source = index if words else -1
            return value

        return read_port

    def settled_read(read: Callable[[int, int], int]) -> Callable[[int, int], int]:
        def read_other(offset: int, size: int) -> int:
            settle()
            return read(offset, size)

        return read_other

    def settled_write(write: Callable[[int, int, int], None]) -> Callable[[int, int, int], None]:
        def write_any(offset: int, size: int, value: int) -> None:
            settle()
            write(offset, size, value)

        return write_any

    if any(region.ahead for region in regions):
        link.before = settle
        for index, (region, handler) in enumerate(zip(regions, handlers, strict=True)):
            own = handler.read
            handler.read = reader(index, own) if region.ahead else settled_read(own)
            handler.write = settled_write(handler.write)
