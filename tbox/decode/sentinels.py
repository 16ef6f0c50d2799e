"""Which raw values of a signal are no readings: its SNA values, and its range turned to raw. Sees no data."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from tbox.decode.roles import Binding
from tbox.decode.table import EXACT_INT_MAX, raw_span

# Physical ranges by role, in the role's unit: wide enough for every pack on the road and for a burning one,
# narrow enough for the sentinels of key-on (511.5 V, 6553.5 V, 5734.3 A, SOC 127 and 255; FACTS, Thresholds).
ROLE_SPANS: dict[str, tuple[float, float]] = {
    "cell_voltage": (0.0, 6.0),
    "cell_voltage_min": (0.0, 6.0),
    "cell_voltage_max": (0.0, 6.0),
    "probe_temperature": (-60.0, 1000.0),
    "temperature_min": (-60.0, 1000.0),
    "temperature_max": (-60.0, 1000.0),
    "coolant_temperature": (-60.0, 200.0),
    "motor_temperature": (-60.0, 400.0),
    "ambient_temperature": (-70.0, 90.0),
    "pack_voltage": (0.0, 1500.0),
    "pack_current": (-3000.0, 3000.0),
    "soc": (0.0, 105.0),
    "soh": (0.0, 120.0),
    "isolation_resistance": (0.0, 1e6),
    "speed": (-100.0, 500.0),
    "motor_speed": (-40_000.0, 40_000.0),
    "odometer": (0.0, 1e7),
    "low_voltage": (0.0, 60.0),
    "charging_power": (-1000.0, 1000.0),
    "range": (0.0, 3000.0),
    "latitude": (-90.0, 90.0),
    "longitude": (-180.0, 180.0),
}

# A value text that says by itself that there is no reading.
_SNA_TEXT = re.compile(
    r"(.*[\W_])?(sna|n/?a|not[\s_-]?avail(able)?|unavailable|(signal|value|data)[\s_-]?invalid|"
    r"invalid[\s_-]?(signal|value|data)|un-?init\w*( .*)?)",
    re.IGNORECASE,
)
# A text that does so only in a signal that is otherwise a number, not a list of states.
_SNA_TEXT_OF_NUMBER = re.compile(
    r"(.*[\W_])?(init(ial\w*)?|invalid|error|err|fault\w*|undefined|not[\s_-]?valid|unknown|default|reserved)",
    re.IGNORECASE,
)
NUMBER_BITS_MIN = 7  # a signal of fewer bits, or of many named values, is a list of states
NUMBER_NAMES_MAX = 4
ALL_ONES_BITS_MIN = 8
_SNA_ATTRIBUTES = ("GenSigSNA", "GenSigSnaValue", "GenSigInvalidValue", "SigSNA", "SNA")
STEP_TOLERANCE = 1e-6  # a limit that is a raw value's physical value up to rounding includes it
_INT64 = (-(1 << 63), (1 << 63) - 1)
_ALL = (-(1 << 70), 1 << 70)  # beyond every raw value


class Limits(NamedTuple):
    """Raw values (as int64) from `low` to `high` that are not in `sna` are readings; those in `sna` are SNA.

    For floats the limits are on the value in the role's unit: value_low, value_high.
    """

    low: int
    high: int
    sna: frozenset[int]
    value_low: float
    value_high: float


def limits_of(signal: Any, binding: Binding) -> Limits:
    """Return what of a signal's raw values is a reading."""
    spans = _spans(signal, binding)
    value_low = max((low for low, _ in spans), default=-math.inf)
    value_high = min((high for _, high in spans), default=math.inf)
    if value_low >= value_high:  # the DBC's range is in some other unit: the role knows better
        value_low, value_high = spans[-1]
    if signal.conversion.is_float:
        return Limits(*_INT64, frozenset(), value_low, value_high)
    scale = float(signal.conversion.scale) * binding.factor
    offset = float(signal.conversion.offset) * binding.factor + binding.offset
    low, high = _to_raw(value_low, value_high, scale, offset)
    sna = _declared(signal) | set(binding.sna)
    ones = _all_ones(signal)
    if _all_ones_is_sna(signal, binding, not low <= ones <= high):
        sna.add(ones)
    if binding.values:  # only mapped values are readings
        low, high = min(raw for raw, _ in binding.values), max(raw for raw, _ in binding.values)
    as_int64 = frozenset((raw + (1 << 63)) % (1 << 64) - (1 << 63) for raw in sna)
    return Limits(max(low, _INT64[0]), min(high, _INT64[1]), as_int64, value_low, value_high)


def _spans(signal: Any, binding: Binding) -> list[tuple[float, float]]:
    """The ranges that hold, in the role's unit: the mapping's alone, else the DBC's and the role's."""
    if binding.span:
        return [binding.span]
    spans = []
    if signal.minimum is not None and signal.maximum is not None and signal.minimum < signal.maximum:
        ends = [float(end) * binding.factor + binding.offset for end in (signal.minimum, signal.maximum)]
        spans.append((min(ends), max(ends)))
    if binding.role in ROLE_SPANS and not binding.values:
        spans.append(ROLE_SPANS[binding.role])
    return spans


def _to_raw(low: float, high: float, scale: float, offset: float) -> tuple[int, int]:
    """Invert a range to raw values, once, so that the hot comparison is on integers."""
    if scale == 0 or not math.isfinite(scale) or not math.isfinite(offset):
        return _ALL
    ends = [(low - offset) / scale, (high - offset) / scale]
    first, last = min(ends), max(ends)
    tolerance = max(STEP_TOLERANCE, 1e-12 * max(_magnitude(first), _magnitude(last)))
    return (
        _ALL[0] if not first > -EXACT_INT_MAX else math.ceil(first - tolerance),
        _ALL[1] if not last < EXACT_INT_MAX else math.floor(last + tolerance),
    )


def _magnitude(number: float) -> float:
    return abs(number) if math.isfinite(number) else 0.0


def _all_ones(signal: Any) -> int:
    """All bits set; the largest value in a signed signal, where all ones is -1."""
    return raw_span(signal)[1]


def _all_ones_is_sna(signal: Any, binding: Binding, outside: bool) -> bool:
    if binding.all_ones_is_sna is not None:
        return binding.all_ones_is_sna
    number = bool(binding.role) and not binding.values and not signal.conversion.choices
    if number and not signal.is_signed and signal.length >= ALL_ONES_BITS_MIN:
        return True
    return outside


def _declared(signal: Any) -> set[int]:
    """SNA values the DBC declares, in value texts or in an attribute."""
    choices: Mapping[int, Any] = signal.conversion.choices or {}
    is_number = signal.length >= NUMBER_BITS_MIN and len(choices) <= NUMBER_NAMES_MAX
    found = {
        int(raw)
        for raw, text in choices.items()
        if _SNA_TEXT.fullmatch(str(text).strip())
        or (is_number and _SNA_TEXT_OF_NUMBER.fullmatch(str(text).strip()))
    }
    attributes = (signal.dbc.attributes or {}) if signal.dbc else {}
    for name in _SNA_ATTRIBUTES:
        if name in attributes and (raw := _integer(attributes[name].value)) is not None:
            found.add(raw)
    low, high = raw_span(signal)
    # A declared value may be written unsigned though the signal is signed.
    return {raw - (1 << signal.length) if low < 0 and raw > high else raw for raw in found}


def _integer(value: Any) -> int | None:
    try:
        return int(value) if not isinstance(value, str) else int(value.strip(), 0)
    except (ValueError, OverflowError):
        return None
