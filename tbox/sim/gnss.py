"""A synthetic route and a GNSS receiver that loses its fix and errs by metres. Knows no bus and no clock.

The route is our own: a smooth closed loop of about 20 km that follows no real road.
"""

from __future__ import annotations

import datetime as dt
import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

EARTH_M_PER_DEG = 111_320.0  # of latitude; of longitude times cos(latitude)
START_LATITUDE_DEG, START_LONGITUDE_DEG = 48.0, 11.0
ALTITUDE_M = 520.0
_ROUTE_RADIUS_M = 3000.0
_ROUTE_POINTS = 720

ERROR_SIGMA_M = 1.5  # of a good consumer receiver under open sky, per axis
ERROR_TAU_S = 30.0  # the error wanders, it does not jump


class Place(NamedTuple):
    """A true position: WGS 84 degrees, heading clockwise from north."""

    latitude_deg: float
    longitude_deg: float
    heading_deg: float


class GnssFix(NamedTuple):
    """What the receiver says; `state` 0: no fix, and then nothing else is valid."""

    state: int
    latitude_deg: float
    longitude_deg: float
    heading_deg: float
    hdop: float
    satellites: int
    altitude_m: float


NO_FIX = GnssFix(0, math.nan, math.nan, math.nan, math.nan, 0, math.nan)


class Route:
    """A closed loop; positions by distance driven."""

    def __init__(self) -> None:
        angle = np.linspace(0.0, 2.0 * math.pi, _ROUTE_POINTS + 1)
        radius = _ROUTE_RADIUS_M * (1.0 + 0.18 * np.sin(3 * angle) + 0.07 * np.sin(7 * angle + 1.0))
        self._east_m = radius * np.cos(angle) - radius[0]
        self._north_m = radius * np.sin(angle)
        steps = np.hypot(np.diff(self._east_m), np.diff(self._north_m))
        self._along_m = np.concatenate([[0.0], np.cumsum(steps)])
        self.length_m = float(self._along_m[-1])

    def at(self, distance_m: float) -> Place:
        """Return the place after distance_m along the loop, round and round."""
        along = distance_m % self.length_m
        i = min(int(np.searchsorted(self._along_m, along, side="right")) - 1, _ROUTE_POINTS - 1)
        share = (along - self._along_m[i]) / (self._along_m[i + 1] - self._along_m[i])
        east_step = self._east_m[i + 1] - self._east_m[i]
        north_step = self._north_m[i + 1] - self._north_m[i]
        heading = math.degrees(math.atan2(east_step, north_step)) % 360.0
        return offset_place(
            self._east_m[i] + share * east_step, self._north_m[i] + share * north_step, heading
        )


def offset_place(east_m: float, north_m: float, heading_deg: float) -> Place:
    """Return the place so many metres from the route's start."""
    per_deg = EARTH_M_PER_DEG * math.cos(math.radians(START_LATITUDE_DEG))
    return Place(
        START_LATITUDE_DEG + float(north_m) / EARTH_M_PER_DEG,
        START_LONGITUDE_DEG + float(east_m) / per_deg,
        heading_deg,
    )


class Receiver:
    """Adds a wandering error to the truth; no fix under cover."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._error_m = ERROR_SIGMA_M * rng.standard_normal(2)

    def fix(self, place: Place, dt_s: float, *, covered: bool) -> GnssFix:
        """Return the fix at a true place, dt_s after the one before."""
        keep = math.exp(-dt_s / ERROR_TAU_S)
        noise = self._rng.standard_normal(2)
        self._error_m = keep * self._error_m + ERROR_SIGMA_M * math.sqrt(1.0 - keep * keep) * noise
        if covered:
            return NO_FIX
        north, east = self._error_m.tolist()
        per_deg = EARTH_M_PER_DEG * math.cos(math.radians(place.latitude_deg))
        return GnssFix(
            3,
            place.latitude_deg + north / EARTH_M_PER_DEG,
            place.longitude_deg + east / per_deg,
            place.heading_deg,
            0.8,
            11,
            ALTITUDE_M + 1.5 * north,
        )


# --- NMEA 0183 ------------------------------------------------------------------------------------------


def _sentence(body: str) -> str:
    checksum = 0
    for character in body:
        checksum ^= ord(character)
    return f"${body}*{checksum:02X}\r\n"


def _angle(degrees: float, whole_digits: int, positive: str, negative: str) -> str:
    hundred_thousandths = round(abs(degrees) * 60.0 * 100_000)
    whole, minutes = divmod(hundred_thousandths, 60 * 100_000)
    hemisphere = positive if degrees >= 0 else negative
    return f"{whole:0{whole_digits}d}{minutes / 100_000:08.5f},{hemisphere}"


def rmc(fix: GnssFix, speed_kmh: float, utc: dt.datetime) -> str:
    """Return the $GNRMC sentence of a fix; status V and empty fields without one."""
    time, date = utc.strftime("%H%M%S.%f")[:9], utc.strftime("%d%m%y")
    if not fix.state:
        return _sentence(f"GNRMC,{time},V,,,,,,,{date},,,N")
    place = _angle(fix.latitude_deg, 2, "N", "S") + "," + _angle(fix.longitude_deg, 3, "E", "W")
    return _sentence(f"GNRMC,{time},A,{place},{speed_kmh / 1.852:.3f},{fix.heading_deg:.2f},{date},,,A")


def gga(fix: GnssFix, utc: dt.datetime) -> str:
    """Return the $GNGGA sentence of a fix; quality 0 and empty fields without one."""
    time = utc.strftime("%H%M%S.%f")[:9]
    if not fix.state:
        return _sentence(f"GNGGA,{time},,,,,0,00,,,M,,M,,")
    place = _angle(fix.latitude_deg, 2, "N", "S") + "," + _angle(fix.longitude_deg, 3, "E", "W")
    return _sentence(
        f"GNGGA,{time},{place},1,{fix.satellites:02d},{fix.hdop:.1f},{fix.altitude_m:.1f},M,47.0,M,,"
    )
