"""A virtio device for tests: it gives back what it was told, backwards."""

from __future__ import annotations

from typing import ClassVar

from devices.virtio.chain import Chain
from devices.virtio.ring import Queue, VirtQueue
from devices.virtio.transport import VirtioDevice

F_ODD, F_NEEDS_ODD = 1 << 0, 1 << 1
"""Two features of its own; the second does not go without the first."""
NOW, LATER = 0, 1
CHANGE = 7
"""The byte of the configuration whose write is a change of it by the device."""


class VirtioEcho(VirtioDevice):
    """Queue 0 answers at once; queue 1 in a later turn, the last request first."""

    model: ClassVar[str] = "virtio-echo"
    device_type: ClassVar[int] = 63
    queues = (Queue("now", 128), Queue("later", 128))
    config_size: ClassVar[int] = 8

    def __init__(self, host: object, options: object = None) -> None:
        self.config_bytes = bytearray(b"echo" + bytes(4))
        self.held: list[Chain] = []
        self.worked = False
        super().__init__(host, options)  # type: ignore[arg-type]

    def features(self) -> int:
        return F_ODD | F_NEEDS_ODD

    def accepts_features(self, features: int) -> bool:
        return not features & F_NEEDS_ODD or bool(features & F_ODD)

    def handle(self, queue: VirtQueue, chain: Chain) -> None:
        if queue.index == LATER:
            chain.held = True
            self.held.append(chain)
            self.host.want_work()
        else:
            chain.write(chain.read()[::-1])

    def work(self) -> None:
        self.worked = True
        self.host.want_turn()

    def turn(self) -> None:
        if self.worked:
            self.worked = False
            self.give_back()
        super().turn()

    def give_back(self) -> None:
        queue = self.virtqueues[LATER]

        def answer() -> None:
            while self.held:
                chain = self.held.pop()
                if queue.owns(chain):
                    chain.write(chain.read()[::-1])
                    queue.complete(chain)

        self.guarded(queue, answer)

    def sleep(self) -> None:
        self.give_back()
        self.end_turn()
        super().sleep()

    def device_reset(self) -> None:
        self.held.clear()

    def read_device_config(self) -> bytes:
        return bytes(self.config_bytes)

    def write_device_config(self, offset: int, size: int, value: int) -> None:
        self.config_bytes[offset : offset + size] = value.to_bytes(size, "little")
        if (offset, size) == (CHANGE, 1):
            self.config_changed()
