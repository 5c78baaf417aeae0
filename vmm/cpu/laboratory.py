"""Looking for private fields of the engine by experiment.

A few things that we need the library knows and has no call for. They lie in two structures of its
own: the engine's, which the handle points to, and the CPU's, which that one points to. Where in
them differs from build to build. So a throw-away engine is made to do what changes a field, and the
field is the one place that changes as it should; then a trial must show that it does what is
expected of it. What is not found beyond doubt is a LookupError, and its user does without.

Source of what is looked for: struct uc_struct, CPUState and CPUX86State of Unicorn 2.1.
"""

from __future__ import annotations

import ctypes
import os
import struct

from vmm.cpu.library import Engine

ENGINE_BYTES = 4096
"""Bytes of the engine's structure that are looked at."""
CPU_BYTES = 48 << 10
"""More than the CPU's structure has; a cache of 4096 pointers lies near its beginning."""
_CACHE = 4096 * 8
_HEAD = 128
"""Pointers in front of that cache that are looked at."""


class Laboratory:
    """An engine to experiment with; a context manager that closes it.

    Raises:
        OSError: our own memory cannot be read through the kernel.
    """

    def __init__(self) -> None:
        self._process = os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC)
        self.engine = Engine()

    def __enter__(self) -> Laboratory:
        return self

    def __exit__(self, *_error: object) -> None:
        self.engine.close()
        os.close(self._process)

    def own(self) -> bytes:
        """The beginning of the engine's structure."""
        return ctypes.string_at(self.engine.handle or 0, ENGINE_BYTES)

    def read(self, address: int, size: int = CPU_BYTES) -> bytes:
        """Memory of ours that may not be there: read through the kernel, it cannot crash us.

        Less than `size` where the memory ends before.
        """
        if address % 4 or not 1 << 12 <= address < 1 << 47:
            return b""
        try:
            return os.pread(self._process, size, address)
        except OSError:
            return b""

    def find_cpu(self, pattern: bytes, elsewhere: int = 0) -> tuple[int, int, int]:
        """The structure with `pattern`, which was put into the CPU's registers.

        Args:
            elsewhere: where the pattern may lie, too; that is not it.

        Returns:
            where in the engine its address is, that address, and where in it the pattern is.
        """
        found = []
        for offset, (address,) in enumerate(struct.iter_unpack("<Q", self.own())):
            data = self.read(address)
            where = data.find(pattern)
            if where < _CACHE or address + where == elsewhere:
                continue
            # It begins with a pointer to its own registers; what lies a little before it does not.
            own = struct.unpack_from(f"<{_HEAD}Q", data)
            if any(address + _CACHE <= each <= address + where for each in own):
                found.append((8 * offset, address, where))
        if len(found) != 1:
            raise LookupError("the engine does not point to its CPU, or to several")
        return found[0]


def only(candidates: set[int]) -> int:
    """The one that is left."""
    if len(candidates) != 1:
        raise LookupError("a field was not found beyond doubt")
    return candidates.pop()


def cpu_of(engine: Engine, pointer: int) -> int:
    """The address of the CPU's structure, if the engine has it at `pointer`."""
    address: int = ctypes.c_uint64.from_address((engine.handle or 0) + pointer).value
    return address
