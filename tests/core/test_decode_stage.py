"""The whole stage: real vehicles' bytes in, values and validity in the pack's picture out, all counted."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tbox.bus.recordings import Recording, recording_batches
from tbox.decode.database import Database, DbcFile, DecodeSettings, load_database
from tbox.decode.roles import DEFAULT_MAP, RoleMap
from tbox.decode.stage import DecodeStage
from tbox.edge.pack import Pack
from tbox.ledger import Ledger
from tbox.model import FRAME_DTYPE, NS_PER_MS, FrameBatch, Now, PackSnapshot, Validity
from tbox.sim.simulator import Simulator
from tests import dbcs
from tests.core.test_batch import assert_equal_to_cantools
from tests.data import data_file
from tests.dbcs import Msg

REPO = Path(__file__).resolve().parents[2]
OWN = [DbcFile(str(REPO / "dbc" / f"tbox_{name}.dbc")) for name in ("bms", "vehicle")]


class Chain:
    """Decode, then the pack: what the edge would know."""

    def __init__(self, database: Database, mapping: str = "", **settings: Any) -> None:
        self.ledger = Ledger()
        texts = [(mapping, "map.toml"), (DEFAULT_MAP.read_text(encoding="utf-8"), str(DEFAULT_MAP))]
        self.stage = DecodeStage(database, RoleMap.parse(texts), self.ledger, DecodeSettings(**settings))
        self.pack = Pack(self.stage.catalog, self.ledger.stage("pack", "samples"))

    def step(self, batch: FrameBatch) -> None:
        now_ns = int(batch.t_ns[-1]) if len(batch) else 0
        for _ in self.pack.take(self.stage.step(Now(now_ns), batch), now_ns):
            pass
        self.ledger.check()

    def snapshot(self, at_ns: int) -> PackSnapshot:
        return self.pack.snapshot(Now(at_ns))

    def dropped(self, stage: str) -> dict[str, int]:
        return dict(self.ledger.snapshot()[stage]["dropped"])


def frames(channel: int, t_ms: int, *pairs: tuple[Any, dict[str, float]]) -> FrameBatch:
    """Encode messages with cantools: the bytes do not come from the decoder's own table."""
    block = np.zeros(len(pairs), FRAME_DTYPE)
    for n, (message, values) in enumerate(pairs):
        known = {s.name: values.get(s.name, 0) for s in message.signals}
        known = {k: v for k, v in known.items() if _present(message, k, values)}
        payload = message.encode(known, strict=False)
        data = np.frombuffer(payload.ljust(64, b"\0"), np.uint8)
        block[n] = (message.frame_id, len(payload), 0, (0, 0), data)
    return FrameBatch(channel, block, np.full(len(pairs), t_ms * NS_PER_MS, np.int64))


def _present(message: Any, name: str, values: dict[str, float]) -> bool:
    signal = message.get_signal_by_name(name)
    return signal.multiplexer_ids is None or values.get(signal.multiplexer_signal) in signal.multiplexer_ids


@pytest.fixture(scope="module")
def three_cars() -> Database:
    """foxBMS, a Tesla Model 3 and a Kona, each on a bus of its own: they share ids."""
    names = ("foxbms.dbc", "model3.dbc", "kona-pcan.dbc")
    return load_database([DbcFile(str(data_file("dbc", name)), n) for n, name in enumerate(names)])


