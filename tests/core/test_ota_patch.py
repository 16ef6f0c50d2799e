"""The patch applier: equal to the C one on every patch bsdiff4 makes, and a wall against every forged one."""

from __future__ import annotations

import bz2
import contextlib
import random
import struct
from collections.abc import Iterator

import bsdiff4
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tbox.ota import patch
from tbox.ota.patch import PatchError, ReadAt


def reader(data: bytes) -> ReadAt:
    return lambda offset, length: data[offset : offset + length]


def blocks(old: bytes, delta: bytes, length: int) -> Iterator[bytes]:
    return patch.apply(reader(old), len(old), reader(delta), len(delta), length)


def applied(old: bytes, delta: bytes, length: int) -> bytes:
    return b"".join(blocks(old, delta, length))


def number(value: int) -> bytes:
    return struct.pack("<Q", abs(value) | (1 << 63 if value < 0 else 0))


def forged(
    triples: list[tuple[int, int, int]], diff: bytes, extra: bytes, length: int, *, tail: bytes = b""
) -> bytes:
    control = bz2.compress(b"".join(number(n) for triple in triples for n in triple))
    packed = bz2.compress(diff)
    header = b"BSDIFF40" + number(len(control)) + number(len(packed)) + number(length)
    return header + control + packed + bz2.compress(extra) + tail


@st.composite
def edited(draw: st.DrawFn) -> tuple[bytes, bytes]:
    rng = draw(st.randoms(use_true_random=False))
    old = rng.randbytes(draw(st.integers(0, 4000)))
    new = bytearray(old)
    for _ in range(draw(st.integers(0, 8))):
        at = rng.randrange(len(new) + 1)
        new[at : at + rng.randrange(80)] = rng.randbytes(rng.randrange(200))
    return old, bytes(new)


@given(edited())
@settings(deadline=None)
def test_the_result_is_the_c_applier_s(pair: tuple[bytes, bytes]) -> None:
    old, new = pair
    delta = bsdiff4.diff(old, new)
    assert applied(old, delta, len(new)) == bsdiff4.patch(old, delta) == new


@pytest.mark.parametrize("size", [patch.BLOCK_BYTES - 1, patch.BLOCK_BYTES, 3 * patch.BLOCK_BYTES + 17])
def test_blocks_are_added_right_across_their_borders_and_never_grow(size: int) -> None:
    rng = random.Random(size)
    old = rng.randbytes(size)
    diff = rng.randbytes(size)
    delta = forged([(size, 5, 0)], diff, b"extra", size + 5)
    found = list(blocks(old, delta, size + 5))
    assert b"".join(found) == bytes((a + b) & 0xFF for a, b in zip(old, diff, strict=True)) + b"extra"
    assert max(map(len, found)) <= patch.BLOCK_BYTES


@given(edited(), st.data())
@settings(deadline=None)
def test_a_damaged_patch_is_refused_or_yields_the_signed_length(
    pair: tuple[bytes, bytes], data: st.DataObject
) -> None:
    old, new = pair
    delta = bytearray(bsdiff4.diff(old, new))
    for _ in range(data.draw(st.integers(1, 5))):
        delta[data.draw(st.integers(0, len(delta) - 1))] = data.draw(st.integers(0, 255))
    delta = delta[: data.draw(st.integers(0, len(delta)))] if data.draw(st.booleans()) else delta
    with contextlib.suppress(PatchError):
        assert len(applied(old, bytes(delta), len(new))) == len(new)


@given(st.binary(max_size=300), st.integers(0, 1 << 40))
def test_noise_is_refused(noise: bytes, length: int) -> None:
    with pytest.raises(PatchError):
        applied(b"base", noise, length)


