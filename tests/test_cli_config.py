"""``--config machine.toml``: every option has a place in it; ``vmm devices``, ``vmm jail``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from cli_rig import run

from devices.registry import MODELS
from vmm.cli import build_parser
from vmm.cli.given import Given
from vmm.cli.machine_file import read_defaults
from vmm.cli.options import JAIL_TAKES
from vmm.config import OF_ANY_FUNCTION

WHOLE = """
image = "echo"
mem = "64M"
load-addr = 0x7000
mode = 64
append = "console=ttyS0"
initrd = "initrd.gz"
kernel-entry = "pvh"
firmware = "rom"
clock = "virtual"
module = ["a,b", "c"]
no-default-devices = true
serial = "none"
timeout = 1.5
snapshot = "snap"
snapshot-at = "end"
snapshot-then = "quit"
snapshot-disks = "none"
json = true
debug-console = "stderr"
screen = true
screen-live = true
trace = "unclaimed"
symbols = "map"
stats = true
jail = "strict"
on-failure = "isolate"
deadline = 2
lane = "socket"

[[device]]
model = "echo"
name = "second"
addr = 0xF00

[[disk]]
file = "root.img"

[[net]]
link = "user"
forward = ["tcp:8080:80", "udp:53:53"]
"""


def boot_parser() -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = build_parser().parse_args(["boot"]).parser
    return parser


def read(tmp_path: Path, text: str) -> dict[str, Any]:
    path = tmp_path / "machine.toml"
    path.write_text(text)
    return read_defaults(str(path), boot_parser())


def test_every_option_has_a_place(tmp_path: Path) -> None:
    found = read(tmp_path, WHOLE)
    there = {a.dest for a in boot_parser()._actions} - {"help", "config"}
    assert set(found) == there, "an option that this test does not know: add it to WHOLE"
    assert found["load_addr"] == 0x7000
    assert (found["mode"], found["timeout"], found["deadline"]) == (64, 1.5, 2.0)
    assert found["module"] == ["a,b", "c"]
    (device,) = found["device"]
    assert isinstance(device, Given)
    assert device.values == {"model": "echo", "name": "second", "addr": 0xF00}
    assert found["disk"][0].values == {"file": "root.img"}
    assert found["net"][0].values == {"link": "user", "forward": ["tcp:8080:80", "udp:53:53"]}


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    assert read(tmp_path, '\ufeffmem = "1M"\n') == {"mem": "1M"}


def test_the_command_line_wins_and_adds(tmp_path: Path) -> None:
    path = tmp_path / "machine.toml"
    path.write_text(
        'image = "no such guest"\nserial = "none"\njson = true\n'
        '[[device]]\nmodel = "echo"\nname = "from-file"\naddr = 0xF00\n'
    )
    status, out, err = run(
        *("boot", "echo", "--config", str(path), "--device", "echo,addr=0xF10,name=from-line"),
        *("--stats", "--serial", "stdio"),
    )
    assert status == 1, err
    devices = json.loads(out)["stats"]["devices"]
    assert {"from-file", "from-line"} <= set(devices)
    assert "checks, all right" in json.loads(out)["output"]


def test_the_example_of_the_documentation(tmp_path: Path) -> None:
    text = (Path(__file__).parent.parent / "docs" / "devices.md").read_text()
    found = read(tmp_path, text.partition("```toml\n")[2].partition("```")[0])
    assert found["mem"] == "256M"
    assert found["device"][0].values["addr"] == 0xF00


# vmm devices, vmm jail.


def test_devices_lists_models_and_their_options() -> None:
    status, out, _ = run("devices", "--json")
    assert status == 0
    found = json.loads(out)
    assert set(found) == set(MODELS)
    for model, about in found.items():
        assert about["summary"], model
        for option in about["options"]:
            assert option["meaning"], f"{model}: say in its Options what {option['name']} means"
            assert option["kind"], model
    (bus,) = found["echo"]["options"]
    assert (bus["name"], bus["kind"], bus["default"]) == ("bus", "pio|mmio", "pio")
    status, out, _ = run("devices")
    assert status == 0
    for model in MODELS:
        assert f"\n{model}  " in f"\n{out.decode()}"
    defaults = {each["name"]: each["default"] for each in found["console"]["options"]}
    assert (defaults["columns"], defaults["rows"]) == ("80", "25")
    options = {each["name"]: each for each in found["config-space"]["options"]}
    assert (options["rom"]["kind"], options["rom"]["default"]) == ("FILE", "")
    assert options["vendor-id"]["default"] == "0x1234"


@pytest.mark.parametrize("option", ["device", "disk", "net"])
def test_help_names_the_options_of_any_function(option: str) -> None:
    (action,) = (action for action in boot_parser()._actions if action.dest == option)
    for name in OF_ANY_FUNCTION:
        assert f"{name}=" in str(action.help)


def test_jail_shows_what_each_device_has() -> None:
    status, out, _ = run("jail", "--json")
    assert status == 0
    rights = json.loads(out)["devices"]["echo"]["rights"]
    assert rights["descriptors"] == ["tube", "doorbell"]
    assert rights["system_calls"] == []
    assert rights["guest_memory"] == 0
    status, out, _ = run("jail")
    assert "\nserial has\n" in out.decode()
    assert "  guest memory  none" in out.decode()


def test_jail_takes_the_machine_options_of_boot() -> None:
    jail: argparse.ArgumentParser = build_parser().parse_args(["jail"]).parser
    of_boot = {action.dest: action for action in boot_parser()._actions}
    of_jail = {action.dest: action for action in jail._actions if action.dest in JAIL_TAKES}
    assert set(of_jail) | {"clock"} == set(JAIL_TAKES)
    for dest, action in of_jail.items():
        same = of_boot[dest]
        assert (action.help, action.default) == (same.help, same.default)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "a.img"
    path.write_bytes(bytes(1024))
    return path


def rights_of(*arguments: str, cwd: Path) -> dict[str, Any]:
    status, out, err = run("jail", "--json", *arguments, cwd=cwd)
    assert (status, err) == (0, b"")
    return {name: each["rights"] for name, each in json.loads(out)["devices"].items()}


def test_jail_shows_the_devices_of_a_boot(disk: Path, tmp_path: Path) -> None:
    cable = f"pair:{tmp_path.name}"
    devices = ("--disk", f"{disk},readonly", "--disk", "a.img,if=ide,readonly", "--net", cable)
    found = rights_of("--mem", "2M", *devices, "--device", "rng,dma=granted", cwd=tmp_path)
    assert {"serial", "echo", "config-space", "rng", "disk", "ide", "net"} == set(found)
    assert f"path ({disk}, read)" in found["disk"]["descriptors"]
    assert f"disk0 ({disk}, read)" in found["ide"]["descriptors"]
    assert any(each.startswith("link (socket:") for each in found["net"]["descriptors"])
    assert found["disk"]["guest_memory"] == found["net"]["guest_memory"] == 2 << 20
    assert found["rng"]["guest_memory"] == 0
    assert not any("preadv" in each for each in found["echo"]["system_calls"])
    assert any("preadv" in each for each in found["disk"]["system_calls"])


def test_jail_takes_a_machine_file(disk: Path, tmp_path: Path) -> None:
    (tmp_path / "machine.toml").write_text(
        'image = "no such guest"\nserial = "nowhere"\ntimeout = 1\nclock = "virtual"\n'
        'mem = "2M"\nno-default-devices = true\n[[disk]]\nfile = "a.img"\nname = "root"\n'
    )
    config = ("--config", "machine.toml")
    found = rights_of(*config, "--device", "rng", cwd=tmp_path)
    assert set(found) == {"root", "rng"}
    assert found["root"]["guest_memory"] == 2 << 20
    assert rights_of(*config, "--mem", "4M", cwd=tmp_path)["root"]["guest_memory"] == 4 << 20
    disk.unlink()
    status, _, err = run("jail", *config, cwd=tmp_path)
    assert status == 2
    assert err.startswith(b"vmm: config machine.toml: line 8: device 'root': file=a.img: No such")
    assert err.count(b"\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--device", "rng,slot=32"), "--device rng,slot=32: device 'rng': slot=32 is not from"),
        (("--disk", "no"), "device 'disk': file=no: No such file"),
        (("--net", "foo"), "--net foo: device 'net': link is user, pair:NAME or tap:NAME"),
        (("--mem", "1K"), "guest memory of 1024 bytes: give a multiple"),
        (("--jail", "strict", "--device", "rng,isolation=none"), "--jail=strict cannot be had"),
    ],
)
def test_what_is_wrong_with_devices_of_jail(arguments: tuple[str, ...], said: str) -> None:
    status, out, err = run("jail", *arguments)
    assert (status, out) == (10 if "strict" in arguments else 2, b"")
    assert err.decode().startswith(f"vmm: {said}")
    assert err.count(b"\n") == 1
