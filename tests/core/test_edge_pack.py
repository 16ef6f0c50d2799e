"""The pack's picture: only valid and fresh values, whole scans only, every sample accounted for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tbox.edge.pack import LAPS_EXACT_MAX, Pack, PackSettings, _laps
from tbox.ledger import StageLedger
from tbox.model import NS_PER_MS, NS_PER_S, Now, SampleBatch, Signal, Validity

CELLS = 12
CATALOG = (
    Signal("Speed", "V", 0, "km/h", "speed"),
    *(Signal(f"Cell{i}", f"C{i // 3}", 0, "V", "cell_voltage", i, i // 3) for i in reversed(range(CELLS))),
    *(Signal(f"Probe{i}", "T", 0, "degC", "probe_temperature", i, i) for i in range(2)),
    Signal("Odd", "V", 0, "", ""),
    Signal("Soc", "B", 0, "percent", "soc"),
)
COLUMN = {signal.name: column for column, signal in enumerate(CATALOG)}


def samples(*named: tuple[str, float] | tuple[str, float, Validity], t_ns: int = 0) -> SampleBatch:
    return SampleBatch(
        np.full(len(named), t_ns, dtype=np.int64),
        np.array([COLUMN[one[0]] for one in named], dtype=np.int64),
        np.array([one[1] for one in named], dtype=np.float64),
        np.array([one[2] if len(one) > 2 else 0 for one in named], dtype=np.uint8),
    )


def frame(
    step: int, value: float, validity: Validity = Validity.VALID
) -> tuple[tuple[str, float, Validity], ...]:
    """One step of a multiplexer: three cells."""
    return tuple((f"Cell{3 * step + i}", value, validity) for i in range(3))


def new_pack(**settings: int) -> tuple[Pack, StageLedger]:
    account = StageLedger("pack", "samples")
    return Pack(CATALOG, account, PackSettings(**settings)), account


def feed(pack: Pack, batch: SampleBatch, t_ns: int = 0) -> int:
    """Return how many cell scans the batch completed."""
    return sum(run.cells_done for run in pack.take(batch, t_ns))


def test_cells_lie_in_the_order_of_their_index_with_their_modules() -> None:
    pack, _ = new_pack()
    feed(pack, samples(*((f"Cell{i}", 3.0 + i / 100) for i in range(CELLS)), ("Probe1", 25.0), ("Soc", 50.0)))
    seen = pack.snapshot(Now(0))
    assert seen.cell_v.tolist() == [3.0 + i / 100 for i in range(CELLS)]
    assert seen.cell_ok.all()
    assert seen.probe_ok.tolist() == [False, True]
    assert seen.probe_module.tolist() == [0, 1]
    assert seen.scalars == {"soc": 50.0}


def test_a_scan_moves_only_when_every_cell_was_heard_anew() -> None:
    pack, _ = new_pack()
    done = [feed(pack, samples(*frame(step, 3.5))) for step in (0, 1, 2, 0, 1, 2, 3)]
    assert done == [0, 0, 0, 0, 0, 0, 1]
    assert [feed(pack, samples(*frame(step, 3.5))) for step in (0, 1, 2, 3)] == [0, 0, 0, 1]


def test_a_batch_that_ends_a_scan_and_begins_the_next_is_cut_there() -> None:
    pack, _ = new_pack()
    feed(pack, samples(*frame(0, 3.1), *frame(1, 3.1), *frame(2, 3.1)))
    seen = []
    for run in pack.take(samples(*frame(3, 3.1), *frame(0, 3.9), ("Soc", 1.0)), 0):
        seen.append((run.cells_done, pack.snapshot(Now(0)).cell_v.max()))
    assert seen == [(True, 3.1), (False, 3.9)]
    assert [feed(pack, samples(*frame(step, 3.9))) for step in (1, 2, 3)] == [0, 0, 1]


def test_a_signal_twice_in_a_batch_is_seen_twice() -> None:
    pack, _ = new_pack()
    runs = list(pack.take(samples(("Soc", 1.0), ("Speed", 5.0), ("Soc", 2.0), ("Soc", 3.0)), 0))
    assert [run.touched for run in runs] == [["soc", "speed"], ["soc"], ["soc"]]


def test_a_burst_is_one_run_only_if_it_is_found_quiet() -> None:
    burst = samples(*(("Soc", float(i)) for i in range(LAPS_EXACT_MAX + 2)))
    size = len(new_pack()[0].value)
    last = float(burst.value[-1])
    for upper, runs in ((np.nextafter(last, np.inf), 1), (last, LAPS_EXACT_MAX + 2)):
        limits = np.full(size, upper), np.full(size, -np.inf)
        assert len(list(new_pack()[0].take(burst, 0, limits))) == runs
    assert len(list(new_pack()[0].take(burst, 0))) == LAPS_EXACT_MAX + 2


@pytest.mark.parametrize("validity", [v for v in Validity if v])
def test_a_refused_sample_never_becomes_a_value_but_the_scan_goes_on(validity: Validity) -> None:
    pack, account = new_pack()
    bad = samples(*frame(0, 65.535, validity), *frame(1, 3.5), *frame(2, 3.5), *frame(3, 3.5))
    assert feed(pack, bad) == 1
    seen = pack.snapshot(Now(0))
    assert seen.cell_ok.tolist() == [False] * 3 + [True] * 9
    assert account.dropped == {"refused": 3}
    account.check()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_believed(value: float) -> None:
    pack, account = new_pack()
    feed(pack, samples(("Soc", 50.0), ("Speed", value)))
    assert pack.snapshot(Now(0)).scalars == {"soc": 50.0}
    assert account.dropped == {"not_finite": 1}


def test_a_value_grows_stale_and_is_no_longer_known() -> None:
    pack, _ = new_pack(cell_stale_ms=500, scalar_stale_ms=1000)
    feed(pack, samples(*frame(0, 3.5), ("Soc", 50.0)))
    assert pack.snapshot(Now(500 * NS_PER_MS)).cell_ok.sum() == 3
    later = pack.snapshot(Now(600 * NS_PER_MS))
    assert later.cell_ok.sum() == 0 and later.scalars == {"soc": 50.0}
    assert pack.snapshot(Now(2 * NS_PER_S)).scalars == {}


def test_a_signal_that_comes_seldom_stays_fresh_for_its_cycles() -> None:
    """A state of health every ten seconds would else be unknown half of the time."""
    catalog = (
        Signal("Soh", "B", 0, "percent", "soh", cycle_ms=10_000),
        Signal("Soc", "B", 0, "percent", "soc", cycle_ms=100),
        Signal("Cell0", "C", 0, "V", "cell_voltage", 0, cycle_ms=2_000),
        Signal("Odo", "O", 0, "km", "odometer", cycle_ms=10**9),
    )
    pack = Pack(catalog, StageLedger("pack", "samples"))
    once = SampleBatch(
        np.zeros(4, np.int64), np.arange(4, dtype=np.int32), np.full(4, 3.0), np.zeros(4, np.uint8)
    )
    feed(pack, once)
    known = {s: pack.snapshot(Now(s * NS_PER_S)) for s in (5, 6, 20, 21, 100, 101, 600, 601)}
    assert set(known[5].scalars) == {"soc", "soh", "odometer"}
    assert set(known[6].scalars) == {"soh", "odometer"} == set(known[100].scalars)
    assert set(known[101].scalars) == {"odometer"} == set(known[600].scalars)
    assert known[601].scalars == {}, "no cycle that a DBC may declare keeps a value for ever"
    assert known[20].cell_ok.all() and not known[21].cell_ok.any()


def test_a_silent_cell_does_not_stop_the_scans_for_ever() -> None:
    pack, _ = new_pack(cell_stale_ms=300)
    done = []
    for n in range(40):
        t_ns = n * 50 * NS_PER_MS
        done.append(feed(pack, samples(*frame(n % 3, 3.5), t_ns=t_ns), t_ns))
    assert sum(done[:6]) == 0
    assert sum(done) >= 9
    assert pack.snapshot(Now(t_ns)).cell_ok.sum() == 9


def test_a_cell_that_comes_back_is_waited_for_again() -> None:
    pack, _ = new_pack(cell_stale_ms=300)
    for n in range(20):
        feed(pack, samples(*frame(n % 3, 3.5), t_ns=n * 50 * NS_PER_MS), n * 50 * NS_PER_MS)
    for n in range(20, 28):
        feed(pack, samples(*frame(n % 4, 3.5), t_ns=n * 50 * NS_PER_MS), n * 50 * NS_PER_MS)
    before = pack.cells.scans
    steps = [feed(pack, samples(*frame(n % 4, 3.5), t_ns=2 * NS_PER_S), 2 * NS_PER_S) for n in range(8)]
    assert sum(steps) == 2 and pack.cells.scans == before + 2


def test_a_time_stamp_from_the_future_does_not_keep_a_value_fresh() -> None:
    pack, _ = new_pack(scalar_stale_ms=1000)
    feed(pack, samples(("Soc", 50.0), t_ns=10**17), 0)
    assert pack.snapshot(Now(2 * NS_PER_S)).scalars == {}


def test_an_empty_batch_and_an_empty_catalog_are_nothing() -> None:
    nothing = samples()
    assert list(new_pack()[0].take(nothing, 0)) == []
    bare = Pack((), StageLedger("pack", "samples"))
    assert list(bare.take(nothing, 0)) == []
    assert len(bare.snapshot(Now(0)).cell_v) == 0


Batches = st.lists(
    st.lists(
        st.tuples(
            st.integers(0, len(CATALOG) - 1),
            st.one_of(st.floats(allow_nan=True, allow_infinity=True), st.floats(2.0, 4.0)),
            st.sampled_from([0, 0, 0, 1, 2, 8]),
            st.integers(-(10**11), 10**11),
        ),
        max_size=40,
    ),
    max_size=8,
)


def as_batch(rows: list[tuple[int, float, int, int]]) -> SampleBatch:
    t_ns, column, value, validity = ([row[i] for row in rows] for i in (3, 0, 1, 2))
    return SampleBatch(
        np.array(t_ns, dtype=np.int64),
        np.array(column, dtype=np.int64),
        np.array(value, dtype=np.float64),
        np.array(validity, dtype=np.uint8),
    )


@given(Batches)
def test_any_batches_leave_what_a_plain_loop_would_and_count_every_sample(
    batches: list[list[tuple[int, float, int, int]]],
) -> None:
    pack, account = new_pack(cell_stale_ms=600_000)
    last: dict[int, float] = {}
    scans, heard = 0, set[int]()
    cells = {column for column, signal in enumerate(CATALOG) if signal.role == "cell_voltage"}
    for rows in batches:
        for column, value, validity, _ in rows:
            if validity == 0 and np.isfinite(value):
                last[column] = value
            heard |= {column} & cells
            if heard == cells:
                heard, scans = set(), scans + 1
        for _ in pack.take(as_batch(rows), 0):
            pass
        account.check()
    for column in range(len(CATALOG)):
        stored = pack.value[pack.slot_of[column]]
        assert stored == last[column] if column in last else np.isnan(stored)
    assert pack.cells.scans == scans


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60))
def test_laps_hold_no_signal_twice_and_cannot_be_longer(columns: list[int]) -> None:
    laps = _laps(np.array(columns, dtype=np.int64), 6)
    assert [begin for begin, _ in laps] == [0, *(end for _, end in laps[:-1])] and laps[-1][1] == len(columns)
    for begin, end in laps:
        assert len(set(columns[begin:end])) == end - begin
        assert end == len(columns) or columns[end] in columns[begin:end]
