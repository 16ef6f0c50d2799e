"""Two copies hold the old value or the new one, whatever is torn or flipped."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tbox.durable import OsStorage, TwoCopies, frame, unframe


@given(st.integers(0, 2**64 - 1), st.binary(max_size=300))
def test_a_copy_reads_back_as_written(sequence: int, payload: bytes) -> None:
    assert unframe(frame(sequence, payload)) == (sequence, payload)
    assert unframe(frame(sequence, payload) + b"old tail") == (sequence, payload)


@given(st.binary(max_size=60), st.data())
def test_any_single_flipped_bit_is_noticed(payload: bytes, data: st.DataObject) -> None:
    raw = bytearray(frame(7, payload))
    bit = data.draw(st.integers(0, len(raw) * 8 - 1))
    raw[bit // 8] ^= 1 << bit % 8
    assert unframe(bytes(raw)) is None


@given(st.binary(max_size=200))
def test_garbage_is_never_a_copy_and_never_raises(raw: bytes) -> None:
    assert unframe(raw) is None


def test_values_alternate_between_the_copies(tmp_path: Path) -> None:
    copies = TwoCopies(OsStorage(), str(tmp_path), "v")
    assert copies.read() is None
    assert [copies.write(b"%d" % n) for n in range(5)] == [1, 2, 3, 4, 5]
    assert copies.read() == (5, b"4")
    assert {unframe(path.read_bytes()) for path in tmp_path.iterdir()} == {(5, b"4"), (4, b"3")}


def test_a_shorter_value_over_a_longer_one_reads_back(tmp_path: Path) -> None:
    copies = TwoCopies(OsStorage(), str(tmp_path), "v")
    for value in (b"x" * 500, b"y" * 400, b"z", b""):
        copies.write(value)
        assert copies.read() is not None and copies.read()[1] == value  # type: ignore[index]


def test_a_value_in_both_copies_outlives_either_and_is_written_no_more(tmp_path: Path) -> None:
    copies = TwoCopies(OsStorage(), str(tmp_path), "v")
    copies.write(b"older")
    for value in (b"newer", b"newest", b"newer"):
        copies.write_both(value)
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        copies.write_both(value)
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
        for path, raw in before.items():
            path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
            found = copies.read()
            assert found is not None and found[1] == value
            copies.write_both(value)


@pytest.mark.parametrize("survivor", [0, 1])
def test_the_newest_whole_copy_is_never_the_one_overwritten(tmp_path: Path, survivor: int) -> None:
    copies = TwoCopies(OsStorage(), str(tmp_path), "v")
    for n in range(4 + survivor):
        copies.write(b"%d" % n)
    newest = copies.read()
    assert newest is not None

    class CutAfterWrite(OsStorage):
        def fsync(self, path: str) -> None:
            Path(path).write_bytes(b"")  # the power went before the sync: all of it is gone
            raise OSError("power cut")

    with pytest.raises(OSError, match="power cut"):
        TwoCopies(CutAfterWrite(), str(tmp_path), "v").write(b"new")
    assert copies.read() == newest
    assert copies.damaged()
