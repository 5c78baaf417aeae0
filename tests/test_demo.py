"""The demos, run as a reader runs them: each must show what it teaches."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from vmm.demo import DEMOS


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
