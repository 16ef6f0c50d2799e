"""What watches hand to rules: a value, or one for each item with its extremes found. Values only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
NO_ITEM = -1
NAN = float("nan")


def no_detail(item: int) -> str:
    return ""


@dataclass(slots=True)
class Scalar:
    """One value, None while unknown. item: the cell or probe it comes from, or NO_ITEM."""

    value: float | None
    item: int = NO_ITEM
    name: str = ""  # what the item is called in the text, "" for the pack itself
    detail: Callable[[int], str] = no_detail


@dataclass(slots=True)
class Items:
    """One value for each cell or probe, NaN where unknown. high and low: where the extremes are, -1: none (of
    a watch that only ever is too high, low is not looked for); highest and lowest: their values or NaN."""

    values: Floats
    high: int
    low: int
    highest: float
    lowest: float
    detail: Callable[[int], str] = no_detail


Reading = Scalar | Items
NOTHING = Scalar(None)


def items(values: Floats, detail: Callable[[int], str] = no_detail, *, both: bool = False) -> Items:
    """Return Items with the highest, and with `both` the lowest, of what is known."""
    if not len(values):
        return Items(values, NO_ITEM, NO_ITEM, NAN, NAN, detail)
    high = int(values.argmax())
    highest = float(values[high])
    if highest == highest:  # argmax finds a NaN first, if there is one
        low = int(values.argmin()) if both else NO_ITEM
        return Items(values, high, low, highest, float(values[low]) if both else NAN, detail)
    known = np.flatnonzero(~np.isnan(values))
    if not len(known):
        return Items(values, NO_ITEM, NO_ITEM, NAN, NAN, detail)
    high, low = int(known[values[known].argmax()]), int(known[values[known].argmin()])
    return Items(values, high, low, float(values[high]), float(values[low]), detail)
