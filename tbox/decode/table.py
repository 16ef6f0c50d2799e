"""Compiles DBC messages into one signal table: where bits lie and what they mean. Decodes nothing.

A message, or one multiplexer value of a message, is a *plan*: a run of table rows. Plan 0 stands for unknown
ids, plan 1 for frames that cannot be decoded; both are empty. A plan with a selector names, for every value
of the selector, the plan to go on with, so that nested multiplexers are a walk from plan to plan.

What the table cannot say goes to cantools itself, message by message (`PlanInfo.reason` says why).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from tbox.decode.database import Definition
from tbox.model import FRAME_DTYPE

UNKNOWN_PLAN = 0
MALFORMED_PLAN = 1

FRAME_DATA_OFFSET = FRAME_DTYPE.fields["data"][1] if FRAME_DTYPE.fields else 0
WORD_BYTES = 8
LAST_WORD_BYTE = 64 - WORD_BYTES  # a word read from here on would leave the payload
EXACT_INT_MAX = 1 << 53  # float64 holds every integer up to here
SELECTOR_VALUES_MAX = 1 << 16  # longer selectors go to cantools
PLANS_MAX = 1 << 20
NO_ID = 0xFFFF_FFFF  # above every id with its flag

# What the bits are. KIND_U64: an unsigned integer of 64 bits, which an int64 cannot hold.
KIND_INT, KIND_F16, KIND_F32, KIND_F64, KIND_U64 = range(5)
_FLOAT_KINDS = {16: KIND_F16, 32: KIND_F32, 64: KIND_F64}

IntArray: TypeAlias = npt.NDArray[np.int64]
_Tree: TypeAlias = Sequence[Any]  # cantools' signal_tree: names, and {selector: {value: tree}}


class RowInfo(NamedTuple):
    """The people's side of a row. definition: index into the table's definitions."""

    definition: int
    signal: Any  # cantools.database.can.Signal


class PlanInfo(NamedTuple):
    """The people's side of a plan. reason: why it goes to cantools, "" when the table can say it."""

    definition: int
    rows: range
    reason: str = ""


class _Bits(NamedTuple):
    """Where a signal lies: the 8-byte word at `byte` of the payload, shifted right, masked."""

    byte: int
    shift: int
    mask: int
    half: int  # sign half: (x ^ half) - half; 0 when unsigned
    big: bool
    need_bytes: int  # the payload must be so long
    kind: int


class NotInTable(Exception):
    """A signal or message the table cannot say; the reason is the message."""


@dataclass(slots=True)
class SignalTable:
    """The rows of all plans as parallel arrays, the plans, and the ids of each channel.

    value = raw * scale + add, rounded twice as cantools does; an integer above 2^53 is exact in raw only.
    column: index into `columns`.
    """

    definitions: list[Definition] = field(default_factory=list)
    columns: list[tuple[int, Any]] = field(default_factory=list)  # (definition, cantools signal)
    row_info: list[RowInfo] = field(default_factory=list)
    plan_info: list[PlanInfo] = field(default_factory=list)
    column_of: dict[tuple[int, str], int] = field(default_factory=dict)  # (definition, signal) -> column

    byte: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))  # from the start of the frame
    shift: npt.NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    mask: npt.NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    half: npt.NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    big: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    need_bytes: npt.NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))
    kind: npt.NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))
    scale: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    add: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    is_int: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    is_raw: npt.NDArray[np.bool_] = field(
        default_factory=lambda: np.zeros(0, np.bool_)
    )  # int = raw, not value
    column: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    start: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))  # first row of a plan
    count: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    length: npt.NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))  # of the message
    fallback: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    selector_row: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))  # -1: none
    selector_base: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))  # into selector_plan
    selector_size: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    stem: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))  # plan when the selector is cut off
    selector_plan: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))

    roots: dict[int, tuple[npt.NDArray[np.uint32], IntArray]] = field(default_factory=dict)


def compile_table(definitions: Sequence[Definition]) -> SignalTable:
    """Compile the messages of all channels into one table."""
    return _Compiler().compile(list(definitions))