def test_three_cars_at_once_from_bytes_to_the_packs_picture(three_cars: Database) -> None:
    assert len(three_cars.definitions) == 41 + 148 + 107
    message = {(d.channel, d.message.name): d.message for d in three_cars.definitions}
    # The SOC is the Tesla's here, the pack's voltage the Kona's; cells and probes are foxBMS's.
    mapping = "[[signal]]\nchannel = 0\nmessage = 'f_Pack*'\nsignal = '.*'\nignore = true\n"
    mapping += "[[signal]]\nchannel = 2\nmessage = 'BMS_542'\nsignal = '.*'\nignore = true\n"
    mapping += "[[signal]]\nchannel = 1\nmessage = 'ID132*'\nsignal = '.*'\nignore = true\n"
    chain = Chain(three_cars, mapping)
    cells = message[0, "f_CellVoltages"]
    for cycle in range(2):
        for page in range(54):
            values: dict[str, float] = {"f_CellVoltages_Mux": page}
            values |= {f"CellVoltage_{4 * page + n:03d}": 3600 + 4 * page + n for n in range(4)}
            if page == 9:
                values["CellVoltage_037_invalidFlag"] = 1
            chain.step(frames(0, cycle * 540 + page * 10, (cells, values)))
    soc, hv = message[1, "ID292BMS_SOC"], message[2, "Batt_HV_Status"]
    contactor = message[1, "ID212BMS_status"]
    for n in range(3):
        t_ms = 1100 + 100 * n
        chain.step(frames(1, t_ms, (soc, {"SOCUI292": 61.5}), (contactor, {"BMS_contactorState": 4})))
        chain.step(frames(2, t_ms, (hv, {"VBatt": 355.1, "IBatt": 12.5})))
    snapshot = chain.snapshot(1300 * NS_PER_MS)
    ok = np.ones(216, np.bool_)
    ok[37] = False
    assert snapshot.cell_ok.tolist() == ok.tolist()
    assert snapshot.cell_v[ok] == pytest.approx(3.6 + 0.001 * np.flatnonzero(ok))
    assert snapshot.scalars["soc"] == 61.5
    assert snapshot.scalars["pack_voltage"] == pytest.approx(355.1)
    assert snapshot.scalars["pack_current"] == pytest.approx(-12.5)
    assert snapshot.scalars["contactor_state"] == 2.0
    assert chain.dropped("validity")["flagged"] == 2


@pytest.mark.slow
def test_the_kona_recording_gives_no_reading_from_its_sentinels() -> None:
    """BAT_SOC reads 255 in 106 of 108 samples; bound to the SOC it must never count, nor V_BAT 6.0 V."""
    log = data_file("can", "kona-pcan-ccan-power-on-ready-off.gvret.csv")
    database = load_database([DbcFile(str(data_file("dbc", "kona-pcan.dbc")))])
    mapping = "[[signal]]\nmessage = 'Twelve*'\nsignal = 'BAT_SOC'\nrole = 'soc'\n"
    mapping += "[[signal]]\nmessage = 'Twelve*'\nsignal = 'BAT_SOH'\nrole = 'soh'\n"
    mapping += "[[signal]]\nmessage = 'BMS_542'\nsignal = 'SocDisp'\nignore = true\n"
    mapping += "[[signal]]\nmessage = 'BMS_542'\nsignal = 'uwe542_78_UCCS'\nrole = 'pack_voltage'\n"
    chain = Chain(database, mapping)
    seen: dict[str, list[float]] = {}
    for batch in recording_batches(Recording(log), 0, 0):
        samples = chain.stage.step(Now(0), batch)
        for column, value, code in zip(samples.column, samples.value, samples.validity, strict=True):
            if code == Validity.VALID:
                seen.setdefault(chain.stage.catalog[column].role, []).append(float(value))
    chain.ledger.check()
    frames_in = chain.ledger.snapshot()["decode"]
    assert frames_in["into"] == 24_263 and frames_in["dropped"] == {"unknown": 1}
    assert set(seen["soc"]) <= {0.0} and set(seen["soh"]) <= {0.0}
    assert "pack_voltage" not in seen or max(seen["pack_voltage"]) < 500
    assert min(seen["low_voltage"]) > 11


