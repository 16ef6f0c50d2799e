"""Frames are packed as cantools packs them, for any values, and carry the CRC that the README describes."""

from __future__ import annotations

import zlib
from pathlib import Path

import cantools
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tbox.model import CANFD_FDF
from tbox.sim import layout
from tbox.sim.packing import Packer, crc8, frame_crcs

DBC = Path(__file__).parents[2] / "dbc"
DATABASES = {name: cantools.database.load_file(DBC / name, strict=True) for name in layout.DATABASES}
CASES = [
    (name, msg, mux)
    for name, messages in layout.DATABASES.items()
    for msg in messages
    for mux in (range(layout.MODULES) if any(sig.selector for sig in msg.signals) else (None,))
]


def bitwise_crc8(data: bytes) -> int:
    """The textbook's CRC-8/SAE-J1850, bit by bit."""
    crc = 0xFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc << 1 ^ 0x1D) & 0xFF if crc & 0x80 else crc << 1
    return crc ^ 0xFF


def values_for(packer: Packer, mux: int | None, rng: np.random.Generator, rows: int) -> np.ndarray:
    low = np.array([sig.lo for sig in packer.signals])
    high = np.array([sig.hi for sig in packer.signals])
    values = rng.uniform(low, high, (rows, len(low)))
    missing = rng.random(values.shape) < 0.1
    for column, sig in enumerate(packer.signals):
        if sig.sna is not None:
            values[missing[:, column], column] = np.nan
        if sig.selector:
            values[:, column] = mux
    return values


def test_the_crc_has_its_published_check_value() -> None:
    assert crc8(b"123456789") == 0x4B


@settings(deadline=None)
@given(st.binary(max_size=80))
def test_the_table_crc_is_the_bitwise_one(data: bytes) -> None:
    assert crc8(data) == bitwise_crc8(data)


EQUAL_ROWS = st.integers(1, 64).flatmap(
    lambda n: st.lists(st.binary(min_size=n, max_size=n), min_size=1, max_size=9)
)


@settings(deadline=None)
@given(EQUAL_ROWS, st.integers(0, 255))
def test_crcs_of_a_batch_are_those_of_its_frames(rows: list[bytes], data_id: int) -> None:
    data = np.array([list(row) for row in rows], dtype=np.uint8)
    ids = np.full(len(rows), data_id, dtype=np.uint8)
    expected = [bitwise_crc8(row[1:] + bytes([data_id])) for row in rows]
    assert frame_crcs(data, len(rows[0]), ids).tolist() == expected


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32))
@pytest.mark.parametrize(("name", "msg", "mux"), CASES)
def test_cantools_packs_the_same_bytes(name: str, msg: layout.Msg, mux: int | None, seed: int) -> None:
    rng = np.random.default_rng(seed)
    packer = Packer(msg, mux)
    values = values_for(packer, mux, rng, 3)
    counters = rng.integers(0, layout.COUNTER_VALUES, 3)
    frames = packer.pack(np.full(3, msg.can_id, dtype=np.uint32), counters, values)
    oracle = DATABASES[name].get_message_by_name(msg.name)
    for row in range(3):
        payload = frames["data"][row, : msg.length].tobytes()
        raw = dict(zip((sig.name for sig in packer.signals), packer.raw(values)[row].tolist(), strict=True))
        raw |= {layout.COUNTER_NAME: int(counters[row]), layout.CRC_NAME: payload[0]}
        assert bytes(oracle.encode(raw, scaling=False, strict=False)) == payload
        assert payload[0] == bitwise_crc8(payload[1:] + bytes([msg.data_id]))
        assert bool(frames["flags"][row] & CANFD_FDF) == msg.fd
        assert not frames["data"][row, msg.length :].any()


@pytest.mark.parametrize(("name", "msg", "mux"), CASES)
def test_a_value_comes_back_within_half_a_step_and_a_missing_one_as_sna(
    name: str, msg: layout.Msg, mux: int | None
) -> None:
    packer = Packer(msg, mux)
    values = values_for(packer, mux, np.random.default_rng(zlib.crc32(msg.name.encode())), 20)
    frames = packer.pack(np.full(20, msg.can_id, dtype=np.uint32), np.zeros(20, dtype=np.int64), values)
    oracle = DATABASES[name].get_message_by_name(msg.name)
    for row in range(20):
        decoded = oracle.decode(frames["data"][row, : msg.length].tobytes(), decode_choices=False)
        for column, sig in enumerate(packer.signals):
            want = values[row, column]
            if np.isnan(want):
                assert sig.sna is not None and decoded[sig.name] == sig.sna * sig.scale + sig.offset
            else:
                assert abs(decoded[sig.name] - want) <= sig.scale * 0.5000001


@pytest.mark.parametrize("beyond", [-1e12, 1e12])
def test_a_value_beyond_the_raw_range_saturates_and_never_reads_as_missing(beyond: float) -> None:
    for _, msg, mux in CASES:
        packer = Packer(msg, mux)
        raw = packer.raw(np.full((1, len(packer.signals)), beyond))[0]
        for column, sig in enumerate(packer.signals):
            assert sig.raw_min <= raw[column] <= sig.raw_max
            assert raw[column] != sig.sna