class _Compiler:
    """Collects rows and plans as Python lists; `compile` turns them into arrays once."""

    def __init__(self) -> None:
        self.table = SignalTable()
        self.bits: list[_Bits] = []
        self.factors: list[Factors] = []
        self.row_columns: list[int] = []
        self.selectors: list[tuple[int, int, int, int]] = []  # per plan: row, base, size, stem
        self.selector_plan: list[int] = []

    def compile(self, definitions: list[Definition]) -> SignalTable:
        self.table.definitions = definitions
        for plan in (UNKNOWN_PLAN, MALFORMED_PLAN):
            assert self._plan(-1, range(0)) == plan
        roots: dict[int, list[tuple[int, int]]] = {}
        for index, definition in enumerate(definitions):
            roots.setdefault(definition.channel, []).append((definition.can_id, self._message(index)))
        self._arrays()
        for channel, pairs in roots.items():
            pairs.sort()
            pairs.append((NO_ID, UNKNOWN_PLAN))  # so that a search never ends beyond the last
            keys = np.array([can_id for can_id, _ in pairs], np.uint32)
            self.table.roots[channel] = (keys, np.array([plan for _, plan in pairs], np.int64))
        return self.table

    def _plan(self, definition: int, rows: range, reason: str = "") -> int:
        if len(self.table.plan_info) >= PLANS_MAX:
            raise NotInTable("too many multiplexer values")
        self.table.plan_info.append(PlanInfo(definition, rows, reason))
        self.selectors.append((-1, 0, 0, UNKNOWN_PLAN))
        return len(self.table.plan_info) - 1

    def _message(self, index: int) -> int:
        """Compile one message and return its first plan."""
        message = self.table.definitions[index].message
        rows, plans, values = len(self.bits), len(self.table.plan_info), len(self.selector_plan)
        try:
            _check_names(message)
            return self._node(index, message.signal_tree, [])
        except NotInTable as reason:
            del self.bits[rows:], self.factors[rows:], self.row_columns[rows:], self.table.row_info[rows:]
            del self.table.plan_info[plans:], self.selectors[plans:], self.selector_plan[values:]
            return self._plan(index, self._fallback_rows(index), str(reason))

    def _fallback_rows(self, index: int) -> range:
        """Rows for what cantools decodes, with bits where they can be said: for columns and validity."""
        first = len(self.bits)
        message = self.table.definitions[index].message
        for signal in message.signals:
            try:
                self.bits.append(locate(signal, message.length))
            except NotInTable:
                self.bits.append(_Bits(0, 0, 0, 0, False, 0, KIND_INT))
            self._row(index, signal, Factors(1.0, 0.0, False, False))
        return range(first, len(self.bits))

    def _row(self, index: int, signal: Any, factor: Factors) -> None:
        columns, key = self.table.columns, (index, signal.name)
        if key not in self.table.column_of:
            self.table.column_of[key] = len(columns)
            columns.append((index, signal))
        self.factors.append(factor)
        self.row_columns.append(self.table.column_of[key])
        self.table.row_info.append(RowInfo(index, signal))

    def _node(self, index: int, tree: _Tree, above: list[Any]) -> int:
        """Compile a node of the multiplexer tree; `above` are the signals on the way to it."""
        message = self.table.definitions[index].message
        muxes = [entry for entry in tree if isinstance(entry, dict)]
        if len(muxes) > 1:
            raise NotInTable("several multiplexers side by side")
        here = [message.get_signal_by_name(_name(entry)) for entry in tree]
        _check_overlap(here, message.length)
        signals = above + here
        first = len(self.bits)
        for signal in signals:
            self.bits.append(locate(signal, message.length))
            self._row(index, signal, factors(signal))
        plan = self._plan(index, range(first, len(self.bits)))
        if muxes:
            ((name, branches),) = muxes[0].items()
            self._select(index, plan, first + [s.name for s in signals].index(name), signals, branches)
        return plan

    def _select(
        self, index: int, plan: int, row: int, signals: list[Any], branches: dict[int, _Tree]
    ) -> None:
        """Give a plan its selector, a plan for each value; the plan itself serves when that is cut off."""
        signal = self.table.row_info[row].signal
        plain = self.factors[row] == (1.0, 0.0, True, False)
        if self.bits[row].kind != KIND_INT or self.bits[row].half or not plain:
            raise NotInTable(f"selector {signal.name} is signed, scaled or a float")
        values = [value for value in branches if 0 <= value <= self.bits[row].mask]
        if values and max(values) >= SELECTOR_VALUES_MAX:
            raise NotInTable(f"selector {signal.name} takes values of {SELECTOR_VALUES_MAX} and more")
        targets = [MALFORMED_PLAN] * (max(values, default=-1) + 1)
        shared: dict[tuple[str, ...], int] = {}
        for value in values:
            tree = branches[value]
            flat = tuple(entry for entry in tree if isinstance(entry, str))
            if len(flat) == len(tree) and flat in shared:
                targets[value] = shared[flat]
                continue
            targets[value] = self._node(index, tree, signals)
            if len(flat) == len(tree):
                shared[flat] = targets[value]
        self.selectors[plan] = (row, len(self.selector_plan), len(targets), plan)
        self.selector_plan += [*targets, MALFORMED_PLAN]  # the last stands for every larger value

    def _arrays(self) -> None:
        table, plans = self.table, self.table.plan_info
        table.byte = np.array([b.byte + FRAME_DATA_OFFSET for b in self.bits], np.int64)
        table.shift = np.array([b.shift for b in self.bits], np.uint64)
        table.mask = np.array([b.mask for b in self.bits], np.uint64)
        table.half = np.array([b.half for b in self.bits], np.uint64)
        table.big = np.array([b.big for b in self.bits], np.bool_)
        table.need_bytes = np.array([b.need_bytes for b in self.bits], np.uint8)
        table.kind = np.array([b.kind for b in self.bits], np.uint8)
        table.scale = np.array([f.scale for f in self.factors], np.float64)
        table.add = np.array([f.add for f in self.factors], np.float64)
        table.is_int = np.array([f.is_int for f in self.factors], np.bool_)
        table.is_raw = np.array([f.is_raw for f in self.factors], np.bool_)
        table.column = np.array(self.row_columns, np.int64)
        table.start = np.array([p.rows.start for p in plans], np.int64)
        table.fallback = np.array([bool(p.reason) for p in plans], np.bool_)
        table.count = np.array([0 if p.reason else len(p.rows) for p in plans], np.int64)
        lengths = [table.definitions[p.definition].message.length if p.definition >= 0 else 0 for p in plans]
        table.length = np.array([min(n, 255) for n in lengths], np.uint8)
        selectors = np.array(self.selectors, np.int64)
        table.selector_row, table.selector_base = selectors[:, 0].copy(), selectors[:, 1].copy()
        table.selector_size, table.stem = selectors[:, 2].copy(), selectors[:, 3].copy()
        table.selector_plan = np.array(self.selector_plan or [0], np.int64)


