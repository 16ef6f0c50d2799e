"""Judges samples before any threshold sees them. Drops none; all travel on with their validity.

What is wrong with a whole frame (CRC, counter) outranks a signal's own flag, then SNA, range, an incomplete
multiplexer cycle and, last, a spike.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tbox import kernel
from tbox.decode.batch import Decoded, Decoder, where_
from tbox.decode.database import DecodeSettings
from tbox.decode.guard import NEVER_NS, FrameGuard
from tbox.decode.roles import Binding, MappingError, RoleMap
from tbox.decode.sentinels import Limits, limits_of
from tbox.decode.table import KIND_INT, IntArray, SignalTable
from tbox.model import NS_PER_MS, FrameBatch, Signal, Validity

Codes = npt.NDArray[np.uint8]

# A step larger than these, undone by the next sample, is a spike: in the role's unit, wide enough for load
# steps. Roles that may jump have none.
GLITCH_STEPS: dict[str, float] = {
    "cell_voltage": 0.5,
    "cell_voltage_min": 0.5,
    "cell_voltage_max": 0.5,
    "probe_temperature": 10.0,
    "temperature_min": 10.0,
    "temperature_max": 10.0,
    "coolant_temperature": 10.0,
    "ambient_temperature": 10.0,
    "motor_temperature": 30.0,
    "pack_voltage": 60.0,
    "soc": 5.0,
    "soh": 5.0,
    "speed": 30.0,
    "odometer": 10.0,
    "low_voltage": 5.0,
}
NO_RAW = -(1 << 63)
GLITCH_MEMORY_NS = 3_000 * NS_PER_MS  # a value this old says nothing about the next


class Judge:
    """The validity of every sample, and the state it takes."""

    def __init__(
        self,
        decoder: Decoder,
        bindings: Sequence[Binding],
        roles: RoleMap,
        catalog: Sequence[Signal],
        settings: DecodeSettings,
    ) -> None:
        """Raises MappingError when a mapping asks for a signal that is not there."""
        table = decoder.table
        self.guard = FrameGuard(decoder, roles, settings.counter_gap_ms)
        self._limits = _LimitTable(table, bindings)
        decoder.expect(self._limits.low, self._limits.span)
        self._flags = _FlagTable(decoder, bindings)
        self._codes = _CodeTable(table, bindings)
        self._cycles = _MuxCycles(table, catalog, settings) if settings.mux_cycle else None
        self._spikes = _Spikes(table, catalog, bindings) if settings.glitch else None

    def passes(
        self, decoded: Decoded, upper: npt.NDArray[np.float64], lower: npt.NDArray[np.float64]
    ) -> bool:
        """Return whether a reading reaches a limit (of each sample), by what the sample alone says.

        Takes no state. SNA and what is out of range are no readings.
        """
        code = np.zeros(len(decoded.value), np.uint8)
        value = self._codes.apply(decoded, code)
        out = (value >= upper) | (value <= lower)
        return bool(out.any()) and bool((out & (code == 0) & (self._limits.judge(decoded) == 0)).any())

    def judge(self, batch: FrameBatch, decoded: Decoded) -> tuple[npt.NDArray[np.float64], Codes]:
        """Return the values, enum codes put in their place, and their validity."""
        code = self._limits.judge(decoded)
        value = self._codes.apply(decoded, code)
        self._flags.judge(batch, decoded, code)
        of_frame = self.guard.judge(batch, decoded)
        if of_frame is not None:
            of_sample = of_frame.take(decoded.frame)
            np.copyto(code, of_sample, where=of_sample != 0)
        if self._cycles is not None:
            self._cycles.judge(batch, decoded, of_frame, code)
        if self._spikes is not None:
            self._spikes.judge(batch, decoded, value, code)
        return value, code


class _LimitTable:
    """SNA and range, by row: one comparison for most samples, a closer look at the few that fail it.

    low, span: of each row, low <= raw <= low + span is a reading; any raw value of a row judged by value.
    """

    def __init__(self, table: SignalTable, bindings: Sequence[Binding]) -> None:
        columns = [limits_of(signal, bindings[n]) for n, (_, signal) in enumerate(table.columns)]
        rows = [columns[column] for column in table.column.tolist()]
        exact = [_by_raw(table, n) for n in range(len(rows))]
        self._sna = _padded([limits.sna for limits in rows])
        self.low, self.span = _spans(rows, exact)
        self._low_value = np.array([limits.value_low for limits in rows])
        self._high_value = np.array([limits.value_high for limits in rows])
        # Rows with an SNA value among their readings; rows judged by value (floats, what cantools decoded).
        self._inside = np.array([any(r.low <= raw <= r.high for raw in r.sna) for r in rows], np.bool_)
        self._by_value = ~np.array(exact, np.bool_)
        self._any_by_value = bool(self._by_value.any())
        self._any_inside = bool(self._inside.any())

    def judge(self, decoded: Decoded) -> Codes:
        code = np.zeros(len(decoded.value), np.uint8)
        if decoded.inside and not self._any_inside and not self._any_by_value:
            return code
        row, raw = decoded.row, decoded.raw
        outside = where_((raw - self.low.take(row)).view(np.uint64) > self.span.take(row))
        if len(outside):
            code[outside] = np.where(self._is_sna(row[outside], raw[outside]), Validity.SNA, Validity.RANGE)
        if self._any_inside:
            at = where_(self._inside.take(row))
            code[at[self._is_sna(row[at], raw[at])]] = Validity.SNA
        if self._any_by_value:
            at = where_(self._by_value.take(row))
            value, its_row = decoded.value[at], row[at]
            wrong = ~((value >= self._low_value.take(its_row)) & (value <= self._high_value.take(its_row)))
            wrong &= code[at] == 0
            code[at[wrong]] = np.where(np.isnan(value[wrong]), Validity.SNA, Validity.RANGE)
        return code

    def _is_sna(self, row: IntArray, raw: IntArray) -> npt.NDArray[np.bool_]:
        found: npt.NDArray[np.bool_] = (self._sna[row] == raw[:, None]).any(axis=1)
        return found


def _padded(sets: Sequence[frozenset[int]]) -> IntArray:
    """Return the sets as rows of one array, filled up with a value no int of the table takes."""
    table = np.full((len(sets), max((len(s) for s in sets), default=0)), NO_RAW, np.int64)
    for n, values in enumerate(sets):
        table[n, : len(values)] = sorted(values)
    return table


def _by_raw(table: SignalTable, row: int) -> bool:
    """Whether a row's raw value is known exactly and is an int64: it has bits, and not 64 unsigned ones."""
    mask, half = int(table.mask[row]), int(table.half[row])
    return bool(table.kind[row] == KIND_INT and mask and (half or mask < 1 << 63))


