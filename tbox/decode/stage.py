"""The decode stage: frames in, samples with their validity out, everything counted. Touches no world."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tbox.decode.batch import Decoded, Decoder, Details, Outcome, where_
from tbox.decode.database import Database, DecodeSettings, Definition
from tbox.decode.roles import Binding, RoleMap
from tbox.decode.table import MALFORMED_PLAN, NO_ID, UNKNOWN_PLAN, IntArray, SignalTable, compile_table
from tbox.decode.validity import Judge
from tbox.ledger import Ledger
from tbox.model import ROLE_UNITS, FrameBatch, Now, SampleBatch, Signal, Validity

# Validity -> the cause the ledger counts it under.
CAUSES = {v: v.name.lower() for v in Validity if v is not Validity.VALID}


class _Limited(NamedTuple):
    """The ids of messages with a limited signal, by channel, and the limits they were found for."""

    upper: npt.NDArray[np.float64]
    lower: npt.NDArray[np.float64]
    ids: dict[int, npt.NDArray[np.uint32]]


class DecodeStage:
    """All buses' frames to samples in the units of their roles.

    catalog: the columns. table: what the DBCs compiled to. short: frames shorter than their message.
    Ledger "decode" counts frames, "validity" samples; a sample that is not VALID travels on with its code and
    counts as dropped with its cause.
    """

    def __init__(self, database: Database, roles: RoleMap, ledger: Ledger, settings: DecodeSettings) -> None:
        """Raises roles.MappingError when the mapping does not fit the DBCs."""
        table = compile_table(database.definitions)
        bindings = [_bind(table, roles, column) for column in range(len(table.columns))]
        self.catalog = _catalog(table, bindings)
        self.short = 0
        self.table = table
        self._fold(bindings)
        self._decoder = Decoder(table)
        self._limited: _Limited | None = None
        self._judge = Judge(self._decoder, bindings, roles, self.catalog, settings)
        self._wanted = None if settings.unmapped else np.array([bool(s.role or s.vss) for s in self.catalog])
        self._frames = ledger.stage("decode", "frames")
        self._samples = ledger.stage("validity", "samples")

    @property
    def judge(self) -> Judge:
        """The validity checks at work, for what they counted."""
        return self._judge

    def step(self, now: Now, batch: FrameBatch) -> SampleBatch:
        """Decode and judge one batch. Never raises for what the frames hold."""
        n = len(batch)
        batch = _side_by_side(batch)
        decoded = self._decoder.decode(batch.channel, batch.frames, batch.t_ns)
        if decoded.fallback:
            decoded = self._merge(batch, decoded)
        unknown, malformed, short = decoded.outcome or _outcome(decoded)
        self._frames.into += n
        self._frames.out += n - unknown - malformed
        self._frames.drop("unknown", unknown)
        self._frames.drop("malformed", malformed)
        self.short += short
        value, validity = self._judge.judge(batch, decoded)
        samples = SampleBatch(decoded.t_ns, decoded.column, value, validity)
        if self._wanted is not None:
            samples = _select(samples, self._wanted.take(decoded.column))
        self._count(samples.validity)
        return samples

    def passes(
        self, batch: FrameBatch, upper: npt.NDArray[np.float64], lower: npt.NDArray[np.float64]
    ) -> bool:
        """Return whether a reading in the batch reaches a limit (by column); counts and keeps nothing.

        Any thread may ask. What only cantools can decode counts as past a limit. Frames without a limited
        signal are not even decoded.
        """
        limited = self._limited_ids(upper, lower).get(batch.channel)
        if limited is None:
            return False
        ids = batch.frames["id"]
        at = where_(limited.take(limited.searchsorted(ids)) == ids)
        if not len(at):
            return False
        decoded = self._decoder.decode(batch.channel, batch.frames[at])
        if decoded.fallback:
            return True
        return self._judge.passes(decoded, upper.take(decoded.column), lower.take(decoded.column))

    def _limited_ids(
        self, upper: npt.NDArray[np.float64], lower: npt.NDArray[np.float64]
    ) -> dict[int, npt.NDArray[np.uint32]]:
        """Return by channel, in order, the ids of messages with a limited signal; kept while limits stay."""
        known = self._limited
        if known is None or known.upper is not upper or known.lower is not lower:
            found: dict[int, set[int]] = {}
            for column in where_(np.isfinite(upper) | np.isfinite(lower)).tolist():
                definition = self.table.definitions[self.table.columns[column][0]]
                found.setdefault(definition.channel, {NO_ID}).add(definition.can_id)
            ids = {channel: np.array(sorted(of), np.uint32) for channel, of in found.items()}
            known = self._limited = _Limited(upper, lower, ids)
        return known.ids

    def _count(self, validity: npt.NDArray[np.uint8]) -> None:
        self._samples.into += len(validity)
        if not validity.any():
            self._samples.out += len(validity)
            return
        counts = np.bincount(validity, minlength=len(Validity)).tolist()
        self._samples.out += counts[Validity.VALID]
        for code, cause in CAUSES.items():
            self._samples.drop(cause, counts[code])

    def _fold(self, bindings: list[Binding]) -> None:
        """Fold the units of the roles into the table: one multiplication instead of two."""
        table = self.table
        for column, binding in enumerate(bindings):
            if (binding.factor, binding.offset) == (1.0, 0.0):
                continue
            rows = table.column == column
            table.scale[rows] *= binding.factor
            table.add[rows] = table.add[rows] * binding.factor + binding.offset
        self._factor = np.array([b.factor for b in bindings], np.float64)
        self._offset = np.array([b.offset for b in bindings], np.float64)

    def _merge(self, batch: FrameBatch, decoded: Decoded) -> Decoded:
        """Put what cantools decoded between the table's samples, in the order of the frames."""
        table = self.table
        frame: list[int] = []
        row: list[int] = []
        value: list[float] = []
        for one in decoded.fallback:
            if one.error:
                continue
            info = table.plan_info[decoded.plan[one.frame]]
            rows = {table.row_info[r].signal.name: r for r in info.rows}
            for name, number in one.values.items():
                frame.append(one.frame)
                row.append(rows[name])
                value.append(float(number))
        frames = np.array(frame, np.int64)
        rows_ = np.array(row, np.int64)
        column = table.column.take(rows_)
        values = np.array(value, np.float64) * self._factor.take(column) + self._offset.take(column)
        raw = self._decoder.raw(batch.frames, frames, rows_)
        return _interleave(batch, decoded, Details(frames, rows_, raw), values, column)


