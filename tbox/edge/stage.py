"""The edge stage: samples in; alarms, telemetry, journeys, captures and isolation requests out. Does no IO.

One step, in order: the rules see the samples, and the isolation request follows from the alarms that stand;
then the driving mode, the sampler, journeys, estimators and the black box see the same instant.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import msgspec

from tbox.edge.blackbox import BlackBox, BlackBoxSettings
from tbox.edge.engine import Engine, Standing
from tbox.edge.estimators import Estimators, EstimatorSettings
from tbox.edge.isolation import Demand, Isolation, IsolationSettings, NoWarning, WarningOutput
from tbox.edge.journey import Journeys, JourneySettings
from tbox.edge.mode import Context, ModeSettings, ModeTracker
from tbox.edge.pack import Floats, PackSettings
from tbox.edge.rules import RuleSet
from tbox.edge.sampler import Sampler, SamplerSettings
from tbox.edge.watches import LoadSettings
from tbox.ledger import Ledger
from tbox.model import (
    NS_PER_MS,
    NS_PER_S,
    CanSend,
    Draft,
    EdgeOutput,
    FrameBatch,
    Level,
    Now,
    SampleBatch,
    Signal,
)

STEP_NS_MAX = 200 * NS_PER_MS  # it wants to be called so often, on a silent bus too


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
    """Everything that is decided at the edge. Owned by one thread. warning: a lamp or buzzer, if fitted."""

    def __init__(
        self,
        catalog: tuple[Signal, ...],
        rules: RuleSet,
        settings: EdgeSettings,
        ledger: Ledger,
        warning: WarningOutput | None = None,
    ) -> None:
        self._engine = Engine(
            catalog, rules, ledger.stage("pack", "samples"),
            pack=settings.pack, load=settings.load, series_cells=settings.series_cells,
        )  # fmt: skip
        self._isolation = Isolation(settings.isolation)
        self._mode = ModeTracker(settings.mode)
        self._sampler = Sampler(catalog, ledger.stage("sampler", "samples"), settings.sampler)
        self._journeys = Journeys(settings.journey)
        self._estimators = Estimators(settings.estimators)
        self._blackbox = BlackBox(ledger.stage("blackbox", "frames"), settings.blackbox)
        self._warning: WarningOutput = warning or NoWarning()
        self._warned: tuple[Level | None, str] = (None, "")
        self._context = Context()
        self._now_ns: int | None = None

    def step(
        self,
        now: Now,
        samples: SampleBatch,
        frames: FrameBatch | None = None,
        send: Callable[[CanSend], None] | None = None,
    ) -> EdgeOutput:
        """Take what was received since the last step. Call it when the last output asks for it.

        send: is given the output's frames as soon as the rules have spoken; they do not wait for the rest.
        """
        now = self._forward(now)
        alarms = self._engine.step(now, samples, self._context)
        snapshot = self._engine.pack.snapshot(now)
        output = self._out(now, alarms, snapshot.scalars.get("isolation_ack"))
        if send is not None:
            for frame in output.sends:
                send(frame)
        self._context, drafts = self._mode.step(now, snapshot)
        drafts += self._sampler.step(now, samples, self._context)
        drafts += self._journeys.step(now, snapshot, self._context)
        drafts += self._estimators.step(now, snapshot, self._context)
        drafts += self._blackbox.step(now, frames)
        return self._with_captures(now, output, alarms, drafts)

    def flush(self, now: Now) -> EdgeOutput:
        """At stop: give out what is held (open windows, journeys, captures)."""
        now = self._forward(now)
        drafts = self._sampler.flush(now, self._context)
        drafts += self._journeys.flush(now)
        drafts += self._blackbox.flush(now)
        return EdgeOutput(self._surrounded(drafts))

    def reload(self, rules: RuleSet) -> None:
        """Put other rules in force. Alarms of rules that stay as they are go on; those of others end."""
        self._engine.reload(rules)

    def reset_alarms(self, now: Now, rule: str | None = None) -> EdgeOutput:
        """End the alarms of a rule (None: of all), latched ones too; what still holds is raised again."""
        now = self._forward(now)
        ack = self._engine.scalars.get("isolation_ack")
        alarms = self._engine.reset(now.mono_ns, rule)
        return self._with_captures(now, self._out(now, alarms, ack), alarms, [])

    def _forward(self, now: Now) -> Now:
        """Time never runs backwards in here, whatever comes in."""
        if self._now_ns is not None and now.mono_ns < self._now_ns:
            now = now._replace(mono_ns=self._now_ns)
        self._now_ns = now.mono_ns
        return now

    def _with_captures(
        self, now: Now, output: EdgeOutput, alarms: list[Draft], drafts: list[Draft]
    ) -> EdgeOutput:
        """Show the alarms to the black box; return the output with these drafts and its own behind it."""
        for alarm in alarms:
            if alarm.body["event"] == "clear":
                self._blackbox.clear(now, alarm)
            else:
                drafts += self._blackbox.trigger(now, alarm)
        return EdgeOutput(self._surrounded(output.drafts + drafts), output.sends, output.next_wake_ns)

    def _surrounded(self, drafts: list[Draft]) -> list[Draft]:
        """Put the context into every record that lacks it; telemetry has it among its own keys."""
        for draft in drafts:
            if draft.kind != "telemetry":
                draft.body.setdefault("context", self._context.body())
        return drafts

    def _out(self, now: Now, alarms: list[Draft], ack: float | None) -> EdgeOutput:
        standing = self._engine.standing()
        demands = [
            Demand(rule.name, alarm.key, index)
            for rule, alarm, index, _ in standing
            if rule.isolate and alarm.level >= Level.CRITICAL
        ]
        sends, events = self._isolation.step(now.mono_ns, demands, None if ack is None else ack >= 0.5)
        if alarms:
            self._warn(standing)
        wake_ns = now.mono_ns + STEP_NS_MAX
        if self._isolation.next_ns is not None:
            wake_ns = min(wake_ns, max(self._isolation.next_ns, now.mono_ns))
        return EdgeOutput(alarms + events, sends, wake_ns)

    def _warn(self, standing: list[Standing]) -> None:
        worst = max(standing, key=lambda stand: stand.alarm.level, default=None)
        show = (worst.alarm.level, worst.text) if worst else (None, "")
        if show != self._warned:
            self._warned = show
            self._warning.show(*show)

    @property
    def isolation_limits(self) -> tuple[Floats, Floats]:
        """For each column the upper and lower limit at which a rule may ask for isolation at once."""
        return self._engine.isolation_limits

    @property
    def isolates_at_once(self) -> bool:
        """Whether a single reading may make a rule ask for isolation."""
        return self._engine.isolates_at_once

    @property
    def isolating(self) -> bool:
        """Whether isolation is asked for, or may be soon, so that time is short. Any thread may ask."""
        return self._engine.isolating or self._isolation.next_ns is not None

    @property
    def unwatched(self) -> list[str]:
        """Names of rules whose signals this vehicle's catalog does not carry: they can never speak."""
        return self._engine.unwatched

    def status(self) -> dict[str, Any]:
        """Return the vehicle as the edge sees it, in plain values."""
        engine, scalars, now_ns = self._engine, self._engine.scalars, self._now_ns or 0
        spread_v, hottest_c = engine.spread_v, engine.hottest_c
        if spread_v is None and {"cell_voltage_max", "cell_voltage_min"} <= scalars.keys():
            spread_v = scalars["cell_voltage_max"] - scalars["cell_voltage_min"]
        return {
            "mode": str(self._context.mode),
            "speed_kmh": scalars.get("speed"),
            "gear": scalars.get("gear"),
            "soc_percent": scalars.get("soc"),
            "low_voltage_v": scalars.get("low_voltage"),
            "hottest_c": hottest_c if hottest_c is not None else scalars.get("temperature_max"),
            "spread_mv": None if spread_v is None else round(spread_v * 1000.0, 1),
            "alarms": [
                {
                    "rule": rule.name,
                    "key": alarm.key,
                    "level": int(alarm.level),
                    "text": text,
                    "since_s": round((now_ns - alarm.began_ns) / NS_PER_S, 1),
                    "state": str(alarm.state),
                }
                for rule, alarm, _, text in engine.standing()
            ],
            "isolation": self._isolation.status(),
            "journey": self._journeys.status(),
            "estimates": self._estimators.status(),
            "blackbox": self._blackbox.status(),
            "cell_scans": engine.pack.cells.scans,
            "rules_unwatched": engine.unwatched,
        }
