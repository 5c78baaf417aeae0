"""One contract for every device model, in the machine's process and in a jailed child.

A model that is added to `devices.registry.MODELS` is tested by being there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from device_contract import (
    IN_PROCESS,
    LANE,
    PROXIED,
    Subject,
    Workshop,
    every_read,
    is_stateless,
    script,
    spoiled,
)

from devices.bus import Bus, BusType
from devices.contract import Device
from devices.errors import DeviceError, DeviceFailure
from devices.registry import MODELS, load

PIC = "devices.irqchip.pic:PicPair"
LOCAL = (
    PIC,
    "devices.platform.debug_console:DebugConsole",
    "devices.platform.fw_cfg:FwCfg",
    "devices.platform.i8042:I8042",
    "devices.platform.port92:Port92",
    "devices.platform.post:PostPort",
    "devices.platform.vga_text:VgaText",
)
"""Not for the command line: they always live in the machine's process."""

CASES = [
    *((model, IN_PROCESS) for model in (*sorted(MODELS), *LOCAL)),
    *((model, how) for model in sorted(MODELS) for how in (PROXIED, LANE)),
]


@pytest.fixture(scope="module")
def workshop() -> Iterator[Workshop]:
    made = Workshop()
    yield made
    made.close()


@pytest.fixture(params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    found: tuple[str, str] = request.param
    return found


@pytest.fixture
def subject(workshop: Workshop, case: tuple[str, str]) -> Iterator[Subject]:
    with workshop.make_subject(*case) as made:
        yield made


@pytest.fixture
def twin(workshop: Workshop, case: tuple[str, str]) -> Iterator[Subject]:
    with workshop.make_subject(*case) as made:
        yield made


# What a model declares.


@pytest.mark.parametrize("name", sorted(MODELS))
def test_model_is_what_the_registry_says(name: str) -> None:
    model = load(name)
    assert issubclass(model, Device)
    assert model.model == name
    assert model.summary


def test_default_places_do_not_collide(workshop: Workshop) -> None:
    buses = {BusType.PIO: Bus(BusType.PIO, 0x10000), BusType.MMIO: Bus(BusType.MMIO)}
    placed = 0
    for name in (*MODELS, *LOCAL):
        with workshop.make_subject(name, IN_PROCESS) as made:
            for region, handler in zip(made.regions, made.handlers, strict=True):
                claimed = region.range()
                if claimed is not None:
                    buses[region.bus].insert(claimed, handler, name)
                    placed += 1
    assert placed >= len(MODELS)


def test_regions_never_change(subject: Subject) -> None:
    before = subject.device.regions()
    assert len(before) == len(subject.handlers)
    assert before or subject.is_pci
    assert len({region.name for region in before}) == len(before)
    subject.run(script(subject, seed=1))
    assert subject.device.regions() == before


# Accesses.


def test_reads_of_every_size_stay_in_range(subject: Subject) -> None:
    for seed in range(3):
        subject.run(script(subject, seed))
        for access in every_read(subject):
            value = subject.perform(access)
            assert isinstance(value, int)
            assert 0 <= value < 1 << 8 * access.size, access


def test_the_same_accesses_give_the_same_results(subject: Subject, twin: Subject) -> None:
    accesses = script(subject, seed=2, length=1000)
    assert subject.run(accesses) == twin.run(accesses)
    assert subject.saved() == twin.saved()
    assert subject.host.story() == twin.host.story()


@pytest.mark.parametrize("how", [PROXIED, LANE])
@pytest.mark.parametrize("model", sorted(MODELS))
def test_a_jailed_child_is_no_different(workshop: Workshop, model: str, how: str) -> None:
    with (
        workshop.make_subject(model, IN_PROCESS) as here,
        workshop.make_subject(model, how) as there,
    ):
        assert here.regions == there.regions
        assert (here.is_pci, here.takes_input) == (there.is_pci, there.takes_input)
        for seed in range(5):
            accesses = script(here, seed, length=400)
            assert here.run(accesses) == there.run(accesses)
            assert here.saved() == there.saved()
            assert here.host.story() == there.host.story()


# Snapshot and restore.


def test_modify_changes_the_snapshot(case: tuple[str, str], subject: Subject) -> None:
    fresh = subject.saved()
    subject.run(script(subject, seed=3))
    if is_stateless(case[0]):
        assert subject.saved() == fresh == {}
    else:
        assert subject.saved() != fresh


def test_restore_undoes_a_modification(subject: Subject) -> None:
    for seed in range(10):
        subject.run(script(subject, seed, length=30))
        before = subject.saved()
        kept = msgspec.json.encode(before)
        subject.run(script(subject, seed + 100, length=30))
        assert msgspec.json.encode(before) == kept, "a snapshot changed with its device"
        subject.take_up(before)
        assert subject.saved() == before


def test_restored_twin_goes_on_like_the_original(subject: Subject, twin: Subject) -> None:
    for seed in range(10):
        subject.run(script(subject, seed, length=40))
        twin.take_up(subject.saved())
        subject.host.forget()
        twin.host.forget()
        more = script(subject, seed + 200, length=40)
        assert subject.run(more) == twin.run(more)
        assert subject.saved() == twin.saved()
        assert subject.host.story() == twin.host.story()


def test_restore_drives_the_interrupt_lines_as_they_were(subject: Subject, twin: Subject) -> None:
    for seed in range(10):
        subject.run(script(subject, seed, length=40))
        twin.take_up(subject.saved())
        levels = [subject.host.lines.get(pin, False) for pin in range(4)]
        assert [twin.host.lines.get(pin, False) for pin in range(4)] == levels


def test_snapshot_is_plain_json(subject: Subject, twin: Subject) -> None:
    subject.run(script(subject, seed=4))
    state = subject.saved()
    text = json.dumps(state)
    assert json.loads(text) == state
    assert msgspec.json.decode(msgspec.json.encode(state)) == state
    twin.take_up(json.loads(text))
    assert twin.saved() == state


def test_snapshot_of_a_fresh_device_is_a_state(subject: Subject, twin: Subject) -> None:
    twin.run(script(twin, seed=5))
    fresh = subject.saved()
    twin.take_up(fresh)
    assert twin.saved() == fresh


def is_refused(subject: Subject, state: Any) -> bool:
    try:
        subject.device.restore(state)
    except DeviceFailure:
        raise
    except DeviceError:
        return True
    return False


def test_spoiled_states_are_refused_and_change_nothing(subject: Subject) -> None:
    subject.run(script(subject, seed=6))
    state = subject.saved()
    subject.device.sleep()
    tried = 0
    for what, wrong in spoiled(state):
        tried += 1
        assert is_refused(subject, wrong), f"took up: {what}"
        assert subject.device.snapshot() == state, what
    assert tried > 8
    subject.device.wake()
    assert subject.saved() == state


# Sleep and wake.


def test_sleep_and_wake_are_idempotent(subject: Subject, twin: Subject) -> None:
    accesses = script(subject, seed=7)
    first, second = accesses[:100], accesses[100:]
    results = subject.run(first)
    before = subject.saved()
    for _ in range(2):
        subject.device.sleep()
    assert subject.device.snapshot() == before
    for _ in range(2):
        subject.device.wake()
    assert subject.saved() == before
    results += subject.run(second)
    assert results == twin.run(accesses)
    assert subject.saved() == twin.saved()


def test_wake_without_sleep_is_harmless(subject: Subject) -> None:
    subject.run(script(subject, seed=8))
    before = subject.saved()
    subject.device.wake()
    assert subject.saved() == before


# Input from the outside.


def test_input_is_state(case: tuple[str, str], subject: Subject, twin: Subject) -> None:
    if not subject.takes_input:
        assert not hasattr(load(case[0]), "receive")
        return
    before = subject.saved()
    assert subject.device.receive(b"typed") == 5
    after: Any = subject.saved()
    assert after != before
    twin.take_up(after)
    assert twin.saved() == after


def test_input_beyond_all_room_is_refused_not_lost(subject: Subject) -> None:
    if not subject.takes_input:
        return
    taken = [subject.device.receive(bytes(1 << 10)) for _ in range(64)]
    assert all(0 <= count <= 1 << 10 for count in taken)
    assert taken[-1] == 0, "a device holds input without bound"
    subject.take_up(subject.saved())
    assert subject.device.receive(b"x") == 0