def _side_by_side(batch: FrameBatch) -> FrameBatch:
    """Return the batch with its arrays in one piece each, as the kernel wants them; as a rule they are."""
    if batch.frames.flags.c_contiguous and batch.t_ns.flags.c_contiguous:
        return batch
    frames, t_ns = np.ascontiguousarray(batch.frames), np.ascontiguousarray(batch.t_ns)
    return FrameBatch(batch.channel, frames, t_ns)


def _outcome(decoded: Decoded) -> Outcome:
    unknown = int(np.count_nonzero(decoded.plan == UNKNOWN_PLAN))
    malformed = int(np.count_nonzero(decoded.plan == MALFORMED_PLAN))
    return Outcome(unknown, malformed, int(np.count_nonzero(decoded.short)))


def _interleave(
    batch: FrameBatch, decoded: Decoded, more: Details, value: npt.NDArray[np.float64], column: IntArray
) -> Decoded:
    """Return what was decoded with more samples, in the order of their frames."""
    order = np.argsort(np.concatenate((decoded.frame, more.frame)), kind="stable")

    def both(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.concatenate((one, other))[order]

    details = Details(
        both(decoded.frame, more.frame), both(decoded.row, more.row), both(decoded.raw, more.raw)
    )
    return Decoded(
        decoded.plan, decoded.short, both(decoded.value, value), both(decoded.column, column),
        batch.t_ns.take(details.frame), lambda: details, fallback=decoded.fallback,
    )  # fmt: skip


def _select(samples: SampleBatch, wanted: npt.NDArray[np.bool_]) -> SampleBatch:
    return SampleBatch(
        samples.t_ns[wanted], samples.column[wanted], samples.value[wanted], samples.validity[wanted]
    )


def _bind(table: SignalTable, roles: RoleMap, column: int) -> Binding:
    index, signal = table.columns[column]
    definition: Definition = table.definitions[index]
    return roles.bind(definition.message.name, signal.name, signal.unit or "", definition.channel)


def _catalog(table: SignalTable, bindings: list[Binding]) -> tuple[Signal, ...]:
    """Describe the columns. A name is given once: the VSS name to its first bearer, else message.signal."""
    taken: set[str] = set()
    catalog = []
    for (index, signal), binding in zip(table.columns, bindings, strict=True):
        definition = table.definitions[index]
        own = f"{definition.message.name}.{signal.name}"
        name = _first_free((binding.vss, own, f"{own}@{definition.channel}"), taken)
        taken.add(name)
        catalog.append(_describe(definition, signal, binding, name))
    return tuple(catalog)


def _first_free(names: Iterable[str], taken: set[str]) -> str:
    name = ""
    for name in names:
        if name and name not in taken:
            return name
    tries = (f"{name}#{n}" for n in range(2, len(taken) + 3))
    return next(candidate for candidate in tries if candidate not in taken)


def _describe(definition: Definition, signal: object, binding: Binding, name: str) -> Signal:
    """One catalog entry: numbers in the role's unit where there is a role."""
    s = signal
    conversion = s.conversion  # type: ignore[attr-defined]
    low, high = s.minimum, s.maximum  # type: ignore[attr-defined]
    if low is None or high is None or not low < high:
        low = high = None
    else:
        low, high = sorted((low * binding.factor + binding.offset, high * binding.factor + binding.offset))
    coded = bool(binding.values)
    return Signal(
        name=name,
        message=definition.message.name,
        channel=definition.channel,
        unit=ROLE_UNITS[binding.role] if binding.role else (s.unit or ""),  # type: ignore[attr-defined]
        role=binding.role,
        index=binding.index,
        module=binding.module,
        vss=binding.vss,
        minimum=None if coded else low,
        maximum=None if coded else high,
        scale=1.0 if coded else float(conversion.scale) * binding.factor,
        offset=0.0 if coded else float(conversion.offset) * binding.factor + binding.offset,
        is_float=bool(conversion.is_float),
        cycle_ms=definition.message.cycle_time,
    )
