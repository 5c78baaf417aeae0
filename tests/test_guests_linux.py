"""`python -m guests.linux`: the archive it builds, what it takes from packages, what it says."""

from __future__ import annotations

import gzip
import lzma
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guests import cpio, linux

NAMES = st.text(
    st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20
).filter(lambda name: not name.startswith("/") and name != "TRAILER!!!")
ENTRIES = st.builds(
    cpio.Entry,
    NAMES,
    st.integers(0, (1 << 32) - 1),
    st.binary(max_size=50),
    st.tuples(st.integers(0, 4095), st.integers(0, (1 << 20) - 1)),
)


# The archive.


@given(entries=st.lists(ENTRIES, max_size=6))
def test_round_trip(entries: list[cpio.Entry]) -> None:
    archive = cpio.pack(entries)
    assert cpio.unpack(archive) == entries
    assert len(archive) % 4 == 0


@given(entries=st.lists(ENTRIES, max_size=3), cut=st.integers(1, 300))
def test_truncated(entries: list[cpio.Entry], cut: int) -> None:
    archive = cpio.pack(entries)
    with pytest.raises(ValueError, match="cpio"):
        cpio.unpack(archive[: max(0, len(archive) - cut - 3)])


@pytest.mark.parametrize("name", ["", "/init", "a\0b"])
def test_bad_names(name: str) -> None:
    with pytest.raises(ValueError, match="no name"):
        cpio.pack([cpio.Entry(name, 0)])


def test_the_header_is_that_of_the_format() -> None:
    archive = cpio.pack([cpio.program("init", b"12345")])
    fields = [archive[at : at + 8] for at in range(6, 110, 8)]
    assert archive[:6] == b"070701"
    assert archive[110:124] == b"init\0\0" + b"12345\0\0\0"
    assert [int(field, 16) for field in fields] == [1, 0o100755, 0, 0, 1, 0, 5, 0, 0, 0, 0, 5, 0]
    assert archive[124:130] == b"070701"


@pytest.mark.parametrize("tool", [("cpio", "-idm"), ("busybox", "cpio", "-idm")])
def test_other_programs_read_it(tmp_path: Path, tool: tuple[str, ...]) -> None:
    if shutil.which(tool[0]) is None:
        pytest.skip(f"there is no {tool[0]} here")
    archive = cpio.pack(
        [
            cpio.directory("bin"),
            cpio.program("bin/tool", b"contents"),
            cpio.symlink("bin/sh", "tool"),
            cpio.program("odd", b"x"),
        ]
    )
    subprocess.run(tool, input=archive, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "bin/tool").read_bytes() == b"contents"
    assert os.access(tmp_path / "bin/tool", os.X_OK)
    assert os.readlink(tmp_path / "bin/sh") == "tool"
    assert (tmp_path / "odd").read_bytes() == b"x"


# The root file system.


def test_initramfs() -> None:
    packed = linux.initramfs(b"the busybox")
    assert packed == linux.initramfs(b"the busybox")
    entries = {entry.name: entry for entry in cpio.unpack(gzip.decompress(packed))}
    assert entries["bin/busybox"].data == b"the busybox"
    assert entries["bin/sh"].data == b"busybox"
    assert entries["init"].data.startswith(b"#!/bin/sh\n")
    assert stat.S_IMODE(entries["etc/udhcpc/default.script"].mode) == 0o755
    assert stat.S_ISCHR(entries["dev/console"].mode)
    assert entries["dev/console"].device == (5, 1)
    seen: set[str] = set()
    for name in entries:
        parent = os.path.dirname(name)
        assert not parent or parent in seen
        seen.add(name)


def test_the_scripts_are_scripts() -> None:
    assert linux.READY in linux.INIT
    for script in (linux.INIT, linux.DHCP_SCRIPT):
        subprocess.run(["sh", "-n"], input=script.encode(), check=True)


# From packages; the tools of a Debian system are stood in for.

