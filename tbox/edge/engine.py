"""The rules at work: samples in, alarm records out. Sends nothing, stores nothing.

The pack takes a batch in run by run; each run's readings (of cells, probes and single values) go to the rules
that watch them. On a healthy pack a rule costs one comparison a reading.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from tbox.edge.alarms import Alarm
from tbox.edge.bands import Band
from tbox.edge.imbalance import Imbalance
from tbox.edge.judge import Judge
from tbox.edge.mode import Context
from tbox.edge.pack import Floats, Ints, Pack, PackSettings, Run, Series
from tbox.edge.readings import NAN, NO_ITEM, Items, Reading, Scalar
from tbox.edge.rules import WATCHES, Rule, RuleSet
from tbox.edge.thermal import Runaway, Thermal
from tbox.edge.watches import BMS_ROLES, LOST_NS, Load, LoadSettings, Watches
from tbox.ledger import StageLedger
from tbox.model import NS_PER_MS, Draft, Level, Now, SampleBatch, Signal

# A critical that must hold at least this long is pending, and seen as `isolating`, well before it is
# confirmed; only quicker ones can be confirmed by the frame that first shows them.
LEAD_NS = 200 * NS_PER_MS

FEW = 64  # samples that are looked at before all are

CELL_EXTREMES = ("cell_voltage_max", "cell_voltage_min")
PROBE_EXTREMES = ("temperature_max", "temperature_min")

# What a derived watch needs on the bus: one of these sets of roles.
NEEDS: dict[str, tuple[set[str], ...]] = {
    **{name: ({"cell_voltage"},) for name, watch in WATCHES.items() if watch.item == "cell"},
    **{name: ({"probe_temperature"},) for name, watch in WATCHES.items() if watch.item == "probe"},
    "cell_voltage": ({"cell_voltage"}, {"cell_voltage_max"}, {"cell_voltage_min"}),
    "probe_temperature": ({"probe_temperature"}, {"temperature_max"}, {"temperature_min"}),
    "cell_spread": ({"cell_voltage"}, set(CELL_EXTREMES)),
    "temperature_spread": ({"probe_temperature"}, set(PROBE_EXTREMES)),
    "thermal_runaway": ({"probe_temperature"},),
    "pack_voltage_per_cell": ({"pack_voltage"},),
    "pack_voltage_mismatch": ({"pack_voltage", "cell_voltage"},),
    "soc_jump": ({"soc"},),
    "isolation_per_volt": ({"isolation_resistance", "pack_voltage"},),
    "contactor_mismatch": ({"contactor_state", "contactor_command"},),
    "bms_silent": tuple({role} for role in sorted(BMS_ROLES)),
}


class Standing(NamedTuple):
    """An alarm the receiver knows of. place: the cell or probe as the vehicle counts it, -1 for none."""

    rule: Rule
    alarm: Alarm
    place: int
    text: str


class Engine:
    """All rules of a rule set over one vehicle's signals. account: ledger.stage("pack", "samples")."""

    def __init__(
        self,
        catalog: tuple[Signal, ...],
        rules: RuleSet,
        account: StageLedger,
        *,
        pack: PackSettings | None = None,
        load: LoadSettings | None = None,
        series_cells: int | None = None,
    ) -> None:
        self.pack = Pack(catalog, account, pack)
        self._cell_names = [f"cell {index}" for index in self.pack.cells.index]
        self._probe_names = [f"probe {index}" for index in self.pack.probes.index]
        self._imbalance = Imbalance(self._cell_names)
        self._thermal = Thermal(self._probe_names)
        self._load = Load(load)
        self._cell_ohm = (load or LoadSettings()).cell_mohm / 1000.0
        self._ocv_v = NAN  # what the cells' mean would be without the load, about
        self._watches = Watches(self.pack, series_cells)
        self._roles = frozenset(signal.role for signal in catalog if signal.role)
        self._is_bms = np.array([signal.role in BMS_ROLES for signal in catalog], dtype=np.bool_)
        self._columns_of = _columns_by_role(catalog)
        self._context = Context()
        self._now_ns = 0
        self._scalars: dict[str, float] = {}
        self._lost_ns: dict[str, int] = {}  # when a series was last searched for silent items
        self._judges: dict[str, list[Judge]] = {}
        self._all: list[Judge] = []
        self._orphans: list[Draft] = []
        self.reload(rules)

    # --- the rules in force --------------------------------------------------------------------------------

    def reload(self, rules: RuleSet) -> None:
        """Put other rules in force. Alarms of rules that stay as they are go on; those of others end."""
        before = {judge.rule.name: judge for judge in self._all}
        self._judges = {}
        for rule in rules.rules:
            judge = Judge(rule, self._names_of(rule))
            old = before.get(rule.name)
            if old and old.rule == rule:
                judge.adopt(before.pop(rule.name))
            self._judges.setdefault(rule.watch, []).append(judge)
        self._all = [judge for judges in self._judges.values() for judge in judges]
        by_name = {judge.rule.name: judge for judge in self._all}
        for judge in self._all:
            judge.others = [by_name[name] for name in judge.rule.unless if name in by_name]
        self._orphans += [
            draft
            for judge in before.values()
            for draft in judge.reset(self._now_ns, "the rule was changed", self._body())
        ]
        self._escalating = [judge for judge in self._all if judge.rule.escalate]
        params = next((rule.params for rule in rules.rules if rule.watch == "thermal_runaway"), None)
        self._imbalance.knee_v = max(
            (rule.knee_v for rule in rules.rules if rule.watch == "cell_drift"), default=-np.inf
        )
        self._runaway = Runaway(params, self._cell_names, self._probe_names) if params else None
        self._isolators = [judge for judge in self._all if judge.rule.isolate]
        self._runaway_isolates = any(judge.rule.watch == "thermal_runaway" for judge in self._isolators)
        self._limits = self._outer_limits((rule, rule.ladder.bands[0]) for rule in rules.rules)
        self.isolation_limits = self._outer_limits(
            (judge.rule, band)
            for judge in self._isolators
            for band in judge.rule.ladder.bands
            if band.level >= Level.CRITICAL and band.for_ns < LEAD_NS
        )
        self.isolates_at_once = bool(np.isfinite(self.isolation_limits).any())

    def _names_of(self, rule: Rule) -> list[str]:
        names = {"cell": self._cell_names, "probe": self._probe_names}.get(rule.item, [])
        return names or [f"highest {rule.item}", f"lowest {rule.item}"]

    def _outer_limits(self, bands: Iterable[tuple[Rule, Band]]) -> tuple[Floats, Floats]:
        """Return for each column the nearest upper and lower limit the bands set on its bare value."""
        size = len(self._is_bms)
        upper, lower = np.full(size, np.inf), np.full(size, -np.inf)
        for rule, band in bands:
            for columns in (self._columns_of[role] for role in _bare(rule.watch) if role in self._columns_of):
                if rule.ladder.sign > 0:
                    upper[columns] = np.minimum(upper[columns], band.limit)
                else:
                    lower[columns] = np.maximum(lower[columns], band.limit)
        return upper, lower

    @property
    def unwatched(self) -> list[str]:
        """Names of rules whose signals this vehicle's catalog does not carry: they can never speak."""
        return [
            judge.rule.name
            for judge in self._all
            if not any(needs <= self._roles for needs in NEEDS.get(judge.rule.watch, ({judge.rule.watch},)))
        ]

    @property
    def isolating(self) -> bool:
        """Whether a rule that may ask for isolation has an alarm, confirmed or not, or a probe rises so fast
        that it soon may. Any thread may ask."""
        if self._runaway_isolates and self._runaway is not None and self._runaway.near:
            return True
        return any(judge.busy for judge in self._isolators)

    # --- the step ------------------------------------------------------------------------------------------

    def step(self, now: Now, samples: SampleBatch, context: Context) -> list[Draft]:
        """Take a batch in (it may be empty); return what alarms have to tell. now never runs backwards."""
        self._now_ns, self._context = now.mono_ns, context
        drafts, self._orphans = self._orphans, []
        limits = None if any(judge.busy for judge in self._all) else self._limits
        for run in self.pack.take(samples, now.mono_ns, limits):
            drafts += self._judge_run(run)
        if self._heard_bms(samples):
            self._watches.heard(now.mono_ns)
        return drafts + self._judge_time(now.mono_ns)

    def reset(self, t_ns: int, rule: str | None) -> list[Draft]:
        """End the alarms of a rule (None: of all), latched ones too; what still holds is raised again."""
        drafts: list[Draft] = []
        for judge in self._all:
            if rule in (None, judge.rule.name):
                drafts += judge.reset(t_ns, "reset", self._body())
        return drafts

    def _heard_bms(self, samples: SampleBatch) -> bool:
        """Return whether a believed sample of the BMS is there; mostly one is among the first."""
        for part in (slice(FEW), slice(FEW, None)):
            if (self._is_bms.take(samples.column[part]) & (samples.validity[part] == 0)).any():
                return True
        return False

    def _judge_run(self, run: Run) -> list[Draft]:
        readings: dict[str, Reading] = {}
        if run.touched:
            roles = frozenset(run.touched)
            self._scalars = self.pack.scalars(run.t_ns)
            readings |= self._watches.step(run.t_ns, self._scalars, roles)
            readings |= self._fallbacks(roles)
        if run.cells_done:
            readings |= self._cell_readings(run.t_ns)
        if run.probes_done:
            readings |= self._probe_readings(run.t_ns)
        if not readings:
            return []
        conditions = self._load.step(
            run.t_ns, self._scalars, has_charging_state="charging_state" in self._roles
        )
        return self._apply(run.t_ns, readings, conditions)

    def _apply(self, t_ns: int, readings: dict[str, Reading], conditions: dict[str, bool]) -> list[Draft]:
        drafts: list[Draft] = []
        for watch, reading in readings.items():
            for judge in self._judges.get(watch, ()):
                rule = judge.rule
                if conditions[rule.only] and not self._ocv_v < rule.knee_v:
                    drafts += judge.judge(
                        t_ns, reading, rule.load_allowance_v_per_a * self._load.current_a, self._body
                    )
                elif judge.busy:
                    drafts += judge.stand_aside(t_ns, self._body())
        return drafts

    def _judge_time(self, t_ns: int) -> list[Draft]:
        """What time alone brings about: silence and escalation."""
        drafts: list[Draft] = []
        for judge in self._judges.get("bms_silent", ()):
            if not judge.busy and self._watches.heard_lately(t_ns):
                continue
            reading = self._watches.silence(t_ns, self.pack.last("ignition", "charging_state"))
            drafts += judge.judge(t_ns, reading, 0.0, self._body)
        for judge in self._escalating:
            if judge.busy:
                drafts += judge.tick(t_ns, self._body())
        return drafts

    def _body(self) -> dict[str, Any]:
        return self._context.body()

    # --- readings ------------------------------------------------------------------------------------------

    def _cell_readings(self, t_ns: int) -> dict[str, Reading]:
        readings = self._imbalance.step(t_ns, *self.pack.known(self.pack.cells, t_ns), self._sag_v())
        self._ocv_v = self._imbalance.ocv_v
        cells = readings["cell_voltage"]
        if self._runaway and isinstance(cells, Items):
            self._runaway.see_cells(t_ns, cells.values)
        return readings | self._lost("cell_lost", self.pack.cells, t_ns)

    def _sag_v(self) -> float:
        """Return what the load takes from a cell's voltage; below 0 while charging."""
        return -self._scalars.get("pack_current", 0.0) * self._cell_ohm

    def _probe_readings(self, t_ns: int) -> dict[str, Reading]:
        readings = self._thermal.step(t_ns, *self.pack.known(self.pack.probes, t_ns))
        probes = readings["probe_temperature"]
        if self._runaway and isinstance(probes, Items):
            readings["thermal_runaway"] = self._runaway.see_probes(t_ns, probes.values, self._thermal.rise)
        return readings | self._lost("probe_lost", self.pack.probes, t_ns)

    def _lost(self, watch: str, series: Series, t_ns: int) -> dict[str, Reading]:
        if 0 <= t_ns - self._lost_ns.get(watch, -LOST_NS) < LOST_NS:
            return {}
        self._lost_ns[watch] = t_ns
        return {watch: self._watches.lost(series, t_ns)}

    def _fallbacks(self, touched: frozenset[str]) -> dict[str, Reading]:
        """Where single cells or probes are not on the bus, the BMS's own extremes stand for them."""
        readings: dict[str, Reading] = {}
        for series, watch, spread, extremes in (
            (self.pack.cells, "cell_voltage", "cell_spread", CELL_EXTREMES),
            (self.pack.probes, "probe_temperature", "temperature_spread", PROBE_EXTREMES),
        ):
            if len(series) or touched.isdisjoint(extremes):
                continue
            high, low = (self._scalars.get(role, NAN) for role in extremes)
            readings[watch] = Items(
                np.array([high, low]), 0 if high == high else NO_ITEM, 1 if low == low else NO_ITEM, high, low
            )
            if high == high and low == low:
                if watch == "cell_voltage":
                    self._ocv_v = (high + low) / 2.0 + self._sag_v()
                readings[spread] = Scalar(high - low, detail=_from_to(low, high))
        return readings

    # --- what stands ---------------------------------------------------------------------------------------

    def standing(self) -> list[Standing]:
        """Return the alarms that stand, by rule."""
        return [
            Standing(judge.rule, alarm, self._index_of(judge, alarm), judge.text_of(alarm))
            for judge in self._all
            if judge.busy
            for alarm in judge.alarms
        ]

    def _index_of(self, judge: Judge, alarm: Alarm) -> int:
        place = judge.place_of(alarm)
        item = "probe" if judge.rule.watch == "thermal_runaway" else judge.rule.item
        index = {"cell": self.pack.cells.index, "probe": self.pack.probes.index}.get(item)
        return int(index[place]) if index is not None and 0 <= place < len(index) else NO_ITEM

    @property
    def scalars(self) -> dict[str, float]:
        """The single values known at the last run, by role."""
        return self._scalars

    @property
    def spread_v(self) -> float | None:
        return self._imbalance.spread_v

    @property
    def hottest_c(self) -> float | None:
        return self._thermal.hottest_c


def _columns_by_role(catalog: tuple[Signal, ...]) -> dict[str, Ints]:
    columns: dict[str, list[int]] = {}
    for column, signal in enumerate(catalog):
        if signal.role:
            columns.setdefault(signal.role, []).append(column)
    return {role: np.array(places, dtype=np.int64) for role, places in columns.items()}


def _bare(watch: str) -> tuple[str, ...]:
    """Return the roles whose bare value a watch is."""
    return {
        "cell_voltage": ("cell_voltage", *CELL_EXTREMES),
        "probe_temperature": ("probe_temperature", *PROBE_EXTREMES),
    }.get(watch, (watch,))


def _from_to(low: float, high: float) -> Any:
    return lambda _: f"{low:g} to {high:g}"
