"""The route is a closed loop, the receiver errs by metres, loses its fix under cover; sentences check out."""

from __future__ import annotations

import datetime as dt
import functools
import itertools
import math
import operator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tbox.sim.gnss import EARTH_M_PER_DEG, NO_FIX, GnssFix, Place, Receiver, Route, gga, rmc

UTC = dt.datetime(2026, 3, 4, 5, 6, 7, 250_000, tzinfo=dt.UTC)


def metres(one: Place | GnssFix, other: Place | GnssFix) -> float:
    north = (one.latitude_deg - other.latitude_deg) * EARTH_M_PER_DEG
    per_deg = EARTH_M_PER_DEG * math.cos(math.radians(one.latitude_deg))
    return math.hypot(north, (one.longitude_deg - other.longitude_deg) * per_deg)


def test_the_route_is_closed_and_about_20_km_long() -> None:
    route = Route()
    assert 18_000 < route.length_m < 26_000
    assert metres(route.at(0.0), route.at(route.length_m)) < 0.01


@given(st.floats(0, 1e6), st.floats(0.1, 20))
def test_driving_a_few_metres_moves_a_few_metres_along_the_heading(distance_m: float, step_m: float) -> None:
    route = Route()
    here, there = route.at(distance_m), route.at(distance_m + step_m)
    assert 0.95 * step_m <= metres(here, there) <= step_m * 1.001 + 0.001
    assert 0.0 <= here.heading_deg < 360.0


def test_a_receivers_error_is_metres_and_wanders_instead_of_jumping() -> None:
    receiver, place = Receiver(np.random.default_rng(1)), Route().at(0.0)
    fixes = [receiver.fix(place, 0.2, covered=False) for _ in range(5000)]
    errors = np.array([metres(fix, place) for fix in fixes])
    jumps = np.array([metres(a, b) for a, b in itertools.pairwise(fixes)])
    assert 0.5 < errors.mean() < 4.0
    assert jumps.max() < 1.5


def test_under_cover_there_is_no_fix() -> None:
    assert Receiver(np.random.default_rng(1)).fix(Route().at(0.0), 1.0, covered=True) is NO_FIX


def checksum_holds(sentence: str) -> bool:
    body, _, tail = sentence.removeprefix("$").partition("*")
    return sentence.endswith("\r\n") and int(tail, 16) == functools.reduce(operator.xor, body.encode())


@given(st.floats(-90, 90), st.floats(-180, 180))
def test_sentences_carry_the_position_to_a_hundred_thousandth_of_a_minute(lat: float, lon: float) -> None:
    fix = GnssFix(3, lat, lon, 12.5, 0.8, 11, 520.0)
    for sentence, first in ((rmc(fix, 50.0, UTC), 3), (gga(fix, UTC), 2)):
        assert checksum_holds(sentence)
        fields = sentence.split("*")[0].split(",")
        read = []
        for field, hemisphere in (fields[first : first + 2], fields[first + 2 : first + 4]):
            digits = field.index(".") - 2
            minutes = float(field[digits:])
            assert 0 <= minutes < 60
            sign = -1 if hemisphere in "SW" else 1
            read.append(sign * (int(field[:digits]) + minutes / 60))
        assert read == pytest.approx([lat, lon], abs=1e-7)


def test_without_a_fix_the_sentences_say_so() -> None:
    assert rmc(NO_FIX, 0.0, UTC).startswith("$GNRMC,050607.25,V,,,,,,,040326,")
    assert gga(NO_FIX, UTC).split(",")[6] == "0"
    assert checksum_holds(rmc(NO_FIX, 0.0, UTC)) and checksum_holds(gga(NO_FIX, UTC))