def test_the_simulated_vehicle_decodes_whole_and_its_crcs_hold() -> None:
    chain = Chain(load_database(OWN))
    simulator = Simulator(1)
    count = 0
    for step in range(1, 500):
        for batch in simulator.frames_until(step * 10 * NS_PER_MS):
            count += len(batch)
            chain.step(batch)
    decode = chain.ledger.snapshot()["decode"]
    assert decode["into"] == decode["out"] == count > 500
    assert set(chain.dropped("validity")) <= {"sna"}
    snapshot = chain.snapshot(5000 * NS_PER_MS)
    assert len(snapshot.cell_v) == 192 and len(snapshot.probe_c) == 48 and snapshot.cell_ok.all()
    assert snapshot.probe_module.tolist() == [n // 6 for n in range(48)]
    assert {"soc", "soh", "pack_current", "speed", "gear", "hvil", "isolation_resistance"} <= set(
        snapshot.scalars
    )


def test_frames_and_times_with_gaps_between_them_decode_as_in_one_piece() -> None:
    batch = next(iter(Simulator(3).frames_until(500 * NS_PER_MS)))
    wide, wide_ns = np.repeat(batch.frames, 2), np.repeat(batch.t_ns, 2)
    apart = FrameBatch(batch.channel, wide[::2], wide_ns[::2])
    expected = Chain(load_database(OWN)).stage.step(Now(0), batch)
    got = Chain(load_database(OWN)).stage.step(Now(0), apart)
    assert len(got) > 0
    for name in ("t_ns", "column", "value", "validity"):
        assert getattr(got, name).tobytes() == getattr(expected, name).tobytes()


def test_values_that_only_cantools_can_say_stand_between_the_others_in_order() -> None:
    wide = [dbcs.Sig("A", 0, 64, False, False, "3", "1")]  # integers above 2^53: cantools' business
    plain = [dbcs.Sig("B", 0, 8, False, False, "1", "0")]
    chain = Chain(dbcs.load([Msg(1, "Wide", 8, wide), Msg(2, "Plain", 8, plain)]))
    block = np.zeros(6, FRAME_DTYPE)
    block["id"], block["len"] = [2, 1, 2, 1, 1, 2], 8
    block["data"][:, 0] = range(6)
    samples = chain.stage.step(Now(0), FrameBatch(0, block, np.arange(6, dtype=np.int64)))
    assert samples.t_ns.tolist() == list(range(6))
    assert samples.value.tolist() == [0, 4, 2, 10, 13, 5]


def test_unmapped_signals_keep_their_dbc_name_or_stay_out() -> None:
    database = load_database(OWN)
    names = [s.name for s in Chain(database).stage.catalog]
    assert len(set(names)) == len(names)
    assert "BMS_Status.BmsState" in names and "Vehicle.Speed" in names
    chain = Chain(database, unmapped=False)
    for batch in Simulator(2).frames_until(300 * NS_PER_MS):
        samples = chain.stage.step(Now(0), batch)
        assert all(chain.stage.catalog[c].role for c in samples.column)
    chain.ledger.check()


def test_one_dbc_on_two_buses_has_two_columns_of_each_signal() -> None:
    files = [DbcFile(OWN[1].path, 0), DbcFile(OWN[1].path, 1)]
    catalog = Chain(load_database(files)).stage.catalog
    assert len({s.name for s in catalog}) == len(catalog) == 62
    assert [s.channel for s in catalog if s.role == "speed"] == [0, 1]


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(messages=dbcs.databases(), seed=st.integers(0, 2**32 - 1), backwards=st.booleans())
def test_nothing_on_a_bus_raises_and_everything_is_counted(
    messages: list[Msg], seed: int, backwards: bool
) -> None:
    """Any DBC, any frames, sentinel bytes, stuck bits, time running backwards, error and remote flags."""
    names = [sig.name for msg in messages for sig in msg.signals]
    roles = ["cell_voltage", "soc", "pack_current", "speed"]
    mapping = "".join(
        f"[[signal]]\nsignal = '{name}'\nrole = '{roles[n % 4]}'\nunit = '{['V', '%', 'A', 'km/h'][n % 4]}'\n"
        for n, name in enumerate(names[:4])
    )
    mapping += "".join(
        f'[[message]]\nmessage = "{msg.name}"\nprofile = "counter"\ncounter = "{sig.name}"\n'
        for msg in messages
        for sig in msg.signals[:1]
        if sig.bits <= 8 and not sig.float_type and not sig.mark.startswith("m")
    )
    chain = Chain(dbcs.load(messages), mapping)
    rng = np.random.default_rng(seed)
    block = dbcs.frames_of(rng, dbcs.load(messages).definitions, 80)
    block["len"][::7] = 255  # no frame is so long
    t_ns = np.sort(rng.integers(0, 10**10, 80))
    if backwards:
        t_ns = t_ns[::-1].copy()
    for first in range(0, 80, 20):
        part = slice(first, first + 20)
        samples = chain.stage.step(Now(0), FrameBatch(0, block[part], t_ns[part]))
        assert len(samples.t_ns) == len(samples.value) == len(samples.validity) == len(samples.column)
        chain.ledger.check()
    assert len(chain.stage.step(Now(0), FrameBatch(9, block[:20], t_ns[:20]))) == 0
    assert len(chain.stage.step(Now(0), FrameBatch(0, block[:0], t_ns[:0]))) == 0
    chain.ledger.check()


def thousands() -> list[Msg]:
    """250 messages of 32 signals: both byte orders, signed and not, floats, scales, multiplexed pages."""
    messages = []
    for n in range(250):
        paged, length = n % 5 == 0, 64
        sigs = [dbcs.Sig(f"S{n}_Page", 0, 8, False, False, "1", "0", mark="M")] if paged else []
        for k in range(31 if paged else 32):
            slot = 8 + 16 * (k % 16) if paged else 16 * k
            bits, float_type = (32, 1) if not paged and n % 7 == 3 and k % 2 == 0 else (16, 0)
            if not paged and n % 7 == 3 and k % 2:
                slot, bits = 16 * k + 11, 5  # within the float before: overlapping is allowed
            big = n % 2 == 1 and not float_type and bits == 16
            start = 8 * (slot // 8) + 7 - slot % 8 if big else slot
            scale, offset = dbcs.SCALES[k % len(dbcs.SCALES)], dbcs.OFFSETS[k % len(dbcs.OFFSETS)]
            mark = f"m{k // 16}" if paged else ""
            sigs.append(dbcs.Sig(f"S{n}_{k}", start, bits, big, k % 3 == 0, scale, offset, mark, float_type))
        messages.append(Msg(n + 1, f"M{n}", length, sigs))
    return messages


@pytest.mark.slow
def test_eight_thousand_signals_decode_as_in_cantools_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "large.dbc"
    path.write_text(dbcs.render(thousands()))
    database = load_database([DbcFile(str(path))])
    block = dbcs.frames_of(np.random.default_rng(1), database.definitions, 1000)
    assert_equal_to_cantools(database, block, 100)
    tracemalloc.start()
    try:
        chain = Chain(database)
        assert len(chain.stage.catalog) == 8000
        built_bytes, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        for first in range(0, 1000, 100):
            t_ns = np.arange(first, first + 100, dtype=np.int64) * NS_PER_MS
            chain.step(FrameBatch(0, block[first : first + 100], t_ns))
        held_bytes, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Of 8,000 signals 2 KiB each, of a batch 512 bytes for each of its some 3,200 samples: generous limits.
    assert built_bytes < 16 << 20 and peak_bytes - built_bytes < 4 << 20
    assert held_bytes - built_bytes < 1 << 20, "nothing grows with the frames"


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2_000), st.floats(0.0, 1.0))
def test_the_look_ahead_misses_no_reading_past_a_limit_and_counts_nothing(at_ms: int, share: float) -> None:
    database = load_database(OWN)
    ahead = Chain(database)
    batches = Simulator(1).frames_until(at_ms * NS_PER_MS)[-3:]
    known = DecodeStage(database, RoleMap.load(), Ledger(), DecodeSettings(glitch=False))
    for batch in batches:
        before = ahead.ledger.snapshot()
        samples = known.step(Now(0), batch)
        good = samples.value[samples.validity == Validity.VALID]
        limit = float(np.quantile(good, share)) if len(good) else 0.0
        size = len(ahead.stage.catalog)
        upper, lower = np.full(size, limit), np.full(size, -np.inf)
        assert ahead.stage.passes(batch, upper, lower) >= bool((good >= limit).any())
        assert not ahead.stage.passes(batch, np.full(size, np.inf), lower)
        assert ahead.ledger.snapshot() == before


def test_the_look_ahead_takes_no_sentinel_for_a_reading() -> None:
    stage = Chain(load_database(OWN)).stage
    message = next(d.message for d in load_database(OWN).definitions if d.message.name == "BMS_Cells_M0")
    frame = np.zeros(1, FRAME_DTYPE)
    frame[0] = (message.frame_id, 64, 0, (0, 0), np.full(64, 0xFF, np.uint8))
    size = len(stage.catalog)
    upper = np.array([5.0 if s.role == "cell_voltage" else np.inf for s in stage.catalog])
    batch = FrameBatch(0, frame, np.zeros(1, np.int64))
    assert not stage.passes(batch, upper, np.full(size, -np.inf))
    assert stage.passes(
        frames(0, 0, (message, {s.name: 4.0 for s in message.signals if "Volt" in s.name})),
        np.where(np.isinf(upper), np.inf, 3.9),
        np.full(size, -np.inf),
    )
