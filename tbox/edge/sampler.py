"""Folds samples into windows by driving mode and lays them out as telemetry. Never judges a value, no IO.

Every catalog signal is sampled. Three kinds of columns share one account:
- signals with a role: windows of the driving mode's fine plan, a record about once a second while driving;
- unmapped signals: coarser windows, batched longer, since their names cost more than their values;
- states (roles without a unit: gear, contactors): a row per change at its own time, all at a keyframe.

A window is `t // window`, so late samples still find theirs until its record leaves; what comes later than
that joins the open record. The row of a window carries the time of its beginning. Columns: `name` is the last
value; `name.min`, `.max`, `.mean` are there only when a window of this record was not flat.

Raw integers: value = raw * scale + offset with the signal's own scale (exact), the mean ten times finer,
floats at FLOAT_SCALE (error <= half of it). A value beyond RAW_MAX steps, or not a number, is counted
as dropped "unrepresentable".
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Annotated, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from tbox import kernel
from tbox.edge.mode import Context, Mode
from tbox.ledger import StageLedger
from tbox.model import (
    NS_PER_MS,
    NS_PER_S,
    ROLE_UNITS,
    Block,
    Column,
    Draft,
    Level,
    Now,
    SampleBatch,
    Series,
    Signal,
    Validity,
)

FLOAT_SCALE = 1e-3  # of signals without a usable scale; in the signal's unit
FLOAT_SCALE_BY_ROLE = {"latitude": 1e-7, "longitude": 1e-7, "cell_voltage": 1e-4}  # 1e-7 deg = 11 mm
MEAN_FINER = 10  # steps of the mean in one step of the signal
RAW_MAX = 2.0**58  # so that the difference of two means still fits 64 bits
ON_GRID_STEPS_MAX = (
    1e-3  # a value further off its declared grid shows that the declaration is not of this unit
)

STATE_ROLES = frozenset(role for role, unit in ROLE_UNITS.items() if not unit)
LAST_ONLY_ROLES = frozenset({"latitude", "longitude", "odometer"})  # a mean of these tells nobody anything

LATE_NS = 50 * NS_PER_MS  # a record waits so long for samples of its last window
FAR_NS = 1 << 62
FOLD_SAMPLES = 4096  # samples wait until there are so many, or
FOLD_EVERY_NS = 100 * NS_PER_MS  # for so long: one fold of many costs a fraction of many folds
STATE_ROWS_MAX = 500  # per record; a chattering state sends its record early
WINDOW_ROWS_MAX = 600  # windows of a record

# A record's size is bounded before it is packed: values at their full MessagePack width, names and keys at
# the share that zstd leaves of text (0.5 and 0.25; random identifiers stay below 0.75). 40 KiB of that
# estimate cannot exceed 60 KiB of payload.
RECORD_BYTES_TARGET = 40 * 1024
NAME_SHARE, COLUMN_OVERHEAD_BYTES = 0.5, 9.0
BLOCK_BYTES_TARGET = 8 * 1024  # a block that would be larger is cut, so that records can be
NUMBERED_ROLES = ("cell_voltage", "probe_temperature")  # whose columns are packed as blocks
NUMBERED_NAME_CHARS_MAX = 200

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

WindowMs = Annotated[int, msgspec.Meta(ge=10, le=600_000)]


class ModePlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one driving mode is sampled: signals with a role, and `other` for unmapped ones."""

    window_ms: WindowMs
    record_ms: WindowMs
    other_window_ms: WindowMs
    other_record_ms: WindowMs

    def __post_init__(self) -> None:
        for longer, shorter in (
            ("record_ms", "window_ms"),
            ("other_record_ms", "other_window_ms"),
            ("other_record_ms", "record_ms"),
        ):
            times, rest = divmod(getattr(self, longer), getattr(self, shorter))
            if rest or not 1 <= times <= WINDOW_ROWS_MAX:
                raise ValueError(f"{longer} must be 1 to {WINDOW_ROWS_MAX} times {shorter}")


class SamplerSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How finely each driving mode is sampled. Defaults: 10 Hz in DC fast charging, 2 Hz driving with a
    record a second, slow when idle (GB/T 32960 wants a report at least every 30 s)."""

    idle: ModePlan = ModePlan(
        window_ms=10_000, record_ms=30_000, other_window_ms=30_000, other_record_ms=60_000
    )
    city: ModePlan = ModePlan(window_ms=500, record_ms=1_000, other_window_ms=1_000, other_record_ms=10_000)
    highway: ModePlan = ModePlan(
        window_ms=500, record_ms=1_000, other_window_ms=1_000, other_record_ms=10_000
    )
    charging_ac: ModePlan = ModePlan(
        window_ms=1_000, record_ms=5_000, other_window_ms=5_000, other_record_ms=30_000
    )
    charging_dc: ModePlan = ModePlan(
        window_ms=100, record_ms=1_000, other_window_ms=1_000, other_record_ms=10_000
    )
    keyframe_s: Annotated[float, msgspec.Meta(ge=1, le=3600)] = 60.0  # all states are told again this often

    def plan(self, mode: Mode) -> ModePlan:
        plan = getattr(self, mode.value)
        assert isinstance(plan, ModePlan)
        return plan


class _Table(NamedTuple):
    """Columns and tables of them that share a time axis, with the estimated packed size of each."""

    window_ms: int  # 0: rows at their own times
    t_ns: I64
    items: list[Column | Block]
    cost_bytes: list[float]


class Sampler:
    """Windows of min, max, mean and last for every catalog signal; a row per change for states.

    account: ledger.stage("sampler", "samples"), opened by the caller. A sample is `out` when it is sent as it
    is (a state's change, a window of one), `folded` when it merged into a window or repeats a state.
    """

    def __init__(
        self, catalog: Sequence[Signal], account: StageLedger, settings: SamplerSettings | None = None
    ) -> None:
        self._settings = settings or SamplerSettings()
        self._account = account
        self._names = column_names(catalog)
        self._families = _Families(catalog, self._names)
        self._scales = _Scales(catalog)
        is_state = np.array([signal.role in STATE_ROLES for signal in catalog], dtype=np.bool_)
        has_role = np.array([bool(signal.role) for signal in catalog], dtype=np.bool_)
        self._last_only = np.array([signal.role in LAST_ONLY_ROLES for signal in catalog], dtype=np.bool_)
        self._is_state = is_state
        self._states = _States(np.flatnonzero(is_state), len(catalog))
        self._fine = self._families.in_order(np.flatnonzero(has_role & ~is_state))
        self._other = np.flatnonzero(~has_role)
        self._context = Context()
        self._keyframe_ns = 0  # when all states were last told
        self._open: int | None = None  # index of the open fine record period
        self._waiting: list[SampleBatch] = []  # taken in, not yet folded
        self._waiting_samples = 0
        self._folded_ns = 0
        self._windows = _Windows(self._plan(), self._fine, self._other, len(catalog))

    def step(self, now: Now, samples: SampleBatch, context: Context) -> list[Draft]:
        """Fold a batch; return the telemetry records that are complete. Called with an empty batch too."""
        drafts: list[Draft] = []
        if (context.mode, context.journey_id) != (self._context.mode, self._context.journey_id):
            drafts += self.flush(now, self._context)
            if self._settings.plan(context.mode) != self._plan():
                self._context = context
                self._windows = _Windows(self._plan(), self._fine, self._other, len(self._names))
                self._open = None
        self._context = context
        if self._open is None:
            self._open_period(now.mono_ns // self._windows.record_ns)
        if len(samples):
            self._account.into += len(samples)
            self._account.held += len(samples)
            self._waiting.append(samples)
            self._waiting_samples += len(samples)
        assert self._open is not None
        due = now.mono_ns >= (self._open + 1) * self._windows.record_ns + LATE_NS
        waited = now.mono_ns - self._folded_ns >= FOLD_EVERY_NS
        if due or waited or self._waiting_samples >= FOLD_SAMPLES:
            drafts += self._fold_waiting(now)
        if due and now.mono_ns // self._windows.record_ns > self._open:
            drafts += self._roll(now.mono_ns // self._windows.record_ns)
        return drafts

    def flush(self, now: Now, context: Context) -> list[Draft]:
        """Return everything held as records, however short."""
        self._context = context
        if self._open is None:
            return []
        drafts = self._fold_waiting(now)
        return drafts + self._emit(self._drain(fine=True) + self._drain(fine=False) + self._drain_states())

    # --- in --------------------------------------------------------------------------------------------

    def _plan(self) -> ModePlan:
        return self._settings.plan(self._context.mode)

    def _fold_waiting(self, now: Now) -> list[Draft]:
        """Fold all that waits, without what is invalid or has no raw integer."""
        self._folded_ns = now.mono_ns
        if not self._waiting:
            return []
        batches, self._waiting, self._waiting_samples = self._waiting, [], 0
        if kernel.compiled is not None:
            return [draft for one in batches for draft in self._fold_batch(kernel.compiled, now, one)]
        t_ns, column, value, validity = (
            np.concatenate(arrays) if len(batches) > 1 else arrays[0]
            for arrays in zip(*((b.t_ns, b.column, b.value, b.validity) for b in batches), strict=True)
        )
        return self._fold_closely(now, t_ns, column, value, validity)

    def _fold_closely(
        self, now: Now, t_ns: I64, column: I64, value: F64, validity: npt.NDArray[np.uint8]
    ) -> list[Draft]:
        if np.count_nonzero(validity):
            ok = self._refuse(validity == Validity.VALID, "invalid")
            t_ns, column, value = t_ns[ok], column[ok], value[ok]
        if not self._scales.holds_all(value):
            ok = self._refuse(self._scales.holds(column, value), "unrepresentable")
            t_ns, column, value = t_ns[ok], column[ok], value[ok]
        return self._by_period(now, t_ns, column, value) if len(t_ns) else []

    def _fold_batch(self, work: kernel.Kernel, now: Now, samples: SampleBatch) -> list[Draft]:
        drafts = self._fold_at_once(work, samples, self._scales.reach_of_all, now.mono_ns + 1)
        if drafts is not None:
            return drafts
        return self._fold_closely(now, samples.t_ns, samples.column, samples.value, samples.validity)

    def _fold_at_once(
        self, work: kernel.Kernel, samples: SampleBatch, reach: float, end_ns: int
    ) -> list[Draft] | None:
        """Fold with the kernel; None, and nothing is folded, unless all samples are valid, within ±reach and
        of the open period before end_ns."""
        assert self._open is not None
        begin_ns = self._open * self._windows.record_ns
        end_ns = min(begin_ns + self._windows.record_ns, end_ns)
        places = np.empty(len(samples), np.int64)
        states = self._windows.fold_usual(work, samples, places, reach, begin_ns, end_ns)
        if states < 0:
            return None
        at = places[:states]
        return self._fold_states(samples.t_ns[at], samples.column[at], samples.value[at])

    def _refuse(self, ok: Bools, cause: str) -> Bools:
        refused = len(ok) - int(np.count_nonzero(ok))
        self._account.held -= refused
        self._account.drop(cause, refused)
        return ok

    def _by_period(self, now: Now, t_ns: I64, column: npt.NDArray[np.int64], value: F64) -> list[Draft]:
        """Fold period by period (mostly there is one); the record of a period leaves when the next begins."""
        record_ns = self._windows.record_ns
        assert self._open is not None
        if int(t_ns.max()) > now.mono_ns:
            t_ns = np.minimum(t_ns, now.mono_ns)
        if int(t_ns.min()) < self._open * record_ns:
            t_ns = np.maximum(t_ns, self._open * record_ns)
        if int(t_ns.max()) // record_ns == self._open:
            return self._fold(t_ns, column, value)
        period = np.maximum.accumulate(t_ns // record_ns)
        t_ns = np.maximum(t_ns, period * record_ns)
        drafts: list[Draft] = []
        cuts = [0, *(np.flatnonzero(np.diff(period)) + 1), len(period)]
        for begin, end in pairwise(cuts):
            part = slice(begin, end)
            if period[begin] != self._open:
                drafts += self._roll(int(period[begin]))
            drafts += self._fold(t_ns[part], column[part], value[part])
        return drafts

    def _fold(self, t_ns: I64, column: npt.NDArray[np.int64], value: F64) -> list[Draft]:
        """Fold valid samples of the open period."""
        if kernel.compiled is not None:
            valid = SampleBatch(t_ns, column, value, np.zeros(len(t_ns), np.uint8))
            drafts = self._fold_at_once(kernel.compiled, valid, math.inf, FAR_NS)
            assert drafts is not None
            return drafts
        self._windows.fold(t_ns, column, value)
        state = np.flatnonzero(self._is_state.take(column))
        return self._fold_states(t_ns[state], column[state], value[state])

    def _fold_states(self, t_ns: I64, column: I64, value: F64) -> list[Draft]:
        if not len(t_ns):
            return []
        rows = self._states.changed(column, value)
        repeats = len(t_ns) - len(rows)
        self._account.held -= repeats
        self._account.folded += repeats
        return self._keep_states(t_ns[rows], column[rows], value[rows])

    def _keep_states(self, t_ns: I64, column: npt.NDArray[np.int64], value: F64) -> list[Draft]:
        drafts: list[Draft] = []
        while len(t_ns):
            taken = self._states.keep(t_ns, column, value)
            t_ns, column, value = t_ns[taken:], column[taken:], value[taken:]
            if self._states.full:
                drafts += self._emit(self._drain_states())
        return drafts

    # --- out -------------------------------------------------------------------------------------------

    def _open_period(self, period: int) -> None:
        self._open = period
        self._windows.start(period * self._windows.record_ns)

    def _roll(self, period: int) -> list[Draft]:
        """Close the open record period and open `period`; coarse windows go when their own period is over."""
        assert self._open is not None
        windows = self._windows
        start_ns = period * windows.record_ns
        tables = self._drain(fine=True) + self._drain_states()
        if start_ns // windows.other_record_ns != windows.other_start_ns // windows.other_record_ns:
            tables += self._drain(fine=False)
        drafts = self._emit(tables)
        self._open_period(period)
        if start_ns - self._keyframe_ns >= self._settings.keyframe_s * NS_PER_S:
            self._states.forget()
            self._keyframe_ns = start_ns
        return drafts

    def _drain(self, *, fine: bool) -> list[_Table]:
        stats = self._windows.stats(fine=fine)
        samples = stats.counts.sum()
        if not samples:
            return []
        single = int(np.count_nonzero(stats.counts == 1))
        self._account.held -= int(samples)
        self._account.out += single
        self._account.folded += int(samples) - single
        table = self._lay_out(stats)
        self._windows.reset(fine=fine)
        return [table]

    def _lay_out(self, stats: _Stats) -> _Table:
        """Turn the used rows and columns of a group of windows into integer columns."""
        rows = np.flatnonzero(stats.counts.any(axis=1))
        used = np.flatnonzero(stats.counts.any(axis=0))
        cells = np.ix_(rows, used)
        count, signal = stats.counts[cells], stats.signals[used]
        present = count > 0
        last, low, high = stats.last[cells], stats.low[cells], stats.high[cells]
        largest = np.maximum(np.abs(low), np.abs(high))
        scale, offset = self._scales.choose(signal, last, largest, present)
        varies: Bools = ((low != high) & present).any(axis=0) & ~self._last_only[signal]
        varies |= self._families.touched(signal, varies)
        table = _Table(stats.window_ns // NS_PER_MS, stats.start_ns + rows * stats.window_ns, [], [])
        self._add(table, "", signal, last, scale, offset, present)
        if varies.any():
            signal, scale, offset, present = signal[varies], scale[varies], offset[varies], present[:, varies]
            mean = stats.total[cells][:, varies] / np.maximum(count[:, varies], 1)
            self._add(table, ".min", signal, low[:, varies], scale, offset, present)
            self._add(table, ".max", signal, high[:, varies], scale, offset, present)
            self._add(table, ".mean", signal, mean, scale / MEAN_FINER, offset, present)
        return table

    def _add(
        self, table: _Table, suffix: str, signal: I64, value: F64, scale: F64, offset: F64, present: Bools
    ) -> None:
        """Add a column for each signal, numbered cells as one block; absent values repeat their neighbour."""
        raw = np.ascontiguousarray(np.rint((_filled(value, present) - offset) / scale).astype(np.int64).T)
        whole: Bools = np.logical_and.reduce(present, axis=0)
        cost = _packed_bytes(raw) + len(table.t_ns) / 8 * ~whole
        family, number = self._families.family[signal], self._families.number[signal]
        joined = (family[1:] >= 0) & (family[1:] == family[:-1]) & (number[1:] == number[:-1] + 1)
        joined &= whole[1:] & whole[:-1] & (scale[1:] == scale[:-1]) & (offset[1:] == offset[:-1])
        cuts = [0, *(np.flatnonzero(~joined) + 1).tolist(), len(signal)]
        scales, offsets, costs = scale.tolist(), offset.tolist(), cost.tolist()
        names = [self._names[s] + suffix for s in signal.tolist()]
        there = [None if all_ else present[:, at].copy() for at, all_ in enumerate(whole.tolist())]
        for begin, end in pairwise(cuts):
            if end - begin == 1:
                name = names[begin]
                table.items.append(Column(name, scales[begin], offsets[begin], raw[begin], there[begin]))
                table.cost_bytes.append(costs[begin] + len(name) * NAME_SHARE + COLUMN_OVERHEAD_BYTES)
                continue
            prefix, tail = self._families.texts[int(family[begin])]
            step = max(1, int(BLOCK_BYTES_TARGET // cost[begin:end].max()))
            for i in range(begin, end, step):
                part = slice(i, min(i + step, end))
                block = Block(prefix, int(number[i]), tail + suffix, scales[i], offsets[i], raw[part])
                table.items.append(block)
                table.cost_bytes.append(sum(costs[part]) + len(prefix + tail) + COLUMN_OVERHEAD_BYTES)

    def _drain_states(self) -> list[_Table]:
        t_ns, column, value = self._states.take()
        if not len(t_ns):
            return []
        self._account.held -= len(t_ns)
        self._account.out += len(t_ns)
        signal, dense = np.unique(column, return_inverse=True)
        shape = (len(t_ns), len(signal))
        present, cells = np.zeros(shape, dtype=np.bool_), np.zeros(shape)
        present[np.arange(len(t_ns)), dense] = True
        cells[np.arange(len(t_ns)), dense] = value
        scale, offset = self._scales.choose(signal, cells, np.abs(cells), present)
        table = _Table(0, t_ns, [], [])
        self._add(table, "", signal, cells, scale, offset, present)
        return [table]

    def _emit(self, tables: Sequence[_Table]) -> list[Draft]:
        """Pack tables into as many drafts as the size limit asks for."""
        parts = list(_parts(tables))
        base_ns = min((int(table.t_ns.min()) for table in tables), default=0)
        drafts = []
        for number, part in enumerate(parts, 1):
            body = self._context.body()
            body["windows_ms"] = [table.window_ms for table in part]
            body["series"] = [
                Series(
                    (table.t_ns - base_ns) // NS_PER_MS,
                    tuple(item for item in table.items if isinstance(item, Column)),
                    tuple(item for item in table.items if isinstance(item, Block)),
                )
                for table in part
            ]
            if len(parts) > 1:
                body |= {"part": number, "parts": len(parts)}
            drafts.append(Draft("telemetry", Level.INFO, base_ns, body))
        return drafts


class _Stats(NamedTuple):
    """One group's windows: (rows, columns) views, their signals, the time of row 0, a window's length."""

    signals: I64
    start_ns: int
    window_ns: int
    counts: I64
    low: F64
    high: F64
    total: F64
    last: F64


class _Windows:
    """Statistics of all windows of the open records, preallocated; both groups live in one flat array."""

    def __init__(self, plan: ModePlan, fine: I64, other: I64, catalog_size: int) -> None:
        self.record_ns = plan.record_ms * NS_PER_MS
        self.other_record_ns = plan.other_record_ms * NS_PER_MS
        self.other_start_ns = 0
        self._fine_start_ns = 0
        self._groups = (
            (fine, plan.window_ms * NS_PER_MS, plan.record_ms // plan.window_ms),
            (other, plan.other_window_ms * NS_PER_MS, plan.other_record_ms // plan.other_window_ms),
        )
        self._is_other = np.zeros(catalog_size, dtype=np.bool_)
        self._is_other[other] = True
        self._stride = np.zeros(catalog_size, dtype=np.int64)
        self._base = np.full(catalog_size, -1, dtype=np.int64)  # states: one cell at the end nobody reads
        size = 0
        for signals, _, rows in self._groups:
            self._stride[signals] = len(signals)
            self._base[signals] = size + np.arange(len(signals))
            size += rows * len(signals)
        size += 1
        self._row = (0, 0)
        self._row_cells = self._base  # cell of each column in the rows of `_row`
        self._row_room = np.empty(catalog_size, dtype=np.int64)  # the kernel's own `_row_cells`
        self._count = np.zeros(size, dtype=np.int64)
        self._low, self._high = np.full(size, np.inf), np.full(size, -np.inf)
        self._total, self._last = np.zeros(size), np.zeros(size)

    def start(self, start_ns: int) -> None:
        """Begin the fine record at `start_ns`; the coarse one it lies in follows."""
        self._fine_start_ns = start_ns
        self.other_start_ns = start_ns // self.other_record_ns * self.other_record_ns

    def fold(self, t_ns: I64, column: npt.NDArray[np.int64], value: F64) -> None:
        """Merge samples of the open record into their windows."""
        if not len(t_ns):
            return
        cell = self._cells(t_ns, column)
        np.add.at(self._count, cell, 1)
        np.add.at(self._total, cell, value)
        np.minimum.at(self._low, cell, value)
        np.maximum.at(self._high, cell, value)
        self._last[cell] = value

    def fold_usual(
        self, work: kernel.Kernel, samples: SampleBatch, places: I64, reach: float, begin_ns: int, end_ns: int
    ) -> int:
        """Do the same with the kernel; return how many states there are and leave in `places` where. -1, and
        nothing is folded, if a sample is not valid, beyond reach, or not within begin_ns <= t_ns < end_ns."""
        (_, fine_ns, _), (_, other_ns, _) = self._groups
        return work.fold(
            samples.t_ns, samples.column, samples.value, samples.validity, self._base, self._stride,
            self._is_other, self._row_room, self._count, self._low, self._high, self._total, self._last,
            places, reach, begin_ns, end_ns, self._fine_start_ns, self.other_start_ns, fine_ns, other_ns,
        )  # fmt: skip

    def _cells(self, t_ns: I64, column: npt.NDArray[np.int64]) -> I64:
        """Return where each sample goes; mostly all lie in the same window of their group."""
        (_, fine_ns, _), (_, other_ns, _) = self._groups
        first, last = int(t_ns.min()), int(t_ns.max())
        row = (first - self._fine_start_ns) // fine_ns, (first - self.other_start_ns) // other_ns
        if row == ((last - self._fine_start_ns) // fine_ns, (last - self.other_start_ns) // other_ns):
            if row != self._row:
                self._row = row
                rows = np.where(self._is_other, row[1], row[0]).astype(np.int64)
                self._row_cells = self._base + rows * self._stride
            return self._row_cells.take(column)
        rows = np.where(
            self._is_other.take(column),
            (t_ns - self.other_start_ns) // other_ns,
            (t_ns - self._fine_start_ns) // fine_ns,
        ).astype(np.int64)
        return self._base.take(column) + rows * self._stride.take(column)

    def _part(self, fine: bool) -> slice:
        (signals, _, rows), (others, _, other_rows) = self._groups
        size = len(signals) * rows
        return slice(0, size) if fine else slice(size, size + len(others) * other_rows)

    def stats(self, *, fine: bool) -> _Stats:
        signals, window_ns, rows = self._groups[0 if fine else 1]
        part, shape = self._part(fine), (rows, len(signals))
        start_ns = self._fine_start_ns if fine else self.other_start_ns
        return _Stats(
            signals, start_ns, window_ns, self._count[part].reshape(shape),
            self._low[part].reshape(shape), self._high[part].reshape(shape),
            self._total[part].reshape(shape), self._last[part].reshape(shape),
        )  # fmt: skip

    def reset(self, *, fine: bool) -> None:
        part = self._part(fine)
        self._count[part] = 0
        self._total[part] = 0.0
        self._low[part], self._high[part] = np.inf, -np.inf


class _States:
    """The last value of each state and the changes not yet sent, in bounded arrays."""

    def __init__(self, signals: I64, catalog_size: int) -> None:
        self._dense = np.zeros(catalog_size, dtype=np.int64)
        self._dense[signals] = np.arange(len(signals))
        self._last = [math.nan] * len(signals)
        self._t_ns = np.zeros(STATE_ROWS_MAX, dtype=np.int64)
        self._column = np.zeros(STATE_ROWS_MAX, dtype=np.int64)
        self._value = np.zeros(STATE_ROWS_MAX)
        self._n = 0

    @property
    def full(self) -> bool:
        return self._n == STATE_ROWS_MAX

    def changed(self, column: npt.NDArray[np.int64], value: F64) -> I64:
        """Return the positions whose value differs from the same state's sample before."""
        last, rows = self._last, []
        states = self._dense[column].tolist()
        for row, (state, one) in enumerate(zip(states, value.tolist(), strict=True)):
            if one != last[state]:
                last[state] = one
                rows.append(row)
        return np.array(rows, dtype=np.int64)

    def keep(self, t_ns: I64, column: npt.NDArray[np.int64], value: F64) -> int:
        """Take as many rows as there is room for; return how many."""
        n = min(len(t_ns), STATE_ROWS_MAX - self._n)
        rows = slice(self._n, self._n + n)
        self._t_ns[rows], self._column[rows], self._value[rows] = t_ns[:n], column[:n], value[:n]
        self._n += n
        return n

    def take(self) -> tuple[I64, I64, F64]:
        n, self._n = self._n, 0
        return self._t_ns[:n].copy(), self._column[:n].copy(), self._value[:n].copy()

    def forget(self) -> None:
        """Let the next sample of each state count as a change: a keyframe."""
        self._last = [math.nan] * len(self._last)


class _Scales:
    """Step and origin of each column's raw integers, and the range they can hold."""

    def __init__(self, catalog: Sequence[Signal]) -> None:
        self._fallback = np.array([FLOAT_SCALE_BY_ROLE.get(s.role, FLOAT_SCALE) for s in catalog])
        self.scale = self._fallback.copy()
        self.offset = np.zeros(len(catalog))
        for i, signal in enumerate(catalog):
            if not signal.is_float and signal.scale and math.isfinite(signal.scale):
                self.scale[i] = signal.scale
                self.offset[i] = signal.offset if math.isfinite(signal.offset) else 0.0
        self._finer = np.minimum(self._fallback, np.abs(self.scale))
        self._reach = np.abs(self.scale) * RAW_MAX
        self.reach_of_all = float(np.min(self._reach - np.abs(self.offset), initial=np.inf))

    def holds_all(self, value: F64) -> bool:
        """Return whether all values have a raw integer in any column: the usual case, at one comparison."""
        return bool(np.count_nonzero(np.abs(value) <= self.reach_of_all) == len(value))

    def holds(self, column: npt.NDArray[np.int64], value: F64) -> Bools:
        """Return which values have a raw integer; NaN has none."""
        held: Bools = np.abs(value - self.offset[column]) <= self._reach[column]
        return held

    def choose(self, signal: I64, last: F64, largest: F64, present: Bools) -> tuple[F64, F64]:
        """Return scale and offset for a table's columns.

        A column whose values do not lie on its declared grid (they are in another unit than the DBC's, say)
        takes the float scale, which loses less, if its largest magnitude fits that.
        """
        scale, offset = self.scale[signal], self.offset[signal]
        steps = (last - offset) / scale
        off = np.abs(steps - np.rint(steps)) > ON_GRID_STEPS_MAX + np.abs(steps) * 1e-12
        fits = largest <= self._finer[signal] * RAW_MAX
        finer = np.logical_and((off & present).any(axis=0), (fits | ~present).all(axis=0))
        return np.where(finer, self._finer[signal], scale), np.where(finer, 0.0, offset)


class _Families:
    """Which columns are one and the same but for a number in their name: the cells, the probes."""

    def __init__(self, catalog: Sequence[Signal], names: Sequence[str]) -> None:
        self.family = np.full(len(catalog), -1, dtype=np.int64)
        self.number = np.zeros(len(catalog), dtype=np.int64)
        self.texts: list[tuple[str, str]] = []
        known: dict[tuple[str, str], int] = {}
        for i, (signal, name) in enumerate(zip(catalog, names, strict=True)):
            match = _NUMBERED.fullmatch(name) if len(name) <= NUMBERED_NAME_CHARS_MAX else None
            if signal.role not in NUMBERED_ROLES or match is None:
                continue
            prefix, number, tail = match.groups()
            self.family[i] = known.setdefault((prefix, tail), len(known))
            self.number[i] = int(number)
        self.texts = list(known)

    def touched(self, signals: I64, chosen: Bools) -> Bools:
        """Return which signals have one of their family among the chosen: a family stays one block."""
        family = self.family[signals]
        hit = np.zeros(len(self.texts) + 1, dtype=np.bool_)
        hit[family[chosen]] = True
        hit[-1] = False  # those without a family, -1
        touched: Bools = hit[family]
        return touched

    def in_order(self, signals: I64) -> I64:
        """Return the signals with each family together and in the order of its numbers."""
        return signals[np.lexsort((self.number[signals], self.family[signals]))]


_NUMBERED = re.compile(r"(.*\D)(0|[1-9]\d{0,8})(\D*)")


def column_names(catalog: Sequence[Signal]) -> list[str]:
    """Return a name for each signal, each unlike any other: VSS where a role has one, else message.signal.

    Cells and probes carry their index. A name taken already gets its bus, message and signal appended.
    """
    names: list[str] = []
    taken: set[str] = set()
    for signal in catalog:
        plain = signal.name
        if not plain.startswith(f"{signal.message}."):
            plain = f"{signal.message}.{plain}"
        name = signal.vss or plain
        if signal.vss and signal.role in NUMBERED_ROLES and not name.endswith("]"):
            name = f"{name}[{signal.index}]"
        if name in taken:
            name = f"{name}@{signal.channel}.{plain}"
        count = 2
        while name in taken:
            name, count = f"{name}#{count}", count + 1
        taken.add(name)
        names.append(name)
    return names


def _filled(value: F64, present: Bools) -> F64:
    """Return `value` with absent cells repeating the row before (or the first that is there)."""
    if present.all():
        return value
    rows = np.arange(len(value))[:, None]
    source = np.maximum.accumulate(np.where(present, rows, -1), axis=0)
    source = np.where(source < 0, present.argmax(axis=0), source)
    filled: F64 = np.take_along_axis(value, source, axis=0)
    return filled


_WIDTH_LIMITS = np.array([32, 128, 32_768, 2_147_483_648], dtype=np.int64)
_WIDTH_BYTES = np.array([1.0, 2.0, 3.0, 5.0, 9.0])


def _packed_bytes(raw: I64) -> F64:
    """Return an upper bound on the MessagePack bytes of each column's (columns, rows) deltas."""
    first: F64 = _WIDTH_BYTES[np.searchsorted(_WIDTH_LIMITS, np.abs(raw[:, 0]), side="right")]
    if raw.shape[1] == 1:
        return first
    widest = np.abs(np.diff(raw, axis=1)).max(axis=1)
    rest: F64 = _WIDTH_BYTES[np.searchsorted(_WIDTH_LIMITS, widest, side="right")] * (raw.shape[1] - 1)
    return first + rest


def _parts(tables: Iterable[_Table]) -> Iterable[list[_Table]]:
    """Cut tables, between columns, into lists that each stay within RECORD_BYTES_TARGET."""
    part: list[_Table] = []
    room = float(RECORD_BYTES_TARGET)
    for table in tables:
        axis = 3.0 * len(table.t_ns)
        costs = np.cumsum(table.cost_bytes)
        begin, spent = 0, 0.0
        while begin < len(table.items):
            end = int(np.searchsorted(costs, spent + room - axis, side="right"))
            if end <= begin and part:
                yield part
                part, room = [], float(RECORD_BYTES_TARGET)
                continue
            end = max(end, begin + 1)
            part.append(table._replace(items=table.items[begin:end]))
            room -= axis + float(costs[end - 1]) - spent
            begin, spent = end, float(costs[end - 1])
    if part:
        yield part
