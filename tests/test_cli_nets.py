"""``--net`` and ``[[net]]``: what they stand for, and what is wrong with them in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_rig import given, run

from devices.errors import UserError
from vmm.cli.nets import nets
from vmm.config import DeviceConfig, DmaMode


def test_a_card_is_a_virtio_device() -> None:
    assert nets(
        given("net", "user,forward=tcp:8080:80,forward=udp:53:53,slot=7", "none"), ["net"]
    ) == [
        DeviceConfig("net-2", "net", {"link": "user", "forward": "tcp:8080:80+udp:53:53"}, slot="7")
    ]
    assert nets(given("net", "pair:lan,mac=52:54:00:00:00:01,name=lan,isolation=none"), []) == [
        DeviceConfig("lan", "net", {"link": "pair:lan", "mac": "52:54:00:00:00:01"}, isolated=False)
    ]
    assert nets(given("net", "user,dma=granted"), [])[0].dma is DmaMode.GRANTED
    assert nets(given("net"), []) == []


def test_cards_that_meet_others_differ() -> None:
    addresses = {
        nets(given("net", text), [])[0].options["mac"] for text in ("pair:a", "pair:a", "tap:a")
    }
    assert len(addresses) == 3
    assert all(address.startswith("52:54:00:") for address in addresses)


@pytest.mark.parametrize(
    ("text", "about"),
    [
        ("", "a network card needs a 'link'"),
        ("none,mac=52:54:00:00:00:01", "a network card needs a 'link'"),
        ("slirp", "link is user, pair:NAME or tap:NAME, not slirp"),
        ("pair:", "after pair: comes a name"),
        ("pair:a/b", "after pair: comes a name"),
        ("tap:sixteen-is-a-lot", "link=tap:sixteen-is-a-lot: the name has more than 15 characters"),
        ("pair:" + "x" * 65, "the name has more than 64 characters"),
        ("user,forward", "'forward' is not option=value"),
        ("user,forward=80", "forward=80: write tcp:8080:80"),
        ("user,hostfwd=tcp::1-:2", "a network card has no option 'hostfwd'; it has link, forward"),
        ("tap:a,forward=tcp:1:2", "forward= is for link=user"),
        ("user,mac=52:54:00:00:00:01,mac=52:54:00:00:00:02", "option 'mac' is given twice"),
        ("user,mac=1", "mac is six bytes"),
        ("user,slot=two", "slot=two is not"),
    ],
)
def test_what_is_wrong_with_one(text: str, about: str) -> None:
    with pytest.raises(UserError, match="--net") as caught:
        nets(given("net", text), [])
    assert about in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("table", "line", "about"),
    [
        ('mac = "52:54:00:00:00:01"\n', 1, "a network card needs a 'link'"),
        ('link = "user"\nfoward = []\n', 3, "a network card has no option 'foward'"),
        ('link = "user"\n\nforward = ["tcp:1:2", "80"]\n', 4, "forward=80: write"),
        ('mac = "52:54:00:00:00:01"\nlink = "lan"\n', 3, "link is user, pair:NAME"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_its_line(
    tmp_path: Path, table: str, line: int, about: str
) -> None:
    config = tmp_path / "machine.toml"
    config.write_text(f"[[net]]\n{table}")
    status, _, err = run("boot", "--config", str(config))
    assert status == 2
    assert f"config {config}: line {line}: " in err.decode()
    assert about in err.decode()
    assert len(err.splitlines()) == 1


def test_the_guest_has_them(tmp_path: Path) -> None:
    config = tmp_path / "machine.toml"
    config.write_text(f'[[net]]\nlink = "pair:{tmp_path.name}"\nname = "first"\n')
    status, out, err = run(
        "boot", "--json", "--config", str(config), "--net", f"pair:{tmp_path.name}"
    )
    assert status == 0, err
    assert json.loads(out)["output"].count("1af4:1041 class 020000") == 2
