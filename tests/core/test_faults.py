"""A fault is read as it is written, or refused with the names and bounds that exist."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tbox.model import NS_PER_S
from tbox.sim.faults import KINDS, FaultError, make_fault, parse_fault


def test_the_shortest_form_takes_every_default() -> None:
    fault = parse_fault("module-overheat@30s")
    assert (fault.name, fault.start_ns, fault.end_ns) == ("module-overheat", 30 * NS_PER_S, None)
    assert fault.params == {key: spec.default for key, spec in KINDS["module-overheat"].keys.items()}


@pytest.mark.parametrize(
    ("when", "seconds"), [("30", 30), ("30s", 30), ("500ms", 0.5), ("2min", 120), ("1h", 3600), ("1.5s", 1.5)]
)
def test_times_take_a_unit(when: str, seconds: float) -> None:
    assert parse_fault(f"hvil-open@{when}").start_ns == seconds * NS_PER_S
    assert parse_fault(f"hvil-open@0s:duration={when}").end_ns == seconds * NS_PER_S


def test_keys_are_taken_and_ids_may_be_hexadecimal() -> None:
    fault = parse_fault("crc-errors@1s:rate=0.5,message=0x110,duration=2s")
    assert fault.params == {"rate": 0.5, "message": 0x110}
    assert fault.end_ns == 3 * NS_PER_S


def test_a_fault_is_active_from_its_start_to_before_its_end() -> None:
    fault = make_fault("bus-silent", 1.0, duration_s=1.0)
    assert [fault.active(t) for t in (NS_PER_S - 1, NS_PER_S, 2 * NS_PER_S - 1, 2 * NS_PER_S)] == [
        False, True, True, False,
    ]  # fmt: skip


def test_sentinels_are_a_burst_unless_told_otherwise() -> None:
    assert parse_fault("sentinels@0s").end_ns == pytest.approx(0.3 * NS_PER_S)


def test_a_sensor_fault_without_a_sensor_takes_a_probe() -> None:
    assert parse_fault("sensor-open@1s").params == {"probe": 11, "cell": -1}
    assert parse_fault("sensor-open@1s:cell=5").params == {"probe": -1, "cell": 5}


def test_an_unknown_name_lists_those_that_exist() -> None:
    with pytest.raises(FaultError) as error:
        parse_fault("meltdown@1s")
    assert all(name in str(error.value) for name in KINDS)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("module-overheat", "does not say when"),
        ("module-overheat@soon", "'soon'"),
        ("module-overheat@-3s", "not a time"),
        ("module-overheat@3s:modul=1", "it takes module, power, coolant, hv, duration"),
        ("module-overheat@3s:module=8", "from 0 to 7"),
        ("module-overheat@3s:module=1.5", "a whole number"),
        ("module-overheat@3s:module", "key=value"),
        ("module-overheat@3s:module=1,module=2", "key=value"),
        ("module-overheat@3s:power=nan", "not a number"),
        ("module-overheat@3s:power=hot", "not a number"),
        ("frame-loss@3s:rate=1.1", "from 0 to 1"),
        ("sensor-stuck@3s:probe=1,cell=2", "not both"),
        ("", "there is no fault ''"),
    ],
)
def test_what_is_wrong_is_named_with_the_mend(text: str, said: str) -> None:
    with pytest.raises(FaultError) as error:
        parse_fault(text)
    assert said in str(error.value)


@given(st.text(max_size=60))
def test_any_text_is_a_fault_or_a_fault_error(text: str) -> None:
    try:
        parse_fault(text)
    except FaultError as error:
        assert "\n" not in str(error)


@given(
    st.sampled_from(sorted(KINDS)),
    st.dictionaries(st.sampled_from(["module", "cell", "probe", "rate", "power", "leak", "x", "duration"]),
                    st.floats() | st.integers(-5, 300), max_size=4),
)  # fmt: skip
def test_what_is_accepted_is_within_bounds(name: str, params: dict[str, float]) -> None:
    text = ",".join(f"{key}={value}" for key, value in params.items())
    try:
        fault = parse_fault(f"{name}@1s:{text}")
    except FaultError:
        return
    for key, value in fault.params.items():
        spec = KINDS[name].keys[key]
        assert spec.low <= value <= spec.high and math.isfinite(value)
