"""Quantities as people write them ("3.65 V", "20 mV", "1 degC/s") to numbers; never guesses a unit."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from tbox.errors import TboxError

# unit -> (what it measures, factor to that dimension's base unit). A temperature and a temperature
# difference are different things: 20 K is a difference, 20 degC may be either.
UNITS: dict[str, tuple[str, float]] = {
    "V": ("voltage", 1.0),
    "mV": ("voltage", 1e-3),
    "kV": ("voltage", 1e3),
    "A": ("current", 1.0),
    "mA": ("current", 1e-3),
    "mV/A": ("resistance drop", 1e-3),
    "V/A": ("resistance drop", 1.0),
    "degC": ("temperature", 1.0),
    "K": ("temperature difference", 1.0),
    "degC/s": ("temperature rate", 1.0),
    "K/s": ("temperature rate", 1.0),
    "degC/min": ("temperature rate", 1.0 / 60.0),
    "K/min": ("temperature rate", 1.0 / 60.0),
    "ms": ("time", 1e-3),
    "s": ("time", 1.0),
    "min": ("time", 60.0),
    "h": ("time", 3600.0),
    "percent": ("share", 1.0),
    "%": ("share", 1.0),
    "Ohm": ("resistance", 1.0),
    "kOhm": ("resistance", 1e3),
    "MOhm": ("resistance", 1e6),
    "Ohm/V": ("resistance per volt", 1.0),
    "kOhm/V": ("resistance per volt", 1e3),
    "W": ("power", 1.0),
    "kW": ("power", 1e3),
    "km/h": ("speed", 1.0),
    "m/s": ("speed", 3.6),
    "rpm": ("rotation", 1.0),
    "m": ("distance", 1.0),
    "km": ("distance", 1e3),
    "mV*min": ("voltage over time", 0.06),
    "V*s": ("voltage over time", 1.0),
    "deg": ("angle", 1.0),
    "": ("number", 1.0),
}

# A temperature difference may also be written in degC: nobody writes "spread 10 K" on a dashboard.
ALSO_FITS = {("temperature difference", "temperature")}

_QUANTITY = re.compile(r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*(\S*)\s*")


class UnitError(TboxError):
    """A quantity that cannot be read, has no unit, or has one that does not fit its field."""


class Quantity(NamedTuple):
    """value in the unit asked for; shown: the unit it was written in, one of which is `factor` of that."""

    value: float
    shown: str
    factor: float


def parse_quantity(text: object, unit: str, *, where: str = "") -> Quantity:
    """Read `text` ("20 mV", or a bare number where `unit` is "") as a quantity in `unit`.

    where: the field, named in the error. Raises UnitError.
    """
    assert unit in UNITS, unit
    if isinstance(text, bool) or not isinstance(text, str | int | float):
        raise UnitError(f"{text!r} is not a quantity", where=where, mend=_example(unit))
    found = _QUANTITY.fullmatch(str(text))
    if not found:
        raise UnitError(f"{text!r} is not a number with a unit", where=where, mend=_example(unit))
    number, written = float(found[1]), found[2]
    if not math.isfinite(number):
        raise UnitError(f"{text!r} is too large", where=where, mend=_example(unit))
    if written not in UNITS:
        raise UnitError(f"unknown unit {written!r}", where=where, mend=_example(unit))
    wanted, base = UNITS[unit]
    got, factor = UNITS[written]
    if got != wanted and (wanted, got) not in ALSO_FITS:
        what = f"{text!r} has no unit" if not written else f"{text!r} is a {got}, not a {wanted}"
        raise UnitError(what, where=where, mend=_example(unit))
    return Quantity(number * factor / base, written, factor / base)


def parse(text: object, unit: str, *, where: str = "") -> float:
    """Read `text` as a number in `unit`; see parse_quantity."""
    return parse_quantity(text, unit, where=where).value


def parse_ns(text: object, *, where: str = "") -> int:
    """Read a duration ("2 s", "300 ms") as whole nanoseconds, not negative."""
    seconds = parse(text, "s", where=where)
    if seconds < 0:
        raise UnitError(f"{text!r} is negative", where=where, mend="write a duration of at least 0 s")
    return round(seconds * 1e9)


def _example(unit: str) -> str:
    if not unit:
        return "write a bare number"
    others = [name for name, (what, _) in UNITS.items() if what == UNITS[unit][0] and name != unit]
    return f'write it as "1.5 {unit}"' + (f" (or in {', '.join(others)})" if others else "")
