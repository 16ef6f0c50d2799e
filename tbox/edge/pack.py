"""Assembles the pack's picture from samples: only valid, finite and fresh values count. Judges nothing.

Every signal has a slot: cells first, then probes, then single values by role, then the rest; a batch of any
signals is then a few scatters, and a series is a slice. A scan is complete when every cell was heard anew;
`take` cuts a batch where that happens, so that rules never see half a multiplexer cycle.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from tbox import kernel
from tbox.ledger import StageLedger
from tbox.model import NS_PER_MS, ROLE_UNITS, Now, PackSnapshot, SampleBatch, Signal

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Slots = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

NEVER_NS = -(1 << 62)  # the time stamp of what was not heard yet: older than any limit
LAPS_EXACT_MAX = 4  # a quiet batch in which signals come more often is taken as one run
LAPS_MAX = 4096  # any other batch is cut into at most so many; what is left is taken as one
STALE_NS_MAX = 600_000 * NS_PER_MS  # whatever cycle a DBC declares
SERIES_ROLES = ("cell_voltage", "probe_temperature")

Milliseconds = Annotated[int, msgspec.Meta(ge=10, le=600_000)]


class PackSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long a value stays fresh: so long, or so many cycles of its message where the DBC declares a longer
    one. A scan waits at most as long for a cell that fell silent."""

    cell_stale_ms: Milliseconds = 5000  # a slow multiplexer (foxBMS: 54 steps of up to 100 ms) fits
    probe_stale_ms: Milliseconds = 10_000
    scalar_stale_ms: Milliseconds = 5000
    stale_cycles: Annotated[int, msgspec.Meta(ge=2, le=1000)] = 10


class Run(NamedTuple):
    """What a run brought: its time, which series are complete, and the roles heard and believed."""

    t_ns: int
    cells_done: bool
    probes_done: bool
    touched: list[str]


