"""Tests of the sampler: windows against a plain-Python oracle, an exact account, record sizes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tbox.edge.mode import Context, Mode
from tbox.edge.sampler import STATE_ROWS_MAX, ModePlan, Sampler, SamplerSettings, column_names
from tbox.ledger import StageLedger
from tbox.model import NS_PER_MS, Draft, Level, Now, SampleBatch, Signal
from tbox.record.codec import Minter, pack_series, unpack_series

CITY = Context(Mode.CITY, 1)
DC = Context(Mode.CHARGING_DC, 0, 20.0, 150.0)
VSS = "Vehicle.Powertrain.TractionBattery."

CATALOG = (
    Signal("cell0", "Cells", 0, "V", "cell_voltage", 0, vss=VSS + "CellVoltage.CellVoltages", scale=0.001),
    Signal("cell1", "Cells", 0, "V", "cell_voltage", 1, vss=VSS + "CellVoltage.CellVoltages", scale=0.001),
    Signal("speed", "Vehicle", 0, "km/h", "speed", vss="Vehicle.Speed", scale=0.5),
    Signal("gear", "Vehicle", 0, "", "gear"),
    Signal("other", "Misc", 1, "", scale=2.0, offset=-40.0),
    Signal("float", "Misc", 1, "", is_float=True),
)
CELL0, CELL1, SPEED, GEAR, OTHER, FLOAT = range(6)
NAMES = column_names(CATALOG)

Sample = tuple[int, int, float]  # ms, column, value


def batch(samples: Sequence[Sample], validity: Sequence[int] | None = None) -> SampleBatch:
    return SampleBatch(
        np.array([t * NS_PER_MS for t, _, _ in samples], dtype=np.int64),
        np.array([c for _, c, _ in samples], dtype=np.int64),
        np.array([v for _, _, v in samples], dtype=np.float64),
        np.array(validity if validity is not None else [0] * len(samples), dtype=np.uint8),
    )


def new_sampler(catalog: Sequence[Signal] = CATALOG, plan: SamplerSettings | None = None) -> Sampler:
    return Sampler(catalog, StageLedger("sampler", "samples"), plan)


def account(sampler: Sampler) -> StageLedger:
    return sampler._account


def at(ms: int) -> Now:
    return Now(ms * NS_PER_MS)


def points(drafts: Sequence[Draft]) -> dict[str, dict[int, float]]:
    """Expand telemetry drafts: column name -> {absolute ms: value}."""
    out: dict[str, dict[int, float]] = defaultdict(dict)
    for draft in drafts:
        for series in draft.body["series"]:
            for column in unpack_series(pack_series(series)).columns:
                for row, t_ms in enumerate(series.t_ms):
                    if column.present is None or column.present[row]:
                        value = int(column.raw[row]) * column.scale + column.offset
                        out[column.name][draft.mono_ns // NS_PER_MS + int(t_ms)] = value
    return out


def test_a_second_of_driving_is_one_record_with_two_windows() -> None:
    sampler = new_sampler()
    samples = [(10_000 + i * 100, CELL0, 3.700 + i * 0.001) for i in range(10)]
    assert sampler.step(at(10_900), batch(samples), CITY) == []
    (draft,) = sampler.step(at(11_050), batch([]), CITY)
    assert draft.kind == "telemetry" and draft.level is Level.INFO and draft.mono_ns == 10_000 * NS_PER_MS
    assert draft.body["mode"] == "city" and draft.body["journey"] == 1
    assert draft.body["windows_ms"] == [500]
    found = points([draft])
    name = NAMES[CELL0]
    assert found[name] == pytest.approx({10_000: 3.704, 10_500: 3.709})
    assert found[name + ".min"] == pytest.approx({10_000: 3.700, 10_500: 3.705})
    assert found[name + ".max"] == pytest.approx({10_000: 3.704, 10_500: 3.709})
    assert found[name + ".mean"] == pytest.approx({10_000: 3.702, 10_500: 3.707})


def test_a_flat_column_is_sent_once_not_four_times() -> None:
    sampler = new_sampler()
    sampler.step(at(999), batch([(i * 100, SPEED, 50.0) for i in range(10)]), CITY)
    (draft,) = sampler.flush(at(1000), CITY)
    assert set(points([draft])) == {"Vehicle.Speed"}


def test_dc_fast_charging_gives_ten_rows_a_second_in_full_detail() -> None:
    sampler = new_sampler()
    sampler.step(at(0), batch([]), DC)
    drafts = sampler.step(at(1_099), batch([(i * 10, CELL0, 3.7 + 0.001 * (i % 7)) for i in range(100)]), DC)
    found = points(drafts)
    assert [len(found[NAMES[CELL0] + s]) for s in ("", ".min", ".max", ".mean")] == [10] * 4
    assert drafts[0].body["charging_power_kw"] == 150.0


def test_each_mode_has_its_pace() -> None:
    rows = {}
    for mode in Mode:
        sampler, context = new_sampler(), Context(mode, int(mode.is_driving))
        drafts = []
        for t in range(0, 120_000, 100):
            drafts += sampler.step(at(t + 99), batch([(t, SPEED, t / 1000)]), context)
        rows[mode] = len(points(drafts)["Vehicle.Speed"]), len(drafts)
    assert rows[Mode.CHARGING_DC][0] > 1000 > rows[Mode.CITY][0] > 200 > rows[Mode.CHARGING_AC][0]
    assert rows[Mode.IDLE][0] <= 12 and rows[Mode.IDLE][1] <= 5
    assert 110 <= rows[Mode.CITY][1] <= 125, "about a record a second while driving"


def test_a_state_is_a_row_per_change_at_its_own_time() -> None:
    sampler = new_sampler()
    gears = [(100, 0.0), (200, 0.0), (333, 3.0), (400, 3.0), (401, 2.0), (900, 2.0)]
    sampler.step(at(999), batch([(t, GEAR, v) for t, v in gears]), CITY)
    (draft,) = sampler.flush(at(999), CITY)
    assert points([draft])["Vehicle.gear"] == {100: 0.0, 333: 3.0, 401: 2.0}
    assert (account(sampler).out, account(sampler).folded) == (3, 3)


def test_states_are_told_again_at_a_keyframe() -> None:
    sampler = new_sampler(plan=SamplerSettings(keyframe_s=10))
    drafts = []
    for t in range(0, 60_000, 500):
        drafts += sampler.step(at(t), batch([(t, GEAR, 3.0)]), CITY)
    assert 5 <= len(points(drafts)["Vehicle.gear"]) <= 7


def test_a_chattering_state_stays_bounded_and_complete() -> None:
    sampler = new_sampler()
    n = STATE_ROWS_MAX * 3 + 17
    drafts = sampler.step(at(999), batch([(i % 999, GEAR, float(i % 2)) for i in range(n)]), CITY)
    drafts += sampler.flush(at(999), CITY)
    rows = sum(len(series.t_ms) for draft in drafts for series in draft.body["series"])
    assert rows == n == account(sampler).out
    assert max(len(series.t_ms) for draft in drafts for series in draft.body["series"]) <= STATE_ROWS_MAX


def test_a_mode_change_closes_the_record_under_the_mode_it_was_taken_in() -> None:
    sampler = new_sampler()
    sampler.step(at(100), batch([(50, SPEED, 1.0)]), CITY)
    (draft,) = sampler.step(at(200), batch([(150, SPEED, 2.0)]), DC)
    assert draft.body["mode"] == "city" and points([draft]) == {"Vehicle.Speed": {0: 1.0}}
    (draft,) = sampler.flush(at(300), DC)
    assert draft.body["mode"] == "charging_dc" and points([draft]) == {"Vehicle.Speed": {100: 2.0}}


def test_a_late_sample_finds_its_window_and_a_very_late_one_joins_the_open_record() -> None:
    sampler = new_sampler()
    sampler.step(at(0), batch([]), CITY)
    sampler.step(at(1000), batch([(100, SPEED, 1.0)]), CITY)
    drafts = sampler.step(at(1030), batch([(990, SPEED, 2.0)]), CITY)
    drafts += sampler.step(at(1050), batch([]), CITY)
    assert points(drafts)["Vehicle.Speed"] == {0: 1.0, 500: 2.0}
    sampler.step(at(1060), batch([(300, SPEED, 7.0)]), CITY)
    assert points(sampler.flush(at(1060), CITY))["Vehicle.Speed"] == {1000: 7.0}


def test_a_time_in_the_future_is_taken_for_now() -> None:
    sampler = new_sampler()
    sampler.step(at(100), batch([(9_000_000, SPEED, 1.0)]), CITY)
    assert points(sampler.flush(at(100), CITY))["Vehicle.Speed"] == {0: 1.0}


def test_the_invalid_and_the_unrepresentable_are_counted_never_sent() -> None:
    sampler = new_sampler()
    wild = [math.nan, math.inf, -math.inf, 1e300]
    samples = [(1, CELL0, v) for v in wild] + [(1, GEAR, math.nan), (2, CELL0, 511.5), (3, CELL0, 3.7)]
    sampler.step(at(10), batch(samples, [0, 0, 0, 0, 0, 1, 0]), CITY)
    assert points(sampler.flush(at(10), CITY)) == {NAMES[CELL0]: {0: pytest.approx(3.7)}}
    assert account(sampler).dropped == {"unrepresentable": 5, "invalid": 1}
    account(sampler).check()


def test_a_value_off_its_declared_grid_is_sent_at_the_finer_float_scale() -> None:
    """A role converted to another unit than the DBC's must not be flattened to the DBC's steps."""
    catalog = (Signal("mv", "Cells", 0, "V", "cell_voltage", 0, scale=1.0),)
    sampler = new_sampler(catalog)
    sampler.step(at(10), batch([(1, 0, 3.7012)]), CITY)
    assert points(sampler.flush(at(10), CITY))["Cells.mv"][0] == pytest.approx(3.7012)


def test_names_are_unique_and_carry_cell_numbers() -> None:
    twice = (*CATALOG, CATALOG[SPEED], CATALOG[SPEED], CATALOG[OTHER])
    names = column_names(twice)
    assert len(set(names)) == len(names)
    assert names[CELL1] == VSS + "CellVoltage.CellVoltages[1]" and names[OTHER] == "Misc.other"


def test_cells_are_one_block_a_statistic_however_few_of_them_vary() -> None:
    catalog = tuple(
        Signal(f"c{i}", f"M{i // 4}", 0, "V", "cell_voltage", i, vss=VSS + f"C[{i}]", scale=0.001)
        for i in (*range(6, 12), *range(6))
    )
    sampler = new_sampler(catalog)
    volts = [(t, c, 3.7 + 0.001 * (t == 200 and c == 3)) for t in (100, 200) for c in range(12)]
    sampler.step(at(300), batch(volts), CITY)
    (draft,) = sampler.flush(at(300), CITY)
    (series,) = draft.body["series"]
    assert series.columns == ()
    assert [(b.prefix, b.first, b.suffix, b.raw.shape) for b in series.blocks] == [
        (VSS + "C[", 0, suffix, (12, 1)) for suffix in ("]", "].min", "].max", "].mean")
    ]
    assert points([draft])[VSS + "C[9].max"] == {0: pytest.approx(3.701)}


def test_a_plan_that_does_not_divide_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError, match="record_ms must be"):
        msgspec.convert(
            {"window_ms": 300, "record_ms": 1000, "other_window_ms": 1000, "other_record_ms": 1000}, ModePlan
        )


# --- properties ------------------------------------------------------------------------------------------


def oracle(samples: Sequence[Sample], window_ms: int) -> dict[int, dict[str, float]]:
    """Plain Python: window start -> statistics of one column's samples."""
    groups: dict[int, list[float]] = defaultdict(list)
    for t, _, v in samples:
        groups[t // window_ms * window_ms].append(v)
    return {
        t: {"": vs[-1], ".min": min(vs), ".max": max(vs), ".mean": math.fsum(vs) / len(vs)}
        for t, vs in groups.items()
    }


def check_column(found: dict[str, dict[int, float]], column: int, samples: list[Sample], window: int) -> None:
    signal, name = CATALOG[column], NAMES[column]
    step = 1e-3 if signal.is_float else signal.scale
    for t, stats in oracle([s for s in samples if s[1] == column], window).items():
        for suffix, value in stats.items():
            known = found[name + suffix].get(t)  # absent where the window was flat
            error = step / 20 if suffix == ".mean" and known is not None else step / 2
            known = found[name][t] if known is None else known
            exact = not signal.is_float and suffix != ".mean"
            assert known == pytest.approx(value, abs=1e-9 if exact else error + 1e-9), (name, suffix, t)


raw_samples = st.lists(
    st.tuples(
        st.integers(0, 400), st.sampled_from([CELL0, CELL1, SPEED, GEAR, OTHER, FLOAT]), st.integers(0, 4000)
    ),
    max_size=120,
)


@settings(max_examples=150, deadline=None)
@given(raw_samples, st.integers(1, 9))
def test_windows_equal_a_plain_python_oracle(steps: list[tuple[int, int, int]], batch_size: int) -> None:
    t, samples = 0, []
    for gap, column, raw in steps:
        t += gap
        signal = CATALOG[column]
        samples.append((t, column, raw / 7 if signal.is_float else raw * signal.scale + signal.offset))
    sampler = new_sampler()
    drafts = sampler.step(at(0), batch([]), CITY)
    for begin in range(0, len(samples), batch_size):
        part = samples[begin : begin + batch_size]
        drafts += sampler.step(at(part[-1][0]), batch(part), CITY)
        account(sampler).check()
    drafts += sampler.flush(at(t), CITY)
    found = points(drafts)
    for column in (CELL0, CELL1, SPEED):
        check_column(found, column, samples, 500)
    for column in (OTHER, FLOAT):
        check_column(found, column, samples, 1000)
    totals = account(sampler)
    totals.check()
    assert totals.held == 0 and totals.into == len(samples)


anything = st.lists(
    st.tuples(
        st.integers(-5_000, 5_000),
        st.integers(0, 5),
        st.floats(allow_nan=True, allow_infinity=True),
        st.sampled_from([0, 0, 0, 1, 5]),
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40_000), anything, st.sampled_from(Mode)), max_size=12))
def test_whatever_comes_the_account_balances_and_nothing_raises(
    story: list[tuple[int, list[tuple[int, int, float, int]], Mode]],
) -> None:
    sampler, now_ms, total = new_sampler(), 10_000, 0
    for wait, samples, mode in story:
        now_ms += wait
        sampler.step(
            at(now_ms),
            batch([(now_ms + t, c, v) for t, c, v, _ in samples], [s[3] for s in samples]),
            Context(mode, int(mode.is_driving)),
        )
        total += len(samples)
        account(sampler).check()
    sampler.flush(at(now_ms), Context())
    totals = account(sampler)
    totals.check()
    assert totals.into == total and totals.held == 0


