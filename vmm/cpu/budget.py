"""The budget of a run: how much code may execute, and how another thread ends it early.

Unicorn can be stopped exactly (no instruction run twice or skipped) at the start of a translated
block only. So a block hook keeps two counters: the bytes of code executed so far, and a limit; when
the first has reached the second it stops the engine before the block. Another thread ends a run by
lowering the limit: each counter has a single writer at a time, so no kick can be lost.

The hook runs for every block of guest code, millions of times a second. On x86-64 it is 28 bytes
of machine code (`native`) that the engine calls directly; elsewhere, or where the host forbids
executable memory, a Python function does the same about ten times slower.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

from vmm.cpu import native as machine_code
from vmm.cpu.leaving import Leaving
from vmm.cpu.library import HOOK_BLOCK, BlockCallback, Engine, address_of

_EXECUTED, _LIMIT, _STOP, _STOPPED = range(4)

NO_LIMIT = 1 << 62


class Budget:
    """The counters of one engine, with their hook installed.

    Args:
        engine: the engine to hook.
        native: False forces the portable hook.
        leaving: ends runs without a hook, until `count` is called.

    Attributes:
        counts: whether blocks are counted, and the limit is looked at.
        words: [executed, limit, -, stopped], for the hot path of `Cpu`.
        address: of `words`, for native code.
        code: the machine code in use; None: the portable hook.
    """

    def __init__(self, engine: Engine, native: bool = True, leaving: Leaving | None = None) -> None:
        self._engine = engine
        self.counts = False
        self._leaving = leaving
        # Re-entrant: a signal's handler may end a run in the middle of `end`.
        self._ending = threading.RLock()
        self._storage = (ctypes.c_int64 * 4)()
        self.words = memoryview(self._storage).cast("B").cast("q")
        self.words[_LIMIT] = NO_LIMIT
        self.words[_STOP] = address_of("uc_emu_stop")
        self.address = ctypes.addressof(self._storage)
        self.code = machine_code.load() if native else None
        if leaving is None:
            self.count()

    def count(self) -> None:
        """Count from now on; code that is translated already is not counted."""
        if self.counts:
            return
        self.leaving = None
        self.counts = True
        if self.code is not None:
            self._engine.hook(HOOK_BLOCK, ctypes.c_void_p(self.code.on_block), data=self.address)
        else:
            self._engine.hook(HOOK_BLOCK, BlockCallback(self._portable(self._engine)))

    @property
    def leaving(self) -> Leaving | None:
        """What ends the run that goes on, if anything does beside the limit."""
        return self._leaving

    @leaving.setter
    def leaving(self, leaving: Leaving | None) -> None:
        """Waits for an `end` that is under way: the next run would take it for an error."""
        with self._ending:
            self._leaving = leaving

    def _portable(self, engine: Engine) -> Any:
        words, stop = self.words, engine.stop

        def on_block(_engine: int, _address: int, size: int, _data: int) -> None:
            if words[_EXECUTED] >= words[_LIMIT]:
                words[_STOPPED] = 1
                stop()
            else:
                words[_EXECUTED] += size

        return on_block

    def arm(self, amount: int) -> None:
        """Allow `amount` more bytes."""
        words = self.words
        words[_STOPPED] = 0
        words[_LIMIT] = words[_EXECUTED] + amount

    def end(self) -> None:
        """From any thread: stop before the next block.

        Without a count a run that has not really begun does not hear it (see `leaving`).
        """
        self.words[_LIMIT] = -1
        with self._ending:
            if self._leaving is not None:
                self._leaving.leave()
