"""What may leave the vehicle: consent by category, blurred positions, a hash for the VIN. Sends nothing.

Positions in a body are pairs of keys "latitude" and "longitude" (degrees) in one map, at any depth, or
columns of one series whose names differ only in `Latitude` and `Longitude`. Anything positional that is
not such a pair is taken out: what cannot be blurred together is not sent.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Annotated, Any

import msgspec
import numpy as np

from tbox.errors import TboxError
from tbox.model import Column, Draft, Series

EARTH_M_PER_DEG = 111_195.0  # mean radius 6,371 km
LATITUDE_DEG_MAX = 89.0  # where a degree of longitude still has a length worth the name
VIN_CHARS = 17
SECRET_BYTES_MIN = 16
VEHICLE_ID_BYTES = 16

# Kinds that need consent; the others (alarm, event, health, ota) are the operation of the vehicle itself.
CATEGORY_OF_KIND = {"telemetry": "telemetry", "journey": "journeys", "capture": "captures"}

_POSITION_KEYS = frozenset(
    {"latitude", "longitude", "altitude", "altitude_m", "heading", "heading_deg", "course_deg"}
)
_POSITIONAL = re.compile(r"latitude|longitude|\bcurrentlocation\b", re.IGNORECASE)


@lru_cache(4096)  # the same names come every second
def _is_positional(name: str) -> bool:
    return _POSITIONAL.search(name) is not None


class PrivacyError(TboxError):
    """The VIN or the secret cannot make a vehicle id."""


class PrivacySettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Consent, off by default for what says where a person was; and how far positions are blurred.

    position_noise_m is the mean error (FACTS, privacy: 2/ε); 0 sends positions as they are.
    """

    telemetry: bool = True
    captures: bool = True
    journeys: bool = False
    position: bool = False
    position_noise_m: Annotated[float, msgspec.Meta(ge=0, le=100_000)] = 200.0
    position_grid_m: Annotated[float, msgspec.Meta(gt=0, le=10_000)] = 100.0
    position_hold_m: Annotated[float, msgspec.Meta(ge=0, le=100_000)] = 200.0


def vehicle_id(vin: str, secret: bytes) -> str:
    """Return the id that stands in topics: 32 hex digits of HMAC-SHA-256 over the VIN.

    A bare hash of 17 characters is brute-forced; without the secret this one is not. Raises PrivacyError.
    """
    if len(vin) != VIN_CHARS or not vin.isalnum():
        raise PrivacyError(f"a VIN has {VIN_CHARS} letters and digits, this one has {len(vin)}")
    if len(secret) < SECRET_BYTES_MIN:
        raise PrivacyError(
            f"a secret of {len(secret)} bytes can be guessed", mend=f"use at least {SECRET_BYTES_MIN}"
        )
    return hmac.new(secret, vin.upper().encode(), hashlib.sha256).digest()[:VEHICLE_ID_BYTES].hex()


class PositionBlur:
    """Planar Laplace noise, snapped to a grid, one draw per place.

    Independent noise on a parked car averages out, so the blurred fix is held until the true one has moved
    by hold_m from where it was drawn.
    """

    def __init__(self, settings: PrivacySettings, random: Callable[[], float]) -> None:
        self._settings = settings
        self._random = random
        self._drawn_at: tuple[float, float] | None = None
        self._held = (0.0, 0.0)

    def blur(self, latitude: float, longitude: float) -> tuple[float, float]:
        """Return (latitude, longitude) in degrees as they may be sent; NaN where they are no position."""
        if not (abs(latitude) <= 90.0 and abs(longitude) <= 180.0):
            return math.nan, math.nan
        if self._settings.position_noise_m == 0:
            return latitude, longitude
        here = (latitude, longitude)
        if self._drawn_at is None or distance_m(self._drawn_at, here) > self._settings.position_hold_m:
            self._drawn_at = here
            self._held = self._snap(*self._add_noise(latitude, longitude))
        return self._held

    def _add_noise(self, latitude: float, longitude: float) -> tuple[float, float]:
        """The radius of planar Laplace noise is a sum of two exponentials: Gamma(2, 1/ε), ε = 2/mean."""
        scale_m = self._settings.position_noise_m / 2
        radius_m = -scale_m * (math.log(1.0 - self._random()) + math.log(1.0 - self._random()))
        angle = 2.0 * math.pi * self._random()
        north = radius_m * math.cos(angle) / EARTH_M_PER_DEG
        east = radius_m * math.sin(angle) / (EARTH_M_PER_DEG * _shrink(latitude))
        return max(-90.0, min(90.0, latitude + north)), (longitude + east + 180.0) % 360.0 - 180.0

    def _snap(self, latitude: float, longitude: float) -> tuple[float, float]:
        step = self._settings.position_grid_m / EARTH_M_PER_DEG
        snapped = max(-90.0, min(90.0, round(latitude / step) * step))
        step /= _shrink(snapped)
        return snapped, max(-180.0, min(180.0, round(longitude / step) * step))