class Series:
    """The cells or the probes: a slice of the slots, in order of index, and how far the scan has come.

    index: what the vehicle calls each; module: where it sits.
    """

    def __init__(
        self, catalog: Sequence[Signal], role: str, first: int, stale_ms: int, stale_cycles: int
    ) -> None:
        bound: dict[int, int] = {}
        for column, signal in enumerate(catalog):
            if signal.role == role:
                bound.setdefault(signal.index, column)
        self.columns = [bound[index] for index in sorted(bound)]
        self.index = np.array(sorted(bound), dtype=np.int32)
        self.module = np.array([catalog[column].module for column in self.columns], dtype=np.int32)
        self.slots = slice(first, first + len(bound))
        self.stale_ns = max(
            (_stale_ns(catalog[column], stale_ms, stale_cycles) for column in self.columns),
            default=stale_ms * NS_PER_MS,
        )
        self.scans = 0
        self._began_ns = NEVER_NS  # when the running scan heard its first cell
        self._excused = np.zeros(len(bound), dtype=np.bool_)  # silent for long: scans do not wait for them

    def __len__(self) -> int:
        return len(self.columns)

    def complete(self, heard: Bools, t_ns: int) -> bool:
        """Return whether the running scan is complete; one that waited too long goes without the silent."""
        if heard.all():
            if self._excused.any():
                self._excused[:] = False
            return len(heard) > 0
        if not heard.any():
            return False
        if self._began_ns == NEVER_NS:
            self._began_ns = t_ns
        if (heard | self._excused).all():
            self._excused &= ~heard  # one that came back is waited for again
            return True
        if t_ns - self._began_ns > self.stale_ns:
            self._excused = ~heard
            return True
        return False

    def finish(self) -> None:
        """Begin the next scan."""
        self.scans += 1
        self._began_ns = NEVER_NS


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
        cycles = settings.stale_cycles
        self.cells = Series(catalog, "cell_voltage", 0, settings.cell_stale_ms, cycles)
        self.probes = Series(catalog, "probe_temperature", len(self.cells), settings.probe_stale_ms, cycles)
        scalars = [
            column
            for column, signal in enumerate(catalog)
            if signal.role in ROLE_UNITS and signal.role not in SERIES_ROLES
        ]
        first = len(self.cells) + len(self.probes)
        self.roles = [catalog[column].role for column in scalars]
        self._scalars = slice(first, first + len(scalars))
        self._scalar_stale_ns = np.array(
            [_stale_ns(catalog[column], settings.scalar_stale_ms, cycles) for column in scalars], np.int64
        )
        self.slot_of = _slots([*self.cells.columns, *self.probes.columns, *scalars], size)
        self.value: Floats = np.full(size, np.nan)
        self.t_ns: Ints = np.full(size, NEVER_NS, dtype=np.int64)
        self._counts: Ints = np.zeros(size, dtype=np.int64)  # room for one batch's samples by slot
        self._heard: Bools = np.zeros(size, dtype=np.bool_)  # since the scan began, believed or not

    # --- taking in -----------------------------------------------------------------------------------------

    def take(
        self, samples: SampleBatch, now_ns: int, limits: tuple[Floats, Floats] | None = None
    ) -> Iterator[Run]:
        """Take a batch in, run by run, and yield each run once it is in.

        A run holds no signal twice and ends where a scan is complete, so no value is overwritten before it
        was judged. limits: by column, upper and lower; where signals come more than LAPS_EXACT_MAX times and
        no sample reaches one, the batch is taken as one run. None: never. Times in the future of now_ns are
        taken as now.
        """
        count = len(samples)
        self._account.into += count
        if not count:
            return
        if limits is not None and (run := self._at_once(samples, now_ns, *limits)):
            yield run
            return
        believed = (samples.validity == 0) & np.isfinite(samples.value)
        self._count(samples, int(np.count_nonzero(believed)))
        times = np.minimum(samples.t_ns, now_ns)
        slots = self.slot_of.take(samples.column)
        for begin, end in _laps(slots, len(self.value)):
            while begin < end:
                cut = self._cut(slots[begin:end])
                yield self._run(slots, samples.value, believed, times, begin, begin + cut)
                begin += cut

    def _at_once(self, samples: SampleBatch, now_ns: int, upper: Floats, lower: Floats) -> Run | None:
        """Take a quiet batch in as one run; None, and nothing is changed, where it is not quiet or small."""
        touched = np.empty(len(self.value), np.bool_)
        work = kernel.compiled.settle if kernel.compiled is not None else _settle
        believed = work(
            samples.column, samples.value, samples.validity, samples.t_ns, self.slot_of, upper, lower,
            self._counts, self._heard, self.value, self.t_ns, touched, now_ns, LAPS_EXACT_MAX,
        )  # fmt: skip
        if believed < 0:
            return None
        self._count(samples, believed)
        places = np.flatnonzero(touched[self._scalars]).tolist()
        return self._ended(min(int(samples.t_ns[-1]), now_ns), places)

    def _count(self, samples: SampleBatch, out: int) -> None:
        self._account.out += out
        if out < len(samples):
            refused = int(np.count_nonzero(samples.validity))
            self._account.drop("refused", refused)
            self._account.drop("not_finite", len(samples) - out - refused)

    def _cut(self, slots: Slots) -> int:
        """Return after how many samples a scan ends that has samples of its next scan behind it, else all."""
        cut = len(slots)
        for series in (self.cells, self.probes):
            before = self._heard[series.slots]
            if not before.any():
                continue  # nothing of this scan was heard before: what is here cannot be more than one scan
            mine = np.flatnonzero((slots >= series.slots.start) & (slots < series.slots.stop))
            missing = ~before[slots[mine] - series.slots.start]  # which of these samples the scan still needs
            if len(missing) and not missing.all() and np.count_nonzero(missing) == np.count_nonzero(~before):
                cut = min(cut, int(mine[missing][-1]) + 1)
        return cut

    def _run(self, slots: Slots, value: Floats, believed: Bools, times: Ints, begin: int, end: int) -> Run:
        self._heard[slots[begin:end]] = True
        good = begin + np.flatnonzero(believed[begin:end])
        slot = slots[good]
        self.value[slot], self.t_ns[slot] = value[good], times[good]
        places = slot[(slot >= self._scalars.start) & (slot < self._scalars.stop)] - self._scalars.start
        return self._ended(int(times[end - 1]), places.tolist())

    def _ended(self, t_ns: int, places: list[int]) -> Run:
        """Return the run that ends here. places: of the single values it believed."""
        touched = [self.roles[place] for place in places]
        return Run(t_ns, self._done(self.cells, t_ns), self._done(self.probes, t_ns), touched)

    def _done(self, series: Series, t_ns: int) -> bool:
        heard = self._heard[series.slots]
        if not series.complete(heard, t_ns):
            return False
        series.finish()
        heard[:] = False
        return True

    # --- looking -------------------------------------------------------------------------------------------

    def known(self, series: Series, t_ns: int) -> tuple[Floats, Bools]:
        """Return (values, known) of a series at t_ns; those not known are NaN or stale: mask them."""
        return self.value[series.slots].copy(), self.t_ns[series.slots] >= t_ns - series.stale_ns

    def last(self, *roles: str) -> dict[str, float]:
        """Return the last believed values of these roles, however old."""
        values = self.value[self._scalars]
        places = {role: place for place, role in enumerate(self.roles) if role in roles}
        return {
            role: float(values[place]) for role, place in places.items() if values[place] == values[place]
        }

    def scalars(self, t_ns: int) -> dict[str, float]:
        """Return every role with a fresh value."""
        values = self.value[self._scalars].tolist()
        fresh = (self.t_ns[self._scalars] >= t_ns - self._scalar_stale_ns).tolist()
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


