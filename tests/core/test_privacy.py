"""Consent, blurred positions and the keyed vehicle id: what may not leave the vehicle does not."""

from __future__ import annotations

import json
import math
import random
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tbox.model import Block, Column, Draft, Level, Now, Series
from tbox.record.codec import Minter, decode_payload
from tbox.record.privacy import (
    PositionBlur,
    PrivacyError,
    PrivacyFilter,
    PrivacySettings,
    distance_m,
    vehicle_id,
)

BERLIN = (52.52, 13.405)
POSITION = PrivacySettings(position=True, journeys=True)
VIN = "WVWZZZE1ZMP000001"


def a_filter(settings: PrivacySettings, seed: int = 1) -> PrivacyFilter:
    return PrivacyFilter(settings, random.Random(seed).random)


def draft(kind: str = "event", **body: Any) -> Draft:
    return Draft(kind, Level.INFO, 0, body)


def test_the_vehicle_id_needs_the_secret_and_never_shows_the_vin() -> None:
    one = vehicle_id(VIN, b"a" * 32)
    assert one == vehicle_id(VIN.lower(), b"a" * 32) and len(one) == 32
    assert one != vehicle_id(VIN, b"b" * 32) and VIN.lower() not in one
    for vin, secret in (("SHORT", b"a" * 32), (VIN, b"short"), ("W" * 16 + "/", b"a" * 32)):
        with pytest.raises(PrivacyError):
            vehicle_id(vin, secret)


def test_without_consent_a_record_says_only_that_something_is_withheld() -> None:
    filtered = a_filter(PrivacySettings())
    journey = draft("journey", distance_km=12, latitude=52.0, longitude=13.0)
    assert not filtered.admits(journey)
    assert filtered.scrub(journey).body == {"withheld": "journeys"}
    for kind in ("alarm", "event", "health", "ota", "telemetry", "capture"):
        assert filtered.admits(draft(kind))


def test_without_consent_no_position_leaves_at_any_depth() -> None:
    body: dict[str, Any] = {
        "latitude": 52.0, "longitude": 13.0, "text": "x",
        "track": [{"latitude": 52.0, "longitude": 13.0, "t": 1}, {"heading": 90.0}],
        "context": {"fix": {"latitude": 52.0, "longitude": 13.0, "altitude_m": 3}},
    }  # fmt: skip
    kept = a_filter(PrivacySettings()).scrub(draft(**body)).body
    assert kept == {"text": "x", "track": [{"t": 1}, {}], "context": {"fix": {}}}


def test_half_a_position_is_left_out_even_with_consent() -> None:
    assert a_filter(POSITION).scrub(draft(latitude=52.0, x=1)).body == {"x": 1}
    assert a_filter(POSITION).scrub(draft(latitude="52", longitude=13.0)).body == {}


def test_a_parked_car_shows_one_position_however_often_it_tells() -> None:
    blur = PositionBlur(PrivacySettings(position_noise_m=100), random.Random(3).random)
    jitter = random.Random(4)
    shown = {
        blur.blur(BERLIN[0] + jitter.gauss(0, 2e-5), BERLIN[1] + jitter.gauss(0, 2e-5)) for _ in range(5000)
    }
    assert len(shown) == 1 and distance_m(shown.pop(), BERLIN) > 1.0


def test_a_moving_car_gets_a_new_draw_after_the_hold_distance() -> None:
    blur = PositionBlur(PrivacySettings(position_hold_m=200), random.Random(3).random)
    shown = [blur.blur(BERLIN[0] + i * 100 / 111_195, BERLIN[1]) for i in range(31)]
    assert len(set(shown)) == 11  # a draw where it stands and one after each 300 m of a 100 m stride


def test_the_noise_is_planar_laplace_with_the_mean_that_was_asked_for() -> None:
    """C(r) = 1 − (1 + εr)·exp(−εr), ε = 2/mean (FACTS, privacy)."""
    settings = PrivacySettings(position_noise_m=300, position_grid_m=0.01, position_hold_m=0)
    blur = PositionBlur(settings, random.Random(5).random)
    n = 4000
    radii, angles = [], []
    for i in range(n):
        here = (BERLIN[0] + i * 1e-6, BERLIN[1])
        shown = blur.blur(*here)
        radii.append(distance_m(here, shown))
        angles.append(math.atan2((shown[1] - here[1]) * math.cos(math.radians(here[0])), shown[0] - here[0]))
    epsilon = 2 / 300
    radius = np.sort(radii)
    expected = 1 - (1 + epsilon * radius) * np.exp(-epsilon * radius)
    assert np.max(np.abs(expected - np.arange(1, n + 1) / n)) < 1.63 / math.sqrt(n)  # Kolmogorov, 1 %
    assert np.mean(radii) == pytest.approx(300, rel=0.05)
    assert abs(np.mean(np.exp(1j * np.array(angles)))) < 0.05


