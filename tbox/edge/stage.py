"""The edge stage: samples in; alarms, telemetry, journeys, captures and isolation requests out. Does no IO.

One step, in order: the pack takes the samples in, run by run; each run's readings go through the rules; then
the driving mode, the sampler, journeys, estimators and the black box see the same instant; the isolation
request follows from the alarms that stand.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

import msgspec
import numpy as np

from tbox.edge.alarms import Alarm
from tbox.edge.blackbox import BlackBox, BlackBoxSettings
from tbox.edge.estimators import Estimators, EstimatorSettings
from tbox.edge.imbalance import Imbalance
from tbox.edge.isolation import Demand, Isolation, IsolationSettings, NoWarning, WarningOutput
from tbox.edge.journey import Journeys, JourneySettings
from tbox.edge.judge import Judge
from tbox.edge.mode import Context, ModeSettings, ModeTracker
from tbox.edge.pack import Floats, Pack, PackSettings, Series
from tbox.edge.readings import Items, Reading, Scalar
from tbox.edge.rules import WATCHES, Rule, RuleSet
from tbox.edge.sampler import Sampler, SamplerSettings
from tbox.edge.thermal import Runaway, Thermal
from tbox.edge.watches import BMS_ROLES, Load, LoadSettings, Watches
from tbox.ledger import Ledger
from tbox.model import NS_PER_MS, NS_PER_S, Draft, EdgeOutput, FrameBatch, Level, Now, SampleBatch, Signal

STEP_NS_MAX = 100 * NS_PER_MS  # it wants to be called so often, on a silent bus too
CELL_FALLBACK = ("cell_voltage_max", "cell_voltage_min")
PROBE_FALLBACK = ("temperature_max", "temperature_min")


class EdgeSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The settings of all parts. series_cells: cells in series where the bus does not carry each of them."""

    series_cells: Annotated[int, msgspec.Meta(ge=1, le=1000)] | None = None
    pack: PackSettings = PackSettings()
    load: LoadSettings = LoadSettings()
    isolation: IsolationSettings = IsolationSettings()
    mode: ModeSettings = ModeSettings()
    sampler: SamplerSettings = SamplerSettings()
    blackbox: BlackBoxSettings = BlackBoxSettings()
    journey: JourneySettings = JourneySettings()
    estimators: EstimatorSettings = EstimatorSettings()


