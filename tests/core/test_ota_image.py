"""App images: the same bytes for the same tree, back out unharmed, and nothing else is let in."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tbox.errors import TboxError
from tbox.ota import image
from tbox.ota.image import ImageError, ImageHeader, ReadAt

HEADER = ImageHeader(name="app", version="1.0", entry="app.main:main")


def reader(data: bytes) -> ReadAt:
    return lambda offset, length: data[offset : offset + length]


def unpack(data: bytes, destination: Path) -> ImageHeader:
    return image.unpack(reader(data), len(data), destination, hashlib.sha256(data).hexdigest())


def tree(top: Path) -> Path:
    (top / "app" / "data").mkdir(parents=True)
    (top / "app" / "__init__.py").write_text("")
    (top / "app" / "main.py").write_text("def main(): return 0\n")
    (top / "app" / "data" / "grüße.bin").write_bytes(os.urandom(5000))
    (top / "app" / ("long" * 20)).mkdir()
    (top / "app" / ("long" * 20) / ("name" * 20)).write_text("deep")
    (top / "app" / "run").write_text("#!/bin/sh\n")
    (top / "app" / "run").chmod(0o755)
    (top / "app" / "__pycache__").mkdir()
    (top / "app" / "__pycache__" / "main.pyc").write_bytes(b"left out")
    return top


def built(top: Path) -> bytes:
    return b"".join(image.build(top, HEADER))


def test_a_tree_comes_back_as_it_was(tmp_path: Path) -> None:
    source = tree(tmp_path / "tree")
    assert unpack(built(source), tmp_path / "out") == HEADER
    for path in source.rglob("*"):
        if "__pycache__" in path.parts:
            assert not (tmp_path / "out" / path.relative_to(source)).exists()
        elif path.is_file():
            twin = tmp_path / "out" / path.relative_to(source)
            assert twin.read_bytes() == path.read_bytes()
            assert os.access(twin, os.X_OK) == os.access(path, os.X_OK)


def test_times_owners_and_order_of_creation_do_not_show(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for top, names in ((first, "abc"), (second, "cba")):
        top.mkdir()
        for name in names:
            (top / name).write_text(name)
            os.utime(top / name, (len(str(top)), 0))
    assert built(first) == built(second)


def test_a_stock_tar_reads_it(tmp_path: Path) -> None:
    data = built(tree(tmp_path / "tree"))
    with tarfile.open(fileobj=io.BytesIO(data)) as stock:
        assert stock.getnames()[0] == image.HEADER_NAME
        assert f"app/{'long' * 20}/{'name' * 20}" in stock.getnames()


def test_a_link_does_not_get_into_an_image(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "link").symlink_to("/etc/passwd")
    with pytest.raises(TboxError, match="no place in an image"):
        built(tmp_path / "tree")


def hostile(*extra: tarfile.TarInfo, data: bytes = b"", fmt: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar with our header first and these members after it."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=fmt) as tar:
        text = b'{"format":1,"name":"app","version":"1","entry":"a:b"}'
        tar.addfile(_info(image.HEADER_NAME, size=len(text)), io.BytesIO(text))
        for info in extra:
            tar.addfile(info, io.BytesIO(data))
    raw = out.getvalue()
    return raw[: len(raw.rstrip(b"\0")) // 512 * 512 + 512] + bytes(1024)


def _info(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, link
    info.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
    return info


HOSTILE: dict[str, bytes] = {
    "dot dot": hostile(_info("../out")),
    "dot dot inside": hostile(_info("d", tarfile.DIRTYPE), _info("d/../../out")),
    "absolute": hostile(_info("/tmp/out")),
    "dot": hostile(_info("./out")),
    "double slash": hostile(_info("d", tarfile.DIRTYPE), _info("d//out")),
    "symlink out": hostile(_info("link", tarfile.SYMTYPE, link="/etc")),
    "symlink then file": hostile(_info("link", tarfile.SYMTYPE, link="/tmp"), _info("link/out")),
    "symlink inside": hostile(_info("link", tarfile.SYMTYPE, link="d")),
    "hardlink": hostile(_info("link", tarfile.LNKTYPE, link=image.HEADER_NAME)),
    "character device": hostile(_info("null", tarfile.CHRTYPE)),
    "block device": hostile(_info("disk", tarfile.BLKTYPE)),
    "fifo": hostile(_info("pipe", tarfile.FIFOTYPE)),
    "sparse": hostile(_info("sparse", tarfile.GNUTYPE_SPARSE)),
    "contiguous": hostile(_info("cont", tarfile.CONTTYPE)),
    "the same path twice": hostile(_info("x"), _info("x")),
    "header twice": hostile(_info(image.HEADER_NAME)),
    "file as directory": hostile(_info("x"), _info("x/y")),
    "directory missing": hostile(_info("x/y")),
    "pax": hostile(_info("ü" * 120), fmt=tarfile.PAX_FORMAT),
    "GNU long name": hostile(_info("x" * 150), fmt=tarfile.GNU_FORMAT),
    "newline in a name": hostile(_info("a\nb")),
    "set-uid": hostile(_info("x")).replace(b"0000644\0", b"0004755\0"),
    "no header": b"".join(image._member("x", b"0", 0o644, 0)) + bytes(1024),
    "empty": b"",
    "only the end": bytes(1024),
    "trailing bytes": hostile() + b"!",
    "trailing block": hostile() + bytes(512),
    "size past the end": b"".join(image._member(image.HEADER_NAME, b"0", 0o644, 1 << 30)) + bytes(1024),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ImageError):
        unpack(HOSTILE[name], tmp_path / "tree")
    assert sorted(path.name for path in tmp_path.iterdir()) in ([], ["tree"])


def test_the_hostile_archives_are_refused_for_what_they_hold(tmp_path: Path) -> None:
    assert unpack(hostile(_info("fine")), tmp_path / "tree").name == "app"


def test_what_was_unpacked_is_what_was_hashed(tmp_path: Path) -> None:
    data = built(tree(tmp_path / "tree"))
    with pytest.raises(ImageError, match="changed"):
        image.unpack(reader(data), len(data), tmp_path / "out", "0" * 64)


def test_more_members_than_allowed_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image, "MEMBERS_MAX", 3)
    with pytest.raises(ImageError, match="more than 3"):
        unpack(built(tree(tmp_path / "tree")), tmp_path / "out")


SMALL = b"".join(
    [
        *image._member(image.HEADER_NAME, b"0", 0o644, 53),
        b'{"format":1,"name":"app","version":"1","entry":"a:b"}'.ljust(512, b"\0"),
        *image._member("d", b"5", 0o755, 0),
        *image._member("d/f", b"0", 0o644, 5),
        b"hello".ljust(512, b"\0"),
        bytes(1024),
    ]
)


@given(st.data())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_image_never_gets_out_of_its_directory(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    top = tmp_path_factory.mktemp("fuzz")
    raw = bytearray(SMALL)
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(raw[: data.draw(st.integers(0, len(raw)))]) if data.draw(st.booleans()) else bytes(raw)
    with contextlib.suppress(ImageError):
        unpack(cut, top / "tree")
    assert {path.name for path in top.iterdir()} <= {"tree"}


@given(st.binary(max_size=2000))
def test_noise_has_no_header(noise: bytes) -> None:
    with pytest.raises(ImageError):
        image.read_header(reader(noise), len(noise))
