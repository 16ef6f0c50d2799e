"""The edge stage as a whole: what comes out of it, whatever goes in."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tbox.edge.isolation import IsolationSettings
from tbox.edge.rules import RuleSet, RuleText, load_rules, parse_rules
from tbox.edge.stage import EdgeSettings, EdgeStage
from tbox.ledger import Ledger
from tbox.model import NS_PER_S, CanSend, Draft, Level, Now, SampleBatch, Signal, Validity
from tests.core.edge_fixture import (
    ALL_VALID,
    CATALOG,
    CELLS,
    COLUMN_OF,
    COLUMNS,
    RULES,
    Floats,
    NoisyPack,
    batch,
    empty,
    sentinels,
)

PERIOD_NS = NS_PER_S // 10


class Rig:
    """A stage with its ledger, stepped row by row."""

    def __init__(self, rules: RuleSet = RULES["nmc"], mode: str = "send") -> None:
        self.ledger = Ledger()
        self.shown: list[tuple[Level | None, str]] = []
        isolation = msgspec.convert({"mode": mode}, IsolationSettings)
        self.stage = EdgeStage(CATALOG, rules, EdgeSettings(isolation=isolation), self.ledger, warning=self)
        self.drafts: list[Draft] = []
        self.sends: list[CanSend] = []
        self.t_ns = 0

    def show(self, level: Level | None, text: str) -> None:
        self.shown.append((level, text))

    def take(self, samples: SampleBatch) -> list[Draft]:
        output = self.stage.step(Now(self.t_ns), samples)
        self.drafts += output.drafts
        self.sends += output.sends
        assert output.next_wake_ns is not None and output.next_wake_ns >= self.t_ns
        self.ledger.check()
        return output.drafts

    def run(self, rows: Floats) -> None:
        for row in rows:
            self.t_ns += PERIOD_NS
            self.take(batch(self.t_ns, row))

    def alarms(self) -> list[tuple[str, str]]:
        return [(d.body["alarm"], d.body["event"]) for d in self.drafts if d.kind == "alarm"]

    def events(self) -> list[str]:
        return [d.body["state"] for d in self.drafts if d.body.get("event") == "isolation_request"]


def rows_of(seconds: float) -> Floats:
    return NoisyPack(np.random.default_rng(5), soc=0.6).rows(np.full(int(seconds * 10), -40.0), 0.1)


def test_a_critical_alarm_asks_for_isolation_and_its_clear_withdraws_it() -> None:
    rig = Rig()
    rows = rows_of(30)
    rows[50:150, 37] = 4.40
    rows[60:170, COLUMN_OF["isolation_ack"]] = 1.0
    rig.run(rows)
    assert ("cell-over-voltage", "raise") in rig.alarms() and ("cell-over-voltage", "clear") in rig.alarms()
    assert rig.events() == ["requested", "acknowledged", "withdrawn"]
    asked = [frame for frame in rig.sends if frame.data[2] == 1]
    assert asked and all(
        (f.can_id, f.channel, f.fd, f.data[3], f.data[4]) == (0x6F0, 0, False, 4, 37) for f in asked
    )
    assert [frame.data[2] for frame in rig.sends][-3:] == [0, 0, 0]


def test_a_warning_or_an_alarm_asks_for_nothing() -> None:
    rig = Rig()
    rows = rows_of(15)
    rows[50:, 37] = 4.26
    rig.run(rows)
    assert ("cell-over-voltage", "raise") in rig.alarms()
    assert rig.sends == [] and rig.events() == []


def test_the_request_leaves_in_the_step_that_confirms_the_alarm() -> None:
    rig = Rig()
    rows = rows_of(10)
    rows[50:, 37] = 4.40
    rig.run(rows)
    raised = next(d for d in rig.drafts if d.kind == "alarm" and d.level == Level.CRITICAL)
    requested = next(d for d in rig.drafts if d.body.get("event") == "isolation_request")
    assert raised.mono_ns == requested.mono_ns


def test_a_dry_run_says_so_and_sends_nothing() -> None:
    rig = Rig(mode="dry_run")
    rows = rows_of(10)
    rows[50:, 37] = 4.40
    rig.run(rows)
    assert rig.events()[0] == "requested" and rig.sends == []


@pytest.mark.slow
def test_the_warning_output_shows_the_worst_alarm_and_goes_dark() -> None:
    rig = Rig()
    rows = rows_of(120)
    rows[50:150, 37] = 4.40
    rig.run(rows)
    assert rig.shown[0][0] == Level.CRITICAL and "cell 37" in rig.shown[0][1]
    rig.run(rows_of(180))
    assert rig.shown[-1] == (None, "")


def test_status_is_plain_and_says_what_stands() -> None:
    rig = Rig()
    rows = rows_of(10)
    rows[50:, 37] = 4.40
    rig.run(rows)
    status = rig.stage.status()
    msgspec.json.encode(status)
    assert {
        "mode",
        "speed_kmh",
        "soc_percent",
        "hottest_c",
        "spread_mv",
        "alarms",
        "isolation",
        "journey",
    } <= set(status)
    first = next(alarm for alarm in status["alarms"] if alarm["rule"] == "cell-over-voltage")
    assert first["level"] == 4 and "cell 37 is at 4.400 V" in first["text"] and first["since_s"] > 3
    assert status["isolation"]["state"] == "requested"
    assert status["spread_mv"] > 400 and 20 < status["hottest_c"] < 30


def test_sentinels_trip_nothing_however_long_they_last() -> None:
    rig = Rig()
    for _ in range(40):
        rig.t_ns += PERIOD_NS
        rig.take(sentinels(rig.t_ns))
    assert rig.alarms() == []


@pytest.mark.parametrize("validity", [v for v in Validity if v])
def test_what_the_decoder_refused_never_reaches_a_threshold(validity: Validity) -> None:
    rig = Rig()
    for row in rows_of(30):
        rig.t_ns += PERIOD_NS
        bad = np.zeros(len(CATALOG), dtype=np.uint8)
        bad[[37, CELLS + 7, COLUMN_OF["isolation_resistance"], COLUMN_OF["soc"]]] = validity
        row[37], row[CELLS + 7], row[COLUMN_OF["isolation_resistance"]], row[COLUMN_OF["soc"]] = (
            65.5,
            215.0,
            0.0,
            127.5,
        )
        rig.take(batch(rig.t_ns, row, bad))
    assert {rule for rule, _ in rig.alarms()} <= {"cell-lost", "probe-lost"}


def test_a_value_seen_once_and_then_silence_confirms_nothing() -> None:
    rig = Rig()
    rig.run(rows_of(10))
    row = rows_of(0.1)[0]
    row[37] = 4.40
    rig.t_ns += PERIOD_NS
    rig.take(batch(rig.t_ns, row))
    for _ in range(40):
        rig.t_ns += PERIOD_NS
        rig.take(empty())
    assert rig.alarms() == []


def test_a_silent_bms_is_told_and_its_return_too() -> None:
    rig = Rig()
    rig.run(rows_of(5))
    for _ in range(700):
        rig.t_ns += PERIOD_NS
        rig.take(empty())
    rig.run(rows_of(5))
    assert rig.alarms() == [("bms-silent", "raise"), ("bms-silent", "update"), ("bms-silent", "clear")]


def test_a_sleeping_vehicle_may_be_silent() -> None:
    rig = Rig()
    rows = rows_of(5)
    rows[:, COLUMN_OF["ignition"]] = 0.0
    rig.run(rows)
    for _ in range(700):
        rig.t_ns += PERIOD_NS
        rig.take(empty())
    assert rig.alarms() == []


def test_reload_keeps_what_stands_under_unchanged_rules_and_ends_the_rest() -> None:
    rig = Rig()
    rows = rows_of(20)
    rows[50:, 37] = 4.40
    rows[50:, COLUMN_OF["hvil"]] = 0.0
    rig.run(rows[:100])
    stood = {alarm["rule"] for alarm in rig.stage.status()["alarms"]}
    assert {"cell-over-voltage", "hvil-open"} <= stood
    own = RuleText("own.toml", "[rule.hvil-open]\nenabled = false\n")
    defaults = load_rules("nmc")
    rig.stage.reload(RuleSet(tuple(r for r in defaults.rules if r.name != "hvil-open"), "nmc"))
    rig.run(rows[100:])
    assert rig.alarms().count(("cell-over-voltage", "raise")) == 1
    ended = next(d for d in rig.drafts if d.body.get("alarm") == "hvil-open" and d.body["event"] == "clear")
    assert "the rule was changed" in ended.body["text"]
    assert parse_rules([own, RuleText("x", "")], "nmc").rules == ()


def test_resetting_ends_an_alarm_and_what_still_holds_is_raised_again() -> None:
    rig = Rig()
    rows = rows_of(80)  # longer than the minimum repeat
    rows[50:, COLUMN_OF["contactor_state"]] = 3.0
    rig.run(rows[:100])
    output = rig.stage.reset_alarms(Now(rig.t_ns), "contactor-failed")
    assert [d.body["event"] for d in output.drafts if d.kind == "alarm"] == ["clear"]
    rig.run(rows[100:])
    assert rig.alarms().count(("contactor-failed", "raise")) == 2


def test_extremes_of_the_bms_stand_in_where_single_cells_are_not_on_the_bus() -> None:
    catalog = tuple(
        Signal(role, "B", 0, "", role)
        for role in ("cell_voltage_max", "cell_voltage_min", "temperature_max", "soc")
    )
    stage = EdgeStage(catalog, RULES["nmc"], EdgeSettings(series_cells=98), Ledger())
    drafts: list[Draft] = []
    for n in range(80):
        t_ns = n * PERIOD_NS
        value = np.array([4.28 if n > 20 else 4.0, 3.9, 40.0 if n < 40 else 57.0, 55.0])
        stamps = np.full(4, t_ns, dtype=np.int64)
        one = SampleBatch(stamps, np.arange(4), value, np.zeros(4, dtype=np.uint8))
        drafts += stage.step(Now(t_ns), one).drafts
    texts = [d.body["text"] for d in drafts if d.kind == "alarm" and d.body["event"] == "raise"]
    assert any(text.startswith("highest cell is at 4.280 V") for text in texts)
    assert any(text.startswith("highest probe is at 57.0 degC") for text in texts)
    assert "hvil-open" in stage.unwatched and "cell-over-voltage" not in stage.unwatched


def test_a_catalog_without_any_role_is_no_trouble() -> None:
    stage = EdgeStage((Signal("X", "M", 0),), RULES["lfp"], EdgeSettings(), Ledger())
    one = SampleBatch(np.zeros(1, np.int64), np.zeros(1, np.int64), np.ones(1), np.zeros(1, np.uint8))
    for n in range(100):
        assert [d for d in stage.step(Now(n * NS_PER_S), one).drafts if d.kind == "alarm"] == []
    assert len(stage.unwatched) == len(RULES["lfp"].rules)
    msgspec.json.encode(stage.status())
    stage.flush(Now(0))


Steps = st.lists(
    st.tuples(
        st.integers(-(2 * NS_PER_S), 5 * NS_PER_S),  # how the clock moves, backwards too
        st.integers(-(10**10), 10**10),  # how far the samples' stamps are off
        st.integers(0, 2**32 - 1),
        st.sampled_from(["row", "wild", "nan", "part", "empty", "refused"]),
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(Steps)
def test_nothing_that_can_come_raises_and_every_sample_is_accounted_for(
    steps: list[tuple[int, int, int, str]],
) -> None:
    rig = Rig()
    healthy = rows_of(0.1)[0]
    for move_ns, off_ns, seed, what in steps:
        rig.t_ns = max(0, rig.t_ns + move_ns)
        rng = np.random.default_rng(seed)
        row, validity, column = healthy.copy(), ALL_VALID, COLUMNS
        if what == "wild":
            row = rng.standard_normal(len(row)) * 10.0 ** rng.integers(-3, 12)
        elif what == "nan":
            row[rng.integers(0, len(row), 50)] = rng.choice([np.nan, np.inf, -np.inf])
        elif what == "refused":
            validity = rng.integers(0, 9, len(row)).astype(np.uint8)
        elif what == "part":
            column = rng.integers(0, len(CATALOG), 90)
            row, validity = row[column], np.zeros(90, dtype=np.uint8)
        samples = SampleBatch(np.full(len(row), rig.t_ns + off_ns, np.int64), column, row, validity)
        for draft in rig.take(empty() if what == "empty" else samples):
            msgspec.msgpack.encode({k: v for k, v in draft.body.items() if k != "series"})
    msgspec.json.encode(rig.stage.status())
