"""What a scan of 192 cells and 48 probes costs with every rule on it, against its limits in plain Python.

The peer holds each cell and probe against its limits, the way a script would, and takes the same extremes,
mean and sigma; it has no debounce, hysteresis, slope, drift, staleness or text, so it does far less.
And whether all that cost is for nothing but silence: a healthy pack's day, as bytes, raises no alarm.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from tbox.agent import build_stages
from tbox.config import BusConfig, Config, RulesConfig, VehicleConfig
from tbox.edge.readings import items
from tbox.edge.rules import RuleSet, load_rules
from tbox.edge.stage import EdgeSettings, EdgeStage
from tbox.flow import Flow
from tbox.ledger import Ledger
from tbox.model import NS_PER_MS, NS_PER_S, EdgeOutput, FrameBatch, Now, SampleBatch
from tbox.sim.simulator import SimSettings, Simulator
from tbox.sim.vehicle import CHARGING_DC, IGNITION_ON, load_cycle
from tbox.uplink.session import UplinkSettings
from tests.bench.harness import Result, interleaved, seconds
from tests.core.edge_fixture import CATALOG, CELLS, COLUMNS, PROBES, Bench, Floats, NoisyPack

SCANS = 400
PERIOD_NS = 100 * NS_PER_MS
BURST_SCANS = (
    10  # so many scans in one batch of 10 ms: about what 10,000 frames/s of 24 cells each would bring
)
WHERE = "user-mode CPU of this machine"
DBC = Path(__file__).parents[2] / "dbc"
DAY_S = 86_400
DAY_SOC_PERCENT = 45.0  # both charges of the day then pass the whole upper part of the curve, up to full
AWAKE_STEP_NS = 200 * NS_PER_MS
REST_STEP_NS = 10 * NS_PER_S
# A parked or AC-charging BMS reports a scan in two seconds; every message's phase is in its first 100 ms.
REST_SCAN_NS, REST_SCAN_LASTS_NS = 2 * NS_PER_S, 100 * NS_PER_MS


def _batches(rows: Floats, scans_each: int = 1) -> list[tuple[int, SampleBatch]]:
    made = []
    for first in range(0, len(rows), scans_each):
        t_ns = (first + scans_each) * PERIOD_NS // scans_each
        part = rows[first : first + scans_each]
        column = np.tile(COLUMNS, len(part))
        zeros = np.zeros(len(column), dtype=np.uint8)
        stamps = np.full(len(column), t_ns, dtype=np.int64)
        made.append((t_ns, SampleBatch(stamps, column, part.ravel(), zeros)))
    return made


class _Plain:
    """The peer: one Python statement for each cell and limit."""

    def __init__(self, rules: RuleSet) -> None:
        self.limits = [
            (rule.watch, rule.ladder.sign, band.limit) for rule in rules.rules for band in rule.ladder.bands
        ]
        self.alarms = 0

    def scans(self, rows: list[list[float]]) -> None:
        for row in rows:
            self._scan(row)

    def _scan(self, row: list[float]) -> None:
        cells, probes = row[:CELLS], row[CELLS : CELLS + PROBES]
        high, low, mean = max(cells), min(cells), sum(cells) / CELLS
        sigma = statistics.pstdev(cells, mean)
        single = {"cell_spread": high - low, "temperature_spread": max(probes) - min(probes)}
        single["cell_deviation"] = max(high - mean, mean - low) - sigma
        for watch, sign, limit in self.limits:
            if watch == "cell_voltage":
                self.alarms += sum(1 for volts in cells if sign * volts >= sign * limit)
            elif watch == "probe_temperature":
                self.alarms += sum(1 for degrees in probes if sign * degrees >= sign * limit)
            elif watch in single and sign * single[watch] >= sign * limit:
                self.alarms += 1


def cases() -> Iterator[Result]:
    """Yield the cost of a scan's statistics, of all rules on a scan, on a burst, and of the whole step;
    then the alarms of a healthy day."""
    rules = load_rules("nmc")
    rows = NoisyPack(np.random.default_rng(1), soc=0.7).rows(np.full(SCANS, -40.0), 0.1)
    yield _statistics(rows)
    yield from _rules(rules, rows)
    yield _whole_step(rules, rows)
    for chemistry in CHEMISTRIES:
        for frames in LAYOUTS:
            yield _healthy_day(chemistry, frames)


def _statistics(rows: Floats) -> Result:
    cells = np.ascontiguousarray(rows[:, :CELLS])
    plain = cells.tolist()

    def ours() -> None:
        for volts in cells:
            items(volts, both=True)
            deviation = volts - np.add.reduce(volts) / CELLS
            np.dot(deviation, deviation)

    def peer() -> None:
        for volts in plain:
            low, high = min(volts), max(volts)
            volts.index(low), volts.index(high)
            mean = sum(volts) / CELLS
            sum((v - mean) * (v - mean) for v in volts)

    a, b, ratio = interleaved(lambda: seconds(ours) / SCANS * 1e6, lambda: seconds(peer) / SCANS * 1e6)
    return Result(
        bench="edge", case="statistics of a 192-cell scan", value=a, unit="us/scan", peer="pure Python",
        peer_value=b, ratio=ratio, goal="ratio >= 2", ok=ratio >= 2.0, note=WHERE,
    )  # fmt: skip


def _rules(rules: RuleSet, rows: Floats) -> Iterator[Result]:
    lists = rows.tolist()

    def peer() -> float:
        return seconds(lambda: _Plain(rules).scans(lists)) / SCANS * 1e6

    for case, scans_each, goal in (
        ("all rules, a scan a batch", 1, 1.0),
        (f"all rules, {BURST_SCANS} scans a batch", BURST_SCANS, 3.0),
    ):

        def ours(scans_each: int = scans_each) -> float:
            bench = Bench(rules)
            batches = _batches(rows, scans_each)
            return seconds(lambda: _feed(bench, batches)) / SCANS * 1e6

        a, b, ratio = interleaved(ours, peer)
        yield Result(
            bench="edge", case=case, value=a, unit="us/scan", peer="plain Python, limits only", peer_value=b,
            ratio=ratio, goal=f"ratio >= {goal:g}", ok=ratio >= goal, note=WHERE,
        )  # fmt: skip


def _feed(bench: Bench, batches: list[tuple[int, SampleBatch]]) -> None:
    for t_ns, one in batches:
        bench.t_ns = t_ns
        bench.take(one)
    assert bench.drafts == []


def _whole_step(rules: RuleSet, rows: Floats) -> Result:
    batches = _batches(rows)

    def ours() -> float:
        stage = EdgeStage(CATALOG, rules, EdgeSettings(), Ledger())
        outputs: list[EdgeOutput] = []
        spent = seconds(lambda: outputs.extend(stage.step(Now(t_ns), one) for t_ns, one in batches))
        return spent / SCANS * 1e6

    value = statistics.median(ours() for _ in range(5))
    return Result(
        bench="edge", case="whole edge step, a scan of 262 signals each", value=value, unit="us/step",
        goal="<= 1000: 1 % of a core at 10 Hz", ok=value <= 1000.0, note=WHERE,
    )  # fmt: skip


# --- a healthy day ------------------------------------------------------------------------------------

Chemistry = Literal["NMC", "LFP"]
Layout = Literal["plain", "mux"]
CHEMISTRIES: tuple[Chemistry, ...] = ("NMC", "LFP")
LAYOUTS: dict[Layout, str] = {"plain": "tbox_bms.dbc", "mux": "tbox_bms_mux.dbc"}


def _healthy_day(chemistry: Chemistry, frames: Layout) -> Result:
    """24 hours of rest, city, highway, fast charge and AC charge through simulator, decode and edge."""
    ledger = Ledger()
    files = [str(DBC / name) for name in (LAYOUTS[frames], "tbox_vehicle.dbc")]
    config = Config(
        vehicle=VehicleConfig(id="v"),
        bus=[BusConfig(interface="virtual", channel="v", dbc=files)],
        rules=RulesConfig(chemistry="lfp" if chemistry == "LFP" else "nmc"),
        uplink=UplinkSettings(),
    )
    flow = Flow(*build_stages(config, ledger))
    told: list[str] = []
    for now, batch in _day(chemistry, frames):
        told += [d.body["text"] for d in flow.step(now, batch).drafts if d.kind == "alarm"]
    ledger.check()
    count = ledger.snapshot()["decode"]["out"]
    return Result(
        bench="edge", case=f"healthy pack, 24 simulated hours, {chemistry} {frames}", value=len(told),
        unit="alarms", goal="0", ok=not told and count > DAY_S, note="; ".join(told[:3]) or f"{count} frames",
    )  # fmt: skip


def _day(chemistry: Chemistry, frames: Layout) -> Iterator[tuple[Now, FrameBatch | None]]:
    """The day in steps: every frame while driving or fast charging, else one scan in REST_SCAN_NS."""
    cycle = load_cycle("day", loop=True)
    simulator = Simulator(
        11,
        SimSettings(
            chemistry=chemistry, frames=frames, cycle="day", physics_ms=200, soc_percent=DAY_SOC_PERCENT,
            ambient_c=8.0, pack_c=24.0,
        ),
    )  # fmt: skip
    t_ns = 0
    while t_ns < DAY_S * NS_PER_S:
        wish = cycle.at(t_ns / NS_PER_S)
        if wish.ignition >= IGNITION_ON or wish.charging >= CHARGING_DC:
            t_ns += AWAKE_STEP_NS
            yield Now(t_ns), None
            for batch in simulator.frames_until(t_ns):
                yield Now(t_ns), batch
        else:
            t_ns += REST_STEP_NS
            for batch in simulator.frames_until(t_ns):
                yield from _thinned(batch)


def _thinned(batch: FrameBatch) -> Iterator[tuple[Now, FrameBatch]]:
    """Cut a long batch to its scans at rest, each taken when its last frame has come."""
    kept = np.flatnonzero(batch.t_ns % REST_SCAN_NS < REST_SCAN_LASTS_NS)
    scans = np.split(kept, np.flatnonzero(np.diff(batch.t_ns[kept]) > REST_SCAN_LASTS_NS) + 1)
    for one in scans:
        if len(one):
            times = batch.t_ns[one]
            yield Now(int(times[-1])), FrameBatch(batch.channel, batch.frames[one], times)
