"""Assembles the pack's picture from samples: only valid, finite and fresh values count. Judges nothing.

Values lie in one array over the whole catalog, so that a batch of any signals costs a few scatters and no
Python per sample. A scan is complete when every cell was heard anew; `take` cuts a batch where that happens,
so that rules never see half a multiplexer cycle.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated

import msgspec
import numpy as np
import numpy.typing as npt

from tbox.ledger import StageLedger
from tbox.model import NS_PER_MS, ROLE_UNITS, Now, PackSnapshot, SampleBatch, Signal

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Columns = npt.NDArray[np.int32]
Bools = npt.NDArray[np.bool_]

NEVER_NS = -(1 << 62)  # the time stamp of what was not heard yet: older than any limit
LAPS_EXACT_MAX = 4  # a quiet batch in which signals come more often is taken as one run
LAPS_MAX = 4096  # any other batch is cut into at most so many; what is left is taken as one

Milliseconds = Annotated[int, msgspec.Meta(ge=10, le=600_000)]


class PackSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long a value stays fresh. A scan waits at most `cell_stale_ms` for a cell that fell silent."""

    cell_stale_ms: Milliseconds = 5000  # a slow multiplexer (foxBMS: 54 steps of up to 100 ms) fits
    probe_stale_ms: Milliseconds = 10_000
    scalar_stale_ms: Milliseconds = 5000


class Series:
    """The cells or the probes: columns in order of their index, and how far the running scan has come."""

    def __init__(self, catalog: Sequence[Signal], role: str, stale_ms: int) -> None:
        bound: dict[int, int] = {}
        for column, signal in enumerate(catalog):
            if signal.role == role:
                bound.setdefault(signal.index, column)
        self.index = np.array(sorted(bound), dtype=np.int32)  # what the vehicle calls them
        self.columns = np.array([bound[i] for i in sorted(bound)], dtype=np.int32)
        self.module = np.array([catalog[column].module for column in self.columns], dtype=np.int32)
        self.stale_ns = stale_ms * NS_PER_MS
        self.scans = 0
        self.began_ns = NEVER_NS  # when the running scan heard its first cell
        self._missing_allowed = np.zeros(len(self.columns), dtype=np.bool_)

    def __len__(self) -> int:
        return len(self.columns)

    def complete(self, heard: Bools, t_ns: int) -> bool:
        """Return whether the running scan is complete; one that waited too long goes without the silent."""
        fresh = heard[self.columns]
        if fresh.all():
            if self._missing_allowed.any():
                self._missing_allowed[:] = False
            return len(fresh) > 0
        if self.began_ns == NEVER_NS:
            if fresh.any():
                self.began_ns = t_ns
            return False
        if bool((fresh | self._missing_allowed).all()) and bool(fresh.any()):
            self._missing_allowed &= ~fresh  # one that came back is waited for again
            return True
        if t_ns - self.began_ns > self.stale_ns:
            self._missing_allowed = ~fresh
            return bool(fresh.any())
        return False

    def finish(self, heard: Bools) -> None:
        """Begin the next scan."""
        heard[self.columns] = False
        self.scans += 1
        self.began_ns = NEVER_NS