def _stale_ns(signal: Signal, least_ms: int, cycles: int) -> int:
    return max(least_ms * NS_PER_MS, min(cycles * (signal.cycle_ms or 0) * NS_PER_MS, STALE_NS_MAX))


def _slots(order: Sequence[int], size: int) -> Slots:
    """Return the slot of each catalog column: those in `order` first, the rest behind."""
    placed = set(order)
    slot_of = np.empty(size, dtype=np.int64)
    slot_of[[*order, *(column for column in range(size) if column not in placed)]] = np.arange(size)
    return slot_of


def _settle(
    column: Ints, value: Floats, validity: npt.NDArray[np.uint8], t_ns: Ints, slot_of: Slots, upper: Floats,
    lower: Floats, counts: Ints, heard: Bools, pack_value: Floats, pack_t_ns: Ints, touched: Bools,
    now_ns: int, laps: int,
) -> int:  # fmt: skip
    """Do what kernel.c's settle does."""
    slots = slot_of.take(column)
    counts[:] = np.bincount(slots, minlength=len(counts))
    if int(counts.max()) <= laps:
        return -1
    if ((value >= upper.take(column)) | (value <= lower.take(column))).any():
        return -1
    heard |= counts > 0
    at = np.flatnonzero((validity == 0) & np.isfinite(value))
    last = np.full(len(counts), -1, dtype=np.int64)
    last[slots[at]] = at  # the others of a signal would only be overwritten
    np.greater_equal(last, 0, out=touched)
    found = last[touched]
    pack_value[touched], pack_t_ns[touched] = value[found], np.minimum(t_ns[found], now_ns)
    return len(at)


def _laps(slots: Slots, size: int) -> list[tuple[int, int]]:
    """Cut a batch into runs in which no signal appears twice, as long as they can be."""
    count = len(slots)
    if int(np.bincount(slots, minlength=size).max()) == 1:
        return [(0, count)]
    order = np.argsort(slots, kind="stable")
    same = slots[order[1:]] == slots[order[:-1]]
    before = np.full(count, -1, dtype=np.int64)  # where the same signal was last, -1: nowhere
    before[order[1:][same]] = order[:-1][same]
    reach = np.maximum.accumulate(before)
    cuts = [0]
    while len(cuts) < LAPS_MAX:  # the next cut is the first sample that repeats one of the running lap
        cut = int(np.searchsorted(reach, cuts[-1]))
        if cut >= count:
            break
        cuts.append(cut)
    return list(zip(cuts, [*cuts[1:], count], strict=True))
