"""What every test starts from."""

from __future__ import annotations

import signal

import pytest
from cpu_bench import Bench

# A runner started with nohup ignores SIGHUP, and so would every process that tests start.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(params=[True, False], ids=["native", "portable"])
def both_paths(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a CPU test with machine code and without."""
    monkeypatch.setattr(Bench, "native", request.param)
