"""App images: a deterministic uncompressed tar of a package tree, and its safe unpacking. Never a link.

Uncompressed, because a compressed image defeats every delta. The format is the plain part of ustar: regular
files and directories, sorted, no times, no owners. The first member is the header, `tbox-image.json`. The
unpacker is written for exactly this and refuses everything else a tar can hold.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, NamedTuple

import msgspec
from msgspec import Meta

from tbox.errors import Refused, TboxError

BLOCK_BYTES = 512
COPY_BYTES = 256 * 1024
HEADER_NAME = "tbox-image.json"
HEADER_BYTES_MAX = 64 * 1024
MEMBERS_MAX = 100_000
PATH_CHARS_MAX = 255
NAME_CHARS_MAX = 100
DEPTH_MAX = 32

_REGULAR, _DIRECTORY = b"0", b"5"
_SIZE_OCTAL = re.compile(rb"^[0-7]{11}\0$")
# What builds leave behind and no device needs; left out so that two builds of one tree are equal.
_LEFT_OUT = frozenset({"__pycache__", ".git", ".DS_Store"})

ReadAt = Callable[[int, int], bytes]


class ImageError(Refused):
    """The image is not one that this unpacker lets in."""


class ImageHeader(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an app image says of itself. It is covered by the signed digest, but decides nothing by itself.

    entry: "package.module:function" that the boot loader calls. platform: "any" or as `sysconfig` names it.
    """

    format: Literal[1] = 1
    name: Annotated[str, Meta(max_length=200)]
    version: Annotated[str, Meta(max_length=200)]
    platform: Annotated[str, Meta(max_length=100)] = "any"
    entry: Annotated[str, Meta(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*\Z", max_length=200)]


class Member(NamedTuple):
    """One file or directory of an image; offset is that of its first content byte."""

    path: str
    directory: bool
    executable: bool
    size: int
    offset: int


# --- building ------------------------------------------------------------------------------------------


def build(tree: Path, header: ImageHeader) -> Iterator[bytes]:
    """Yield the image of a package tree: the same bytes for the same tree, on any machine, at any time.

    Raises TboxError on a link, a special file or a name that the format cannot carry.
    """
    text = msgspec.json.encode(header)
    yield from _member(HEADER_NAME, _REGULAR, 0o644, len(text))
    yield _padded(text)
    for path in _sorted_tree(tree):
        name = path.relative_to(tree).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise TboxError("links and special files have no place in an image", where=str(path))
        if path.is_dir():
            yield from _member(name, _DIRECTORY, 0o755, 0)
            continue
        size = path.stat().st_size
        yield from _member(name, _REGULAR, 0o755 if os.access(path, os.X_OK) else 0o644, size)
        yield from _content(path, size)
    yield bytes(2 * BLOCK_BYTES)


def _sorted_tree(tree: Path) -> Iterator[Path]:
    for path in sorted(tree.iterdir(), key=lambda path: path.name.encode()):
        if path.name in _LEFT_OUT or path.suffix == ".pyc":
            continue
        yield path
        if path.is_dir() and not path.is_symlink():
            yield from _sorted_tree(path)


def _content(path: Path, size: int) -> Iterator[bytes]:
    left = size
    with path.open("rb") as file:
        while left and (block := file.read(min(COPY_BYTES, left))):
            left -= len(block)
            yield block
    if left:
        raise TboxError("file shrank while it was read", where=str(path))
    yield bytes(-size % BLOCK_BYTES)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK_BYTES)


def _member(name: str, kind: bytes, mode: int, size: int) -> Iterator[bytes]:
    prefix, base = _split(name)
    block = bytearray(BLOCK_BYTES)
    for at, field in (
        (0, base),
        (100, b"%07o" % mode),
        (108, b"%07o" % 0),
        (116, b"%07o" % 0),
        (124, b"%011o" % size),
        (136, b"%011o" % 0),
        (148, b" " * 8),
        (156, kind),
        (257, b"ustar\x0000"),
        (345, prefix),
    ):
        block[at : at + len(field)] = field
    block[148:156] = b"%06o\0 " % sum(block)
    yield bytes(block)


def _split(name: str) -> tuple[bytes, bytes]:
    """Return ustar's (prefix, name). Raises TboxError when the path does not fit."""
    problem = path_problem(name)
    if problem:
        raise TboxError(problem, where=name, mend="rename it")
    raw = name.encode()
    if len(raw) <= NAME_CHARS_MAX:
        return b"", raw
    for at in range(len(raw) - NAME_CHARS_MAX - 1, min(155, len(raw) - 1) + 1):
        if raw[at : at + 1] == b"/":
            return raw[:at], raw[at + 1 :]
    raise TboxError("path is too long for an image", where=name, mend="shorten it")


# --- reading -------------------------------------------------------------------------------------------


def path_problem(name: str) -> str:
    """Return why a member may not have this path, "" when it may."""
    parts = name.split("/")
    if not name or len(name.encode("utf-8", "surrogatepass")) > PATH_CHARS_MAX or len(parts) > DEPTH_MAX:
        return "path is empty, too long or too deep"
    if name.startswith("/") or "\\" in name:
        return "path is absolute or not portable"
    if any(part in ("", ".", "..") for part in parts):
        return "path leaves the tree or is not in its plain form"
    if not name.isprintable():
        return "path holds characters that do not print"
    return ""


def members(read_at: ReadAt, length: int) -> Iterator[Member]:
    """Yield the members of an image of `length` bytes, each checked before it is yielded.

    Raises ImageError on anything that `build` would not have made: paths that leave the tree, links,
    devices, sparse or extended members, duplicates, files as directories, bytes after the end.
    """
    seen: dict[str, bool] = {}  # path -> is a directory
    offset = 0
    while True:
        block = read_at(offset, BLOCK_BYTES)
        if len(block) != BLOCK_BYTES:
            raise ImageError("image ends in the middle", where=f"byte {offset}")
        if block == bytes(BLOCK_BYTES):
            _check_end(read_at, offset, length)
            return
        member = _parse(block, offset)
        if member.offset + member.size > length:
            raise ImageError("member reaches past the end of the image", where=member.path)
        if len(seen) >= MEMBERS_MAX:
            raise ImageError(f"more than {MEMBERS_MAX} members", where=member.path)
        _check_place(member, seen)
        seen[member.path] = member.directory
        yield member
        offset = member.offset + member.size + -member.size % BLOCK_BYTES


def _check_end(read_at: ReadAt, offset: int, length: int) -> None:
    last = offset + BLOCK_BYTES
    if length - last != BLOCK_BYTES or read_at(last, BLOCK_BYTES) != bytes(BLOCK_BYTES):
        raise ImageError("bytes follow the end of the image", where=f"byte {offset}")


def _check_place(member: Member, seen: dict[str, bool]) -> None:
    if not seen and member.path != HEADER_NAME:
        raise ImageError(f"image does not begin with {HEADER_NAME}", where=member.path)
    if member.path in seen:
        raise ImageError("the same path twice", where=member.path)
    parent = str(PurePosixPath(member.path).parent)
    if parent != "." and not seen.get(parent, False):
        raise ImageError("its directory is missing or a file", where=member.path)


def _parse(block: bytes, offset: int) -> Member:
    where = f"byte {offset}"
    checksum = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    if block[148:156] != b"%06o\0 " % checksum:
        raise ImageError("member header is damaged", where=where)
    if block[257:265] != b"ustar\x0000":
        raise ImageError("not a plain ustar member", where=where)
    kind = block[156:157]
    if kind not in (_REGULAR, _DIRECTORY) or any(block[157:257]):
        raise ImageError("only regular files and directories may come in an image", where=where)
    if not _SIZE_OCTAL.match(block[124:136]):
        raise ImageError("member size is malformed", where=where)
    size = int(block[124:135], 8)
    if kind == _DIRECTORY and size:
        raise ImageError("a directory with content", where=where)
    mode = block[100:108]
    if mode not in (b"0000644\0", b"0000755\0"):
        raise ImageError("member mode is neither 644 nor 755", where=where)
    path = _path(block, where)
    return Member(path, kind == _DIRECTORY, mode == b"0000755\0", size, offset + BLOCK_BYTES)


def _path(block: bytes, where: str) -> str:
    base, _, rest = block[:100].partition(b"\0")
    prefix, _, more = block[345:500].partition(b"\0")
    if any(rest) or any(more) or any(block[500:]):
        raise ImageError("member name is malformed", where=where)
    try:
        name = (prefix + b"/" + base if prefix else base).decode()
    except UnicodeDecodeError:
        raise ImageError("member name is not UTF-8", where=where) from None
    problem = path_problem(name)
    if problem:
        raise ImageError(problem, where=where)
    return name


def read_header(read_at: ReadAt, length: int) -> ImageHeader:
    """Return the header of an image. Raises ImageError."""
    return _header(read_at, next(members(read_at, length), None))


def _header(read_at: ReadAt, member: Member | None) -> ImageHeader:
    if member is None or member.directory or not 0 < member.size <= HEADER_BYTES_MAX:
        raise ImageError("image has no header of a sane size", where=HEADER_NAME)
    try:
        return msgspec.json.decode(read_at(member.offset, member.size), type=ImageHeader)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise ImageError(f"image header is malformed: {error}", where=HEADER_NAME) from None


class _Forward:
    """Reads an image once, from its first byte to its last, and hashes all that it passes.

    What is unpacked is thereby what was hashed, even if the medium changes its mind between two reads.
    """

    def __init__(self, read_at: ReadAt, length: int) -> None:
        self._read_at, self._length, self._at = read_at, length, 0
        self._sha256 = hashlib.sha256()

    def __call__(self, offset: int, length: int) -> bytes:
        assert offset >= self._at, "an image is read forwards"
        self._take(offset - self._at)
        return self._take(min(length, self._length - offset))

    def _take(self, length: int) -> bytes:
        block = self._read_at(self._at, length) if length > 0 else b""
        self._sha256.update(block)
        self._at += len(block)
        return block

    def hexdigest(self) -> str:
        return self._sha256.hexdigest() if self._at == self._length else ""


def check(read_at: ReadAt, length: int) -> ImageHeader:
    """Return the header of an image that `unpack` would take. Raises ImageError for the first thing it
    would not."""
    found = members(read_at, length)
    header = _header(read_at, next(found, None))
    for _ in found:
        pass
    return header


def unpack(read_at: ReadAt, length: int, destination: Path, sha256: str) -> ImageHeader:
    """Unpack the image of this digest into a directory that this call makes. Raises ImageError, OSError.

    When it raises, the directory is not to be used. Files are made with O_EXCL and O_NOFOLLOW, so nothing
    that stands there is ever written through.
    """
    reader = _Forward(read_at, length)
    destination.mkdir(mode=0o700)
    found = members(reader, length)
    header = _header(reader, next(found, None))
    for member in found:
        if member.directory:
            (destination / member.path).mkdir(mode=0o755)
        else:
            _unpack_file(reader, member, destination / member.path)
    if reader.hexdigest() != sha256:
        raise ImageError("the image changed while it was unpacked", where=str(destination))
    return header


def _unpack_file(read_at: ReadAt, member: Member, path: Path) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(path, flags, 0o755 if member.executable else 0o644)
    with os.fdopen(fd, "wb") as file:
        at, end = member.offset, member.offset + member.size
        while at < end:
            block = read_at(at, min(COPY_BYTES, end - at))
            if not block:
                raise ImageError("image ends in the middle", where=member.path)
            file.write(block)
            at += len(block)
