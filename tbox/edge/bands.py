"""Hysteresis and debounce as data: ladders of overlapping bands and how long each must hold. Tells nobody.

A band has two levels. It is entered at `limit`, held through everything between, and left at `clear`; the gap
between the two is the hysteresis. A ladder is several bands of rising severity over the same quantity.
"""

from __future__ import annotations

from dataclasses import dataclass

from tbox.model import Level


@dataclass(frozen=True, slots=True)
class Band:
    """limit and clear in the quantity's unit; for_ns: how long the limit must be passed without a break;
    clear_for_ns: how long the value must stay past `clear` before the band is left."""

    level: Level
    limit: float
    clear: float
    for_ns: int
    clear_for_ns: int


@dataclass(frozen=True, slots=True)
class Ladder:
    """Bands in order of severity. sign +1: too much is bad; -1: too little is."""

    sign: int
    bands: tuple[Band, ...]

    def reached(self, value: float) -> int:
        """Return the highest band whose limit `value` is at or past, -1 for none. NaN reaches nothing."""
        for top in range(len(self.bands) - 1, -1, -1):
            if self.sign * value >= self.sign * self.bands[top].limit:
                return top
        return -1

    def held(self, value: float, top: int) -> int:
        """Return the highest band up to `top` that `value` has not left yet, -1 when all are left."""
        for band in range(top, -1, -1):
            if self.sign * value > self.sign * self.bands[band].clear:
                return band
        return -1


class Debounce:
    """Tells which band of a ladder has been reached for long enough, from one value at a time."""

    __slots__ = ("_ladder", "_since_ns")

    def __init__(self, ladder: Ladder) -> None:
        self._ladder = ladder
        self._since_ns: list[int | None] = [None] * len(ladder.bands)

    @property
    def began_ns(self) -> int | None:
        """When the lowest band was entered; None while no limit is passed."""
        return self._since_ns[0]

    def step(self, t_ns: int, reached: int) -> int:
        """Take the band reached at t_ns; return the highest band confirmed, -1 for none."""
        confirmed = -1
        for index, band in enumerate(self._ladder.bands):
            since_ns = self._since_ns[index]
            if index > reached:
                self._since_ns[index] = None
                continue
            if since_ns is None:
                self._since_ns[index] = since_ns = t_ns
            if t_ns - since_ns >= band.for_ns:
                confirmed = index
        return confirmed

    def restart(self) -> None:
        """Forget what was seen: the value became unknown, and a gap confirms nothing."""
        self._since_ns = [None] * len(self._since_ns)
