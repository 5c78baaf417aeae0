"""A device that does DMA in every way there is, and a guest that executes what it wrote."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from devices.bus import BusType
from devices.contract import Device, DeviceHost, Region
from devices.dma import DmaFault

SYNCED, POSTED = 0xED0, 0xEE0
"""Ports: an address (its write is the doorbell), then a value; then what became of it."""
VALUE, RESULT = 4, 8
BODY, DONE = 0x20_0000, 0x28_0000


@dataclass
class ProbeState:
    value: int = 0
    waiting: list[int] = field(default_factory=list)
    result: int = 0


class _Port:
    def __init__(self, device: DmaProbe, synced: bool) -> None:
        self._device, self._synced = device, synced

    def read(self, offset: int, size: int) -> int:
        return self._device.state.result if offset == RESULT else 0

    def write(self, offset: int, size: int, value: int) -> None:
        device = self._device
        if offset == VALUE:
            device.state.value = value
        elif offset == 0:
            if self._synced:
                device.carry_out(value)
            else:
                device.state.waiting.append(value)
                device.host.want_turn()


class DmaProbe(Device):
    """Writes ``mov eax, value; ret`` to an address, then the value to `DONE`."""

    model: ClassVar[str] = "dma-probe"
    dma: ClassVar[bool] = True
    State = ProbeState
    state: ProbeState

    def regions(self) -> tuple[Region, ...]:
        return (
            Region("synced", BusType.PIO, 16, SYNCED, synced=True),
            Region("posted", BusType.PIO, 16, POSTED),
        )

    def handlers(self) -> tuple[_Port, ...]:
        return _Port(self, True), _Port(self, False)

    def carry_out(self, address: int) -> None:
        memory, value = self.host.memory, self.state.value.to_bytes(4, "little")
        try:
            memory.write(address, b"\xb8" + value + b"\xc3")
            memory.write(DONE, value)
            self.state.result = 1
        except DmaFault:
            self.state.result = 2

    def turn(self) -> None:
        while self.state.waiting:
            self.carry_out(self.state.waiting.pop(0))

    def wake(self) -> None:
        super().wake()
        if self.state.waiting:
            self.host.want_turn()


_GUEST = (
    # bits 32; org 0x100000
    # mov esp, 0x2f0000
    # mov dword [0x300000], 0x83      ; two pages of 4 MiB, the second an alias of the first
    # mov dword [0x300004], 0x83
    # mov eax, 0x300000; mov cr3, eax
    # mov eax, cr4; or eax, 0x10; mov cr4, eax
    # mov eax, cr0; or eax, 0x80000000; mov cr0, eax
    # mov ebx, 1
    "bc00002f00c7050000300083000000c7050400300083000000b8000030000f22d8"
    "0f20e083c8100f22e00f20c00d000000800f22c0bb01000000"
    # next: mov eax, ebx; mov edx, {port + 4}; out dx, eax
    "89d8ba{value_port}ef"
    # mov eax, 0x200000; mov edx, {port}; out dx, eax
    "b800002000ba{port}ef"
    # again: cmp dword [0x280000], ebx; jne {again or fail}
    "391d000028000f85{otherwise}"
    # mov eax, 0x200000; call eax; cmp eax, ebx; jne fail
    # mov eax, 0x600000; call eax; cmp eax, ebx; jne fail
    "b800002000ffd039d87519b800006000ffd039d8750e"
    # inc ebx; cmp ebx, {rounds}; jb next; mov al, 1; out 0xf4, al
    # fail: mov al, 2; out 0xf4, al
    "4381fb{rounds}72c2b001e6f4f4b002e6f4f4"
)
GOOD, BAD = 1, 2
"""How the guest exits: every round gave the value that was asked for, or one did not."""


def guest(*, synced: bool, rounds: int) -> bytes:
    """Has the device write code, executes it by two virtual addresses, and again.

    After a synced write it takes no excuse; after a posted one it waits for `DONE`.
    """

    def dword(value: int) -> str:
        return (value & 0xFFFF_FFFF).to_bytes(4, "little").hex()

    port = SYNCED if synced else POSTED
    return bytes.fromhex(
        _GUEST.format(
            port=dword(port),
            value_port=dword(port + VALUE),
            otherwise=dword(0x24 if synced else -12),
            rounds=dword(rounds),
        )
    )


def make(host: DeviceHost) -> Any:
    return DmaProbe(host)
