"""Records are encoded once and read back exactly; what is not a payload is refused, whatever it is."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from random import Random
from typing import Any

import msgspec
import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from tbox.model import RECORD_PAYLOAD_BYTES_MAX, Block, Column, Draft, Level, Now, Series, TimeQuality
from tbox.record.codec import (
    EXPANDED_BYTES_MAX,
    ZSTD_MAGIC,
    Minter,
    PayloadError,
    PayloadTooLargeError,
    decode_payload,
    pack_series,
    unpack_series,
)

I64 = st.integers(-(2**63), 2**63 - 1)
NAMES = st.one_of(
    st.text(max_size=12),
    st.builds("{}{}{}".format, st.sampled_from(["", "Cell", "a1b"]), st.integers(0, 12), st.just("")),
    st.builds("Cell{:03d}.{}".format, st.integers(0, 120), st.sampled_from(["min", "max"])),
)


@st.composite
def series(draw: st.DrawFn) -> Series:
    length = draw(st.integers(0, 12))
    t_ms = np.array(draw(st.lists(I64, min_size=length, max_size=length)), np.int64)
    columns = []
    for name in draw(st.lists(NAMES, unique=True, max_size=12)):
        raw = np.array(draw(st.lists(I64, min_size=length, max_size=length)), np.int64)
        present = None
        if draw(st.booleans()):
            present = np.array(draw(st.lists(st.booleans(), min_size=length, max_size=length)), np.bool_)
            raw = np.where(present, raw, 0)
        columns.append(Column(name, draw(st.sampled_from([1.0, 0.001])), 0.5, raw, present))
    return Series(t_ms, tuple(columns))


def flat(table: Series) -> dict[str, Any]:
    columns = {
        c.name: (
            c.scale,
            c.offset,
            c.raw.tolist(),
            None if c.present is None else c.present.tolist(),
        )
        for c in table.columns
    }
    return {"t_ms": table.t_ms.tolist(), **columns}


def mint(body: dict[str, Any], now: Now | None = None, mono_ns: int = 5) -> bytes:
    source = Minter(3, "vehicle", guard=nullcontext())
    return source.mint(Draft("telemetry", Level.INFO, mono_ns, body), now or Now(5)).payload


@settings(deadline=None)
@given(series())
def test_unpacking_undoes_packing(table: Series) -> None:
    through = msgspec.msgpack.decode(msgspec.msgpack.encode(pack_series(table)))
    assert flat(unpack_series(through)) == flat(table)


JSONISH = st.recursive(
    st.none()
    | st.booleans()
    | I64
    | st.floats(allow_nan=False)
    | st.text(max_size=20)
    | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(max_size=5).filter(lambda key: key != "series"), JSONISH, max_size=5))
def test_a_body_comes_back_as_it_was_minted(body: dict[str, Any]) -> None:
    record = decode_payload(mint(body, Now(7_000, 9_000, TimeQuality.NTP)))
    assert record["body"] == body
    assert (record["id"], record["kind"], record["level"]) == (3 << 32 | 1, "telemetry", 1)
    assert (record["mono"], record["wall"], record["q"]) == (5, 9_000 - 6_995, 2)


def test_the_wall_time_is_nil_while_the_clock_is_unset() -> None:
    record = decode_payload(mint({}))
    assert record["wall"] is None and record["q"] == TimeQuality.UNSET


def test_expanding_gives_the_values_by_name_rounded_and_none_where_absent() -> None:
    table = Series(
        np.array([0, 100], np.int64),
        (
            Column("Cell1", 0.001, 0.0, np.array([3712, 3713], np.int64)),
            Column("Probe", 0.1, -40.0, np.array([651, 0], np.int64), np.array([True, False])),
        ),
    )
    body = decode_payload(mint({"series": [table]}), expand=True)["body"]
    signals = {"Probe": [25.1, None], "Cell1": [3.712, 3.713]}
    assert body["series"] == [{"t_ms": [0, 100], "signals": signals}]


def test_numbered_columns_share_one_name() -> None:
    columns = tuple(Column(f"Cell{i}.mean", 0.001, 0.0, np.array([3700 + i], np.int64)) for i in range(192))
    packed = pack_series(Series(np.array([0], np.int64), columns))
    assert [entry["n"] for entry in packed["c"]] == [["Cell", 0, 192, ".mean", 0]]


@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 300), st.randoms(use_true_random=False))
def test_a_block_is_the_columns_it_stands_for(columns: int, times: int, first: int, random: Random) -> None:
    raw = np.array(
        [[random.randrange(-(2**60), 2**60) for _ in range(times)] for _ in range(columns)], np.int64
    )
    t_ms = np.arange(times, dtype=np.int64)
    block = Series(t_ms, (), (Block("Cells[", first, "].min", 0.001, 0.5, raw),))
    single = tuple(Column(f"Cells[{first + i}].min", 0.001, 0.5, row) for i, row in enumerate(raw))
    assert flat(unpack_series(pack_series(block))) == flat(Series(t_ms, single))


def test_numpy_values_in_a_body_are_plain_numbers_afterwards() -> None:
    body = {"a": np.float64(1.5), "b": np.int32(3), "c": np.array([1, 2]), "d": np.bool_(True)}
    assert decode_payload(mint(body))["body"] == {"a": 1.5, "b": 3, "c": [1, 2], "d": True}


def test_a_small_record_is_not_compressed_and_a_large_one_is() -> None:
    assert not mint({}).startswith(ZSTD_MAGIC)
    assert mint({"text": "x" * 5_000}).startswith(ZSTD_MAGIC)


def test_an_id_is_used_up_only_when_encoding_succeeded() -> None:
    source = Minter(1, "vehicle", guard=nullcontext())
    noise = np.random.default_rng(1).bytes(RECORD_PAYLOAD_BYTES_MAX)
    for body in ({"noise": noise}, {"zeros": bytes(EXPANDED_BYTES_MAX)}):
        with pytest.raises(PayloadTooLargeError, match="split it"):
            source.mint(Draft("capture", Level.INFO, 0, body), Now(0))
    with pytest.raises(TypeError):
        source.mint(Draft("event", Level.INFO, 0, {"what": object()}), Now(0))
    assert source.last_id is None
    assert source.mint(Draft("event", Level.INFO, 0, {}), Now(0)).id == 1 << 32 | 1
    assert source.last_id == 1 << 32 | 1


def test_threads_that_mint_at_once_never_share_an_id() -> None:
    source = Minter(1, "vehicle", guard=threading.Lock())
    numbers: list[int] = []

    def work() -> None:
        for _ in range(300):
            numbers.append(source.mint(Draft("event", Level.INFO, 0, {"x": "y" * 300}), Now(0)).id)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == [1 << 32 | i for i in range(1, 1201)]


# --- what is not a payload ----------------------------------------------------------------------------


def compressed(plain: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(plain)


def envelope(**changes: Any) -> dict[str, Any]:
    whole = {"v": 1, "id": 1, "kind": "event", "level": 1, "mono": 0, "wall": None, "q": 0, "body": {}}
    return {**whole, **changes}


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"a": value}
    return value


def hostile() -> Iterator[tuple[str, bytes]]:
    encode = msgspec.msgpack.encode
    yield "nothing", b""
    yield "too long", bytes(RECORD_PAYLOAD_BYTES_MAX + 1)
    yield "a bomb that tells its size", compressed(bytes(EXPANDED_BYTES_MAX + 1))
    stream = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    yield "a bomb that does not", stream.compress(bytes(EXPANDED_BYTES_MAX * 4)) + stream.flush()
    yield "bytes after the end", compressed(encode(envelope())) + b"x"
    yield "a torn frame", compressed(encode(envelope(body={"x": "y" * 999})))[:-7]
    yield "an array that claims four thousand million items", b"\xdd\xff\xff\xff\xff"
    yield "arrays in arrays", b"\x91" * 60_000
    yield "nested maps", encode(envelope(body=nested(40)))
    yield "another version", encode(envelope(v=2))
    yield "no map", encode([1, 2])
    yield "a field missing", encode({"v": 1})
    yield "a field of another type", encode(envelope(id="1"))
    yield "an extension", encode(envelope(body={"x": msgspec.msgpack.Ext(5, b"")}))


@pytest.mark.parametrize(("what", "payload"), list(hostile()), ids=[what for what, _ in hostile()])
def test_what_is_no_payload_is_refused(what: str, payload: bytes) -> None:
    with pytest.raises(PayloadError):
        decode_payload(payload, expand=True)


def hostile_series() -> Iterator[tuple[str, Any]]:
    column = {"n": "x", "s": 1.0, "o": 0.0, "d": [1]}
    block = {"n": ["c", 0, 2, "", 0], "s": 1.0, "o": 0.0, "d": [1, 2]}
    yield "no list", {"t": [0]}
    yield "no table", [3]
    yield "too few values", [{"t": [0, 1], "c": [column]}]
    yield "beyond 64 bit", [{"t": [0], "c": [{**column, "d": [2**64 - 1]}]}]
    yield "a bitmap too short", [{"t": [0] * 9, "c": [{**column, "p": b"\xff"}]}]
    yield "a bitmap of other size", [{"t": [0], "c": [{**column, "p": b"\x00"}]}]
    yield "a block too wide", [{"t": [0], "c": [{**block, "n": ["c", 0, 3, "", 0]}]}]
    yield "a block of nothing", [{"t": [], "c": [{**block, "n": ["c", 0, 4096, "", 0], "d": []}]}]
    yield "a block with a bitmap", [{"t": [0], "c": [{**block, "p": b"\x80"}]}]
    yield "a huge name", [{"t": [0], "c": [{**block, "n": ["c" * 9999, 0, 2, "", 0]}]}]
    yield "a huge width", [{"t": [0], "c": [{**block, "n": ["c", 0, 2, "", 10**9]}]}]
    absent = {"n": "x", "s": 1.0, "o": 0.0, "d": [], "p": bytes(3000)}
    yield "values out of thin air", [{"t": [0] * 24_000, "c": [absent] * 100}]


@pytest.mark.parametrize(
    ("what", "tables"), list(hostile_series()), ids=[what for what, _ in hostile_series()]
)
def test_damaged_series_are_refused_when_expanded(what: str, tables: Any) -> None:
    payload = compressed(msgspec.msgpack.encode(envelope(body={"series": tables})))
    with pytest.raises(PayloadError):
        decode_payload(payload, expand=True)


def test_odd_scales_expand_without_a_crash() -> None:
    for scale in (0.0, math.inf, math.nan, 1e308, 5e-324):
        table = {"t": [0], "c": [{"n": "x", "s": scale, "o": 0.0, "d": [2**62]}]}
        decode_payload(msgspec.msgpack.encode(envelope(body={"series": [table]})), expand=True)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_fuzzed_payloads_are_read_or_refused_and_nothing_else(data: st.DataObject) -> None:
    table = Series(
        np.arange(4, dtype=np.int64),
        tuple(Column(f"Cell{i}", 0.001, 0.0, np.arange(4, dtype=np.int64) * 7 + i) for i in range(5)),
    )
    plain = msgspec.msgpack.encode(envelope(body={"series": [pack_series(table)], "text": "abc"}))
    fuzzed = bytearray(plain)
    for _ in range(data.draw(st.integers(1, 6))):
        fuzzed[data.draw(st.integers(0, len(fuzzed) - 1))] = data.draw(st.integers(0, 255))
    payload = bytes(fuzzed[: data.draw(st.integers(0, len(fuzzed)))])
    for candidate in (payload, compressed(payload), ZSTD_MAGIC + payload):
        try:
            record = decode_payload(candidate, expand=True)
        except PayloadError:
            continue
        assert set(record) == {"v", "id", "kind", "level", "mono", "wall", "q", "body"}
