"""Quantities: what people write is read exactly, what is unclear is refused with the field and the mend."""

from __future__ import annotations

import contextlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tbox.units import UNITS, UnitError, parse, parse_ns, parse_quantity


@pytest.mark.parametrize(
    ("text", "unit", "value"),
    [
        ("3.65 V", "V", 3.65),
        ("20 mV", "V", 0.02),
        ("20mV", "V", 0.02),
        ("2 s", "s", 2.0),
        ("300 ms", "s", 0.3),
        ("10 min", "s", 600.0),
        ("1 degC/s", "degC/s", 1.0),
        ("60 degC/min", "degC/s", 1.0),
        ("-20 degC", "degC", -20.0),
        ("10 degC", "K", 10.0),
        ("10 K", "K", 10.0),
        ("5", "", 5.0),
        (5, "", 5.0),
        ("25 percent", "percent", 25.0),
        ("25 %", "percent", 25.0),
        ("1 MOhm", "kOhm", 1000.0),
        ("500 Ohm/V", "Ohm/V", 500.0),
        ("0.3 mV/A", "V/A", 0.0003),
        ("30 mV*min", "V*s", 1.8),
        ("10 m/s", "km/h", 36.0),
        (".5 V", "V", 0.5),
    ],
)
def test_a_quantity_is_read_in_the_unit_asked_for(text: object, unit: str, value: float) -> None:
    assert math.isclose(parse(text, unit), value, rel_tol=1e-12)


@pytest.mark.parametrize(
    ("text", "unit", "says"),
    [
        ("3.65", "V", "has no unit"),
        (3.65, "V", "has no unit"),
        ("3.65 A", "V", "is a current, not a voltage"),
        ("3.65 Volt", "V", "unknown unit 'Volt'"),
        ("hot", "degC", "not a number"),
        ("", "V", "not a number"),
        ("1e999 V", "V", "too large"),
        ("nan V", "V", "not a number"),
        (True, "V", "not a quantity"),
        (None, "V", "not"),
        ("20 K", "degC", "temperature difference"),
        ("3,65 V", "V", "not a number"),
        ([1], "V", "not a quantity"),
    ],
)
def test_what_is_unclear_is_refused_with_field_and_mend(text: object, unit: str, says: str) -> None:
    with pytest.raises(UnitError) as refused:
        parse(text, unit, where="rules.toml:7: limit")
    line = str(refused.value)
    assert line.startswith("rules.toml:7: limit: ")
    assert says in line
    assert f"1.5 {unit}" in line
    assert "\n" not in line


@given(st.floats(-1e6, 1e6), st.sampled_from(sorted(UNITS)), st.sampled_from(sorted(UNITS)))
def test_writing_a_value_in_any_unit_and_reading_it_gives_it_back(
    value: float, shown: str, unit: str
) -> None:
    if UNITS[shown][0] != UNITS[unit][0]:
        return
    read = parse_quantity(f"{value!r} {shown}", unit)
    assert read.shown == shown
    assert math.isclose(read.value / read.factor, value, rel_tol=1e-9, abs_tol=1e-12)


@given(st.text(max_size=20))
def test_any_text_is_read_or_refused_never_more(text: str) -> None:
    with contextlib.suppress(UnitError):
        assert math.isfinite(parse(text, "V"))


def test_a_duration_is_whole_nanoseconds_and_not_negative() -> None:
    assert parse_ns("1.5 s") == 1_500_000_000
    assert parse_ns("0 s") == 0
    with pytest.raises(UnitError, match="negative"):
        parse_ns("-1 s")