def _spans(rows: Sequence[Limits], exact: Sequence[bool]) -> tuple[IntArray, npt.NDArray[np.uint64]]:
    """Return low and high − low: one unsigned comparison says whether a raw value lies between."""
    low = [r.low if ok and r.low <= r.high else 0 for r, ok in zip(rows, exact, strict=True)]
    span = [max(0, r.high - r.low) if ok else (1 << 64) - 1 for r, ok in zip(rows, exact, strict=True)]
    return np.array(low, np.int64), np.array(span, np.uint64)


class _FlagTable:
    """A BMS's own invalid flags: signals that refuse others of their frame (foxBMS: one for each cell)."""

    def __init__(self, decoder: Decoder, bindings: Sequence[Binding]) -> None:
        table = decoder.table
        self._decoder = decoder
        self._flag = np.full(len(table.column), -1, np.int64)
        self._refuses: dict[int, tuple[int, ...]] = {}  # flag row -> raw values; empty: all but 0
        for plan in table.plan_info:
            names = {table.row_info[row].signal.name: row for row in plan.rows}
            for row in plan.rows:
                binding = bindings[table.column[row]]
                if binding.invalid_flag in names:
                    self._flag[row] = names[binding.invalid_flag]
                    self._refuses[names[binding.invalid_flag]] = binding.invalid_when
        self._refuse_missing(table, bindings)
        self._any = bool((self._flag >= 0).any())
        self._special = {row for row, values in self._refuses.items() if values}

    def _refuse_missing(self, table: SignalTable, bindings: Sequence[Binding]) -> None:
        served = set(table.column[self._flag >= 0].tolist())
        for column, binding in enumerate(bindings):
            if binding.invalid_flag and column not in served and not binding.shipped:
                index, signal = table.columns[column]
                name = f"{table.definitions[index].message.name}.{signal.name}"
                raise MappingError(
                    f"{name} has no flag {binding.invalid_flag!r} beside it",
                    where=table.definitions[index].where,
                    mend="correct invalid_flag in the mapping",
                )

    def judge(self, batch: FrameBatch, decoded: Decoded, code: Codes) -> None:
        if not self._any:
            return
        flag = self._flag.take(decoded.row)
        at = where_(flag >= 0)
        if not len(at):
            return
        frame, flag = decoded.frame[at], flag[at]
        raw = self._decoder.raw(batch.frames, frame, flag)
        refused = raw != 0
        for row in self._special.intersection(flag.tolist()):
            mine = flag == row
            refused[mine] = np.isin(raw[mine], self._refuses[row])
        cut_off = self._table_need(flag) > np.minimum(batch.frames["len"][frame], 64)
        code[at[refused | cut_off]] = Validity.FLAGGED

    def _table_need(self, row: IntArray) -> npt.NDArray[np.uint8]:
        return self._decoder.table.need_bytes.take(row)


