"""What a scan of 192 cells and 48 probes costs with every rule on it, against its limits in plain Python.

The peer holds each cell and probe against its limits, the way a script would, and takes the same extremes,
mean and sigma; it has no debounce, hysteresis, slope, drift, staleness or text, so it does far less.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import numpy as np

from tbox.edge.readings import items
from tbox.edge.rules import RuleSet, load_rules
from tbox.edge.stage import EdgeSettings, EdgeStage
from tbox.ledger import Ledger
from tbox.model import NS_PER_MS, EdgeOutput, Now, SampleBatch
from tests.bench.harness import Result, interleaved, seconds
from tests.core.edge_fixture import CATALOG, CELLS, COLUMNS, PROBES, Bench, Floats, NoisyPack

SCANS = 400
PERIOD_NS = 100 * NS_PER_MS
BURST_SCANS = (
    10  # so many scans in one batch of 10 ms: about what 10,000 frames/s of 24 cells each would bring
)
WHERE = "user-mode CPU of this machine"


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
    """Yield the cost of a scan's statistics, of all rules on a scan, on a burst, and of the whole step."""
    rules = load_rules("nmc")
    rows = NoisyPack(np.random.default_rng(1), soc=0.7).rows(np.full(SCANS, -40.0), 0.1)
    yield _statistics(rows)
    yield from _rules(rules, rows)
    yield _whole_step(rules, rows)


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
