"""What watches hand to rules: a value, or one for each item with its extremes found. Values only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
NO_ITEM = -1


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
    """One value for each cell or probe, NaN where unknown. high and low: where the extremes are, -1: none."""

    values: Floats
    high: int
    low: int
    detail: Callable[[int], str] = no_detail


Reading = Scalar | Items
NOTHING = Scalar(None)


def items(values: Floats, detail: Callable[[int], str] = no_detail) -> Items:
    """Return Items with the extremes of what is known."""
    high = int(values.argmax()) if len(values) else NO_ITEM
    if high == NO_ITEM or values[high] == values[high]:  # argmax finds a NaN first, if there is one
        low = int(values.argmin()) if len(values) else NO_ITEM
        return Items(values, high, low, detail)
    known = np.flatnonzero(~np.isnan(values))
    if not len(known):
        return Items(values, NO_ITEM, NO_ITEM, detail)
    return Items(values, int(known[values[known].argmax()]), int(known[values[known].argmin()]), detail)
