"""Console, entropy source, balloon and pvpanic, taken over in a whole machine: each has its own.

The model's code is replaced, everything else is as ever: its options, what the machine opens for
it, its jail, its registers and its place on the bus. Disks, network cards, shared directories and
sockets have more of their own: `test_dma_escape`, `test_network_escape`, `test_p9_jail`,
`test_vsock_host`.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from machine_rig import RAM_SIZE, MachineRig
from taken_over import Attacks, Own, census, descriptors

from devices import registry
from devices.contract import DeviceHost
from devices.pvpanic import PvPanic
from devices.virtio.balloon import Balloon
from devices.virtio.console import Console
from devices.virtio.rng import Rng
from proxy.jail import OnViolation, policy, policy_for
from proxy.jail.escape import ATTEMPTS, BY_NAME, Attempt, bait
from vmm.outcome import Ending

PLACE = RAM_SIZE - 4096
PRECIOUS = b"the guest's own"


def _spoil(host: DeviceHost) -> str:
    host.memory.write(PLACE, bytes(len(PRECIOUS)))
    return "overwrote guest memory"


def _shrink(host: DeviceHost) -> str:
    for fd in range(3, 4096):
        try:
            os.ftruncate(fd, 0)
        except OSError:
            continue
        return f"shrank descriptor {fd}"
    raise OSError("nothing can be shrunk")


def _lie(host: DeviceHost) -> str:
    """All that a device can say to the machine, though nobody asked."""
    host.request_exit(0)
    host.output(b"the guest prints this")
    host.send_msi(0xFEE0_0000, 0x21)
    host.wrote_pages(0, 1)
    return "said it"


def _log(host: DeviceHost) -> int:
    return host.fds["log"]


def _write_log(host: DeviceHost) -> str:
    os.write(_log(host), b"its own")
    return "wrote its log"


def _read_log(host: DeviceHost) -> str:
    return repr(os.pread(_log(host), 100, 0))


def _map_log(host: DeviceHost) -> str:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    if libc.mmap(None, 4096, 1, 1, _log(host), 0) == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "mmap")
    return "mapped its log to read it"


class Replaced(Attacks):
    """Before a model among the bases, it takes the place of its code: a write chooses an attack, a
    read carries it out."""

    own: ClassVar[tuple[Own, ...]] = (
        *(descriptors, _spoil, _shrink, _lie),
        *(_write_log, _read_log, _map_log),
    )
    chosen = 0

    def regions(self) -> Any:
        return super().regions()  # type: ignore[misc]

    def handlers(self) -> Any:
        return [self] * len(self.regions())

    def write(self, offset: int, size: int, value: int) -> None:
        self.chosen = value

    def read(self, offset: int, size: int) -> int:
        return self.carry_out(self.chosen)


class TakenRng(Replaced, Rng):
    pass


class TakenBalloon(Replaced, Balloon):
    pass


class TakenConsole(Replaced, Console):
    pass


class TakenPvPanic(Replaced, PvPanic):
    pass


KINDS: dict[str, type[Replaced]] = {
    "rng": TakenRng,
    "balloon": TakenBalloon,
    "console": TakenConsole,
    "pvpanic": TakenPvPanic,
}
EACH = pytest.mark.parametrize("model", KINDS)
NAME = "dut"


@pytest.fixture(scope="module", autouse=True)
def _bait() -> Iterator[None]:
    with bait() as Attacks.targets:
        yield


class Victim:
    """A machine of which one device was taken over."""

    def __init__(self, model: str, directory: Path, **how: Any) -> None:
        self.log = directory / "log"
        if model == "console":
            how["log"] = str(self.log)
        self.rig = MachineRig(model, **how)
        self.rig.write_config(1, 2, 2)  # its registers answer, and it is no bus master

    def attempt(self, what: Attempt | Own) -> bool:
        self.rig.write(0, 0, 1, Replaced.number(what))
        got = self.rig.read(0, 0, 1)
        assert got in (0, 1) or self.failure, "it was tried"
        return got == 1

    @property
    def failure(self) -> str:
        return str(self.rig.proxy.failed or "")


@contextmanager
def victim(model: str, directory: Path, **how: Any) -> Iterator[Victim]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.MODELS, model, f"{__name__}:{KINDS[model].__name__}")
        made = Victim(model, directory, **how)
    with made.rig:
        yield made


@EACH
def test_no_way_out_is_open(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other: what is forbidden fails, instead of being the end."""
    lenient = replace(policy_for(model), on_violation=OnViolation.DENY)
    monkeypatch.setitem(policy._OWN, model, lenient)
    with victim(model, tmp_path) as taken:
        open_ways = [each.name for each in ATTEMPTS if taken.attempt(each)]
        assert not taken.failure
        assert open_ways == [], taken.rig.logs
        assert not taken.attempt(_shrink), taken.rig.logs


