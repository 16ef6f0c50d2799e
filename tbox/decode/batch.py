"""Decodes whole batches of mixed frames at once with numpy, bit for bit as cantools does. Judges no value.

For every (frame, signal) pair the table row and the byte address are laid out flat; one gather of unaligned
64-bit words then yields all raw values. No grouping by id, no Python per frame, except for the messages that
only cantools can say.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tbox.decode.table import (
    KIND_F16,
    KIND_F32,
    KIND_F64,
    KIND_INT,
    MALFORMED_PLAN,
    UNKNOWN_PLAN,
    WORD_BYTES,
    IntArray,
    SignalTable,
)
from tbox.model import FRAME_BYTES

PAYLOAD_BYTES_MAX = 64


class Fallback(NamedTuple):
    """One frame decoded by cantools: signal name -> value, or why it could not be."""

    frame: int
    values: dict[str, Any]
    error: str = ""


class Decoded(NamedTuple):
    """What a batch of n frames holds: k samples in frame order, in cantools' order within a frame.

    plan: (n,) the plan each frame ended in (UNKNOWN_PLAN, MALFORMED_PLAN or one that says its message).
    short: (n,) the payload was shorter than the message. frame, row: (k,) indices into the batch and table.
    raw: (k,) int64 raw values (a float's bits). value: (k,) float64. fallback: what cantools decoded instead;
    its samples are not among the k.
    """

    plan: IntArray
    short: npt.NDArray[np.bool_]
    frame: IntArray
    row: IntArray
    raw: IntArray
    value: npt.NDArray[np.float64]
    fallback: list[Fallback]


class Decoder:
    """A table at work. `decode` never raises for what a frame holds."""

    def __init__(self, table: SignalTable) -> None:
        self.table = table
        self._any_big = bool(table.big.any())
        self._any_float = bool((table.kind != KIND_INT).any())
        self._any_fallback = bool(table.fallback.any())
        self._no_ids = (np.zeros(1, np.uint32), np.zeros(1, np.int64))

    def decode(self, channel: int, frames: npt.NDArray[np.void]) -> Decoded:
        """Decode frames of one bus. frames: (n,) model.FRAME_DTYPE."""
        table = self.table
        frames = np.ascontiguousarray(frames)
        words = _words(frames)
        lengths = np.minimum(frames["len"], PAYLOAD_BYTES_MAX)
        plan = self._plans(channel, frames["id"], lengths, words)
        short = lengths < table.length.take(plan)
        count = table.count.take(plan)
        frame = np.repeat(np.arange(len(frames)), count)
        ends = np.cumsum(count)
        row = np.arange(len(frame)) + np.repeat(table.start.take(plan) - ends + count, count)
        if short.any():
            whole = table.need_bytes.take(row) <= lengths.take(frame)
            frame, row = frame[whole], row[whole]
        raw = self._raw(words, frame, row)
        value = self._values(raw, row)
        fallback = self._cantools(frames, lengths, plan) if self._any_fallback else []
        return Decoded(plan, short, frame, row, raw, value, fallback)

    def raw(self, frames: npt.NDArray[np.void], frame: IntArray, row: IntArray) -> IntArray:
        """Return raw values by (index into frames, table row)."""
        return self._raw(_words(np.ascontiguousarray(frames)), frame, row)

    def _plans(
        self, channel: int, ids: IntArray, lengths: npt.NDArray[np.uint8], words: npt.NDArray[np.uint64]
    ) -> IntArray:
        """Return each frame's plan: by id, then by its selectors until none is left."""
        table = self.table
        keys, roots = table.roots.get(channel, self._no_ids)
        place = np.searchsorted(keys, ids)
        place[place == len(keys)] = 0
        plan = roots.take(place)
        plan[keys.take(place) != ids] = UNKNOWN_PLAN
        open_ = np.flatnonzero(table.selector_row.take(plan) >= 0)
        while len(open_):
            at = plan.take(open_)
            row = table.selector_row.take(at)
            value = self._raw(words, open_, row)
            known = value < table.selector_size.take(at)
            target = table.selector_plan.take(table.selector_base.take(at) + np.where(known, value, 0))
            target[~known] = MALFORMED_PLAN
            cut = table.need_bytes.take(row) > lengths.take(open_)
            plan[open_] = np.where(cut, at, target)
            open_ = open_[~cut]
            open_ = open_[table.selector_row.take(plan.take(open_)) >= 0]
        return plan

    def _raw(self, words: npt.NDArray[np.uint64], frame: IntArray, row: IntArray) -> IntArray:
        table = self.table
        word = words[frame * FRAME_BYTES + table.byte.take(row)]
        if self._any_big:
            big = np.flatnonzero(table.big.take(row))
            word[big] = word[big].byteswap()
        word >>= table.shift.take(row)
        word &= table.mask.take(row)
        half = table.half.take(row)
        word ^= half
        word -= half
        raw: IntArray = word.view(np.int64)
        return raw

    def _values(self, raw: IntArray, row: IntArray) -> npt.NDArray[np.float64]:
        table = self.table
        value = raw.astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):  # infinities and signalling NaNs are values too
            if self._any_float:
                _put_floats(value, raw, table.kind.take(row))
            value *= table.scale.take(row)
            value += table.add.take(row)
        return value

    def _cantools(
        self, frames: npt.NDArray[np.void], lengths: npt.NDArray[np.uint8], plan: IntArray
    ) -> list[Fallback]:
        """Let cantools decode what only it can; a frame it refuses gets the malformed plan."""
        done: list[Fallback] = []
        for index in np.flatnonzero(self.table.fallback.take(plan)).tolist():
            info = self.table.plan_info[plan[index]]
            payload = frames["data"][index, : lengths[index]].tobytes()
            one = decode_by_cantools(self.table.definitions[info.definition].message, index, payload)
            done.append(one)
            if one.error:
                plan[index] = MALFORMED_PLAN
        return done


def decode_by_cantools(message: Any, frame: int, payload: bytes, *, choices: bool = False) -> Fallback:
    """Decode one payload with cantools itself."""
    try:
        return Fallback(frame, message.decode(payload, decode_choices=choices, allow_truncated=True))
    except Exception as error:  # whatever cantools or bitstruct raises, the frame is malformed
        return Fallback(frame, {}, " ".join(str(error).split()) or type(error).__name__)


def _words(frames: npt.NDArray[np.void]) -> npt.NDArray[np.uint64]:
    """View the frames' memory as little-endian 64-bit words that start at every byte."""
    count = max(0, frames.nbytes - WORD_BYTES + 1)
    return np.ndarray((count,), "<u8", buffer=frames.data, strides=(1,))


def _put_floats(value: npt.NDArray[np.float64], raw: IntArray, kind: npt.NDArray[np.uint8]) -> None:
    for code, as_int, as_float in (
        (KIND_F16, np.uint16, np.float16),
        (KIND_F32, np.uint32, np.float32),
        (KIND_F64, np.uint64, np.float64),
    ):
        at = np.flatnonzero(kind == code)
        if len(at):
            value[at] = raw[at].astype(as_int).view(as_float)