# --- sizes -----------------------------------------------------------------------------------------------


def packed(draft: Draft) -> int:
    """The size of the record's payload."""
    return len(Minter(1, "vehicle", guard=nullcontext()).mint(draft, Now(draft.mono_ns)).payload)


def test_eight_thousand_signals_of_pure_noise_stay_below_the_record_limit() -> None:
    rng = np.random.default_rng(1)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_"))
    catalog = tuple(
        Signal("".join(rng.choice(letters, 20)), "".join(rng.choice(letters, 12)), 0, is_float=True)
        for _ in range(8000)
    )
    sampler, context = new_sampler(catalog), Context(Mode.CITY, 1)
    columns = np.arange(8000, dtype=np.int64)
    drafts = []
    for t in range(0, 10_000, 500):
        values = rng.normal(0, 1e12, 8000)
        times = np.full(8000, t * NS_PER_MS)
        drafts += sampler.step(
            at(t), SampleBatch(times, columns, values, np.zeros(8000, dtype=np.uint8)), context
        )
    drafts += sampler.flush(at(10_000), context)
    assert len(drafts) > 1 and max(packed(draft) for draft in drafts) < 62 * 1024
    assert [d.body["part"] for d in drafts] == list(range(1, len(drafts) + 1))
    account(sampler).check()


def test_a_driving_second_of_a_192_cell_pack_is_a_few_kilobytes() -> None:
    rng = np.random.default_rng(2)
    catalog = tuple(
        Signal(
            f"c{i}",
            "Cells",
            0,
            "V",
            "cell_voltage",
            i,
            vss=VSS + f"CellVoltage.CellVoltages[{i}]",
            scale=1e-3,
        )
        for i in range(192)
    )
    sampler = new_sampler(catalog)
    columns = np.arange(192, dtype=np.int64)
    valid = np.zeros(192, dtype=np.uint8)
    drafts = []
    for t in range(0, 10_000, 100):
        volts = np.round(3.7 + rng.normal(0, 0.001, 192), 3)
        drafts += sampler.step(
            at(t + 99), SampleBatch(np.full(192, t * NS_PER_MS), columns, volts, valid), CITY
        )
    assert max(packed(draft) for draft in drafts) < 6 * 1024
