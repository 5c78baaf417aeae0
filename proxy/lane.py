"""The fast lane: one page shared by the machine and one child, for Read, Write and their replies.

Rules that both ends keep:
- The machine puts requests into a ring and counts them in `HEAD`; the child carries them out in
  order and counts them in `TAIL`. At most one of them is a read that the machine waits for, so one
  `VALUE` is enough.
- The lane is opened and closed by messages on the tube, so the order of all commands is one: the
  child looks at the ring only after `LaneOpen`, and carries out all of the ring before any
  message that it takes from the tube later.
- A `SyncedWrite` in the ring is done, with its turn, when `TAIL` has passed it.
- The machine waits for the answer of each tube message that it sends while the lane is open, or
  closes the lane first. `DOOR` counts such messages, so that a polling child looks at the tube.
- Who looks at the page in vain spins, if each side has a CPU; on one CPU (`LaneOpen.shares`)
  it gives way to the other (`sched_yield`) after each look, the machine also after each write.
- The child polls for some tens of looks or microseconds after the last request, one whose writes
  are turns for a millisecond. Then it announces
  that it sleeps (in `STATE`), passes a full fence, looks at the ring once more, waits on the tube
  for one millisecond, looks again, and blocks. A machine that posted a request passes a full fence
  and looks at `STATE`; if it says asleep, `LaneClose` on the tube wakes the child.
- The lane is opened again only when the child has told in `CLOSED` that it closed the generation
  before. A child that is still in that one would take new requests ahead of what is in the tube.
- `STATE` carries the generation of the lane, so that the machine never mistakes an old
  announcement for a new one.
- The machine reads each word of the child once and believes it only after a check; it indexes by
  its own counts. The memory is sealed: the child cannot shrink it under the machine.

The stores of one side are seen in order by the other on x86-64 (Intel SDM vol. 3A, 9.2.2: only a
load may pass an older store to another place). A full fence is a locked instruction, which the
interpreter's lock object gives; other processors use the tube alone.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import platform
import struct
import threading
from collections.abc import Callable

LANE_BYTES = 8192

# Words of 8 bytes, by cache line: the first is the machine's to write, the others the child's.
# What changes with each request is apart from what rarely does and is looked at each time.
HEAD = 0
DOOR = 1
TAIL = 8
VALUE = 9
UPCALLS = 10
STATE = 16
CLOSED = 17

RING_START = 4096
RING_SLOTS = 64
SLOT_BYTES = 64
"""A cache line each, so that the two sides do not fight for neighbours."""
RING = tuple(RING_START + SLOT_BYTES * slot for slot in range(RING_SLOTS))
"""Where each slot starts."""
SLOT = struct.Struct("<QQQ")
"""Header as in the messages `Read`, `Write` and `SyncedWrite` (opcode, length, region, requester),
then offset and data. The address is left out: no model knows where it is mapped."""
READ_SLOT = struct.Struct("<QQ")
"""The part of a slot that a read needs."""
TAKEN_SLOT = struct.Struct("<BBB5xQQ")
"""A slot as the child takes it, with the header's fields apart."""


def header(opcode: int, length: int, region: int, requester: int = 0) -> int:
    """The first 8 bytes of a `Read` or `Write` as one number."""
    return opcode | length << 8 | region << 16 | requester << 32


def supported() -> bool:
    """Whether this host can have a lane at all: its memory order."""
    return platform.machine() in ("x86_64", "AMD64")


def create_page(name: str) -> int:
    """A new page as a sealed memfd: nobody can change its size or its seals."""
    return create_sealed(f"lane-{name}", LANE_BYTES)


def create_sealed(name: str, size: int) -> int:
    """A memfd of `size` bytes that keeps its size for ever; the caller owns the descriptor."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd


def check_sealed(fd: int, size: int) -> None:
    """Raises ValueError unless `fd` is memory of at least `size` bytes that cannot shrink."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise ValueError("not a memory descriptor") from error
    if not seals & fcntl.F_SEAL_SHRINK or os.fstat(fd).st_size < size:
        raise ValueError("memory that could shrink, or is too small")


def map_page(fd: int) -> mmap.mmap:
    """Map a lane's page, shared."""
    return mmap.mmap(fd, LANE_BYTES)


def make_fence() -> Callable[[], object]:
    """A full memory fence: taking a free lock is a locked instruction on x86-64."""
    lock = threading.Lock()

    def fence() -> None:
        with lock:
            pass

    return fence
