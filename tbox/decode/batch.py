"""Decodes whole batches of mixed frames at once with numpy, bit for bit as cantools does. Judges no value.

The kernel goes frame by frame where there is one. numpy does the same so: for every (frame, signal) pair the
table row and the byte address are laid out flat; one gather of unaligned 64-bit words then yields all raw
values. No grouping by id, no Python per frame, except for the messages that only cantools can say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tbox import kernel
from tbox.decode.table import (
    KIND_F16,
    KIND_F32,
    KIND_F64,
    KIND_INT,
    KIND_U64,
    MALFORMED_PLAN,
    NO_ID,
    UNKNOWN_PLAN,
    WORD_BYTES,
    IntArray,
    SignalTable,
)
from tbox.model import FRAME_BYTES

WORD = np.dtype("<u8")
FEW_FRAMES = 3  # up to here frames are decoded one by one

# What a plan's rows need beyond shift and mask.
NEEDS_SWAP, NEEDS_SIGN, NEEDS_KIND, NEEDS_CANTOOLS = 1, 2, 4, 8
NEEDS_ALL = NEEDS_SWAP | NEEDS_SIGN


class Fallback(NamedTuple):
    """One frame decoded by cantools: signal name -> value, or why it could not be."""

    frame: int
    values: dict[str, Any]
    error: str = ""


class Outcome(NamedTuple):
    """How many frames had no plan, were malformed, and were shorter than their message."""

    unknown: int
    malformed: int
    short: int


class Details(NamedTuple):
    """Where each of k samples came from.

    frame, row: (k,) indices into the batch and table. raw: (k,) int64 raw values (a float's bits).
    """

    frame: IntArray
    row: IntArray
    raw: IntArray


@dataclass(slots=True)
class Decoded:
    """What a batch of n frames holds: k samples in frame order, in cantools' order within a frame.

    plan: (n,) the plan each frame ended in (UNKNOWN_PLAN, MALFORMED_PLAN or one that says its message).
    short: (n,) the payload was shorter than the message.
    value: (k,) float64. column: (k,) int64, of the table. t_ns: (k,) the time of each sample's frame.
    inside: every raw value is known to be in its row's span. look: returns the details, which hardly anybody
    asks for. fallback: what cantools decoded instead; its samples are not among the k.
    outcome: of the frames, where it is known already.
    """

    plan: IntArray
    short: npt.NDArray[np.bool_]
    value: npt.NDArray[np.float64]
    column: IntArray
    t_ns: IntArray
    look: Callable[[], Details]
    inside: bool = False
    fallback: list[Fallback] = field(default_factory=list)
    outcome: Outcome | None = None
    _details: Details | None = None

    def _seen(self) -> Details:
        if self._details is None:
            self._details = self.look()
        return self._details

    @property
    def frame(self) -> IntArray:
        return self._seen().frame

    @property
    def row(self) -> IntArray:
        return self._seen().row

    @property
    def raw(self) -> IntArray:
        return self._seen().raw


class Decoder:
    """A table at work, as it is now. `decode` never raises for what a frame holds."""

    def __init__(self, table: SignalTable) -> None:
        self.table = table
        self._needs = _needs(table)
        self._rows = _rows(table)
        self._plans_packed = _plans(table, self._needs).view(np.uint8)
        self._rows_packed = self._rows.view(np.uint8)
        self._selects = table.selector_row >= 0
        self._any_big_selector = bool(table.big[table.selector_row[self._selects]].any())
        self._no_ids = (np.array([NO_ID], np.uint32), np.zeros(1, np.int64))
        self._root_of = {
            channel: dict(zip(keys.tolist(), plans.tolist(), strict=True))
            for channel, (keys, plans) in table.roots.items()
        }
        self._lean: dict[int, _Lean] = {}
        self._zeros = np.zeros(int(table.count.max(initial=0)), np.int64)  # read only

    def expect(self, low: IntArray, span: npt.NDArray[np.uint64]) -> None:
        """Say between which raw values, low to low + span, each row's readings lie: see `Decoded.inside`."""
        self._rows["low"], self._rows["span"] = low, span

    def decode(self, channel: int, frames: npt.NDArray[np.void], t_ns: IntArray | None = None) -> Decoded:
        """Decode frames of one bus. frames: (n,) model.FRAME_DTYPE. t_ns: (n,) their times, else 0."""
        if not frames.flags.c_contiguous:
            frames = np.ascontiguousarray(frames)
        if t_ns is None:
            t_ns = np.zeros(len(frames), np.int64)
        if kernel.compiled is not None:
            return self._decode_compiled(kernel.compiled, channel, frames, t_ns)
        if len(frames) <= FEW_FRAMES:
            return self._decode_few(channel, frames, t_ns)
        table = self.table
        words = words_of(frames)
        lengths = frames["len"]
        plan = self._plans(channel, frames["id"], lengths, words)
        needs = int(np.bitwise_or.reduce(self._needs.take(plan)))
        short = lengths < table.length.take(plan)
        count = table.count.take(plan)
        frame = np.arange(len(frames)).repeat(count)
        base = table.start.take(plan) + count - count.cumsum()
        row = np.arange(len(frame)) + base.take(frame)
        if short.any():
            whole = table.need_bytes.take(row) <= lengths.take(frame)
            frame, row = frame[whole], row[whole]
        raw = self._raw(words, frame, row, needs)
        value = self._values(raw, row, needs)
        return self._decoded(frames, t_ns, plan, short, needs, Details(frame, row, raw), value)

    def _decoded(
        self, frames: npt.NDArray[np.void], t_ns: IntArray, plan: IntArray, short: npt.NDArray[np.bool_],
        needs: int, details: Details, value: npt.NDArray[np.float64],
    ) -> Decoded:  # fmt: skip
        fallback = self._cantools(frames, plan, short) if needs & NEEDS_CANTOOLS else []
        column, times = self.table.column.take(details.row), t_ns.take(details.frame)
        return Decoded(plan, short, value, column, times, lambda: details, fallback=fallback)

    def _decode_compiled(
        self, work: kernel.Kernel, channel: int, frames: npt.NDArray[np.void], t_ns: IntArray
    ) -> Decoded:
        table = self.table
        block = frames.view(np.uint8)
        plan, short = np.empty(len(frames), np.int64), np.empty(len(frames), np.bool_)
        keys, roots = table.roots.get(channel, self._no_ids)
        samples, needs, *outcome = work.plans(
            block, keys, roots, self._plans_packed, self._rows_packed, table.selector_plan, plan, short
        )
        value, column, times = np.empty(samples), np.empty(samples, np.int64), np.empty(samples, np.int64)
        found, inside = work.decode(
            block, t_ns, plan, self._plans_packed, self._rows_packed, value, column, times
        )
        if found < samples:  # short frames
            value, column, times = value[:found], column[:found], times[:found]
        rest = plan.copy() if needs & NEEDS_CANTOOLS else plan  # cantools may find a frame malformed yet

        def look() -> Details:
            frame, row, raw = np.empty((3, samples), np.int64)
            work.details(block, rest, self._plans_packed, self._rows_packed, frame, row, raw)
            return Details(frame[:found], row[:found], raw[:found])

        decoded = Decoded(plan, short, value, column, times, look, inside)
        if not needs & NEEDS_CANTOOLS:
            decoded.outcome = Outcome(*outcome)
        if needs & NEEDS_KIND:
            decoded.value = self._values(decoded.raw, decoded.row, needs)
        if needs & NEEDS_CANTOOLS:
            decoded.fallback = self._cantools(frames, plan, short)
        return decoded

    def raw(self, frames: npt.NDArray[np.void], frame: IntArray, row: IntArray) -> IntArray:
        """Return raw values by (index into frames, table row)."""
        return self._raw(words_of(np.ascontiguousarray(frames)), frame, row, NEEDS_ALL)

    def _plans(
        self, channel: int, ids: IntArray, lengths: npt.NDArray[np.uint8], words: npt.NDArray[np.uint64]
    ) -> IntArray:
        """Return each frame's plan: by id, then by its selectors until none is left."""
        table = self.table
        keys, roots = table.roots.get(channel, self._no_ids)
        place = keys.searchsorted(ids)
        plan = roots.take(place)
        plan *= keys.take(place) == ids  # else UNKNOWN_PLAN, which is 0
        open_ = where_(self._selects.take(plan))
        while len(open_):
            at = plan.take(open_)
            row = table.selector_row.take(at)
            place = open_ * FRAME_BYTES
            place += table.byte.take(row)
            word: npt.NDArray[np.uint64] = words[place]
            if self._any_big_selector:
                big = where_(table.big.take(row))
                word[big] = word[big].byteswap()
            word >>= table.shift.take(row)
            word &= table.mask.take(row)
            value: IntArray = word.view(np.int64)
            np.minimum(value, table.selector_size.take(at), out=value)
            value += table.selector_base.take(at)
            target = table.selector_plan.take(value)
            more = self._selects.take(target)
            cut = table.need_bytes.take(row) > lengths.take(open_)
            if cut.any():
                target[cut] = at[cut]
                more &= ~cut
            plan[open_] = target
            open_ = open_[more]
        return plan

    def _raw(self, words: npt.NDArray[np.uint64], frame: IntArray, row: IntArray, needs: int) -> IntArray:
        table = self.table
        place = frame * FRAME_BYTES
        place += table.byte.take(row)
        # take() copies the unaligned view whole first, which pays from some signals a frame on.
        dense = len(row) * WORD_BYTES > len(words)
        word: npt.NDArray[np.uint64] = words.take(place) if dense else words[place]
        if needs & NEEDS_SWAP:
            big = where_(table.big.take(row))
            word[big] = word[big].byteswap()
        word >>= table.shift.take(row)
        word &= table.mask.take(row)
        if needs & NEEDS_SIGN:
            half = table.half.take(row)
            word ^= half
            word -= half
        raw: IntArray = word.view(np.int64)
        return raw

    def _values(self, raw: IntArray, row: IntArray, needs: int) -> npt.NDArray[np.float64]:
        table = self.table
        value = raw.astype(np.float64)
        if needs & NEEDS_KIND:
            _put_kinds(value, raw, table.kind.take(row))
            with np.errstate(over="ignore", invalid="ignore"):  # infinities and NaNs are values too
                value *= table.scale.take(row)
                value += table.add.take(row)
            return value
        value *= table.scale.take(row)
        value += table.add.take(row)
        return value

    # --- few frames: no flat layout, the rows of a plan lie side by side already ------------------------

    def _decode_few(self, channel: int, frames: npt.NDArray[np.void], t_ns: IntArray) -> Decoded:
        words = words_of(frames)
        lengths = frames["len"].tolist()
        roots = self._root_of.get(channel, {})
        plans: list[int] = []
        shorts: list[bool] = []
        parts: list[tuple[int, IntArray, IntArray, npt.NDArray[np.float64]]] = []
        needs = 0
        for index, can_id in enumerate(frames["id"].tolist()):
            lean = self._lean_of(roots.get(can_id, UNKNOWN_PLAN))
            while lean.selector is not None and lean.selector.need_bytes <= lengths[index]:
                lean = self._lean_of(lean.selector.turn(words, index))
            plans.append(lean.plan)
            shorts.append(lengths[index] < lean.bytes)
            needs |= lean.needs
            if len(lean.row):
                parts.append(self._decode_lean(words, index, lengths[index], lean))
        plan = np.array(plans, np.int64)
        short = np.array(shorts, np.bool_)
        if len(parts) == 1:
            index, row, raw, value = parts[0]
            frame = np.full(len(row), index) if index else self._zeros[: len(row)]
            return self._decoded(frames, t_ns, plan, short, needs, Details(frame, row, raw), value)
        frame = np.array([part[0] for part in parts], np.int64).repeat([len(part[1]) for part in parts])
        row, raw = _joined([part[1] for part in parts]), _joined([part[2] for part in parts])
        value = np.concatenate([part[3] for part in parts]) if parts else np.zeros(0)
        return self._decoded(frames, t_ns, plan, short, needs, Details(frame, row, raw), value)

    def _lean_of(self, plan: int) -> _Lean:
        lean = self._lean.get(plan)
        if lean is None:
            lean = self._lean[plan] = _lean(self.table, plan, int(self._needs[plan]))
        return lean

    def _decode_lean(
        self, words: npt.NDArray[np.uint64], index: int, length: int, lean: _Lean
    ) -> tuple[int, IntArray, IntArray, npt.NDArray[np.float64]]:
        word = words[lean.byte + index * FRAME_BYTES]
        if lean.big is not None:
            word[lean.big] = word[lean.big].byteswap()
        word >>= lean.shift
        word &= lean.mask
        if lean.half is not None:
            word ^= lean.half
            word -= lean.half
        raw: IntArray = word.view(np.int64)
        if lean.needs & NEEDS_KIND:
            value = self._values(raw, lean.row, lean.needs)
        else:
            value = raw * lean.scale
            value += lean.add
        if length < lean.bytes:
            whole = self.table.need_bytes.take(lean.row) <= length
            return index, lean.row[whole], raw[whole], value[whole]
        return index, lean.row, raw, value

    def _cantools(
        self, frames: npt.NDArray[np.void], plan: IntArray, short: npt.NDArray[np.bool_]
    ) -> list[Fallback]:
        """Let cantools decode what only it can; a frame it refuses gets the malformed plan."""
        done: list[Fallback] = []
        for index in where_(self.table.fallback.take(plan)).tolist():
            info = self.table.plan_info[plan[index]]
            payload = frames["data"][index, : frames["len"][index]].tobytes()
            one = decode_by_cantools(self.table.definitions[info.definition].message, index, payload)
            done.append(one)
            if one.error:
                plan[index], short[index] = MALFORMED_PLAN, False
        return done


def decode_by_cantools(message: Any, frame: int, payload: bytes, *, choices: bool = False) -> Fallback:
    """Decode one payload with cantools itself."""
    try:
        return Fallback(frame, message.decode(payload, decode_choices=choices, allow_truncated=True))
    except Exception as error:  # whatever cantools or bitstruct raises, the frame is malformed
        return Fallback(frame, {}, " ".join(str(error).split()) or type(error).__name__)


def where_(condition: npt.NDArray[np.bool_]) -> IntArray:
    """Return where a one-dimensional array is true, at a third of the cost of np.flatnonzero."""
    found: IntArray = condition.nonzero()[0]
    return found


def words_of(block: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """View a block's memory as little-endian 64-bit words that start at every byte."""
    flat = block.view(np.uint8)  # a buffer of structs is slow to describe
    return np.ndarray((max(0, flat.size - WORD_BYTES + 1),), WORD, flat, 0, (1,))


def _joined(parts: list[IntArray]) -> IntArray:
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _put_kinds(value: npt.NDArray[np.float64], raw: IntArray, kind: npt.NDArray[np.uint8]) -> None:
    """Put in what is not an int64: floats by their bits, and unsigned integers of 64 bits."""
    for code, bits, meaning in (
        (KIND_F16, np.uint16, np.float16),
        (KIND_F32, np.uint32, np.float32),
        (KIND_F64, np.uint64, np.float64),
        (KIND_U64, np.uint64, np.uint64),
    ):
        at = where_(kind == code)
        if len(at):
            with np.errstate(invalid="ignore"):  # signalling NaNs
                value[at] = raw[at].astype(bits).view(meaning)


class _Lean(NamedTuple):
    """One plan's part of the table, cut out for frames that come alone."""

    plan: int
    row: IntArray
    byte: IntArray
    shift: npt.NDArray[np.uint64]
    mask: npt.NDArray[np.uint64]
    half: npt.NDArray[np.uint64] | None
    big: IntArray | None
    scale: npt.NDArray[np.float64]
    add: npt.NDArray[np.float64]
    bytes: int
    needs: int
    selector: _Selector | None


@dataclass(frozen=True, slots=True)
class _Selector:
    """A plan's selector as plain ints. targets: the plan for each value."""

    byte: int
    shift: int
    mask: int
    big: bool
    need_bytes: int
    targets: list[int]

    def turn(self, words: npt.NDArray[np.uint64], index: int) -> int:
        """Return the plan a frame's selector leads to."""
        word = int(words[index * FRAME_BYTES + self.byte])
        if self.big:
            word = int.from_bytes(word.to_bytes(WORD_BYTES, "little"), "big")
        value = (word >> self.shift) & self.mask
        return self.targets[value] if value < len(self.targets) else MALFORMED_PLAN


def _selector(table: SignalTable, plan: int) -> _Selector | None:
    row, base = int(table.selector_row[plan]), int(table.selector_base[plan])
    if row < 0:
        return None
    return _Selector(
        byte=int(table.byte[row]),
        shift=int(table.shift[row]),
        mask=int(table.mask[row]),
        big=bool(table.big[row]),
        need_bytes=int(table.need_bytes[row]),
        targets=table.selector_plan[base : base + int(table.selector_size[plan])].tolist(),
    )


def _lean(table: SignalTable, plan: int, needs: int) -> _Lean:
    row = np.arange(table.start[plan], table.start[plan] + table.count[plan])
    return _Lean(
        plan=plan,
        row=row,
        byte=table.byte[row],
        shift=table.shift[row],
        mask=table.mask[row],
        half=table.half[row] if needs & NEEDS_SIGN else None,
        big=where_(table.big[row]) if needs & NEEDS_SWAP else None,
        scale=table.scale[row],
        add=table.add[row],
        bytes=int(table.length[plan]),
        needs=needs,
        selector=_selector(table, plan),
    )


def _needs(table: SignalTable) -> npt.NDArray[np.uint8]:
    """Return for every plan which steps its rows need beyond shift and mask."""
    needs = np.zeros(len(table.plan_info), np.uint8)
    for plan, info in enumerate(table.plan_info):
        rows = slice(info.rows.start, info.rows.stop)
        if info.reason:
            needs[plan] = NEEDS_CANTOOLS
            continue
        needs[plan] = (
            NEEDS_SWAP * bool(table.big[rows].any())
            | NEEDS_SIGN * bool(table.half[rows].any())
            | NEEDS_KIND * bool((table.kind[rows] != KIND_INT).any())
        )
    return needs


def _rows(table: SignalTable) -> npt.NDArray[np.void]:
    """Return the table's rows as the kernel wants them, every raw value expected."""
    rows = np.zeros(len(table.byte), kernel.ROW)
    for name in ("mask", "half", "scale", "add", "column", "byte", "shift", "big", "need_bytes"):
        rows[name] = getattr(table, name)
    rows["low"], rows["span"] = np.iinfo(np.int64).min, np.iinfo(np.uint64).max
    return rows


def _plans(table: SignalTable, needs: npt.NDArray[np.uint8]) -> npt.NDArray[np.void]:
    """Return the table's plans as the kernel wants them."""
    plans = np.zeros(len(table.plan_info), kernel.PLAN)
    for name in ("start", "count", "selector_row", "selector_base", "selector_size", "length"):
        plans[name] = getattr(table, name)
    plans["needs"] = needs
    return plans