class Pack:
    """The last believed value of every signal, and when it was taken.

    account: ledger.stage("pack", "samples"), opened by the caller: out are the believed samples; dropped are
    "refused" (by the decoder, counted by cause there) and "not_finite".
    """

    def __init__(
        self, catalog: Sequence[Signal], account: StageLedger, settings: PackSettings | None = None
    ) -> None:
        settings = settings or PackSettings()
        size = len(catalog)
        self._account = account
        self.value: Floats = np.full(size, np.nan)
        self.t_ns: Ints = np.full(size, NEVER_NS, dtype=np.int64)
        self._heard: Bools = np.zeros(size, dtype=np.bool_)  # since the scan began, believed or not
        self._first: Ints = np.zeros(size, dtype=np.int64)
        self.cells = Series(catalog, "cell_voltage", settings.cell_stale_ms)
        self.probes = Series(catalog, "probe_temperature", settings.probe_stale_ms)
        self._series = tuple(series for series in (self.cells, self.probes) if len(series))
        self._scalar_stale_ns = settings.scalar_stale_ms * NS_PER_MS
        self.roles, self._role_columns, self._role_of = _scalars(catalog)
        # After each run: the indexes into `roles` that were heard and believed.
        self.touched: list[int] = []
        self._seen_run: Bools = np.zeros(size, dtype=np.bool_)

    def take(
        self, samples: SampleBatch, now_ns: int, *, quiet: bool = False
    ) -> Iterator[tuple[int, bool, bool]]:
        """Take a batch in, run by run; after each run yield (its time, cells complete, probes complete).

        A run holds no signal twice and ends where a scan is complete, so no value is overwritten before it
        was judged. quiet: every sample was already held against its limits and none passed one; then a batch
        in which signals come more than LAPS_EXACT_MAX times is taken as one run. Times in the future of
        now_ns are taken as now.
        """
        count = len(samples)
        self._account.into += count
        if not count:
            return
        believed = (samples.validity == 0) & np.isfinite(samples.value)
        self._count(samples, believed)
        times = np.minimum(samples.t_ns, now_ns)
        laps = _laps(samples.column, len(self.value))
        if quiet and len(laps) > LAPS_EXACT_MAX:
            yield self._run(samples, believed, times, 0, count)
            return
        for begin, end in laps:
            yield from self._lap(samples, believed, times, begin, end)

    def _count(self, samples: SampleBatch, believed: Bools) -> None:
        out = int(np.count_nonzero(believed))
        self._account.out += out
        if out < len(samples):
            refused = int(np.count_nonzero(samples.validity))
            self._account.drop("refused", refused)
            self._account.drop("not_finite", len(samples) - out - refused)

    def _lap(
        self, samples: SampleBatch, believed: Bools, times: Ints, begin: int, end: int
    ) -> Iterator[tuple[int, bool, bool]]:
        """Take samples[begin:end], which holds no column twice; cut it after the sample that ends a scan."""
        while begin < end:
            column = samples.column[begin:end]
            self._first[column] = np.arange(len(column))
            cut = len(column)
            missing = [series.columns[~self._heard[series.columns]] for series in self._series]
            self._seen_run[column] = True
            for columns in missing:
                if len(columns) and self._seen_run[columns].all():
                    cut = min(cut, int(self._first[columns].max()) + 1)
            self._seen_run[column] = False
            yield self._run(samples, believed, times, begin, begin + cut)
            begin += cut

    def _run(
        self, samples: SampleBatch, believed: Bools, times: Ints, begin: int, end: int
    ) -> tuple[int, bool, bool]:
        column, good = samples.column[begin:end], believed[begin:end]
        self._heard[column] = True
        t_ns = int(times[end - 1])
        if not good.all():
            column, value, taken = column[good], samples.value[begin:end][good], times[begin:end][good]
        else:
            value, taken = samples.value[begin:end], times[begin:end]
        self.value[column] = value
        self.t_ns[column] = taken
        places = self._role_of[column]
        self.touched = places[places >= 0].tolist()
        done = [series.complete(self._heard, t_ns) for series in (self.cells, self.probes)]
        for series, complete in zip((self.cells, self.probes), done, strict=True):
            if complete:
                series.finish(self._heard)
        return t_ns, done[0], done[1]

    # --- looking -----------------------------------------------------------------------------------------

    def known(self, series: Series, t_ns: int) -> tuple[Floats, Bools]:
        """Return (values, known) of a series at t_ns; those not known are NaN or stale: mask them."""
        columns = series.columns
        return self.value[columns], self.t_ns[columns] >= t_ns - series.stale_ns

    def scalar(self, role_index: int) -> float:
        """Return the last believed value of roles[role_index], however old."""
        return float(self.value[self._role_columns[role_index]])

    def scalars(self, t_ns: int) -> dict[str, float]:
        """Return every role with a fresh value."""
        values = self.value[self._role_columns].tolist()
        fresh = (self.t_ns[self._role_columns] >= t_ns - self._scalar_stale_ns).tolist()
        known: dict[str, float] = {}
        for role, value, ok in zip(self.roles, values, fresh, strict=True):
            if ok and role not in known:
                known[role] = value
        return known

    def snapshot(self, now: Now) -> PackSnapshot:
        """Return the pack as known now."""
        cell_v, cell_ok = self.known(self.cells, now.mono_ns)
        probe_c, probe_ok = self.known(self.probes, now.mono_ns)
        return PackSnapshot(
            now.mono_ns, cell_v, cell_ok, probe_c, probe_ok, self.probes.module,
            self.scalars(now.mono_ns), self.cells.scans,
        )  # fmt: skip


def _scalars(catalog: Sequence[Signal]) -> tuple[list[str], Columns, Columns]:
    """Return the roles with one value, their columns, and for each catalog column its place in them or -1."""
    bound = [
        (signal.role, column)
        for column, signal in enumerate(catalog)
        if signal.role in ROLE_UNITS and signal.role not in ("cell_voltage", "probe_temperature")
    ]
    role_of = np.full(len(catalog), -1, dtype=np.int32)
    for place, (_, column) in enumerate(bound):
        role_of[column] = place
    return [role for role, _ in bound], np.array([c for _, c in bound], dtype=np.int32), role_of


def _laps(column: Columns, size: int) -> list[tuple[int, int]]:
    """Cut a batch into runs in which no column appears twice, as long as they can be."""
    count = len(column)
    if int(np.bincount(column, minlength=size).max()) == 1:
        return [(0, count)]
    order = np.argsort(column, kind="stable")
    same = column[order[1:]] == column[order[:-1]]
    before = np.full(count, -1, dtype=np.int64)  # the previous sample of the same column
    before[order[1:][same]] = order[:-1][same]
    cuts = [0]
    # The next cut is the first sample whose predecessor lies in the running lap.
    reach = np.maximum.accumulate(before)
    while len(cuts) < LAPS_MAX:
        cut = int(np.searchsorted(reach, cuts[-1]))
        if cut >= count:
            break
        cuts.append(cut)
    return list(zip(cuts, [*cuts[1:], count], strict=True))
