"""CPU speed: the same code on a bare engine and in a machine with idle devices."""

from __future__ import annotations

import struct
from time import perf_counter
from typing import Self

from vmm.boot.options import BootOptions, Mode
from vmm.cpu.engine import StopReason
from vmm.cpu.library import REG, Engine
from vmm.machine import Machine
from vmm.memory import GuestMemory

CODE_AT = 0x100000
DATA_AT = 0x200000

LOOPS = {
    "arithmetic": (bytes.fromhex("4801d84831c3") * 5, 40_000_000),  # add rax,rbx; xor rbx,rax
    "load and store": (bytes.fromhex("488b3e48893e"), 40_000_000),  # mov rdi,[rsi]; mov [rsi],rdi
    "short blocks": (b"", 60_000_000),  # nothing but the loop itself
}
"""Name -> (64-bit loop body with RSI at data, rounds)."""


def code(body: bytes, rounds: int) -> bytes:
    """64-bit code: `rounds` times `body`, then CLI and HLT."""
    start = b"\xbe" + struct.pack("<I", DATA_AT) + b"\xb9" + struct.pack("<I", rounds)
    back = b"\x48\xff\xc9\x75" + struct.pack("<b", -(len(body) + 5))  # dec rcx; jnz
    return start + body + back + b"\xfa\xf4"


class SpeedBench:
    """One machine with its devices, one bare engine.

    Args:
        scale: divides the number of rounds.
    """

    def __init__(self, scale: int) -> None:
        self._scale = scale
        self._machine = Machine(memory="16M")
        self._machine.build()
        self._memory = GuestMemory(16 << 20)

    def round(self, name: str) -> dict[str, float]:
        """Megabytes of code a second on the bare engine, and the machine's share of that."""
        body, rounds = LOOPS[name]
        rounds //= self._scale
        image = code(body, rounds)
        bare = self._bare(image)
        machine = self._in_machine(image)
        return {"bare": rounds * (len(body) + 5) / bare / 1e6, "ratio": bare / machine}

    def _bare(self, image: bytes) -> float:
        engine = Engine()
        try:
            for region in self._memory.regions:
                engine.map_ram(region.start, region.size, region.address)
            self._memory.write(CODE_AT, image)
            engine.write(REG.UC_X86_REG_RIP, CODE_AT)
            began = perf_counter()
            engine.start(CODE_AT)
            return perf_counter() - began
        finally:
            engine.close()

    def _in_machine(self, image: bytes) -> float:
        self._machine.boot(image, BootOptions(load_addr=CODE_AT, mode=Mode.LONG))
        cpu = self._machine.parts.cpu
        began = perf_counter()
        while cpu.run().reason is not StopReason.HALT:
            pass
        return perf_counter() - began

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._machine.close()
        self._memory.close()
