"""Restored side by side: devices of a snapshot get other places on this host."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from cli_rig import ROOT, run
from network_rig import free_port, needs_passt
from proxy_helpers import open_descriptors

from devices.errors import UserError
from vmm.machine import Machine

PATIENCE = 20


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short, as paths of sockets must be."""
    return tmp_path_factory.mktemp("p")


def save(place: Path, *devices: tuple[str, dict[str, Any]]) -> Path:
    saved = place / "saved"
    with Machine(memory="16M", devices=()) as machine:
        for model, options in devices:
            machine.add_device(model, **options)
        machine.boot("counter")
        machine.snapshot(saved)
    return saved


@pytest.mark.parametrize("isolated", [True, False])
def test_sockets(place: Path, isolated: bool) -> None:
    saved = save(place, ("vsock", {"path": str(place / "v"), "cid": 7, "isolated": isolated}))
    before = open_descriptors()
    with Machine.restore(saved):
        with pytest.raises(UserError, match="is there already") as caught:
            Machine.restore(saved)
        assert str(caught.value).endswith(
            "; restore --device vsock,OPTION=VALUE gives another place"
        )
        with Machine.restore(saved, places={"vsock": {"path": str(place / "w")}}) as second:
            for name in "vw":
                with socket.socket(socket.AF_UNIX) as program:
                    program.connect(str(place / name))
            (vsock,) = second.config.devices
            assert vsock.options == {"path": str(place / "w"), "cid": 7}
            second.snapshot(place / "again")
    with Machine.restore(place / "again"):  # it keeps its new place
        assert (place / "w").is_socket()
        assert not (place / "v").exists()
    assert open_descriptors() == before


@needs_passt
def test_forwarded_ports(place: Path) -> None:
    first, second = free_port(), free_port()
    card = {"link": "user", "forward": f"tcp:{first}:80", "mac": "52:54:00:00:00:07"}
    saved = save(place, ("net", card))
    with Machine.restore(saved):
        with pytest.raises(UserError, match=r"restore --device net,OPTION=VALUE"):
            Machine.restore(saved)
        with Machine.restore(saved, places={"net": {"forward": f"tcp:{second}:80"}}) as machine:
            for port in (first, second):
                socket.create_connection(("127.0.0.1", port), PATIENCE).close()
            assert machine.config.devices[0].options["mac"] == card["mac"]
        with Machine.restore(saved, places={"net": {"forward": ""}}):
            pass


def test_a_log_and_a_disk_that_has_moved(place: Path) -> None:
    disk = place / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    saved = save(
        place,
        ("console", {"log": str(place / "log")}),
        ("blk", {"path": str(disk), "readonly": True}),
    )
    disk.rename(place / "moved.img")
    with pytest.raises(UserError, match=r"disk.img: No such file"):
        Machine.restore(saved)
    places = {"console": {"log": str(place / "other")}, "blk": {"path": str(place / "moved.img")}}
    with (
        Machine.restore(saved, places={"blk": places["blk"]}),
        Machine.restore(saved, places=places),
    ):
        assert (place / "other").read_bytes() == b""
    os.utime(place / "moved.img", (1, 1))
    with pytest.raises(UserError, match="has changed since the snapshot"):
        Machine.restore(saved, places=places)


@pytest.mark.parametrize(
    ("model", "option"), [("blk", "path"), ("ata", "disk2")], ids=["virtio", "ide"]
)
def test_a_private_disk_has_no_place(place: Path, model: str, option: str) -> None:
    """It is a copy of what the snapshot has, so a file that is named is never looked at."""
    disk, other = place / "disk.img", place / "other.img"
    disk.write_bytes(bytes(1 << 20))
    saved = save(place, (model, {option: str(disk)}))
    disk.rename(place / "moved.img")
    other.write_bytes(bytes(1 << 19))
    before = open_descriptors()
    for wrong in (place, other, place / "none.img", place / "moved.img"):
        problem = f"device '{model}': {option}={wrong}: .* private copy .*--disks original"
        with pytest.raises(UserError, match=problem):
            Machine.restore(saved, places={model: {option: str(wrong)}})
        if wrong != place / "moved.img":
            with pytest.raises(UserError, match=f"{option}={wrong}"):
                Machine.restore(saved, disks="original", places={model: {option: str(wrong)}})
    places = {model: {option: str(place / "moved.img")}}
    with Machine.restore(saved, disks="original", places=places) as machine:
        machine.snapshot(place / "again")
    with Machine.restore(place / "again", disks="original"):
        pass
    assert open_descriptors() == before
    how = ["restore", str(saved), "--device", f"{model},{option}={place}"]
    status, _, said = run(*how)
    assert (status, said.count(b"\n")) == (2, 1)
    assert b"--disks original" in said