@EACH
@pytest.mark.parametrize("what", [BY_NAME["read-file"], _shrink], ids=["open", "shrink"])
def test_the_first_forbidden_call_is_the_end(
    model: str, what: Attempt | Own, tmp_path: Path
) -> None:
    with victim(model, tmp_path) as taken:
        assert not taken.attempt(what)
        call = "ftruncate" if what is _shrink else "openat"
        assert f"forbidden system call '{call}'" in taken.failure


@EACH
def test_it_has_its_own_descriptors_and_no_others(model: str, tmp_path: Path) -> None:
    with victim(model, tmp_path) as taken:
        assert taken.attempt(descriptors)
        with ExitStack() as stack:
            known = {"guest memory": taken.rig.parts.memory.fd}
            if model == "console":
                known["log"] = stack.enter_context(taken.log.open()).fileno()
            found = census("".join(taken.rig.logs), known)
        expected = {"null": 3, "tube": 1, "doorbell": 1}
        if model == "pvpanic":  # its registers are in memory that the machine reads
            expected[next(name for name in found if name.startswith("100000:"))] = 1
        else:
            expected["guest memory"] = 1
        if model == "console":
            expected["log"] = 1
        assert found == expected


@pytest.mark.parametrize(
    ("model", "dma", "reaches"),
    [
        ("rng", "shared", True),
        ("rng", "granted", False),
        ("console", "shared", True),
        ("console", "granted", False),
        ("balloon", "shared", True),
        ("pvpanic", "shared", False),
    ],
)
def test_guest_memory_is_for_those_that_map_it(
    model: str, dma: str, reaches: bool, tmp_path: Path
) -> None:
    with victim(model, tmp_path, dma=dma) as taken:
        ram = taken.rig.ram
        ram[PLACE : PLACE + len(PRECIOUS)] = PRECIOUS
        assert taken.attempt(_spoil) == reaches, taken.rig.logs
        assert (ram[PLACE : PLACE + len(PRECIOUS)] == PRECIOUS) == (not reaches)
        assert not taken.failure


@EACH
def test_the_machine_does_not_believe_it(model: str, tmp_path: Path) -> None:
    """It may not end the run as it likes, print on the console, interrupt, or speak of memory."""
    with victim(model, tmp_path) as taken:
        dropped = []
        taken.rig.parts.cpu.invalidate_pages = dropped.append  # type: ignore[method-assign]
        assert taken.attempt(_lie)
        logs = "\n".join(taken.rig.logs)
        if model == "pvpanic":  # all that it is there for; it cannot pass for the debug-exit port
            outcome = taken.rig.parts.vcpu.take_outcome()
            assert (outcome.ending, outcome.status) == (Ending.PANICKED, 14)
        else:
            assert "asked to end the run (0); it has no right to" in logs
        assert "not looked at: it is no bus master" in logs
        assert dropped == []
        assert all(not each.output for each in taken.rig.parts.consoles.values())
        assert not taken.failure


def test_a_consoles_log_can_be_written_and_no_more(tmp_path: Path) -> None:
    with victim("console", tmp_path) as taken:
        assert taken.attempt(_write_log), taken.rig.logs
        assert taken.log.read_bytes() == b"its own"
        for what in (_read_log, _map_log):
            assert not taken.attempt(what), taken.rig.logs
        assert not taken.failure
