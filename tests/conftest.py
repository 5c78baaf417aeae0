"""What every test starts from."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from cpu_bench import Bench
from hypothesis import settings
from virtio_rigs import Place, virtio_wardens

from proxy.warden import Warden

# A runner started with nohup ignores SIGHUP, and so would every process that tests start.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Hypothesis would judge by the time that an example takes, which on a busy host means nothing.
settings.register_profile("vmm", deadline=None)
settings.load_profile("vmm")


@pytest.fixture(params=[True, False], ids=["native", "portable"])
def both_paths(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a CPU test with machine code and without."""
    monkeypatch.setattr(Bench, "native", request.param)


@pytest.fixture(scope="module")
def virtio_warden() -> Iterator[Warden]:
    with virtio_wardens() as made:
        yield made


@pytest.fixture(params=["in-process", "jailed", "granted"])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    """Runs a virtio test on a model here, in a jailed process, and in one with dma=granted."""
    here = request.param == "in-process"
    warden = None if here else request.getfixturevalue("virtio_warden")
    made = Place(warden, granted=request.param == "granted")
    yield made
    made.close()