@given(st.floats(-90, 90), st.floats(-180, 180), st.integers(0, 2**32))
def test_every_place_on_earth_stays_on_earth(latitude: float, longitude: float, seed: int) -> None:
    shown = PositionBlur(PrivacySettings(), random.Random(seed).random).blur(latitude, longitude)
    assert -90 <= shown[0] <= 90 and -180 <= shown[1] <= 180


@pytest.mark.parametrize("latitude", [math.nan, 91.0, -math.inf])
def test_what_is_no_position_is_not_sent(latitude: float) -> None:
    assert all(math.isnan(value) for value in PositionBlur(POSITION, random.random).blur(latitude, 13.0))


def location(suffix: str, latitudes: list[float], present: list[bool] | None = None) -> Series:
    here = None if present is None else np.array(present, np.bool_)
    n = len(latitudes)
    return Series(
        np.arange(n, dtype=np.int64) * 1000,
        (
            Column("Vehicle.Speed", 0.1, 0.0, np.zeros(n, np.int64)),
            Column(f"Vehicle.CurrentLocation.Latitude{suffix}", 1e-7, 0.0,
                   np.rint(np.array(latitudes) * 1e7).astype(np.int64), here),
            Column(f"Vehicle.CurrentLocation.Longitude{suffix}", 1e-7, 0.0,
                   np.full(n, 134050000, np.int64), here),
            Column(f"Vehicle.CurrentLocation.Heading{suffix}", 1.0, 0.0, np.zeros(n, np.int64)),
        ),
    )  # fmt: skip


def minted(settings: PrivacySettings, series: Series) -> dict[str, Any]:
    source = Minter(1, "v", a_filter(settings), guard=nullcontext())
    record = source.mint(Draft("telemetry", Level.INFO, 0, {"series": [series]}), Now(0))
    signals = decode_payload(record.payload, expand=True)["body"]["series"][0]["signals"]
    assert isinstance(signals, dict)
    return signals


def test_position_columns_leave_only_with_consent_and_blurred() -> None:
    table = location(".mean", [52.52, 52.52, 52.52])
    assert list(minted(PrivacySettings(), table)) == ["Vehicle.Speed"]
    signals = minted(POSITION, table)
    latitudes = signals["Vehicle.CurrentLocation.Latitude.mean"]
    assert len(set(latitudes)) == 1 and latitudes[0] != 52.52
    shown = (latitudes[0], signals["Vehicle.CurrentLocation.Longitude.mean"][0])
    assert 0 < distance_m(shown, (52.52, 13.405)) < 20_000
    assert "Vehicle.CurrentLocation.Heading.mean" in signals


def test_absent_fixes_stay_absent_and_a_lone_latitude_is_left_out() -> None:
    signals = minted(POSITION, location("", [52.0, 0.0], [True, False]))
    assert signals["Vehicle.CurrentLocation.Latitude"][1] is None
    lone = location("", [52.0])
    lone = Series(lone.t_ms, lone.columns[:2])
    assert list(minted(POSITION, lone)) == ["Vehicle.Speed"]


def test_a_block_of_positions_is_left_out_and_other_blocks_stay() -> None:
    raw = np.array([[520000000], [520000001]], np.int64)
    blocks = (Block("Latitude", 1, "", 1e-7, 0.0, raw), Block("Cell", 1, ".min", 0.001, 0.0, raw))
    series = Series(np.array([0], np.int64), (), blocks)
    for settings in (PrivacySettings(), POSITION):
        assert list(minted(settings, series)) == ["Cell1.min", "Cell2.min"]


def test_noise_zero_sends_positions_as_they_are() -> None:
    exact = PrivacySettings(position=True, position_noise_m=0)
    assert a_filter(exact).scrub(draft(latitude=52.0, longitude=13.0)).body == {
        "latitude": 52.0, "longitude": 13.0,
    }  # fmt: skip


FIX = st.just({"latitude": 51.23456, "longitude": 6.78901})


@given(
    st.recursive(
        st.integers() | st.text(max_size=5) | FIX,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    ),
    st.booleans(),
)
def test_no_true_position_survives_whatever_the_body(value: Any, consent: bool) -> None:
    scrubbed = a_filter(PrivacySettings(position=consent)).scrub(draft(value=value)).body
    text = json.dumps(scrubbed)
    assert "51.23456" not in text and "6.78901" not in text
