"""The demos, run as a reader runs them: each must show what it teaches."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest
from cli_rig import finish, start

from vmm.demo import DEMOS
from vmm.demo.lesson import Lesson


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vmm", "demo", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)


def test_the_list() -> None:
    done = _run()
    assert done.returncode == 0
    assert all(name in done.stdout for name in DEMOS)


@pytest.mark.parametrize("name", DEMOS)
def test_each_comes_out_as_it_teaches(name: str) -> None:
    done = _run(name)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "NOT AS IT SHOULD BE" not in done.stdout
    assert done.stderr == ""


def test_isolation_shows_both_sides() -> None:
    values = json.loads(_run("isolation", "--json").stdout)
    assert values["ok"]
    bare = [s for s in values["steps"] if not s["jail"]]
    jailed = [s for s in values["steps"] if s["jail"]]
    assert len(bare) == len(jailed) >= 20
    # Without a jail the host is open: else the lesson shows nothing.
    assert sum(s["escaped"] for s in bare) >= 10
    assert not any(s["escaped"] for s in jailed)
    assert any("openat" in s["seen"] for s in jailed)


def test_text_of_a_device_is_cleaned(capsys: pytest.CaptureFixture[str]) -> None:
    lesson = Lesson()
    lesson.show("the device says", "\x1b]0;title\x07 boo\nvmm: more")
    assert "?]0;title? boo?vmm: more" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_demo_at_any_time(number: signal.Signals) -> None:
    """Also while the device hangs whose failure the demo waits for."""
    for wait in (0.0, 0.2, 0.4):
        process = start("demo", "crash")
        assert process.stdout is not None
        while b"Act 3" not in process.stdout.readline():
            assert process.poll() is None
        time.sleep(wait)
        process.send_signal(number)
        status, out, err = finish(process)
        assert status == 130 or out.count(b"left behind") == 1, (out, err)
        assert b"Traceback" not in err
