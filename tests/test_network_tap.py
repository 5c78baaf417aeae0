"""Taps that cannot be had, each in one line; one that can be is in `test_network_linux`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from jail_tools import as_user
from proxy_helpers import open_descriptors

from vmm.network import tap
from vmm.network.tap import TUN, TapEnd
from vmm.opening import HostFileError


def refused(name: str) -> str:
    before = open_descriptors()
    with pytest.raises(HostFileError, match=r"^here: ") as caught:
        TapEnd("here", name)
    assert open_descriptors() == before
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix("here: ")


def can_open() -> bool:
    try:
        os.close(os.open(TUN, os.O_RDWR))
    except OSError:
        return False
    return True


def test_no_taps_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tap, "TUN", str(tmp_path / "tun"))
    assert refused("x") == (
        f"{tmp_path}/tun: No such file or directory; load the kernel's module tun"
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="for this one must be root")
@pytest.mark.skipif(not can_open(), reason="NO TAP: /dev/net/tun cannot be opened")
def test_what_is_no_tap() -> None:
    assert refused("lo") == "is a network device, but no tap of one queue"


def test_an_ordinary_user() -> None:
    """May not open the device, or may and not make a tap."""
    said = as_user("ordinary", lambda: _said("vmmtap"))
    permission = f"{TUN}: Permission denied; ask root"
    missing = f"{TUN}: No such file or directory; load the kernel's module tun"
    assert said in (permission, missing) or said.startswith(
        "there is none, and only root makes one; let root do: ip tuntap add dev vmmtap mode tap"
    )


def _said(name: str) -> str:
    try:
        TapEnd("here", name)
    except HostFileError as error:
        return str(error).removeprefix("here: ")
    return "it was made"
