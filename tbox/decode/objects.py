"""Frames of a recording as objects: message and signals by name, as cantools has them. Does no IO."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tbox.decode.batch import Decoded, Decoder, Fallback, decode_by_cantools
from tbox.decode.database import Database
from tbox.decode.table import KIND_U64, MALFORMED_PLAN, UNKNOWN_PLAN, SignalTable, compile_table
from tbox.model import FRAME_DTYPE

ANY_CHANNEL = 0  # the database of a recording is one bus's, whatever channels the recording has


class FrameObject(NamedTuple):
    """One frame of a known id. signals None: it could not be decoded, and `error` says why."""

    name: str
    signals: dict[str, Any] | None
    short: bool
    error: str = ""


class Objects:
    """Decodes frames to objects and counts what became of them.

    counts: decoded (short ones included), unknown, short, malformed. causes: why frames are not whole.
    """

    def __init__(self, database: Database, *, choices: bool = False) -> None:
        self.counts: Counter[str] = Counter()
        self.causes: Counter[str] = Counter()
        self._choices = choices
        self.table: SignalTable = compile_table(database.definitions)
        self._decoder = Decoder(self.table)
        self._messages = {d.can_id: d.message for d in database.definitions}
        self._names = [info.signal.name for info in self.table.row_info]

    def decode(self, frames: Sequence[tuple[int, bytes]]) -> list[FrameObject | None]:
        """Return an object for each (id with CAN_EFF_FLAG, payload), None where the id is unknown."""
        found = self._by_cantools(frames) if self._choices else self._by_table(frames)
        for one in found:
            self._count(one)
        return found

    def _count(self, one: FrameObject | None) -> None:
        if one is None:
            self.counts["unknown"] += 1
            self.causes["unknown_id"] += 1
        elif one.signals is None:
            self.counts["malformed"] += 1
            self.causes[cause_of(one.error)] += 1
        else:
            self.counts["decoded"] += 1
            if one.short:
                self.counts["short"] += 1
                self.causes["short"] += 1

    def _by_cantools(self, frames: Sequence[tuple[int, bytes]]) -> list[FrameObject | None]:
        return [
            _object(message, payload, decode_by_cantools(message, 0, payload, choices=self._choices))
            if (message := self._messages.get(can_id))
            else None
            for can_id, payload in frames
        ]

    def _by_table(self, frames: Sequence[tuple[int, bytes]]) -> list[FrameObject | None]:
        block = np.zeros(len(frames), FRAME_DTYPE)
        for index, (can_id, payload) in enumerate(frames):
            block[index] = (
                can_id,
                len(payload),
                0,
                (0, 0),
                np.frombuffer(payload.ljust(64, b"\0"), np.uint8),
            )
        decoded = self._decoder.decode(ANY_CHANNEL, block)
        signals = self._signals(decoded, len(frames))
        for one in decoded.fallback:
            signals[one.frame] = one.values
        return [
            self._one(can_id, payload, plan, signals[index])
            for index, ((can_id, payload), plan) in enumerate(zip(frames, decoded.plan.tolist(), strict=True))
        ]

    def _one(self, can_id: int, payload: bytes, plan: int, signals: dict[str, Any]) -> FrameObject | None:
        if plan == UNKNOWN_PLAN:
            return None
        message = self._messages[can_id]
        if plan == MALFORMED_PLAN:  # cantools knows best what is wrong with it
            return _object(message, payload, decode_by_cantools(message, 0, payload))
        return FrameObject(message.name, signals, len(payload) < message.length)

    def _signals(self, decoded: Decoded, frames: int) -> list[dict[str, Any]]:
        values: list[float | int] = decoded.value.tolist()
        for index in np.flatnonzero(self.table.is_int.take(decoded.row)).tolist():
            values[index] = int(values[index])
        for index in np.flatnonzero(self.table.is_raw.take(decoded.row)).tolist():
            raw, unsigned = int(decoded.raw[index]), self.table.kind[decoded.row[index]] == KIND_U64
            values[index] = raw % (1 << 64) if unsigned else raw
        names = self._names
        signals: list[dict[str, Any]] = [{} for _ in range(frames)]
        for frame, row, value in zip(decoded.frame.tolist(), decoded.row.tolist(), values, strict=True):
            signals[frame][names[row]] = value
        return signals


def _object(message: Any, payload: bytes, one: Fallback) -> FrameObject:
    if one.error:
        return FrameObject(message.name, None, False, one.error)
    return FrameObject(message.name, one.values, len(payload) < message.length)


def cause_of(error: str) -> str:
    """Return the cause a malformed frame is counted under."""
    if error.startswith("expected multiplexer id"):
        return "unknown_mux"
    return "unpacking" if "unpack" in error else "undecodable"
