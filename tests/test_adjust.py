"""Options of a device that the user changes while it runs."""

from __future__ import annotations

from typing import Any

import pytest

from devices.errors import UserError
from vmm.machine import Machine

EITHER_WAY = pytest.mark.parametrize("isolated", [False, True], ids=["in-process", "jailed"])


def state(machine: Machine, name: str) -> dict[str, Any]:
    was = machine.suspended
    machine.suspend()
    found: dict[str, Any] = machine.parts.wiring.attached[name].snapshot()
    if not was:
        machine.resume()
    return found


@EITHER_WAY
def test_options_get_other_values(isolated: bool, tmp_path: Any) -> None:
    with Machine(memory="16M") as machine:
        machine.add_device("console", isolated=isolated, rows=30)
        machine.add_device("balloon", isolated=isolated)
        machine.boot("hello")
        machine.adjust("console", columns=100)
        machine.adjust("balloon", pages="0x10")
        machine.run(timeout=20)
        found = state(machine, "console")
        assert (found["columns"], found["rows"]) == (100, 30)
        machine.suspend()
        machine.adjust("console", rows=31)
        assert machine.suspended, "it stays as it was"
        assert state(machine, "balloon")["wanted"] == 16
        machine.snapshot(tmp_path / "saved")
    with Machine.restore(tmp_path / "saved") as machine:
        machine.adjust("balloon", pages=17)
        found = state(machine, "console")
        assert (found["columns"], found["rows"]) == (100, 31)
        assert state(machine, "balloon")["wanted"] == 17


@EITHER_WAY
def test_what_cannot_be_changed_is_one_line(isolated: bool) -> None:
    with Machine(memory="16M") as machine:
        machine.add_device("console", isolated=isolated)
        machine.boot("hello")
        before = state(machine, "console")
        for name, options, complaint in (
            ("nobody", {"rows": 1}, "there is no device 'nobody'"),
            ("console", {"log": "x"}, "option 'log' cannot be changed while it runs"),
            ("console", {"row": 1}, "that can be: columns, rows"),
            ("console", {"rows": -1}, "rows=-1"),
            ("console", {"rows": 1 << 16}, "rows=65536"),
            ("console", {"rows": "many", "columns": 5}, "rows=many"),
            ("echo", {"rows": 1}, "that can be: none"),
        ):
            with pytest.raises(UserError, match=complaint) as caught:
                machine.adjust(name, **options)
            assert "\n" not in str(caught.value)
        assert state(machine, "console") == before