class _CodeTable:
    """Enums that a mapping translates to a role's codes."""

    def __init__(self, table: SignalTable, bindings: Sequence[Binding]) -> None:
        self._map: dict[int, dict[int, float]] = {
            row: dict(bindings[column].values)
            for row, column in enumerate(table.column.tolist())
            if bindings[column].values
        }
        self._mapped = np.zeros(len(table.column), np.bool_)
        self._mapped[list(self._map)] = True

    def apply(self, decoded: Decoded, code: Codes) -> npt.NDArray[np.float64]:
        value = decoded.value
        if not self._map:
            return value
        for n in where_(self._mapped.take(decoded.row)).tolist():
            known = self._map[int(decoded.row[n])].get(int(decoded.raw[n]))
            if known is None:
                code[n] = Validity.SNA
            else:
                value[n] = known
        return value


class _MuxCycles:
    """Multiplexed messages whose pages carry roles: nothing of them counts before a page has come twice.

    Which pages a vehicle sends is not in the DBC, so a cycle is known to be complete when it begins anew.
    """

    def __init__(self, table: SignalTable, catalog: Sequence[Signal], settings: DecodeSettings) -> None:
        self._of_plan = np.full(len(table.plan_info), -1, np.int64)
        paged = {table.plan_info[p].definition for p in where_(table.selector_row >= 0).tolist()}
        for plan, info in enumerate(table.plan_info):
            bound = any(
                catalog[table.column[row]].role and table.row_info[row].signal.multiplexer_ids is not None
                for row in info.rows
            )
            if bound and info.definition in paged:
                self._of_plan[plan] = info.definition
        self._any = bool((self._of_plan >= 0).any())
        self._role = np.array([bool(s.role) for s in catalog], np.bool_)
        self._gap_ns = settings.counter_gap_ms * NS_PER_MS
        self._seen: dict[int, set[int]] = {}
        self._whole: set[int] = set()
        self._last_ns: dict[int, int] = {}

    def judge(
        self,
        batch: FrameBatch,
        decoded: Decoded,
        of_frame: Codes | None,
        code: Codes,
    ) -> None:
        if not self._any:
            return
        message = self._of_plan.take(decoded.plan)
        early = np.zeros(len(message), np.bool_)
        for definition in np.unique(message[message >= 0]).tolist():
            frames = where_(message == definition)
            self._follow(definition, frames, batch, decoded, of_frame, early)
        if early.any():
            bound = self._role.take(decoded.column)
            code[early.take(decoded.frame) & bound & (code == 0)] = Validity.MUX

    def _follow(
        self,
        definition: int,
        frames: IntArray,
        batch: FrameBatch,
        decoded: Decoded,
        of_frame: Codes | None,
        early: npt.NDArray[np.bool_],
    ) -> None:
        first_ns, last_ns = int(batch.t_ns[frames[0]]), int(batch.t_ns[frames[-1]])
        if first_ns - self._last_ns.get(definition, first_ns) > self._gap_ns:
            self._whole.discard(definition)
            self._seen.pop(definition, None)
        self._last_ns[definition] = last_ns
        if definition in self._whole:
            return
        seen = self._seen.setdefault(definition, set())
        for frame in frames.tolist():
            page = int(decoded.plan[frame])
            if of_frame is not None and of_frame[frame]:
                continue
            if page in seen:
                self._whole.add(definition)
                del self._seen[definition]
                return
            seen.add(page)
            early[frame] = True


