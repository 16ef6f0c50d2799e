"""What is no reading never counts as one: sentinels, ranges, flags, counters, CRCs, half cycles, spikes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tbox.decode.crc import E2E_P1, E2E_P5, CrcModel, crc_of
from tbox.decode.database import DecodeSettings
from tbox.decode.roles import UNBOUND, MappingError, RoleMap
from tbox.decode.sentinels import limits_of
from tbox.decode.stage import DecodeStage
from tbox.ledger import Ledger
from tbox.model import FRAME_DTYPE, NS_PER_MS, FrameBatch, Now, SampleBatch, Validity
from tests import dbcs
from tests.dbcs import Msg, Sig

V = Validity


def sig(name: str, start: int, bits: int, **more: Any) -> Sig:
    values: dict[str, Any] = {"big": False, "signed": False, "scale": "1", "offset": "0"} | more
    return Sig(name, start, bits, **values)


def batch_of(
    payloads: Iterable[bytes], *, can_id: int = 0x100, start_ms: int = 0, step_ms: int = 10
) -> FrameBatch:
    payloads = list(payloads)
    frames = np.zeros(len(payloads), FRAME_DTYPE)
    for n, payload in enumerate(payloads):
        data = np.frombuffer(payload.ljust(64, b"\0"), np.uint8)
        frames[n] = (can_id, len(payload), 0, (0, 0), data)
    t_ns = (start_ms + step_ms * np.arange(len(payloads), dtype=np.int64)) * NS_PER_MS
    return FrameBatch(0, frames, t_ns)


class Bench:
    """A stage over one generated message, and its samples by signal."""

    def __init__(self, sigs: Sequence[Sig], mapping: str = "", length: int = 8, **settings: Any) -> None:
        self.ledger = Ledger()
        database = dbcs.load([Msg(0x100, "Msg", length, list(sigs))])
        roles = RoleMap.parse([(mapping, "map.toml")])
        self.stage = DecodeStage(database, roles, self.ledger, DecodeSettings(**settings))

    def step(self, payloads: Iterable[bytes], **when: Any) -> SampleBatch:
        samples = self.stage.step(Now(0), batch_of(payloads, **when))
        self.ledger.check()
        return samples

    def codes(self, payloads: Iterable[bytes], signal: str = "A", **when: Any) -> list[Validity]:
        samples = self.step(payloads, **when)
        names = {f"Msg.{signal}"} | {s.name for s in self.stage.catalog if s.vss}
        column = next(n for n, s in enumerate(self.stage.catalog) if s.name in names and _is(self, n, signal))
        return [Validity(c) for c in samples.validity[samples.column == column].tolist()]

    def dropped(self) -> dict[str, int]:
        return dict(self.ledger.snapshot()["validity"]["dropped"])


def _is(bench: Bench, column: int, signal: str) -> bool:
    _, found = bench.stage.table.columns[column]
    return bool(found.name == signal)


def role(name: str, signal: str = "A", **more: object) -> str:
    lines = [f"[[signal]]\nsignal = '{signal}'\nrole = \"{name}\""]
    return "\n".join([*lines, *(f"{k} = {v}" for k, v in more.items())]) + "\n"


def u8(*values: int) -> list[bytes]:
    return [bytes([v]) + bytes(7) for v in values]


# --- SNA and range ------------------------------------------------------------------------------------


def test_a_value_text_that_says_sna_makes_the_value_sna() -> None:
    bench = Bench([sig("A", 0, 8, choices={254: "SNA", 3: "Third"})])
    assert bench.codes(u8(3, 253, 254, 255)) == [V.VALID, V.VALID, V.SNA, V.VALID]
    assert bench.dropped() == {"sna": 1}


@pytest.mark.parametrize(
    "text", ["SNA", "sna", "CELL_NETWORK_SNA", "not available", "Signal not available", "NotAvailable", "n/a",
             "Signal invalid", "invalid value", "Uninitialised default"],
)  # fmt: skip
def test_texts_that_say_there_is_no_reading(text: str) -> None:
    assert Bench([sig("A", 0, 4, choices={9: text})]).codes(u8(9)) == [V.SNA]


@pytest.mark.parametrize("text", ["Init", "TEMP_INVALID", "Error", "Fault", "Reserved", "Unknown"])
def test_texts_that_say_so_only_in_a_number(text: str) -> None:
    assert Bench([sig("A", 0, 12, choices={9: text})]).codes(u8(9)) == [V.SNA]
    states = {0: "Off", 1: "On", 9: text}
    assert Bench([sig("A", 0, 4, choices=states)]).codes(u8(9)) == [V.VALID]


def test_all_ones_outside_the_declared_range_is_sna_and_other_values_there_are_out_of_range() -> None:
    bench = Bench([sig("A", 0, 8, low="0", high="100")])
    assert bench.codes(u8(100, 101, 255)) == [V.VALID, V.RANGE, V.SNA]


def test_all_ones_within_the_declared_range_is_a_reading() -> None:
    assert Bench([sig("A", 0, 8, low="0", high="255")]).codes(u8(255)) == [V.VALID]


def test_all_ones_of_a_roles_number_is_sna_unless_the_mapping_says_otherwise() -> None:
    wide = [sig("A", 0, 10, scale="0.5")]  # 511.5 V at key-on
    ones = [b"\xff\x03" + bytes(6)]
    assert Bench(wide, role("pack_voltage", unit='"V"')).codes(ones) == [V.SNA]
    told = role("pack_voltage", unit='"V"', all_ones_is_sna="false")
    assert Bench(wide, told).codes(ones) == [V.VALID]


@pytest.mark.parametrize(
    ("name", "unit", "bits", "scale", "raw"),
    [
        ("pack_voltage", "V", 16, "0.1", 65535),  # 6553.5 V
        ("pack_voltage", "V", 10, "0.5", 1023),  # 511.5 V
        ("pack_current", "A", 16, "0.1", 57343),  # 5734.3 A
        ("soc", "%", 7, "1", 127),
        ("soc", "%", 8, "1", 255),
        ("soc", "%", 8, "0.5", 255),
        ("cell_voltage", "mV", 16, "1", 65535),
        ("probe_temperature", "degC", 12, "1", 0xFFE),
    ],
)
def test_sentinels_of_key_on_are_never_readings(
    name: str, unit: str, bits: int, scale: str, raw: int
) -> None:
    bench = Bench([sig("A", 0, bits, scale=scale)], role(name, unit=f'"{unit}"'))
    (code,) = bench.codes([raw.to_bytes(8, "little")])
    assert code in (V.SNA, V.RANGE)


def test_a_limit_at_the_last_raw_value_includes_it() -> None:
    # 65535 * 0.01 is 655.35 and a little in binary; the DBC means the raw value.
    bench = Bench([sig("A", 0, 16, scale="0.01", low="0", high="655.35")])
    assert bench.codes([b"\xff\xff" + bytes(6)]) == [V.VALID]


def test_an_empty_range_says_nothing() -> None:
    assert Bench([sig("A", 0, 8, low="5", high="5")]).codes(u8(0, 255)) == [V.VALID, V.VALID]


def test_a_float_that_is_no_number_is_sna_and_an_infinite_one_out_of_range() -> None:
    bench = Bench([sig("A", 0, 32, float_type=1, low="-10", high="10")])
    floats = np.array([1.5, np.nan, np.inf, 11], "<f4")
    payloads = [f.tobytes() + bytes(4) for f in floats]
    assert bench.codes(payloads) == [V.VALID, V.SNA, V.RANGE, V.RANGE]


def test_the_mappings_sna_values_and_range_replace_what_the_dbc_says() -> None:
    bench = Bench([sig("A", 0, 8, low="0", high="10")], role("soc", sna="[50]", range="[20.0, 90.0]"))
    assert bench.codes(u8(19, 50, 89, 91)) == [V.RANGE, V.SNA, V.VALID, V.RANGE]


def test_a_declared_negative_sna_value_of_a_signed_signal_is_found() -> None:
    bench = Bench([sig("A", 0, 16, signed=True, choices={-32768: "SNA"})])
    assert bench.codes([b"\x00\x80" + bytes(6), b"\xff\xff" + bytes(6)]) == [V.SNA, V.VALID]


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    bits=st.integers(1, 32), signed=st.booleans(), scale=st.sampled_from(dbcs.SCALES),
    offset=st.sampled_from(dbcs.OFFSETS),
    ends=st.tuples(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6)), data=st.data(),
)  # fmt: skip
def test_limits_on_raw_values_mean_the_range_on_values(
    bits: int, signed: bool, scale: str, offset: str, ends: tuple[float, float], data: st.DataObject
) -> None:
    low, high = sorted(round(e, 3) for e in ends)
    one = sig("A", 0, bits, signed=signed, scale=scale, offset=offset, low=f"{low:.3f}", high=f"{high:.3f}")
    (signal,) = dbcs.load([Msg(0x100, "Msg", 8, [one])]).definitions[0].message.signals
    limits = limits_of(signal, UNBOUND)
    raw = data.draw(
        st.integers(-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else st.integers(0, (1 << bits) - 1)
    )
    value = raw * float(scale) + float(offset)
    slack = 2e-6 * abs(float(scale)) + 1e-9 * max(abs(low), abs(high), abs(value))
    if low < high and limits.low <= raw <= limits.high:
        assert low - slack <= value <= high + slack
    elif low < high:
        assert value <= low + slack or value >= high - slack


# --- units and codes ----------------------------------------------------------------------------------


def test_values_come_in_the_unit_of_the_role() -> None:
    bench = Bench([sig("A", 0, 16)], role("cell_voltage", unit='"mV"'))
    assert bench.step([(3700).to_bytes(8, "little")]).value.tolist() == [3.7]
    (signal,) = bench.stage.catalog
    assert (signal.unit, signal.scale, signal.role) == ("V", 0.001, "cell_voltage")


def test_a_current_counted_the_other_way_is_turned() -> None:
    bench = Bench(
        [sig("A", 0, 16, signed=True, scale="0.1")], role("pack_current", unit='"A"', invert="true")
    )
    assert bench.step([(100).to_bytes(8, "little")]).value.tolist() == [-10.0]


def test_enum_values_become_the_roles_codes_and_unmapped_ones_sna() -> None:
    bench = Bench([sig("A", 0, 8)], role("gear", values='{ "1" = 0, "4" = 3 }'))
    samples = bench.step(u8(1, 4, 2))
    assert samples.value.tolist()[:2] == [0.0, 3.0]
    assert samples.validity.tolist() == [V.VALID, V.VALID, V.SNA]


# --- flags --------------------------------------------------------------------------------------------


def test_a_flag_of_the_bms_refuses_its_signal_only() -> None:
    sigs = [sig("A", 0, 8), sig("B", 8, 8), sig("A_bad", 16, 1)]
    bench = Bench(sigs, role("soc", invalid_flag='"A_bad"'))
    flagged = [bytes([50, 50, 1]) + bytes(5), bytes([50, 50, 0]) + bytes(5)]
    assert bench.codes(flagged) == [V.FLAGGED, V.VALID]
    assert bench.codes(flagged, "B") == [V.VALID, V.VALID]


def test_a_flag_may_refuse_by_certain_values() -> None:
    sigs = [sig("A", 0, 8), sig("State", 8, 2)]
    bench = Bench(sigs, role("soc", invalid_flag='"State"', invalid_when="[0, 3]"))
    assert bench.codes([bytes([50, s]) + bytes(6) for s in range(4)]) == [
        V.FLAGGED,
        V.VALID,
        V.VALID,
        V.FLAGGED,
    ]


def test_a_flag_that_was_cut_off_refuses() -> None:
    bench = Bench([sig("A", 0, 8), sig("Bad", 56, 1)], role("soc", invalid_flag='"Bad"'))
    assert bench.codes([bytes([50, 0, 0])]) == [V.FLAGGED]


def test_a_flag_that_does_not_exist_is_a_mapping_error() -> None:
    with pytest.raises(MappingError, match="no flag 'Nope'"):
        Bench([sig("A", 0, 8)], role("soc", invalid_flag='"Nope"'))


# --- counters and CRCs --------------------------------------------------------------------------------

COUNTED = '[[message]]\nmessage = "Msg"\nprofile = "counter"\ncounter = "C"\ncounter_modulo = 15\n'
COUNTED_SIGS = [sig("A", 8, 8), sig("C", 0, 4)]


def counted(*pairs: tuple[int, int]) -> list[bytes]:
    return [bytes([counter, value]) + bytes(6) for counter, value in pairs]


def test_a_counter_that_moves_is_good_over_its_end_and_over_batches() -> None:
    bench = Bench(COUNTED_SIGS, COUNTED)
    assert bench.codes(counted((13, 1), (14, 2), (0, 3))) == [V.VALID] * 3
    assert bench.codes(counted((1, 4), (2, 4)), start_ms=30) == [V.VALID] * 2
    assert bench.stage.judge.guard.lost == {}


def test_a_counter_that_sticks_is_told_from_a_frame_sent_twice() -> None:
    bench = Bench(COUNTED_SIGS, COUNTED)
    assert bench.codes(counted((1, 1), (1, 2), (1, 2), (2, 2))) == [V.VALID, V.COUNTER, V.DUPLICATE, V.VALID]
    assert bench.codes(counted((2, 2), (2, 9)), start_ms=40) == [V.DUPLICATE, V.COUNTER]


def test_lost_frames_are_counted_and_what_follows_is_valid() -> None:
    bench = Bench(COUNTED_SIGS, COUNTED)
    assert bench.codes(counted((1, 1), (4, 2), (14, 3))) == [V.VALID] * 3
    assert bench.stage.judge.guard.lost == {"Msg": 2 + 9}


def test_a_counter_outside_its_values_is_wrong() -> None:
    assert Bench(COUNTED_SIGS, COUNTED).codes(counted((15, 1), (0, 2))) == [V.COUNTER, V.VALID]


def test_after_a_silence_a_counter_may_stand_anywhere() -> None:
    bench = Bench(COUNTED_SIGS, COUNTED, counter_gap_ms=1000)
    bench.codes(counted((1, 1)))
    assert bench.codes(counted((1, 1)), start_ms=1001) == [V.VALID]
    assert bench.codes(counted((1, 1)), start_ms=2001) == [V.DUPLICATE]


def protected(model: CrcModel, before: bytes, after: bytes, counter: int, value: int) -> bytes:
    """A frame of 8 bytes: CRC first, then the counter, then the value."""
    width = model.width // 8
    rest = bytes([counter, value]).ljust(8 - width, b"\0")
    return crc_of(model, before + rest + after).to_bytes(width, "little") + rest


PROFILES = {
    "e2e-p1": ("data_id = 0x1234", E2E_P1, b"\x34\x12", b"", 1),
    "e2e-p5": ("data_id = 0x1234", E2E_P5, b"", b"\x34\x12", 2),
    "e2e-p5 by id": ('data_id = "can_id"', E2E_P5, b"", b"\x00\x01", 2),
    "crc8": ("", CrcModel(8, 0x1D, 0xFF, 0xFF), b"", b"", 1),
    "crc8 with an id": ("data_id = 7", CrcModel(8, 0x1D, 0xFF, 0xFF), b"", b"\x07", 1),
    "crc8 other way": (
        'data_id = 7\ndata_id_at = "start"\npoly = 0x31\ninit = 0\nxor_out = 0x55\nreflect = true\n'
        "include_can_id = true",
        CrcModel(8, 0x31, 0, 0x55, reflect=True), b"\x00\x01\x07", b"", 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PROFILES)
def test_a_crc_of_each_profile_is_proved_and_a_flipped_bit_found(name: str) -> None:
    extra, model, before, after, width = PROFILES[name]
    sigs = [
        sig("CRC", 0, 8 * width), sig("C", 8 * width, 4), sig("A", 8 * width + 8, 8),
    ]  # fmt: skip
    profile = name.split()[0]
    mapping = f'[[message]]\nmessage = "Msg"\nprofile = "{profile}"\ncrc = "CRC"\ncounter = "C"\n{extra}\n'
    good = [protected(model, before, after, n, n * 3) for n in range(4)]
    assert Bench(sigs, mapping).codes(good) == [V.VALID] * 4
    for bit in range(64):
        flipped = (int.from_bytes(good[1], "little") ^ 1 << bit).to_bytes(8, "little")
        assert Bench(sigs, mapping).codes([good[0], flipped, good[2]]) == [V.VALID, V.CRC, V.VALID]


def test_a_protected_frame_that_is_cut_short_cannot_be_proved() -> None:
    mapping = '[[message]]\nmessage = "Msg"\nprofile = "crc8"\ncrc = "CRC"\n'
    bench = Bench([sig("CRC", 0, 8), sig("A", 8, 8)], mapping)
    assert bench.codes([protected(CrcModel(8, 0x1D, 0xFF, 0xFF), b"", b"", 1, 2)[:4]]) == [V.CRC]


@pytest.mark.parametrize(
    ("lines", "what"),
    [
        ('profile = "crc8"\ncrc = "Nope"', "no signal 'Nope'"),
        ('profile = "crc8"\ncrc = "A"', "whole bytes"),
        ('profile = "e2e-p1"\ncrc = "CRC"', "without a data id"),
        ('profile = "e2e-p1"\ncrc = "CRC"\ndata_id = "Nope"', "no attribute"),
        ('profile = "crc8"', "without a CRC"),
        ('profile = "counter"', "without a counter"),
    ],
)
def test_a_protection_that_cannot_be_is_a_mapping_error_with_its_line(lines: str, what: str) -> None:
    with pytest.raises(MappingError, match=what) as caught:
        Bench([sig("CRC", 0, 8), sig("A", 12, 8)], f'[[message]]\nmessage = "Msg"\n{lines}\n')
    assert caught.value.where == "map.toml:1"


# --- multiplexer cycles -------------------------------------------------------------------------------

PAGED = [sig("Page", 0, 2, mark="M"), *(sig(f"A{n}", 8, 8, mark=f"m{n}") for n in range(3))]
PAGED_MAP = '[[signal]]\nsignal = \'A(?P<index>\\d)\'\nrole = "probe_temperature"\nunit = "degC"\n'


def pages(*numbers: int) -> list[bytes]:
    return [bytes([n, 20]) + bytes(6) for n in numbers]


def paged_codes(bench: Bench, numbers: Sequence[int], **when: Any) -> list[Validity]:
    samples = bench.step(pages(*numbers), **when)
    roles = np.array([bool(s.role) for s in bench.stage.catalog])
    return [Validity(c) for c in samples.validity[roles[samples.column]].tolist()]


def test_nothing_counts_before_a_page_has_come_twice() -> None:
    bench = Bench(PAGED, PAGED_MAP)
    assert paged_codes(bench, [1, 2, 0, 1, 2]) == [V.MUX, V.MUX, V.MUX, V.VALID, V.VALID]
    assert bench.dropped() == {"mux": 3}


def test_a_vehicle_that_sends_only_some_of_the_declared_pages_still_counts() -> None:
    assert paged_codes(Bench(PAGED, PAGED_MAP), [0, 1, 0, 1]) == [V.MUX, V.MUX, V.VALID, V.VALID]


def test_after_a_silence_the_cycle_begins_anew() -> None:
    bench = Bench(PAGED, PAGED_MAP, counter_gap_ms=100)
    paged_codes(bench, [0, 1, 2, 0])
    assert paged_codes(bench, [1, 2, 1], start_ms=500) == [V.MUX, V.MUX, V.VALID]


def test_an_unknown_page_is_malformed_and_counted() -> None:
    bench = Bench(PAGED, PAGED_MAP)
    assert len(bench.step(pages(3))) == 0
    assert bench.ledger.snapshot()["decode"]["dropped"] == {"malformed": 1}


# --- spikes -------------------------------------------------------------------------------------------

VOLTS = [sig("A", 0, 16, scale="0.001")]
VOLTS_MAP = role("cell_voltage", unit='"V"')


def mv(*values: int) -> list[bytes]:
    return [v.to_bytes(8, "little") for v in values]


def test_a_spike_of_one_sample_is_refused_and_a_step_is_believed_with_its_second() -> None:
    bench = Bench(VOLTS, VOLTS_MAP)
    assert bench.codes(mv(3700, 3701, 2000, 3702)) == [V.VALID, V.VALID, V.GLITCH, V.VALID]
    assert bench.codes(mv(2000, 2001, 2000), start_ms=40) == [V.GLITCH, V.VALID, V.VALID]


@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_spikes_are_the_same_however_the_frames_are_batched(size: int) -> None:
    values = [3700, 3701, 2000, 3702, 3700, 2500, 2501, 2502, 3900, 2502]
    whole = Bench(VOLTS, VOLTS_MAP).codes(mv(*values))
    bench = Bench(VOLTS, VOLTS_MAP)
    parts = [
        code
        for n in range(0, len(values), size)
        for code in bench.codes(mv(*values[n : n + size]), start_ms=10 * n)
    ]
    assert parts == whole


def test_a_value_long_after_the_last_is_no_spike() -> None:
    bench = Bench(VOLTS, VOLTS_MAP)
    bench.codes(mv(3700, 3700))
    assert bench.codes(mv(2000), start_ms=10_000) == [V.VALID]


def test_a_sentinel_is_no_neighbour_to_judge_by() -> None:
    bench = Bench([sig("A", 0, 16, scale="0.001", choices={0xFFFF: "SNA"})], VOLTS_MAP)
    assert bench.codes(mv(3700, 0xFFFF, 3701)) == [V.VALID, V.SNA, V.VALID]


def test_the_mapping_may_set_or_switch_off_the_spike_limit() -> None:
    assert Bench(VOLTS, role("cell_voltage", unit='"V"', glitch="0.0")).codes(mv(3700, 2000)) == [V.VALID] * 2
    tight = Bench(VOLTS, role("cell_voltage", unit='"V"', glitch="0.01"))
    assert tight.codes(mv(3700, 3720)) == [V.VALID, V.GLITCH]
    assert Bench(VOLTS, VOLTS_MAP, glitch=False).codes(mv(3700, 2000)) == [V.VALID] * 2
