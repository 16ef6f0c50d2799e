"""The batch decoder equals cantools, frame by frame and to the last bit, whatever the DBC and the payload."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tbox.decode.batch import Decoder
from tbox.decode.database import Database
from tbox.decode.objects import FrameObject, Objects
from tbox.decode.table import MALFORMED_PLAN, UNKNOWN_PLAN, compile_table
from tbox.model import FRAME_DTYPE
from tests import dbcs
from tests.dbcs import Msg, Sig


def by_cantools(database: Database, can_id: int, payload: bytes) -> dict[str, Any] | str | None:
    """The oracle: the signals, "malformed", or None for an unknown id."""
    message = next((d.message for d in database.definitions if d.can_id == can_id), None)
    if message is None:
        return None
    try:
        decoded: dict[str, Any] = message.decode(payload, decode_choices=False, allow_truncated=True)
    except Exception:
        return "malformed"
    return decoded


def by_us(one: FrameObject | None) -> dict[str, Any] | str | None:
    if one is None:
        return None
    return "malformed" if one.signals is None else one.signals


def assert_equal_to_cantools(
    database: Database, frames: Any, at_once: int, objects: Objects | None = None
) -> None:
    pairs = [(int(f["id"]), f["data"][: f["len"]].tobytes()) for f in frames]
    objects = objects or Objects(database)
    for first in range(0, len(pairs), at_once):
        part = pairs[first : first + at_once]
        for (can_id, payload), one in zip(part, objects.decode(part), strict=True):
            # repr tells 1 from 1.0, -0.0 from 0.0, and holds every bit of a float; the order counts too.
            assert repr(by_us(one)) == repr(by_cantools(database, can_id, payload))


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(messages=dbcs.databases(), seed=st.integers(0, 2**32 - 1), at_once=st.sampled_from([1, 2, 3, 7, 60]))
def test_any_dbc_and_any_payload_decode_as_in_cantools(messages: list[Msg], seed: int, at_once: int) -> None:
    database = dbcs.load(messages)
    frames = dbcs.frames_of(np.random.default_rng(seed), database.definitions, 60)
    assert_equal_to_cantools(database, frames, at_once)


def one_message(*sigs: Sig, length: int = 8) -> Database:
    return dbcs.load([Msg(0x123, "Msg", length, list(sigs))])


def sig(name: str, start: int, bits: int, **more: Any) -> Sig:
    values: dict[str, Any] = {"big": False, "signed": False, "scale": "1", "offset": "0"} | more
    return Sig(name, start, bits, **values)


SHAPES = {
    "64 bits unsigned": [sig("A", 0, 64)],
    "64 bits signed": [sig("A", 0, 64, signed=True)],
    "64 bits with a factor": [sig("A", 0, 64, scale="3", offset="1")],
    "64 bits with a fraction": [sig("A", 0, 64, scale="0.1", offset="-5")],
    "60 bits that start inside a byte": [sig("A", 3, 60)],
    "57 bits over nine bytes": [sig("A", 7, 60, signed=True)],
    "float32": [sig("A", 0, 32, float_type=1), sig("B", 32, 32, float_type=1, big=False, scale="0.1")],
    "float64": [sig("A", 7, 64, float_type=2, big=True)],
    "float16": [sig("A", 8, 16, float_type=1)],
    "overlap": [sig("A", 0, 12), sig("B", 8, 8)],
    "sticks out": [sig("A", 60, 8), sig("B", 0, 8)],
    "both byte orders on the same bits": [sig("A", 0, 16), sig("B", 7, 16, big=True)],
    "signed big-endian": [sig("A", 14, 13, big=True, signed=True, scale="-0.01", offset="3")],
    "big-endian at the end": [sig("A", 59, 12, big=True), sig("B", 0, 1)],
    "a selector without pages": [sig("A", 0, 4, mark="M"), sig("B", 8, 8)],
    "a scaled selector": [sig("A", 0, 4, mark="M", scale="2"), sig("B", 8, 8, mark="m2")],
    "a signed selector": [sig("A", 0, 4, mark="M", signed=True), sig("B", 8, 8, mark="m1")],
    "a page named only in the value texts": [
        sig("A", 0, 2, mark="M", choices={3: "Idle"}), sig("B", 8, 8, mark="m1"),
    ],
    "a wide selector": [
        sig("A", 0, 32, mark="M"), sig("B", 32, 8, mark="m70000"), sig("C", 40, 8, mark="m1"),
    ],
    "a factor above 2^53": [sig("A", 0, 8, scale="9007199254740993")],
    "a factor of zero": [sig("A", 0, 8, scale="0")],
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_of_signal_decodes_as_in_cantools(name: str) -> None:
    length = 9 if "nine" in name else 8
    database = one_message(*SHAPES[name], length=12 if length == 9 else 8)
    frames = dbcs.frames_of(np.random.default_rng(7), database.definitions, 400)
    assert_equal_to_cantools(database, frames, 1000)


@pytest.mark.parametrize(
    "array", ["byte", "shift", "mask", "half", "scale", "add", "need_bytes", "selector_plan", "length", "big"]
)
def test_the_comparison_notices_a_planted_bug(array: str, twin: str) -> None:
    if array == "length" and twin == "compiled":
        pytest.skip("the kernel asks every row whether the payload holds it")
    selector = sig("M", 0, 2, mark="M")
    pages = [sig("A", 13, 11, mark="m0", signed=True), sig("B", 30, 9, mark="m1", big=True, scale="0.1")]
    database = one_message(selector, *pages)
    frames = dbcs.frames_of(np.random.default_rng(3), database.definitions, 300)
    assert_equal_to_cantools(database, frames, 100)
    objects = Objects(database)
    broken = getattr(objects.table, array)
    if array == "length":
        broken[...] = 0
    else:
        broken[...] = ~broken if array == "big" else broken + 1
    objects._decoder = Decoder(objects.table)
    with pytest.raises((AssertionError, IndexError)):
        assert_equal_to_cantools(database, frames, 100, objects)


def test_a_message_beyond_the_table_goes_to_cantools_and_the_table_says_why() -> None:
    table = compile_table(one_message(*SHAPES["overlap"]).definitions)
    assert [p.reason for p in table.plan_info if p.reason] == ["signals overlap or lie outside the message"]


def test_a_batch_without_frames_decodes_to_nothing() -> None:
    decoder = Decoder(compile_table(one_message(sig("A", 0, 8)).definitions))
    decoded = decoder.decode(0, np.zeros(0, FRAME_DTYPE))
    assert len(decoded.value) == len(decoded.plan) == 0


def test_frames_of_a_bus_without_dbc_are_unknown() -> None:
    database = one_message(sig("A", 0, 8))
    frames = dbcs.frames_of(np.random.default_rng(1), database.definitions, 5, wild=False)
    decoded = Decoder(compile_table(database.definitions)).decode(3, frames)
    assert (decoded.plan == UNKNOWN_PLAN).all()


def test_a_standard_and_an_extended_id_of_the_same_number_are_two_messages() -> None:
    database = dbcs.load(
        [Msg(0x123, "Std", 8, [sig("A", 0, 8)]), Msg(0x8000_0123, "Ext", 8, [sig("B", 0, 8)])]
    )
    std, ext = Objects(database).decode([(0x123, bytes(8)), (0x8000_0123, bytes(8))])
    assert std is not None and ext is not None and (std.name, ext.name) == ("Std", "Ext")


def test_a_slice_of_a_larger_block_decodes_like_the_block() -> None:
    database = one_message(sig("A", 0, 8), sig("B", 63, 8, big=True))
    decoder = Decoder(compile_table(database.definitions))
    frames = dbcs.frames_of(np.random.default_rng(1), database.definitions, 40, wild=False)
    whole, odd = decoder.decode(0, frames), decoder.decode(0, frames[1::2])
    assert odd.value.tolist() == [v for n, v in zip(whole.frame, whole.value, strict=True) if n % 2]


@settings(max_examples=100, deadline=None)
@given(block=st.binary(min_size=72, max_size=72 * 20), shift=st.integers(0, 1))
def test_no_bytes_of_a_frame_block_raise(block: bytes, shift: int) -> None:
    database = one_message(sig("A", 0, 4, mark="M"), sig("B", 8, 32, float_type=1, mark="m1"), length=64)
    whole = block[: len(block) // 72 * 72]
    frames = np.frombuffer(whole, FRAME_DTYPE).copy()
    frames["id"][::2] = 0x123
    decoded = Decoder(compile_table(database.definitions)).decode(0, frames)
    assert ((decoded.plan == UNKNOWN_PLAN) | (decoded.plan >= MALFORMED_PLAN)).all()