APT_CACHE = """\
#!/bin/sh
case "$*" in
"depends linux-image-cloud-amd64")
    echo linux-image-cloud-amd64; echo "  Depends: linux-image-6.1.0-1-cloud-amd64";;
"show --no-all-versions busybox-static") echo "Package: busybox-static";;
"show --no-all-versions tool") echo "Package: tool";;
"depends tool") echo tool; echo "  Depends: libtool1"; echo " |Depends: debconf";;
"depends libtool1") echo libtool1; echo "  PreDepends: zlib1g";;
"show --no-all-versions linux-image-9") echo "Package: linux-image-9";;
*) echo "N: Unable to locate package" >&2; exit 100;;
esac
"""
APT_GET = """\
#!/bin/sh
for name; do :; done
echo "$name" >>"$POOL/downloads"
[ -f "$POOL/$name.deb" ] || { echo "E: Failed to fetch $name: no network" >&2; exit 100; }
cp "$POOL/$name.deb" "./${name}_1_amd64.deb"
"""
DPKG_DEB = """\
#!/bin/sh
case "$1" in
--field) echo 1.2-3;;
--fsys-tarfile) exec cat "$2";;
esac
"""


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Packages as bare tar files, and the tools that deal with them."""
    pool = tmp_path / "pool"
    tools = tmp_path / "tools"
    pool.mkdir()
    tools.mkdir()
    scripts = {
        "apt-cache": APT_CACHE,
        "apt-get": APT_GET,
        "dpkg-deb": DPKG_DEB,
        "dpkg": "#!/bin/sh\necho amd64\n",
    }
    for name, text in scripts.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.setenv("POOL", str(pool))
    package(pool, "linux-image-6.1.0-1-cloud-amd64", {"./boot/vmlinuz-6.1.0-1": b"kernel"})
    package(pool, "busybox-static", {"./bin/busybox": b"busybox"})
    return pool


def package(pool: Path, name: str, members: dict[str, bytes]) -> None:
    root = pool / "root"
    for member, data in members.items():
        file = root / member
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        (file.parent / "other").write_bytes(b"other")
    subprocess.run(["tar", "-C", root, "-cf", pool / f"{name}.deb", "."], check=True)
    shutil.rmtree(root)


def downloads(pool: Path) -> list[str]:
    return (pool / "downloads").read_text().split()


def test_from_packages(pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "new" / "guest dir"
    assert linux.main([str(target)]) == 0
    assert (target / "vmlinuz").read_bytes() == b"kernel"
    assert (target / "initramfs.cpio.gz").read_bytes() == linux.initramfs(b"busybox")
    assert sorted(path.name for path in target.iterdir()) == [
        "initramfs.cpio.gz",
        "linux-guest.json",
        "vmlinuz",
    ]
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "downloading linux-image-6.1.0-1-cloud-amd64"
    assert f"vmm boot '{target}/vmlinuz' --initrd '{target}/initramfs.cpio.gz'" in said[-1]
    assert len(downloads(pool)) == 2
    assert linux.main([str(target)]) == 0
    assert "complete already" in capsys.readouterr().out
    assert len(downloads(pool)) == 2
    assert linux.main([str(target), "--update", "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert len(downloads(pool)) == 4


@pytest.mark.parametrize("name", ["vmlinuz", "initramfs.cpio.gz", "linux-guest.json"])
@pytest.mark.parametrize("data", [None, b"", b"null", b"{}", b"damaged"])
def test_damage_is_made_good(pool: Path, tmp_path: Path, name: str, data: bytes | None) -> None:
    target = tmp_path / "guest"
    assert linux.main([str(target), "--quiet"]) == 0
    if data is None:
        (target / name).unlink()
    else:
        (target / name).write_bytes(data)
    assert not linux.is_complete(target)
    assert linux.main([str(target), "--quiet"]) == 0
    assert linux.is_complete(target)
    assert (target / "vmlinuz").read_bytes() == b"kernel"


def test_another_recipe_is_built_anew(
    pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    linux.main([str(tmp_path), "--quiet"])
    assert linux.is_complete(tmp_path)
    monkeypatch.setattr(linux, "RECIPE", linux.RECIPE + 1)
    assert not linux.is_complete(tmp_path)


@pytest.mark.parametrize(
    ("broken", "arguments", "text"),
    [
        ("no network", [], "apt-get --quiet"),
        ("no network", [], "no network"),
        ("no apt", [], "there is no apt-get here: this needs a Debian or Ubuntu system"),
        ("", ["--kernel", "linux-image-8"], "apt knows no package linux-image-8"),
        ("", ["--kernel", "no-such"], "apt knows no package no-such; as root: apt-get update"),
        ("no kernel", [], "has no file like"),
        ("no tar", [], "is damaged"),
        ("file", [], "File exists"),
    ],
)
def test_errors(  # noqa: PLR0917 -- fixtures
    pool: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    broken: str,
    arguments: list[str],
    text: str,
) -> None:
    kernel = pool / "linux-image-6.1.0-1-cloud-amd64.deb"
    target = tmp_path / "guest"
    if broken == "no network":
        kernel.unlink()
    elif broken == "no apt":
        monkeypatch.setenv("PATH", "/nowhere")
    elif broken == "no kernel":
        package(pool, "linux-image-6.1.0-1-cloud-amd64", {"./lib/nothing": b""})
    elif broken == "no tar":
        kernel.write_bytes(b"no tar" * 1000)
    elif broken == "file":
        target.write_bytes(b"")
    assert linux.main([str(target), *arguments]) == 2
    told = capsys.readouterr().err
    assert told.startswith("guests.linux: ")
    assert text in told
    assert told.count("\n") == 1
    if target.is_dir():
        assert list(target.iterdir()) == []


def test_modules_come_with_what_they_need(pool: Path, tmp_path: Path) -> None:
    name = "linux-image-6.1.0-1-cloud-amd64"
    package(
        pool,
        name,
        {
            "./boot/vmlinuz-6.1.0-1": b"kernel",
            **{f"./lib/modules/6.1/kernel/a/{file}": data for file, data in KO.items()},
        },
    )
    arguments = [str(tmp_path / "guest"), "--quiet", "--module", "top", "--module", "no-such"]
    assert linux.main(arguments) == 0
    packed = gzip.decompress((tmp_path / "guest/initramfs.cpio.gz").read_bytes())
    files = {entry.name: entry.data for entry in cpio.unpack(packed)}
    modules_at = "lib/modules/6.1"
    assert [file for file in files if file.endswith(".ko")] == [
        f"{modules_at}/{module}.ko" for module in ("low_1", "low_2", "top")
    ]
    assert files[f"{modules_at}/low_1.ko"] == KO["low-1.ko"]
    assert files[f"{modules_at}/top.ko"] == lzma.decompress(KO["top.ko.xz"])
    assert files[f"{modules_at}/modules.dep"].decode().splitlines() == [
        "low_1.ko:",
        "low_2.ko: low_1.ko",
        "top.ko: low_2.ko low_1.ko",
    ]
    assert files[f"{modules_at}/modules.alias"] == b"alias pci:v00001AF4* top\n"


KO = {
    "low-1.ko": b"\x7fELF\0name=low_1\0depends=\0",
    "low_2.ko": b"\x7fELF\0depends=low-1\0",
    "top.ko.xz": lzma.compress(b"\x7fELF\0alias=pci:v00001AF4*\0depends=low_1,low_2\0name=top\0"),
    "other.ko": b"\x7fELF\0depends=\0",
}


def test_a_module_that_is_damaged(
    pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "linux-image-6.1.0-1-cloud-amd64"
    members = {"./boot/vmlinuz-1": b"kernel", "./lib/modules/6.1/kernel/a/top.ko.xz": b"junk"}
    package(pool, name, members)
    assert linux.main([str(tmp_path / "guest"), "--quiet", "--module", "top"]) == 2
    assert "top.ko.xz cannot be unpacked" in capsys.readouterr().err


def test_another_order_is_built_anew(pool: Path, tmp_path: Path) -> None:
    package(pool, "tool", {"./usr/bin/tool": b"tool", "./usr/share/doc/tool/readme": b"?"})
    package(pool, "libtool1", {"./lib/x86_64-linux-gnu/libtool.so.1": b"so", "./usr/bin/not": b""})
    package(pool, "zlib1g", {"./usr/lib/x86_64-linux-gnu/libz.so.1": b"z"})
    target = tmp_path / "guest"
    counts = []
    for arguments in ([], ["--with", "tool"], ["--with", "tool"]):
        assert linux.main([str(target), "--quiet", *arguments]) == 0
        counts.append(len(downloads(pool)))
    assert counts == [2, 7, 7]
    packed = gzip.decompress((target / "initramfs.cpio.gz").read_bytes())
    entries = {entry.name: entry for entry in cpio.unpack(packed)}
    assert entries["usr/bin/tool"].data == b"tool"
    assert entries["lib/x86_64-linux-gnu/libtool.so.1"].data == b"so"
    assert "usr/lib/x86_64-linux-gnu/libz.so.1" in entries
    assert not {"usr/bin/not", "usr/share/doc/tool/readme"} & entries.keys()
    seen = list(entries)
    assert seen.index("usr") < seen.index("usr/bin") < seen.index("usr/bin/tool")


def test_one_named_kernel(pool: Path, tmp_path: Path) -> None:
    package(pool, "linux-image-9", {"./boot/vmlinuz-9": b"nine"})
    target = tmp_path / "guest"
    assert linux.main([str(target), "--kernel", "linux-image-9", "--quiet"]) == 0
    assert (target / "vmlinuz").read_bytes() == b"nine"


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        linux.main(["--help"])
    assert ended.value.code == 0
    assert "Debian" in capsys.readouterr().out