class _Spikes:
    """Single-sample spikes: far from the last believed sample, and from the one refused just before.

    A real step is believed with its second sample. What a plan has not brought for GLITCH_MEMORY_NS is
    believed as it comes.
    """

    def __init__(self, table: SignalTable, catalog: Sequence[Signal], bindings: Sequence[Binding]) -> None:
        self._step = np.array(
            [
                binding.glitch if binding.glitch is not None else GLITCH_STEPS.get(signal.role, 0.0)
                for signal, binding in zip(catalog, bindings, strict=True)
            ]
        )
        self._watched = self._step > 0
        self._half_step = np.where(self._watched, self._step / 2, np.inf)
        self._believed = np.where(self._watched, np.nan, 0.0)
        self._refused: dict[int, float] = {}  # column -> the sample just refused
        self._plan_ns = np.full(len(table.plan_info), NEVER_NS, np.int64)

    def judge(
        self,
        batch: FrameBatch,
        decoded: Decoded,
        value: npt.NDArray[np.float64],
        code: Codes,
    ) -> None:
        column = decoded.column
        if self._refused or code.any() or not self._settle(column, value):
            calm = self._calm(column, value)
            watched = self._watched.take(column)
            watched &= (code == 0) | (code == Validity.MUX)
            at = where_(watched)
            if len(at):
                self._judge(batch, decoded, at, column[at], value[at], calm[at], code)
        self._plan_ns[decoded.plan] = batch.t_ns

    def _settle(self, column: npt.NDArray[np.int64], value: npt.NDArray[np.float64]) -> bool:
        """Believe all values, provided that all are calm; return whether they are."""
        if kernel.compiled is not None:
            return kernel.compiled.calm(column, value, self._believed, self._half_step)
        if not self._calm(column, value).all():
            return False
        self._believed[column] = value
        return True

    def _calm(self, column: npt.NDArray[np.int64], value: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
        """Return which are within half a step of the believed value: within a step of each other, that is.

        Not so: NaN, and the first of a watched column. Of others nothing is believed that matters.
        """
        away = value - self._believed.take(column)
        np.abs(away, out=away)
        calm: npt.NDArray[np.bool_] = away <= self._half_step.take(column)
        return calm

    def _judge(
        self,
        batch: FrameBatch,
        decoded: Decoded,
        at: IntArray,
        column: npt.NDArray[np.int64],
        v: npt.NDArray[np.float64],
        calm: npt.NDArray[np.bool_],
        code: Codes,
    ) -> None:
        if self._refused or not calm.all():
            doubtful = np.isin(column, np.concatenate((column[~calm], [*self._refused])))
            frame = decoded.frame[at[doubtful]]
            before_ns = self._plan_ns.take(decoded.plan.take(frame))
            stale = (batch.t_ns.take(frame) - before_ns > GLITCH_MEMORY_NS) & (before_ns != NEVER_NS)
            self._one_by_one(at[doubtful], column[doubtful], v[doubtful], stale, code)
            column, v = column[~doubtful], v[~doubtful]
        self._believed[column] = v

    def _one_by_one(
        self,
        at: IntArray,
        column: npt.NDArray[np.int64],
        value: npt.NDArray[np.float64],
        stale: npt.NDArray[np.bool_],
        code: Codes,
    ) -> None:
        """The few columns in which something jumped, sample by sample. stale: the one before is long ago."""
        heard: set[int] = set()
        samples = zip(at.tolist(), column.tolist(), value.tolist(), stale.tolist(), strict=True)
        for place, one, v, long_ago in samples:
            step, believed = self._step[one], self._believed[one]
            refused = self._refused.pop(one, None)
            near = abs(v - believed) <= step or (refused is not None and abs(v - refused) <= step)
            if near or believed != believed or (long_ago and one not in heard):
                self._believed[one] = v
            else:
                self._refused[one] = v
                if code[place] == 0:
                    code[place] = Validity.GLITCH
            heard.add(one)