def test_a_disk_that_a_snapshot_left_out_has_a_place(place: Path) -> None:
    disk = place / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    saved = place / "saved"
    with Machine(memory="16M", devices=()) as machine:
        machine.add_device("blk", path=str(disk))
        machine.boot("counter")
        machine.snapshot(saved, disks="none")
    disk.rename(place / "moved.img")
    with Machine.restore(saved, places={"blk": {"path": str(place / "moved.img")}}):
        pass
    with pytest.raises(UserError, match="No such file"):
        Machine.restore(saved, places={"blk": {"path": str(place / "none.img")}})


@needs_passt
def test_another_link_drops_what_belonged_to_the_old_one(place: Path) -> None:
    card = {"link": "user", "forward": f"tcp:{free_port()}:80", "mac": "52:54:00:00:00:07"}
    saved = save(place, ("net", card))
    with Machine.restore(saved, places={"net": {"link": "pair:zz"}}) as machine:
        assert machine.config.devices[0].options == {"link": "pair:zz", "mac": card["mac"]}
    with Machine.restore(saved, places={"net": {"link": "user"}}) as machine:  # the same one
        assert machine.config.devices[0].options == card
    with pytest.raises(UserError, match="forward= is for link=user"):
        Machine.restore(saved, places={"net": {"link": "pair:zz", "forward": card["forward"]}})


@pytest.mark.parametrize(
    ("options", "wanted", "problem"),
    [
        ({"log": "log"}, "", "option 'log' named a file when .*, and must name one"),
        ({}, "log", "option 'log' named no file when .*, and must name none"),
    ],
)
def test_what_has_a_file_must_keep_one(
    place: Path, options: dict[str, str], wanted: str, problem: str
) -> None:
    saved = save(place, ("console", {key: str(place / name) for key, name in options.items()}))
    new = str(place / wanted) if wanted else ""
    with pytest.raises(UserError, match=f"device 'console': {problem}"):
        Machine.restore(saved, places={"console": {"log": new}})


def test_options_of_one_device_may_be_given_apart(place: Path) -> None:
    saved = save(place, ("net", {}))
    apart = ("--device", "net,forward=tcp:1:2", "--device", "net,link=pair:zz")
    status, _, said = run("restore", str(saved), "--timeout", "0.1", *apart)
    assert (status, said) == (2, b"vmm: device 'net': forward= is for link=user\n")


def test_no_snapshot(place: Path) -> None:
    image, tree = place / "root.img", place / "tree"
    image.write_bytes(bytes(512))
    tree.mkdir()
    for wrong, problem in (
        (image, "is no snapshot: it is no directory"),
        (tree, "is no snapshot: it has no manifest.json"),
        (place / "none", "No such file or directory"),
    ):
        status, _, said = run("restore", str(wrong))
        assert status == 2
        assert said.decode() == f"vmm: snapshot {wrong}: {problem}\n"


@pytest.mark.parametrize(
    ("name", "options", "problem"),
    [
        ("none", {"path": "x"}, "the snapshot has no device 'none'; it has vsock, rng"),
        ("vsock", {"cid": "9"}, "option 'cid' is no place on this host.*can be changed: path"),
        ("rng", {"seed": "9"}, "option 'seed' is no place on this host.*can be changed: none"),
        ("vsock", {"path": ""}, "path=SOCKET is needed"),
        ("vsock", {"path": "/nonexistent/x"}, "snapshot .*: device 'vsock': path=/nonexistent/x: "),
    ],
)
def test_what_cannot_be_moved(
    place: Path, name: str, options: dict[str, str], problem: str
) -> None:
    saved = save(place, ("vsock", {"path": str(place / "v")}), ("rng", {"seed": 1}))
    before = open_descriptors()
    with pytest.raises(UserError, match=problem):
        Machine.restore(saved, places={name: options})
    assert open_descriptors() == before


def test_on_the_command_line(place: Path) -> None:
    saved = save(place, ("vsock", {"path": str(place / "v")}))
    how = ["restore", str(saved), "--timeout", "0.1", "--json"]
    with Machine.restore(saved):
        status, _, said = run(*how)
        assert status == 2
        assert b"--device vsock,OPTION=VALUE" in said
        status, out, said = run(*how, "--device", f"vsock,path={place / 'w'}")
        assert (status, json.loads(out)["ending"]) == (8, "timeout"), said
    twice = [*how, "--device", "vsock,path=a", "--device", "vsock,path=b"]
    status, _, said = run(*twice)
    assert (status, said.count(b"\n")) == (2, 1)
    assert b"--device vsock,path=b: option 'path' is given twice" in said
    for wrong, problem in (
        ("vsock", b"write NAME,OPTION=VALUE"),
        ("vsock,path", b"'path' is not option=value"),
        ("vsock,path=a,path=b", b"option 'path' is given twice"),
        ("vsock,cid=5", b"option 'cid' is no place on this host"),
    ):
        status, _, said = run(*how, "--device", wrong, cwd=ROOT)
        assert status == 2
        assert problem in said
        assert said.count(b"\n") == 1