BIG = (1 << 63) - 1
OUT, BASE = "writes outside the new image", "reads outside the base image"
NOT = "not a BSDIFF40 patch"
# name -> the patch, and the reason it is refused for
FORGED: dict[str, tuple[bytes, str]] = {
    "negative length": (forged([(4, 0, 0)], b"0000", b"", -4), "yields -4 bytes and 4 are signed"),
    "huge length": (forged([(4, 0, 0)], b"0000", b"", BIG), "yields 9223372036854775807 bytes"),
    "another length than signed": (forged([(5, 0, 0)], b"00000", b"", 5), "yields 5 bytes"),
    "negative add": (forged([(-4, 8, 0)], b"", b"00000000", 4), OUT),
    "negative copy": (forged([(8, -4, 0)], b"0" * 8, b"", 4), OUT),
    "add past the new image": (forged([(BIG, 0, 0)], b"0000", b"", 4), OUT),
    "copy past the new image": (forged([(0, BIG, 0)], b"", b"0000", 4), OUT),
    "sum wraps": (forged([(BIG, BIG, 0)], b"", b"", 4), OUT),
    "reads before the base": (forged([(1, 0, -9), (3, 0, 0)], b"0000", b"", 4), BASE),
    "reads past the base": (forged([(1, 0, 1 << 40), (3, 0, 0)], b"0000", b"", 4), BASE),
    "seek to the end of numbers": (forged([(1, 0, BIG), (3, 0, 0)], b"0000", b"", 4), BASE),
    "diff too short": (forged([(4, 0, 0)], b"000", b"", 4), "diff stream ends too early"),
    "extra too short": (forged([(0, 4, 0)], b"", b"000", 4), "extra stream ends too early"),
    "diff left over": (forged([(4, 0, 0)], b"00000", b"", 4), "left over in the diff"),
    "extra left over": (forged([(0, 4, 0)], b"", b"00000", 4), "left over in the extra"),
    "control left over": (forged([(4, 0, 0), (0, 0, 0)], b"0000", b"", 4), "left over in the control"),
    "control too short": (forged([(1, 0, 0)], b"0", b"", 4), "control stream ends too early"),
    "trailing bytes": (forged([(4, 0, 0)], b"0000", b"", 4, tail=b"!"), "bytes follow the extra"),
    "a second stream behind": (
        forged([(4, 0, 0)], b"0000", b"", 4, tail=bz2.compress(b"more")), "bytes follow the extra"
    ),
    "triples that do nothing": (forged([(0, 0, 0)] * 100_000, b"", b"0000", 4), "triples that do nothing"),
    "expands a thousand times": (forged([(0, 4, 0)], b"", bytes(64 << 20), 4), "left over in the extra"),
    "section lengths past the file": (
        b"BSDIFF40" + number(1 << 40) + number(8) + number(4) + b"BZh", "do not fit the file"
    ),
    "negative section": (
        b"BSDIFF40" + number(-32) + number(64) + number(4) + bytes(64), "do not fit the file"
    ),
    "truncated header": (b"BSDIFF40" + bytes(10), NOT),
    "another format": (b"ENDSLEY/BSDIFF43" + bytes(100), NOT),
    "empty": (b"", NOT),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_patch_is_refused_for_what_it_does(name: str) -> None:
    forgery, why = FORGED[name]
    with pytest.raises(PatchError, match=why):
        applied(b"base!", forgery, 4)


def test_the_base_is_read_to_its_last_byte_and_not_one_further() -> None:
    assert applied(b"base!", forged([(1, 0, 1), (3, 0, 0)], bytes(4), b"", 4), 4) == b"bse!"
    with pytest.raises(PatchError, match=BASE):
        applied(b"base!", forged([(1, 0, 2), (3, 0, 0)], bytes(4), b"", 4), 4)


def test_nothing_is_yielded_beyond_the_signed_length_by_a_bomb() -> None:
    made = 0
    with pytest.raises(PatchError, match="left over in the extra"):
        for block in blocks(b"base!", FORGED["expands a thousand times"][0], 4):
            made += len(block)
    assert made <= 4


def test_a_base_that_is_shorter_than_it_should_be_is_refused() -> None:
    delta = forged([(4, 0, 0)], b"0000", b"", 4)
    with pytest.raises(PatchError, match="base image is shorter"):
        b"".join(patch.apply(reader(b"ba"), 4, reader(delta), len(delta), 4))