def _name(entry: Any) -> str:
    return entry if isinstance(entry, str) else str(next(iter(entry)))


def _check_names(message: Any) -> None:
    names = [signal.name for signal in message.signals]
    if len(set(names)) != len(names):
        raise NotInTable("a signal name is used twice")
    if message.length > 64:
        raise NotInTable("the message is longer than a frame")


def _check_overlap(signals: Sequence[Any], length: int) -> None:
    """Refuse signals that overlap or stick out: cantools unpacks a node in one go, so they shift all."""
    for big in (False, True):
        spans = sorted(
            (first, first + s.length)
            for s in signals
            if (s.byte_order == "big_endian") is big
            for first in [first_bit(s)]
        )
        ends = [0, *(end for _, end in spans)]
        if any(start < end for (start, _), end in zip(spans, ends, strict=False)) or ends[-1] > 8 * length:
            raise NotInTable("signals overlap or lie outside the message")


def first_bit(signal: Any) -> int:
    """Return the bit a signal starts at, from the message's first bit on, as its byte order counts."""
    start = int(signal.start)
    return 8 * (start // 8) + 7 - start % 8 if signal.byte_order == "big_endian" else start


def locate(signal: Any, length: int) -> _Bits:
    """Return where a signal lies. Raises NotInTable."""
    big = signal.byte_order == "big_endian"
    first, bits = first_bit(signal), int(signal.length)
    byte = min(first // 8, LAST_WORD_BYTE)
    inside = first - 8 * byte
    if inside + bits > 64 or bits <= 0 or first + bits > 8 * length:
        raise NotInTable(f"{signal.name} does not lie within eight bytes")
    kind = KIND_U64 if bits == 64 and not signal.is_signed else KIND_INT
    if signal.conversion.is_float:
        if bits not in _FLOAT_KINDS:
            raise NotInTable(f"{signal.name} is a float of {bits} bits")
        kind = _FLOAT_KINDS[bits]
    return _Bits(
        byte=byte,
        shift=64 - inside - bits if big else inside,
        mask=(1 << bits) - 1,
        half=1 << (bits - 1) if signal.is_signed and kind == KIND_INT else 0,
        big=big,
        need_bytes=(first + bits + 7) // 8,
        kind=kind,
    )


def raw_span(signal: Any) -> tuple[int, int]:
    """Return the smallest and the largest raw value of an integer signal."""
    bits = int(signal.length)
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signal.is_signed else (0, (1 << bits) - 1)


class Factors(NamedTuple):
    """value = raw * scale + add. is_int: values are ints; is_raw: so large that only raw is exact."""

    scale: float
    add: float
    is_int: bool
    is_raw: bool


def factors(signal: Any) -> Factors:
    """Return factors such that float64 arithmetic equals cantools'. Raises NotInTable where it would not."""
    conversion = signal.conversion
    scale, offset, is_float = conversion.scale, conversion.offset, bool(conversion.is_float)
    if is_float:
        if scale == 1 and offset == 0:
            return Factors(1.0, -0.0, False, False)  # x + -0.0 is x for every x, -0.0 included
        return Factors(_exact(signal, scale), _exact(signal, offset), False, False)
    low, high = raw_span(signal)
    whole = float(scale).is_integer() and float(offset).is_integer()
    scale_f, offset_f = _exact(signal, scale), _exact(signal, offset)
    reach = max(abs(low), abs(high))
    if whole and scale == 1 and offset == 0:
        return Factors(1.0, 0.0, True, reach > EXACT_INT_MAX)
    if whole:
        reach = max(reach, reach * abs(int(scale)) + abs(int(offset)))
    if reach > EXACT_INT_MAX and (whole or isinstance(scale, int)):
        raise NotInTable(f"{signal.name} takes integers above 2^53")
    return Factors(scale_f, offset_f, whole, False)


def _exact(signal: Any, number: float) -> float:
    """Return a factor as a float; an int that a float cannot hold is not for the table."""
    if isinstance(number, int) and abs(number) > EXACT_INT_MAX:
        raise NotInTable(f"{signal.name} has a factor above 2^53")
    return float(number)
