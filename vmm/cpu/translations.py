"""Dropping translated code by guest-physical address."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vmm.cpu.context import CR0_PG, F_AC, Context
from vmm.cpu.layout import H_CPL, H_LMA, H_SMAP

_ALIAS = 1 << 63
"""Upper half of addresses that no guest uses."""


Ranges = Iterable[tuple[int, int]]
"""(start, end) each."""


def invalidate(context: Context, ram: Sequence[tuple[int, int]], ranges: Ranges) -> None:
    """Forget code that was translated from the parts of the ranges that are RAM (2 us).

    The library takes virtual addresses only, and skips what the guest cannot execute now. So for
    the time of the call the CPU has paging off and 64-bit addresses, of which bit 63 does
    not reach memory, and uses a set of TLB entries (that of SMAP) that guests never use.

    Args:
        ram: (start, end) of the RAM regions.
    """
    at = context.at
    context.save()
    words, longs = context.words, context.longs
    cr0, hidden, flags = longs[at.cr], words[at.hflags_w], words[at.eflags_w]
    longs[at.cr] = cr0 & ~CR0_PG
    words[at.hflags_w] = hidden & ~H_CPL | H_LMA | H_SMAP
    words[at.eflags_w] = flags & ~F_AC
    context.restore()
    remove = context.engine.remove_translations
    for begin, past in ranges:
        for start, end in ram:
            if start <= begin < past <= end:
                remove(_ALIAS | begin, _ALIAS | past)
                break
            first, last = max(start, begin), min(end, past)
            if first < last:
                remove(_ALIAS | first, (_ALIAS | first) + last - first)
    longs[at.cr], words[at.hflags_w], words[at.eflags_w] = cr0, hidden, flags
    context.restore()
