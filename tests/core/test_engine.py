"""The rules at work: a healthy pack is left in peace, every fault is told in its time."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tbox.edge.engine import LEAD_NS
from tbox.edge.mode import Context
from tbox.edge.rules import load_rules
from tbox.model import Draft, Level
from tests.core.edge_fixture import (
    CELLS,
    COLUMN_OF,
    RULES,
    Bench,
    Floats,
    NoisyPack,
    chunks,
    drive,
    sentinels,
    warm_up,
)

Change = Callable[[float, Floats], None]

DAY = [
    ("rest", 5.0, 2.0), ("drive", 1.0, 1.0), ("drive", 1 / 6, 0.1), ("rest", 3.0, 2.0), ("dc", 0.25, 1.0),
    ("rest", 1.0, 2.0), ("drive", 1.0, 1.0), ("rest", 2.5, 2.0), ("drive", 0.25, 1.0), ("ac", 6.0, 2.0),
    ("rest", 4.9, 2.0),
]  # fmt: skip


def _current(what: str, rng: np.random.Generator, n: int, period_s: float) -> Floats:
    if what == "drive":
        return drive(rng, n, period_s)
    return np.full(n, {"rest": -0.5, "dc": 120.0, "ac": 9.0}[what])


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1])
def test_a_healthy_noisy_pack_raises_nothing_in_a_day(seed: int) -> None:
    rng = np.random.default_rng(seed)
    bench, pack = Bench(), NoisyPack(rng, soc=0.85)
    before = ""
    for what, n, period_s in chunks(DAY):
        if what != before:
            bench.t_ns += 10_000_000
            bench.take(sentinels(bench.t_ns))
            before = what
        charging = {"dc": 3.0, "ac": 2.0}.get(what, 0.0)
        rows = pack.rows(_current(what, rng, n, period_s), period_s, charging_state=charging)
        bench.run(rows, period_s)
    assert [draft.body["text"] for draft in bench.drafts] == []
    assert bench.t_ns >= 24 * 3600 * 1_000_000_000
    assert bench.engine.pack.cells.scans > 40_000


def single(role: str, value: float) -> Change:
    def change(_: float, row: Floats) -> None:
        row[COLUMN_OF[role]] = value

    return change


def cell(index: int, value: float) -> Change:
    def change(_: float, row: Floats) -> None:
        row[index] = value

    return change


def probe(index: int, value: Callable[[float], float]) -> Change:
    def change(t_s: float, row: Floats) -> None:
        row[CELLS + index] = value(t_s)

    return change


def ramp_cell(index: int, volts_per_s: float) -> Change:
    def change(t_s: float, row: Floats) -> None:
        row[index] = round(row[index] + volts_per_s * t_s, 3)

    return change


def at_rest(t_s: float, row: Floats) -> None:
    row[COLUMN_OF["pack_current"]] = 0.0


def coarse_and_stuck(t_s: float, row: Floats) -> None:
    """Probes in steps of 0.5 degC without noise enough to see them move; probe 8 stands while all warm."""
    row[CELLS : CELLS + 48] = np.round(2.0 * (22.0 + 0.05 * t_s)) / 2.0
    row[CELLS + 8] = 22.0


def runaway(t_s: float, row: Floats) -> None:
    row[80] *= np.exp(-t_s / 4.0)
    row[CELLS + 20] += 2.0 * t_s


def both(*changes: Change) -> Change:
    def change(t_s: float, row: Floats) -> None:
        for one in changes:
            one(t_s, row)

    return change


# fault -> what it does to a row, which rule tells of it, its key, its level at first, within seconds
FAULTS: dict[str, tuple[Change, str, str, Level, float]] = {
    "cell too high": (cell(37, 4.27), "cell-over-voltage", "cell 37", Level.ALARM, 2.2),
    "cell far too high": (cell(37, 4.40), "cell-over-voltage", "cell 37", Level.CRITICAL, 0.8),
    "cell too low": (cell(5, 2.60), "cell-under-voltage", "cell 5", Level.ALARM, 2.2),
    "pack too high": (single("pack_voltage", 4.26 * CELLS), "pack-over-voltage", "pack", Level.ALARM, 2.2),
    "pack too low": (single("pack_voltage", 2.70 * CELLS), "pack-under-voltage", "pack", Level.ALARM, 2.2),
    "pack not its cells": (
        single("pack_voltage", 600.0), "pack-voltage-mismatch", "pack", Level.WARNING, 20.2
    ),
    "hot probe": (probe(7, lambda _: 56.0), "over-temperature-discharge", "probe 7", Level.ALARM, 1.4),
    "hot while charging": (
        both(single("charging_state", 3.0), probe(7, lambda _: 46.0)),
        "over-temperature-charge", "probe 7", Level.WARNING, 1.4,
    ),
    "cold while charging": (
        both(single("charging_state", 2.0), lambda _, row: row.__setitem__(slice(CELLS, CELLS + 48), -2.0)),
        "under-temperature-charge", "probe 0", Level.WARNING, 30.4,
    ),
    "cold": (
        lambda _, row: row.__setitem__(slice(CELLS, CELLS + 48), -22.0),
        "under-temperature-discharge", "probe 0", Level.WARNING, 30.4,
    ),
    "one hot corner": (probe(11, lambda _: 34.5), "temperature-spread", "pack", Level.WARNING, 10.4),
    "warming": (probe(3, lambda t: 22.0 + 0.8 * t), "temperature-rise", "probe 3", Level.WARNING, 8.0),
    "runaway": (runaway, "thermal-runaway", "pack", Level.CRITICAL, 6.5),
    "cell low under load": (ramp_cell(9, -0.02), "imbalance", "pack", Level.WARNING, 22.0),
    "cell falls": (
        lambda _, row: row.__setitem__(9, row[9] - 0.15), "cell-voltage-drop", "cell 9", Level.WARNING, 0.6
    ),
    "cell drifts": (ramp_cell(9, -0.001), "cell-drift", "cell 9", Level.WARNING, 90.0),
    "cell stuck": (cell(100, 3.9), "cell-stuck", "cell 100", Level.WARNING, 21.0),
    "probe stuck": (probe(8, lambda _: 22.3), "probe-stuck", "probe 8", Level.WARNING, 21.0),
    "coarse probe stuck": (coarse_and_stuck, "probe-not-following", "probe 8", Level.WARNING, 92.0),
    "cell unreadable": (cell(9, np.nan), "cell-lost", "cell 9", Level.WARNING, 11.3),
    "probe unreadable": (probe(8, lambda _: np.nan), "probe-lost", "probe 8", Level.WARNING, 11.3),
    "cell low at rest": (
        both(at_rest, lambda _, row: row.__setitem__(9, row[9] - 0.14)),
        "imbalance-rest", "pack", Level.WARNING, 121.0,
    ),
    "cell apart from sigma": (
        both(at_rest, lambda _, row: row.__setitem__(9, row[9] + 0.07)),
        "imbalance-sigma", "cell 9", Level.WARNING, 122.0,
    ),
    "probe open": (probe(8, lambda _: -40.0), "probe-open", "probe 8", Level.WARNING, 3.4),
    "SOC low": (single("soc", 9.0), "soc-low", "pack", Level.INFO, 10.3),
    "SOC too high": (single("soc", 102.0), "soc-high", "pack", Level.WARNING, 10.3),
    "SOC jumps": (single("soc", 70.0), "soc-jump", "pack", Level.WARNING, 0.8),
    "SOH low": (single("soh", 79.0), "soh-low", "pack", Level.WARNING, 60.3),
    "discharge current": (single("pack_current", -900.0), "over-current-discharge", "pack", Level.ALARM, 0.6),
    "charge current": (single("pack_current", 520.0), "over-current-charge", "pack", Level.WARNING, 0.6),
    "isolation low": (single("isolation_resistance", 450.0), "isolation-low", "pack", Level.ALARM, 2.3),
    "isolation lost": (single("isolation_resistance", 40.0), "isolation-lost", "pack", Level.CRITICAL, 2.3),
    "contactors stay": (single("contactor_command", 0.0), "contactor-mismatch", "pack", Level.ALARM, 5.3),
    "contactors welded": (single("contactor_state", 3.0), "contactor-failed", "pack", Level.ALARM, 0.8),
    "HVIL open": (single("hvil", 0.0), "hvil-open", "pack", Level.ALARM, 0.8),
    "12 V lost": (single("low_voltage", 8.0), "low-voltage-lost", "pack", Level.ALARM, 2.3),
    "motor hot": (single("motor_temperature", 160.0), "motor-over-temperature", "pack", Level.WARNING, 5.3),
}  # fmt: skip


TOLD_ELSEWHERE = {"bms-silent"}  # test_stage: a row cannot say nothing


@pytest.mark.parametrize("chemistry", RULES)
def test_every_shipped_rule_has_its_fault(chemistry: str) -> None:
    shipped = {rule.name for rule in RULES[chemistry].rules}
    assert shipped == {rule for _, rule, _, _, _ in FAULTS.values()} | TOLD_ELSEWHERE


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_told_within_its_rules_time(fault: str) -> None:
    change, rule, key, level, within_s = FAULTS[fault]
    rng = np.random.default_rng(7)
    bench, pack = Bench(), NoisyPack(rng, soc=0.6)
    warm_up(bench, pack)
    assert bench.drafts == []
    begin_ns = bench.t_ns
    bench.run(pack.rows(np.full(int(within_s * 10) + 5, -40.0), 0.1), 0.1, change)
    raised = bench.told(rule, "raise")
    assert raised, [draft.body["text"] for draft in bench.drafts]
    assert raised[0].body["key"] == key
    assert raised[0].level == level, raised[0].body["text"]
    assert (raised[0].mono_ns - begin_ns) / 1e9 <= within_s
    assert raised[0].body["context"] == Context().body()
    says_what_where_and_how_much(raised[0])


def says_what_where_and_how_much(draft: Draft) -> None:
    """The text alone tells a person which cell or probe it is, how much, and how much it may be."""
    body, text = draft.body, draft.body["text"]
    assert body["key"] == "pack" or body["key"] in text
    told = re.findall(rf"-?\d+(?:\.\d+)?(?= ?{re.escape(body['unit'])})", text)
    for number in (body["value"], body["limit"]) if body["unit"] else (body["value"],):
        assert any(abs(float(n) - number) <= 0.51 * 10.0 ** -len(n.partition(".")[2]) for n in told), text
    assert len(text.split()) >= 5


def test_a_probe_that_stands_still_while_the_pack_warms_is_told_of_once() -> None:
    """It shows to two rules: by its missing noise, and by the degrees it does not follow."""
    bench, pack = Bench(), NoisyPack(np.random.default_rng(7), soc=0.6)
    warm_up(bench, pack)
    rows = pack.rows(np.full(1200, -40.0), 0.1)
    rows[:, CELLS : CELLS + 48] += np.linspace(0.0, 9.0, len(rows))[:, None].round(1)
    rows[:, CELLS + 8] = 22.3
    bench.run(rows, 0.1)
    assert [(d.body["alarm"], d.body["key"]) for d in bench.drafts if d.body["event"] == "raise"] == [
        ("probe-stuck", "probe 8")
    ]


@pytest.mark.parametrize(("mean_v", "told"), [(3.80, True), (3.38, False)])
@pytest.mark.parametrize(
    ("rule", "fault"),
    [("imbalance", -0.2), ("imbalance-rest", -0.14), ("imbalance-sigma", 0.07), ("cell-drift", -0.05)],
)
def test_cells_are_held_against_each_other_above_the_knee_only(
    rule: str, fault: float, mean_v: float, told: bool
) -> None:
    """Below it they part as their capacities do, and nothing is wrong."""
    bench, pack = Bench(), NoisyPack(np.random.default_rng(7), soc=0.6)
    rows = pack.rows(np.full(1600, 0.0), 0.1)
    rows[:, :CELLS] += mean_v - rows[:, :CELLS].mean()
    rows[400:, 9] += fault
    bench.run(rows, 0.1)
    assert bool(bench.told(rule)) == told


def test_a_load_does_not_pass_for_an_empty_pack() -> None:
    """At 300 A a half-full cell sags to what an empty one shows at rest."""
    bench, pack = Bench(), NoisyPack(np.random.default_rng(7), soc=0.6)
    rows = pack.rows(np.full(600, -300.0), 0.1)
    rows[:, :CELLS] += 3.40 - rows[:, :CELLS].mean()
    rows[400:, 9] -= 0.3
    bench.run(rows, 0.1)
    assert bench.told("imbalance")


@pytest.mark.parametrize("fault", ["over-voltage", "runaway"])
def test_time_is_known_to_be_short_before_a_shipped_rule_asks_for_isolation(fault: str) -> None:
    """Until then frames wait for each other, and the reader gathers longer."""
    change = {"over-voltage": cell(37, 4.4), "runaway": probe(7, lambda t_s: 40.0 + 2.0 * t_s)}[fault]
    bench, pack = Bench(), NoisyPack(np.random.default_rng(7), soc=0.6)
    warm_up(bench, pack)
    assert not bench.engine.isolates_at_once and not bench.engine.isolating
    short_ns: list[int] = []

    def look(t_s: float, row: Floats) -> None:
        if bench.engine.isolating:
            short_ns.append(bench.t_ns)
        change(t_s, row)

    bench.run(pack.rows(np.full(250, -40.0), 0.1), 0.1, look)
    critical = [draft for draft in bench.drafts if draft.level == Level.CRITICAL]
    assert critical and short_ns[0] <= critical[0].mono_ns - LEAD_NS


def test_a_rule_that_asks_at_once_makes_its_signals_press(tmp_path: Path) -> None:
    (tmp_path / "quick.toml").write_text(
        '[rule.quick]\nwatch = "cell_voltage"\nwhen = "above"\nfor = "0 s"\nisolate = true\n'
        'text = "{item} is at {value}"\n'
        'bands = [ { level = "critical", limit = "4.5 V", clear = "4.4 V" } ]\n'
    )
    engine = Bench(load_rules("nmc", [str(tmp_path / "quick.toml")])).engine
    upper, lower = engine.isolation_limits
    assert engine.isolates_at_once and np.isinf(lower).all()
    assert set(upper[:CELLS]) == {4.5} and np.isinf(upper[COLUMN_OF["soc"]])