def _shrink(latitude: float) -> float:
    return math.cos(math.radians(max(-LATITUDE_DEG_MAX, min(LATITUDE_DEG_MAX, latitude))))


def distance_m(a: tuple[float, float], b: tuple[float, float]) -> float:
    """Return the great-circle distance of two (latitude, longitude) in degrees."""
    lat_a, lat_b = math.radians(a[0]), math.radians(b[0])
    half_lat, half_lon = (lat_b - lat_a) / 2, math.radians(b[1] - a[1]) / 2
    chord = math.sin(half_lat) ** 2 + math.cos(lat_a) * math.cos(lat_b) * math.sin(half_lon) ** 2
    return 2 * math.degrees(math.asin(min(1.0, math.sqrt(chord)))) * EARTH_M_PER_DEG


class PrivacyFilter:
    """Applied to every draft before it is encoded; nobody looks inside afterwards.

    random: returns floats in [0, 1); must be hard to guess on a device (random.SystemRandom().random).
    """

    def __init__(self, settings: PrivacySettings, random: Callable[[], float]) -> None:
        self._settings = settings
        self._blur = PositionBlur(settings, random)

    def admits(self, draft: Draft) -> bool:
        """Whether the person agreed to records of this kind. Ask before minting, and count what is not."""
        category = CATEGORY_OF_KIND.get(draft.kind)
        return category is None or bool(getattr(self._settings, category))

    def scrub(self, draft: Draft) -> Draft:
        """Return the draft as it may leave: without content where the kind is not admitted, else blurred."""
        if not self.admits(draft):
            return replace(draft, body={"withheld": CATEGORY_OF_KIND[draft.kind]})
        body = self._scrub_map({key: value for key, value in draft.body.items() if key != "series"})
        if "series" in draft.body:
            body["series"] = [self._scrub_series(series) for series in draft.body["series"]]
        return replace(draft, body=body)

    def _scrub_map(self, body: dict[Any, Any]) -> dict[Any, Any]:
        if not _POSITION_KEYS.isdisjoint(body):
            body = self._scrub_position(body)
        return {key: self._scrub_value(value) for key, value in body.items()}

    def _scrub_value(self, value: Any) -> Any:
        if isinstance(value, dict):
            return self._scrub_map(value)
        if isinstance(value, list | tuple):
            return [self._scrub_value(item) for item in value]
        return value

    def _scrub_position(self, body: dict[Any, Any]) -> dict[Any, Any]:
        latitude, longitude = body.get("latitude"), body.get("longitude")
        paired = isinstance(latitude, int | float) and isinstance(longitude, int | float)
        if not (self._settings.position and paired):
            return {key: value for key, value in body.items() if key not in _POSITION_KEYS}
        assert latitude is not None and longitude is not None
        blurred = self._blur.blur(float(latitude), float(longitude))
        return {**body, "latitude": blurred[0], "longitude": blurred[1]}

    def _scrub_series(self, series: Series) -> Series:
        """Blur the position columns pair by pair; leave out what is positional and has no partner."""
        positional = {column.name: column for column in series.columns if _is_positional(column.name)}
        blocks = tuple(one for one in series.blocks if not _is_positional(f"{one.prefix} {one.suffix}"))
        if not positional and len(blocks) == len(series.blocks):
            return series
        kept = [column for column in series.columns if column.name not in positional]
        partners = {name.lower(): column for name, column in positional.items()}
        if self._settings.position:
            for name, latitude in positional.items():
                longitude = partners.get(name.lower().replace("latitude", "longitude"))
                if longitude is not None and "latitude" in name.lower():
                    kept += self._blur_columns(latitude, longitude)
            kept += [
                column
                for name, column in positional.items()
                if "latitude" not in name.lower() and "longitude" not in name.lower()
            ]
        return replace(series, columns=tuple(kept), blocks=blocks)

    def _blur_columns(self, latitude: Column, longitude: Column) -> list[Column]:
        here = np.ones(len(latitude.raw), np.bool_)
        for column in (latitude, longitude):
            if column.present is not None:
                here = here & column.present
        latitudes = latitude.raw * latitude.scale + latitude.offset
        longitudes = longitude.raw * longitude.scale + longitude.offset
        blurred = np.full((2, len(here)), np.nan)
        for i in np.flatnonzero(here):
            blurred[:, i] = self._blur.blur(float(latitudes[i]), float(longitudes[i]))
        here = here & np.isfinite(blurred[0])
        return [_with_values(latitude, blurred[0], here), _with_values(longitude, blurred[1], here)]


def _with_values(column: Column, values: np.ndarray[Any, np.dtype[np.float64]], here: Any) -> Column:
    raw = np.zeros(len(values), np.int64)
    raw[here] = np.rint((values[here] - column.offset) / column.scale).astype(np.int64)
    return replace(column, raw=raw, present=None if here.all() else here)
