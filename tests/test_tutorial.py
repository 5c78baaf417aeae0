"""The tutorial's blocks, run in order as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"<!-- (file: (\S+)|command) -->\n```\w+\n(.*?)```", re.DOTALL)


def test_tutorial(tmp_path: Path) -> None:
    blocks = BLOCK.findall((ROOT / "docs" / "tutorial.md").read_text())
    files = [name for _, name, _ in blocks if name]
    assert files == ["ticket.py", "try_it.py", "save_it.py", "test_ticket.py"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    for _, name, text in blocks:
        if name:
            (tmp_path / name).write_text(text)
            command = [sys.executable, name]
            if name.startswith("test_"):
                command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", name]
            expected = 0
        else:
            command = [sys.executable, *text.split()[1:]]
            expected = 8
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert done.returncode == expected, f"{name or text}: {done.stdout}{done.stderr}"


def test_the_device_is_about_thirty_lines() -> None:
    text = (ROOT / "docs" / "tutorial.md").read_text()
    model = BLOCK.search(text)
    assert model is not None
    assert len(model[3].splitlines()) <= 45