class EdgeStage:
    """Every rule on every sample. Owned by one thread. warning: a lamp or buzzer, if one is fitted."""

    def __init__(
        self,
        catalog: tuple[Signal, ...],
        rules: RuleSet,
        settings: EdgeSettings,
        ledger: Ledger,
        warning: WarningOutput | None = None,
    ) -> None:
        self._pack = Pack(catalog, ledger.stage("pack", "samples"), settings.pack)
        self._cell_names = [f"cell {index}" for index in self._pack.cells.index]
        self._probe_names = [f"probe {index}" for index in self._pack.probes.index]
        self._imbalance = Imbalance(self._cell_names)
        self._thermal = Thermal(self._probe_names)
        self._load = Load(settings.load)
        self._watches = Watches(self._pack, settings.series_cells)
        self._isolation = Isolation(settings.isolation)
        self._mode = ModeTracker(settings.mode)
        self._sampler = Sampler(catalog, ledger.stage("sampler", "samples"), settings.sampler)
        self._journeys = Journeys(settings.journey)
        self._estimators = Estimators(settings.estimators)
        self._blackbox = BlackBox(ledger.stage("blackbox", "frames"), settings.blackbox)
        self._warning: WarningOutput = warning or NoWarning()
        self._warned: tuple[Level | None, str] = (None, "")
        self._roles = frozenset(signal.role for signal in catalog if signal.role)
        self._is_bms = np.array([signal.role in BMS_ROLES for signal in catalog], dtype=np.bool_)
        self._catalog_size = len(catalog)
        self._columns_of = _columns_by_watch(catalog)
        self._context = Context()
        self._now_ns = -(1 << 62)
        self._scalars: dict[str, float] = {}
        self._fresh_at_ns: int | None = None
        self._judges: dict[str, list[Judge]] = {}
        self._install(rules)

    # --- the step ----------------------------------------------------------------------------------------

    def step(self, now: Now, samples: SampleBatch, frames: FrameBatch | None = None) -> EdgeOutput:
        """Take what was received since the last step. Call it at least every 100 ms, bus or no bus."""
        now = self._forward(now)
        alarms = self._judge(now, samples)
        snapshot = self._pack.snapshot(now)
        self._scalars = snapshot.scalars
        self._context, drafts = self._mode.step(now, snapshot)
        drafts += self._sampler.step(now, samples, self._context)
        drafts += self._journeys.step(now, snapshot, self._context)
        drafts += self._estimators.step(now, snapshot, self._context)
        drafts += self._blackbox.step(now, frames)
        return self._out(now, alarms, drafts)

    def flush(self, now: Now) -> EdgeOutput:
        """At stop: give out what is held (open windows, journeys, captures)."""
        now = self._forward(now)
        drafts = self._sampler.flush(now, self._context)
        drafts += self._journeys.flush(now)
        drafts += self._blackbox.flush(now)
        return EdgeOutput(drafts)

    def reload(self, rules: RuleSet) -> None:
        """Put other rules in force. Alarms of rules that stay as they are go on; those of others end."""
        self._install(rules)

    def reset_alarms(self, now: Now, rule: str | None = None) -> EdgeOutput:
        """End the alarms of a rule (None: of all), latched ones too; what still holds is raised again."""
        now = self._forward(now)
        alarms: list[Draft] = []
        for judge in self._all_judges():
            if rule is None or judge.rule.name == rule:
                alarms += judge.reset(now.mono_ns, "reset", self._context.body())
        return self._out(now, alarms, [])

    def _forward(self, now: Now) -> Now:
        """Time never runs backwards in here, whatever comes in."""
        if now.mono_ns < self._now_ns:
            now = now._replace(mono_ns=self._now_ns)
        self._now_ns = now.mono_ns
        return now

    def _out(self, now: Now, alarms: list[Draft], drafts: list[Draft]) -> EdgeOutput:
        for alarm in alarms:
            if alarm.body["event"] == "clear":
                self._blackbox.clear(now, alarm)
            else:
                drafts += self._blackbox.trigger(now, alarm)
        ack = self._scalars.get("isolation_ack")
        sends, events = self._isolation.step(
            now.mono_ns, self._demands(), None if ack is None else ack >= 0.5
        )
        if alarms:
            self._warn()
        wake_ns = now.mono_ns + STEP_NS_MAX
        if self._isolation.next_ns is not None:
            wake_ns = min(wake_ns, max(self._isolation.next_ns, now.mono_ns))
        return EdgeOutput(alarms + events + drafts, sends, wake_ns)

    # --- the rules ---------------------------------------------------------------------------------------

    def _judge(self, now: Now, samples: SampleBatch) -> list[Draft]:
        drafts, self._orphans = self._orphans, []
        for t_ns, cells_done, probes_done in self._pack.take(
            samples, now.mono_ns, quiet=self._quiet(samples)
        ):
            drafts += self._judge_run(t_ns, cells_done, probes_done)
        if len(samples) and bool((self._is_bms[samples.column] & (samples.validity == 0)).any()):
            self._watches.heard(now.mono_ns)
        return drafts + self._judge_time(now.mono_ns)

    def _judge_run(self, t_ns: int, cells_done: bool, probes_done: bool) -> list[Draft]:
        readings: dict[str, Reading] = {}
        touched = self._pack.touched
        if touched:
            roles = frozenset(self._pack.roles[place] for place in touched)
            self._scalars = self._pack.scalars(t_ns)
            readings |= self._watches.step(t_ns, self._scalars, roles)
            readings |= self._fallbacks(t_ns, roles)
        if cells_done:
            readings |= self._cell_readings(t_ns)
        if probes_done:
            readings |= self._probe_readings(t_ns)
        if not readings:
            return []
        conditions = self._load.step(t_ns, self._scalars, has_charging_state="charging_state" in self._roles)
        return self._apply(t_ns, readings, conditions)

    def _cell_readings(self, t_ns: int) -> dict[str, Reading]:
        cell_v, known = self._pack.known(self._pack.cells, t_ns)
        readings = self._imbalance.step(t_ns, cell_v, known)
        cells = readings["cell_voltage"]
        if self._runaway and isinstance(cells, Items):
            self._runaway.see_cells(t_ns, cells.values)
        readings["cell_lost"] = self._watches.lost(self._pack.cells, t_ns)
        return readings

    def _probe_readings(self, t_ns: int) -> dict[str, Reading]:
        probe_c, known = self._pack.known(self._pack.probes, t_ns)
        readings = self._thermal.step(t_ns, probe_c, known)
        probes = readings["probe_temperature"]
        if self._runaway and isinstance(probes, Items):
            readings["thermal_runaway"] = self._runaway.see_probes(t_ns, probes.values, self._thermal.rise)
        readings["probe_lost"] = self._watches.lost(self._pack.probes, t_ns)
        return readings

    def _fallbacks(self, t_ns: int, touched: frozenset[str]) -> dict[str, Reading]:
        """Where single cells or probes are not on the bus, the BMS's own extremes stand for them."""
        readings: dict[str, Reading] = {}
        for series, watch, spread, roles in (
            (self._pack.cells, "cell_voltage", "cell_spread", CELL_FALLBACK),
            (self._pack.probes, "probe_temperature", "temperature_spread", PROBE_FALLBACK),
        ):
            if len(series) or touched.isdisjoint(roles):
                continue
            high, low = (self._scalars.get(role) for role in roles)
            both = np.array([value if value is not None else np.nan for value in (high, low)])
            readings[watch] = _extremes(both)
            if high is not None and low is not None:
                readings[spread] = Scalar(high - low, detail=lambda _, h=high, w=low: f"{w:g} to {h:g}")  # type: ignore[misc]
        return readings

    def _apply(self, t_ns: int, readings: dict[str, Reading], conditions: dict[str, bool]) -> list[Draft]:
        drafts: list[Draft] = []
        context: dict[str, Any] | None = None
        for watch, reading in readings.items():
            for judge in self._judges.get(watch, ()):
                rule = judge.rule
                if not conditions[rule.only]:
                    if judge.busy:
                        context = context or self._context.body()
                        drafts += judge.stand_aside(t_ns, context)
                    continue
                context = context or self._context.body()
                shift = rule.load_allowance_v_per_a * self._load.current_a
                if isinstance(reading, Scalar) and rule.item:
                    drafts += judge.unknown(t_ns, context)
                elif isinstance(reading, Scalar):
                    drafts += judge.scalar(t_ns, reading, shift, context)
                else:
                    drafts += judge.items(t_ns, reading, shift, context)
        return drafts

    def _judge_time(self, t_ns: int) -> list[Draft]:
        """What time alone brings about: silence and escalation."""
        drafts: list[Draft] = []
        silent = self._judges.get("bms_silent")
        if silent:
            reading = self._watches.silence(t_ns, self._last_known())
            for judge in silent:
                drafts += judge.scalar(t_ns, reading, 0.0, self._context.body())
        for judge in self._escalating:
            if judge.busy:
                drafts += judge.tick(t_ns, self._context.body())
        return drafts

    def _last_known(self) -> dict[str, float]:
        """Return ignition and charging state as last heard, however long ago: a sleeping bus says no more."""
        known: dict[str, float] = {}
        for place, role in enumerate(self._pack.roles):
            if role in ("ignition", "charging_state"):
                value = self._pack.scalar(place)
                if value == value:
                    known[role] = value
        return known

    def _quiet(self, samples: SampleBatch) -> bool:
        """Return whether nothing is pending and no sample passes a limit: each is compared, all at once."""
        if not len(samples) or any(judge.busy for judge in self._all_judges()):
            return False
        value = samples.value
        with np.errstate(invalid="ignore"):
            return not bool(
                ((value >= self._upper[samples.column]) | (value <= self._lower[samples.column])).any()
            )

    # --- rules in force ----------------------------------------------------------------------------------

    _orphans: list[Draft]

    def _install(self, rules: RuleSet) -> None:
        before = {judge.rule.name: judge for judge in self._all_judges()}
        self._judges = {}
        for rule in rules.rules:
            judge = Judge(rule, self._names_of(rule))
            old = before.get(rule.name)
            if old and old.rule == rule:
                judge.adopt(before.pop(rule.name))
            self._judges.setdefault(rule.watch, []).append(judge)
        self._orphans = [
            draft
            for judge in before.values()
            for draft in judge.reset(self._now_ns, "the rule was changed", self._context.body())
        ]
        self._escalating = [judge for judge in self._all_judges() if judge.rule.escalate]
        runaway = next((rule for rule in rules.rules if rule.watch == "thermal_runaway"), None)
        self._runaway = (
            Runaway(runaway.params, self._cell_names, self._probe_names)
            if runaway and runaway.params
            else None
        )
        self._upper, self._lower = self._outer_limits(rules.rules)

    def _names_of(self, rule: Rule) -> list[str]:
        names = {"cell": self._cell_names, "probe": self._probe_names}.get(rule.item, [])
        return names or [f"highest {rule.item}", f"lowest {rule.item}"]

    def _outer_limits(self, rules: Iterable[Rule]) -> tuple[Floats, Floats]:
        """Return for each column the nearest upper and lower limit any rule sets on its bare value."""
        upper, lower = np.full(self._catalog_size, np.inf), np.full(self._catalog_size, -np.inf)
        for rule in rules:
            columns = self._columns_of.get(rule.watch)
            if columns is None:
                continue
            limit = rule.ladder.bands[0].limit
            if rule.ladder.sign > 0:
                upper[columns] = np.minimum(upper[columns], limit)
            else:
                lower[columns] = np.maximum(lower[columns], limit)
        return upper, lower

    def _all_judges(self) -> list[Judge]:
        return [judge for judges in self._judges.values() for judge in judges]

    # --- what stands -------------------------------------------------------------------------------------

    def _standing(self) -> list[tuple[Judge, Alarm]]:
        return [(judge, alarm) for judge in self._all_judges() if judge.busy for alarm in judge.alarms]

    def _demands(self) -> list[Demand]:
        return [
            Demand(judge.rule.name, alarm.key, self._index_of(judge, alarm))
            for judge, alarm in self._standing()
            if judge.rule.isolate and alarm.level >= Level.CRITICAL
        ]

    def _index_of(self, judge: Judge, alarm: Alarm) -> int:
        place = judge.place_of(alarm)
        series = self._pack.probes if judge.rule.watch == "thermal_runaway" else self._series(judge.rule.item)
        return int(series.index[place]) if series and 0 <= place < len(series) else -1

    def _series(self, item: str) -> Series | None:
        return {"cell": self._pack.cells, "probe": self._pack.probes}.get(item)

    def _warn(self) -> None:
        standing = [(alarm.level, judge, alarm) for judge, alarm in self._standing()]
        level, text = None, ""
        if standing:
            level, judge, alarm = max(standing, key=lambda entry: entry[0])
            text = judge.text_of(alarm)
        if (level, text) != self._warned:
            self._warned = (level, text)
            self._warning.show(level, text)

    @property
    def unwatched(self) -> list[str]:
        """Names of rules whose signals this vehicle's catalog does not carry: they can never speak."""
        return [judge.rule.name for judge in self._all_judges() if not self._can_watch(judge.rule.watch)]

    def _can_watch(self, watch: str) -> bool:
        return any(needs <= self._roles for needs in NEEDS.get(watch, ({watch},)))

    def status(self) -> dict[str, Any]:
        """Return the vehicle as the edge sees it, in plain values."""
        spread_v, hottest_c = self._imbalance.spread_v, self._thermal.hottest_c
        if spread_v is None and {"cell_voltage_max", "cell_voltage_min"} <= self._scalars.keys():
            spread_v = self._scalars["cell_voltage_max"] - self._scalars["cell_voltage_min"]
        return {
            "mode": str(self._context.mode),
            "speed_kmh": self._scalars.get("speed"),
            "soc_percent": self._scalars.get("soc"),
            "hottest_c": hottest_c if hottest_c is not None else self._scalars.get("temperature_max"),
            "spread_mv": None if spread_v is None else round(spread_v * 1000.0, 1),
            "alarms": [
                {
                    "rule": judge.rule.name,
                    "key": alarm.key,
                    "level": int(alarm.level),
                    "text": judge.text_of(alarm),
                    "since_s": round((self._now_ns - alarm.began_ns) / NS_PER_S, 1),
                    "state": str(alarm.state),
                }
                for judge, alarm in self._standing()
            ],
            "isolation": self._isolation.status(),
            "journey": self._journeys.status(),
            "estimates": self._estimators.status(),
            "blackbox": self._blackbox.status(),
            "cell_scans": self._pack.cells.scans,
            "rules_unwatched": self.unwatched,
        }


