"""All that holds for virtio devices with guest memory holds for those that get grants instead."""
# ruff: noqa: F403, F821

from __future__ import annotations

from collections.abc import Iterator

import pytest
import test_virtio_blk
import test_virtio_console
import test_virtio_net
import test_virtio_rings
import test_virtio_rng
import test_virtio_transport
from granted_rig import GrantedRig
from test_virtio_blk import *
from test_virtio_console import *
from test_virtio_net import *
from test_virtio_rings import *
from test_virtio_rng import *
from test_virtio_transport import *

MODULES = (
    test_virtio_blk,
    test_virtio_console,
    test_virtio_net,
    test_virtio_rings,
    test_virtio_rng,
    test_virtio_transport,
)

# These two take a turn, or change the state of a ring, behind the back of their rig.
del test_split_indices_run_past_16_bits, test_a_driver_that_never_stops_gets_the_cpu_back


@pytest.fixture(scope="module", autouse=True)
def granted() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in MODULES:
            patch.setattr(module, "LocalRig", GrantedRig)
        yield
