"""Signals before and while a guest runs."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys

import pytest
from cli_rig import environment

from vmm.events import EventLoop
from vmm.interrupt import early_signals, noted_signals

ALL = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def _swallowed(number: int) -> None:
    """The signal comes in a callback from C, where no exception gets out."""
    ctypes.CFUNCTYPE(None)(lambda: signal.raise_signal(number))()


@pytest.mark.parametrize("number", ALL)
def test_early_signals_interrupt(number: int) -> None:
    before = [signal.getsignal(n) for n in ALL]
    with pytest.raises(KeyboardInterrupt), early_signals():
        signal.raise_signal(number)
    assert [signal.getsignal(n) for n in ALL] == before


@pytest.mark.parametrize("number", ALL)
def test_an_early_signal_in_a_callback_is_heard_by_the_run(
    number: int, capfd: pytest.CaptureFixture[str]
) -> None:
    noted: list[int] = []
    loop = EventLoop(lambda: None)
    with early_signals():
        _swallowed(number)
        with noted_signals(loop, noted.append):
            assert noted == [number]
    loop.close()
    assert capfd.readouterr().err == ""


def test_what_a_swallowed_signal_breaks_is_an_interrupt() -> None:
    def broken(swallows: bool) -> None:
        with early_signals():
            if swallows:
                _swallowed(signal.SIGTERM)
            raise ValueError("the callback gave nothing")

    with pytest.raises(KeyboardInterrupt):
        broken(True)
    with pytest.raises(ValueError, match="the callback"):
        broken(False)


def test_an_early_signal_that_was_handled_is_no_end_by_a_signal() -> None:
    script = (
        "import signal\n"
        "from vmm.interrupt import early_signals\n"
        "try:\n"
        "    with early_signals():\n"
        "        exec('signal.raise_signal(signal.SIGINT)')\n"
        "except KeyboardInterrupt:\n"
        "    raise SystemExit(130)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], env=environment(), check=False)
    assert done.returncode == 130


@pytest.mark.parametrize("number", ALL)
def test_signals_are_noted_while_a_guest_runs(number: int) -> None:
    noted: list[int] = []
    loop = EventLoop(lambda: None)
    before = signal.getsignal(number)
    with noted_signals(loop, noted.append):
        os.kill(os.getpid(), number)
        while not noted:
            loop.poll(None)
    assert noted == [number]
    assert signal.getsignal(number) is before
    loop.close()


def test_a_hang_up_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    loop = EventLoop(lambda: None)
    try:
        with early_signals(), noted_signals(loop, lambda _: pytest.fail("ignored it was")):
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
        loop.close()
