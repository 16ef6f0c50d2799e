"""Applies a BSDIFF40 patch as a stream, in bounded memory, in Python. Never trusts a number of the patch.

Every length, offset and control triple is checked against what signed metadata allows before it is acted
on; the caller still hashes the result. Imports nothing heavy: it also runs as a process of its own,
`python -m tbox.ota.patch BASE PATCH OUT LENGTH`.
"""

from __future__ import annotations

import bz2
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tbox.errors import Refused

MAGIC = b"BSDIFF40"
HEADER_BYTES = 32
BLOCK_BYTES = 64 * 1024
TRIPLE_BYTES = 24
# A patch that does nothing for this many triples in a row is an endless loop in disguise.
IDLE_TRIPLES_MAX = 1024

ReadAt = Callable[[int, int], bytes]  # (offset, length) -> up to that many bytes

# Where releases differ they differ in few places: pieces this small are looked at before they are added.
PIECE_BYTES = 4096
_LOW = int.from_bytes(b"\x7f" * PIECE_BYTES, "little")
_HIGH = int.from_bytes(b"\x80" * PIECE_BYTES, "little")
_ZEROS = bytes(BLOCK_BYTES)


class PatchError(Refused):
    """The patch is not one that signed metadata allows."""


def signed_magnitude(raw: bytes) -> int:
    """Return bsdiff's integer: 63 bits little-endian, the top bit is the sign."""
    value = int.from_bytes(raw, "little")
    return value if value < 1 << 63 else -(value - (1 << 63))


class _Bz2Section:
    """One bz2 stream of the patch, unpacked as it is asked for and never further."""

    def __init__(self, read_at: ReadAt, begin: int, end: int, what: str) -> None:
        self._read_at = read_at
        self._at, self._end = begin, end
        self._what = what
        self._unpack = bz2.BZ2Decompressor()
        self._ready = bytearray()

    def read(self, length: int) -> bytes:
        """Return exactly `length` (at most a block) bytes. Raises PatchError when the stream ends before."""
        while len(self._ready) < length:
            self._ready += self._more(length - len(self._ready))
        part = bytes(self._ready[:length])
        del self._ready[:length]
        return part

    def _more(self, length: int) -> bytes:
        packed = b""
        if self._unpack.eof:
            raise PatchError(f"the {self._what} stream ends too early", where="patch")
        if self._unpack.needs_input:
            packed = self._read_at(self._at, min(BLOCK_BYTES, self._end - self._at))
            if not packed:
                raise PatchError(f"the {self._what} stream is truncated", where="patch")
            self._at += len(packed)
        try:
            return self._unpack.decompress(packed, max_length=length)
        except (OSError, ValueError, EOFError) as error:
            raise PatchError(f"the {self._what} stream is damaged: {error}", where="patch") from None

    def finish(self) -> None:
        """Raise PatchError unless the stream is used up to its last byte, packed and unpacked."""
        while not self._ready and not self._unpack.eof:
            self._ready += self._more(1)
        if self._ready:
            raise PatchError(f"bytes are left over in the {self._what} stream", where="patch")
        if self._unpack.unused_data or self._at != self._end:
            raise PatchError(f"bytes follow the {self._what} stream", where="patch")


def _add(diff: bytes, base: bytes) -> bytes:
    """Return the bytewise sum modulo 256; the parts that did not change cost a comparison."""
    if diff == _ZEROS[: len(diff)]:
        return base
    pieces = []
    for at in range(0, len(diff), PIECE_BYTES):
        piece, under = diff[at : at + PIECE_BYTES], base[at : at + PIECE_BYTES]
        pieces.append(under if piece == _ZEROS[: len(piece)] else _add_piece(piece, under))
    return b"".join(pieces)


def _add_piece(diff: bytes, base: bytes) -> bytes:
    """Add all bytes at once as one big integer: the low seven bits first, so that none carries over."""
    x, y = int.from_bytes(diff, "little"), int.from_bytes(base, "little")
    return (((x & _LOW) + (y & _LOW)) ^ ((x ^ y) & _HIGH)).to_bytes(len(diff), "little")


def apply(
    read_base: ReadAt, base_length: int, read_patch: ReadAt, patch_length: int, output_length: int
) -> Iterator[bytes]:
    """Yield the new image in blocks of at most 64 KiB.

    output_length: as signed; a patch that claims another is refused. Raises PatchError, at any point
    between blocks: what was yielded before counts for nothing.
    """
    header = read_patch(0, HEADER_BYTES)
    if len(header) != HEADER_BYTES or header[:8] != MAGIC:
        raise PatchError("not a BSDIFF40 patch", where="patch")
    control_length, diff_length, new_length = (signed_magnitude(header[at : at + 8]) for at in (8, 16, 24))
    if new_length != output_length:
        raise PatchError(f"yields {new_length} bytes and {output_length} are signed", where="patch")
    if control_length < 0 or diff_length < 0 or HEADER_BYTES + control_length + diff_length > patch_length:
        raise PatchError("section lengths do not fit the file", where="patch")
    diff_at = HEADER_BYTES + control_length
    extra_at = diff_at + diff_length
    control = _Bz2Section(read_patch, HEADER_BYTES, diff_at, "control")
    diff = _Bz2Section(read_patch, diff_at, extra_at, "diff")
    extra = _Bz2Section(read_patch, extra_at, patch_length, "extra")

    made = base_at = idle = 0
    while made < output_length:
        triple = control.read(TRIPLE_BYTES)
        add, copy, seek = (signed_magnitude(triple[at : at + 8]) for at in (0, 8, 16))
        _check(add, copy, base_at, base_length, output_length - made)
        idle = 0 if add or copy else idle + 1
        if idle > IDLE_TRIPLES_MAX:
            raise PatchError("control triples that do nothing", where="patch")
        yield from _added(read_base, diff, base_at, add)
        yield from _copied(extra, copy)
        made += add + copy
        base_at += add + seek
    for section in (control, diff, extra):
        section.finish()


def _check(add: int, copy: int, base_at: int, base_length: int, left: int) -> None:
    if add < 0 or copy < 0 or add + copy > left:
        raise PatchError("a control triple writes outside the new image", where="patch")
    if add and not 0 <= base_at <= base_length - add:
        raise PatchError("a control triple reads outside the base image", where="patch")


def _added(read_base: ReadAt, diff: _Bz2Section, base_at: int, length: int) -> Iterator[bytes]:
    while length:
        n = min(length, BLOCK_BYTES)
        base = read_base(base_at, n)
        if len(base) != n:
            raise PatchError("the base image is shorter than boot control says", where="slot")
        yield _add(diff.read(n), base)
        base_at, length = base_at + n, length - n


def _copied(extra: _Bz2Section, length: int) -> Iterator[bytes]:
    while length:
        n = min(length, BLOCK_BYTES)
        yield extra.read(n)
        length -= n


def _main(args: list[str]) -> None:
    """Apply a patch file to a base file; for benches and for people."""
    base, patch, out, length = Path(args[0]), Path(args[1]), Path(args[2]), int(args[3])
    with base.open("rb") as base_file, patch.open("rb") as patch_file, out.open("wb") as out_file:

        def reader(file: object) -> ReadAt:
            def read_at(offset: int, n: int) -> bytes:
                file.seek(offset)  # type: ignore[attr-defined]
                return file.read(n)  # type: ignore[attr-defined, no-any-return]

            return read_at

        sizes = base.stat().st_size, patch.stat().st_size
        for block in apply(reader(base_file), sizes[0], reader(patch_file), sizes[1], length):
            out_file.write(block)


if __name__ == "__main__":
    _main(sys.argv[1:])
