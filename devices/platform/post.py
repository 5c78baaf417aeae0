"""The POST port 0x80: firmware writes how far it has come, Linux writes there to pass time.

Source: IBM PC AT Technical Reference, "POST". Only the last code is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from devices.bus import BusType
from devices.contract import U8, Device, Region


@dataclass
class PostState:
    """`code` is the last byte written."""

    code: U8 = 0


class PostPort(Device):
    model: ClassVar[str] = "post"
    summary: ClassVar[str] = "the POST code port 0x80"
    State = PostState
    state: PostState

    def regions(self) -> tuple[Region, ...]:
        return (Region("code", BusType.PIO, 1, start=0x80),)

    def read(self, offset: int, size: int) -> int:
        return self.state.code

    def write(self, offset: int, size: int, value: int) -> None:
        self.state.code = value
