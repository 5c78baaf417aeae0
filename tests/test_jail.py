"""What the plan promises, what it refuses, and what the report says."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from jail_tools import USERS, as_user, floor, refusal, run_in_jail

import proxy.jail
from devices.errors import UserError
from proxy.jail import (
    JailError,
    JailMode,
    JailPlan,
    JailReport,
    JailUnavailable,
    LayerState,
    Policy,
    Rule,
    enter_jail,
    filter,
    layers,
    plan_jail,
    policy_for,
    report_data,
    report_table,
    try_jail,
)

MODELS = ("serial", "echo", "config-space", "debug-exit")
FLOOR = ("fds", "session", "rlimits", "nnp", "caps", "seccomp", "pdeath")


@pytest.mark.parametrize("user", USERS)
def test_every_layer_of_the_plan_holds(user: str) -> None:
    def run() -> tuple[JailPlan, JailReport]:
        plan = plan_jail(JailMode.AUTO)
        return plan, try_jail(plan, policy_for("echo"))

    plan, report = as_user(user, run)
    for layer in report.layers:
        wanted = LayerState.MISSING if layer.name in plan.missing else LayerState.ENFORCED
        assert layer.state is wanted, layer
        assert layer.detail
    assert [layer.name for layer in report.layers] == [layer.name for layer in layers()]


@pytest.mark.parametrize("user", USERS)
def test_this_host_has_it_all_or_says_so(user: str) -> None:
    plan = as_user(user, lambda: plan_jail(JailMode.AUTO))
    line = plan.one_line()
    assert "\n" not in line
    for name in plan.missing:
        assert name in line
    assert bool(line) == bool(plan.missing)


@pytest.mark.parametrize("name", [layer.name for layer in layers()])
@pytest.mark.parametrize("user", USERS)
def test_strict_refuses_and_auto_tells(user: str, name: str) -> None:
    with pytest.raises(JailUnavailable) as refused:
        as_user(user, lambda: refusal(JailMode.STRICT, {name}))
    message = str(refused.value)
    assert name in message
    assert "\n" not in message
    assert "To mend: " in message
    if name in FLOOR:
        with pytest.raises(JailUnavailable, match=name):
            as_user(user, lambda: refusal(JailMode.AUTO, {name}))
    else:
        plan = as_user(user, lambda: plan_jail(JailMode.AUTO, without={name}))
        assert name in plan.missing
        assert name in plan.one_line()
        assert not plan.has(name)


def test_landlock_is_of_the_floor_only_without_an_empty_root() -> None:
    assert plan_jail(JailMode.AUTO, without={"landlock"}).has("root")
    with pytest.raises(JailUnavailable, match="landlock") as refused:
        plan_jail(JailMode.AUTO, without={"landlock", "root"})
    assert "landlock" in refused.value.missing
    assert "max_user_namespaces" in str(refused.value)
    assert "lsm=" in str(refused.value)


def test_off_is_said_and_does_nothing() -> None:
    plan = plan_jail(JailMode.OFF)
    assert "OFF" in plan.one_line()

    def work() -> Any:
        os.uname()
        return os.getpid() != 1 and "bin" in os.listdir("/")

    assert run_in_jail(plan, work) is True


def test_off_reports_every_layer_as_off() -> None:
    plan = JailPlan(JailMode.OFF)
    report = as_user("root", lambda: enter_jail(plan, Policy(), (1, *range(3, 64)), print))
    assert {layer.state for layer in report.layers} == {LayerState.OFF}


def test_a_layer_that_does_not_exist() -> None:
    with pytest.raises(UserError, match="no layer 'moat'"):
        plan_jail(JailMode.AUTO, without={"moat"})


@pytest.mark.parametrize("model", MODELS)
def test_the_policies_compile(model: str) -> None:
    for plan in (plan_jail(JailMode.AUTO), floor()):
        assert filter.filter_for(policy_for(model), plan.scopes(), notify=True)


def test_a_policy_with_a_wrong_name_is_refused() -> None:
    policy = Policy(extra=(Rule("opennat", "a slip of the pen"),))
    with pytest.raises(UserError, match="opennat"):
        filter.filter_for(policy, frozenset(), notify=True)


def test_an_extra_rule_is_for_that_policy_only() -> None:
    extra = Policy(extra=(Rule("uname", "for this test"),))
    plan = plan_jail(JailMode.AUTO)
    with pytest.raises(JailError, match="got through"):
        try_jail(plan, extra)
    assert try_jail(plan, Policy()).state("seccomp") is LayerState.ENFORCED


def test_every_rule_has_its_reason() -> None:
    for rule in (*proxy.jail.policy.COMMON, *(r for m in MODELS for r in policy_for(m).extra)):
        assert rule.reason


def test_the_report_as_table_and_as_data() -> None:
    full, less = plan_jail(JailMode.AUTO), floor()
    reports = {"echo": try_jail(full, Policy()), "serial": try_jail(less, Policy())}
    data = report_data(reports)
    assert json.loads(json.dumps(data)) == data
    assert data["serial"]["layers"]["root"]["state"] == "missing"
    lines = report_table(reports)
    for layer in layers():
        assert any(re.match(rf"{layer.name}\s+(yes|NO)\s+(yes|NO)\s+\S", line) for line in lines)
    assert "missing root: left out by request (serial)" in lines
    wire = msgspec.json.encode(reports["echo"])
    assert msgspec.json.decode(wire, type=JailReport) == reports["echo"]


def test_one_module_alone_knows_libseccomp() -> None:
    root = Path(proxy.jail.__file__).parents[2]
    users = [
        path.name
        for room in ("devices", "proxy", "vmm")
        for path in root.joinpath(room).rglob("*.py")
        if re.search(r"^\s*(import|from) pyseccomp", path.read_text(), re.MULTILINE)
    ]
    assert users == ["filter.py"]


def test_a_plan_lists_reasons_once() -> None:
    plan = replace(JailPlan(JailMode.AUTO), missing={"netns": "no", "ipcns": "no", "uid": "why"})
    assert "netns, ipcns (no); uid (why)" in plan.one_line()
