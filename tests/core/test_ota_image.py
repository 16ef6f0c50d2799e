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


def _set_uid() -> bytes:
    """A file of mode 4755, its checksum right."""
    plain = b"".join(image._member("x", b"0", 0o644, 0))
    return hostile().removesuffix(bytes(1024)) + _with_checksum(plain, 100, b"0004755") + bytes(1024)


def _gnu_long_name() -> bytes:
    """GNU tar's way to a long name: a member of type L that holds it, before the member itself."""
    name = b"x" * 150 + b"\0"
    member = _with_checksum(b"".join(image._member("link", b"0", 0o644, len(name))), 156, b"L")
    end = b"".join(image._member("short", b"0", 0o644, 0)) + bytes(1024)
    return hostile().removesuffix(bytes(1024)) + member + name.ljust(512, b"\0") + end


def _with_checksum(block: bytes, at: int, field: bytes) -> bytes:
    changed = bytearray(block)
    changed[at : at + len(field)] = field
    changed[148:156] = b" " * 8
    changed[148:156] = b"%06o\0 " % sum(changed)
    return bytes(changed)


LEAVES, LINK = "path leaves the tree", "only regular files and directories"
# name -> the archive, and the reason it is refused for
HOSTILE: dict[str, tuple[bytes, str]] = {
    "dot dot": (hostile(_info("../out")), LEAVES),
    "dot dot inside": (hostile(_info("d", tarfile.DIRTYPE), _info("d/../../out")), LEAVES),
    "absolute": (hostile(_info("/tmp/out")), "path is absolute"),
    "dot": (hostile(_info("./out")), LEAVES),
    "double slash": (hostile(_info("d", tarfile.DIRTYPE), _info("d//out")), LEAVES),
    "symlink out": (hostile(_info("link", tarfile.SYMTYPE, link="/etc")), LINK),
    "symlink then file": (
        hostile(_info("link", tarfile.SYMTYPE, link="/tmp"), _info("link/out")), LINK
    ),
    "symlink inside": (hostile(_info("link", tarfile.SYMTYPE, link="d")), LINK),
    "hardlink": (hostile(_info("link", tarfile.LNKTYPE, link=image.HEADER_NAME)), LINK),
    "character device": (hostile(_info("null", tarfile.CHRTYPE)), LINK),
    "block device": (hostile(_info("disk", tarfile.BLKTYPE)), LINK),
    "fifo": (hostile(_info("pipe", tarfile.FIFOTYPE)), LINK),
    "sparse": (hostile(_info("sparse", tarfile.GNUTYPE_SPARSE)), LINK),
    "contiguous": (hostile(_info("cont", tarfile.CONTTYPE)), LINK),
    "the same path twice": (hostile(_info("x"), _info("x")), "the same path twice"),
    "header twice": (hostile(_info(image.HEADER_NAME)), "the same path twice"),
    "file as directory": (hostile(_info("x"), _info("x/y")), "its directory is missing or a file"),
    "directory missing": (hostile(_info("x/y")), "its directory is missing or a file"),
    "pax": (hostile(_info("ü" * 120), fmt=tarfile.PAX_FORMAT), LINK),
    "GNU long name": (_gnu_long_name(), LINK),
    "GNU tar": (hostile(_info("x"), fmt=tarfile.GNU_FORMAT), "not a plain ustar member"),
    "newline in a name": (hostile(_info("a\nb")), "do not print"),
    "set-uid": (_set_uid(), "mode is neither 644 nor 755"),
    "no header": (
        b"".join(image._member("x", b"0", 0o644, 0)) + bytes(1024), "does not begin with tbox-image.json"
    ),
    "empty": (b"", "ends in the middle"),
    "only the end": (bytes(1024), "no header of a sane size"),
    "no words in the header": (
        b"".join(image._member(image.HEADER_NAME, b"0", 0o644, 1)) + b"?".ljust(512, b"\0") + bytes(1024),
        "image header is malformed",
    ),
    "trailing bytes": (hostile() + b"!", "bytes follow the end"),
    "trailing block": (hostile() + bytes(512), "bytes follow the end"),
    "size past the end": (
        b"".join(image._member(image.HEADER_NAME, b"0", 0o644, 1 << 30)) + bytes(1024), "past the end"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_is_refused_for_what_it_holds(name: str, tmp_path: Path) -> None:
    archive, why = HOSTILE[name]
    with pytest.raises(ImageError, match=why):
        unpack(archive, tmp_path / "tree")
    assert sorted(path.name for path in tmp_path.iterdir()) in ([], ["tree"])
    with pytest.raises(ImageError, match=why):
        image.check(reader(archive), len(archive))


def test_what_holds_nothing_hostile_comes_in(tmp_path: Path) -> None:
    fine = hostile(_info("fine"))
    assert unpack(fine, tmp_path / "tree") == image.check(reader(fine), len(fine))


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
