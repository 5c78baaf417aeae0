"""The jail of a device's process.

`plan_jail` finds out what the host permits. In the warden: `prepare_warden` once, then for each
device `fork_into_jail`, and in the child `enter_jail` with the model's `policy_for`. The warden
holds the seccomp listener that the child hands out; when it is readable, `receive_violation`
names the system call for which the device is then killed.
"""

from proxy.jail.enter import enter_jail, fork_into_jail, prepare_warden
from proxy.jail.filter import receive_violation
from proxy.jail.layers import (
    JailReport,
    Layer,
    LayerReport,
    LayerState,
    layers,
    report_data,
    report_table,
)
from proxy.jail.linux import leave_terminal
from proxy.jail.plan import JailError, JailMode, JailPlan, JailUnavailable
from proxy.jail.policy import OnViolation, Policy, Rule, policy_for
from proxy.jail.probe import plan_jail, try_jail
from proxy.jail.rights import Rights, rights_of
from proxy.jail.shared import SharedDirectory

__all__ = [
    "JailError",
    "JailMode",
    "JailPlan",
    "JailReport",
    "JailUnavailable",
    "Layer",
    "LayerReport",
    "LayerState",
    "OnViolation",
    "Policy",
    "Rights",
    "Rule",
    "SharedDirectory",
    "enter_jail",
    "fork_into_jail",
    "layers",
    "leave_terminal",
    "plan_jail",
    "policy_for",
    "prepare_warden",
    "receive_violation",
    "report_data",
    "report_table",
    "rights_of",
    "try_jail",
]