# What a derived watch needs on the bus: one of these sets of roles.
NEEDS: dict[str, tuple[set[str], ...]] = {
    **{watch: ({"cell_voltage"},) for watch, (_, item, *_rest) in WATCHES.items() if item == "cell"},
    **{watch: ({"probe_temperature"},) for watch, (_, item, *_rest) in WATCHES.items() if item == "probe"},
    "cell_voltage": ({"cell_voltage"}, {"cell_voltage_max"}, {"cell_voltage_min"}),
    "probe_temperature": ({"probe_temperature"}, {"temperature_max"}, {"temperature_min"}),
    "cell_spread": ({"cell_voltage"}, set(CELL_FALLBACK)),
    "temperature_spread": ({"probe_temperature"}, set(PROBE_FALLBACK)),
    "thermal_runaway": ({"probe_temperature"},),
    "pack_voltage_per_cell": ({"pack_voltage"},),
    "pack_voltage_mismatch": ({"pack_voltage", "cell_voltage"},),
    "soc_jump": ({"soc"},),
    "isolation_per_volt": ({"isolation_resistance", "pack_voltage"},),
    "contactor_mismatch": ({"contactor_state", "contactor_command"},),
    "bms_silent": tuple({role} for role in sorted(BMS_ROLES)),
}


def _columns_by_watch(catalog: tuple[Signal, ...]) -> dict[str, Any]:
    """Return for each watch that is a bare signal value the columns it is taken from."""
    columns: dict[str, list[int]] = {}
    for column, signal in enumerate(catalog):
        if signal.role:
            columns.setdefault(signal.role, []).append(column)
    return {role: np.array(places, dtype=np.int32) for role, places in columns.items()}


def _extremes(both: Floats) -> Items:
    known = ~np.isnan(both)
    return Items(both, 0 if known[0] else -1, 1 if known[1] else -1)
