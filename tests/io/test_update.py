"""What the agent tells the update engine of itself: unknown stays unknown, only what balances is clean."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import pytest

from tbox.agent import Agent
from tbox.config import Config, DeviceConfig, OtaConfig
from tbox.errors import TboxError
from tbox.ledger import StageLedger
from tbox.model import NS_PER_S, Draft, Level, Now, TimeQuality
from tbox.ota import boot
from tbox.ota.policy import Vitals, hold_switch
from tbox.update import Around, footing, open_updates, parked, unaccounted, vitals_of
from tests.crash.ota_world import target_of
from tests.io.test_ota_device import DELTA, DELTA_FILE, Real

STANDING: dict[str, Any] = {
    "mode": "idle", "speed_kmh": 0.0, "gear": 0.0, "soc_percent": 80.0, "low_voltage_v": 14.1, "alarms": [],
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"mode": "charging_ac"}, True),
        ({"gear": None}, True),
        ({"gear": 3.0}, False),  # at a red light, though a start has only just been made
        ({"mode": "city"}, False),  # a journey is open: stopped, not parked
        ({"mode": "highway", "gear": None}, False),
        ({"speed_kmh": 30.0}, False),
        ({"speed_kmh": None}, None),
    ],
)
def test_parked_is_standing_in_p_with_no_journey_open(change: dict[str, Any], expected: bool | None) -> None:
    assert parked(STANDING | change) is expected


def test_vitals_carry_what_is_known_in_the_units_of_the_policy() -> None:
    alarms = [{"level": 2}, {"level": 4}]
    vitals = vitals_of(STANDING | {"alarms": alarms}, 5 << 30, OtaConfig(bearer="ntn"), Now(0))
    assert vitals == Vitals(
        parked=True, soc_percent=80.0, low_voltage_mv=14_100, alarm_level=4, disk_free_bytes=5 << 30,
        bearer="ntn", local_minute=None,
    )  # fmt: skip
    known = vitals_of(STANDING, 0, OtaConfig(), Now(0, 1_800_000_000 * NS_PER_S, TimeQuality.NTP))
    assert known.local_minute is not None and known.local_minute % 60 == 0


@pytest.fixture
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The vehicle's time zone, by its rules and not by a zone file, which a small image may lack."""
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(
    ("utc", "local"),
    [
        ("2026-01-15T20:59", "21:59"),
        ("2026-07-15T20:00", "22:00"),
        ("2026-03-29T00:59", "01:59"),  # the hour from 2 to 3 is left out
        ("2026-03-29T01:00", "03:00"),
        ("2026-10-25T00:59", "02:59"),  # it comes twice
        ("2026-10-25T01:00", "02:00"),
    ],
)
def test_the_window_is_of_the_vehicle_s_local_day_summer_time_included(
    berlin: None, utc: str, local: str
) -> None:
    wall_ns = int(datetime.fromisoformat(f"{utc}+00:00").timestamp()) * NS_PER_S
    found = vitals_of(STANDING, 0, OtaConfig(), Now(0, wall_ns, TimeQuality.NTP))
    assert found.local_minute == int(local[:2]) * 60 + int(local[3:])


def test_a_clock_that_nobody_set_tells_no_local_time() -> None:
    assert vitals_of(STANDING, 0, OtaConfig(), Now(0, 1_800_000_000 * NS_PER_S)).local_minute is None


@pytest.mark.parametrize("name", ["speed_kmh", "soc_percent", "low_voltage_v"])
def test_what_the_bus_does_not_say_holds_the_switch(name: str) -> None:
    target, now = target_of(b"image", 2), Now(0)
    assert hold_switch(target, OtaConfig(), vitals_of(STANDING, 0, OtaConfig(), now), True) == ""
    silent = vitals_of(STANDING | {name: None}, 0, OtaConfig(), now)
    assert hold_switch(target, OtaConfig(), silent, True)


def test_a_ledger_is_clean_when_it_balances_and_the_software_dropped_nothing() -> None:
    fine = StageLedger("decode", "frames", into=10, out=7, held=1, folded=1)
    fine.drop("unknown")
    lost = StageLedger("sampler", "samples", into=10, out=9)
    invented = StageLedger("pack", "samples", into=10, out=11)
    blamed = StageLedger("record", "records", into=10, out=9)
    blamed.drop("too_large")
    totals = {stage.name: stage.totals() for stage in (fine, lost, invented, blamed)}
    assert unaccounted(totals) == {"sampler", "pack", "record"}


class Bare:
    """A device whose trusted root is gone, and what it tells."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.real = Real(directory)
        self.told: list[Draft] = []
        monkeypatch.setenv("TBOX_SLOTS", str(self.real.fw))
        device = DeviceConfig(state_directory=str(self.real.data))
        self.config = cast(Config, type("Only", (), {"device": device, "ota": OtaConfig()}))
        nothing = cast(Any, None)
        self.around = Around(
            "car", 1, nothing, [], nothing, nothing, nothing, lambda: Now(1), self.told.append
        )


def test_a_good_image_without_its_trusted_root_drives_on_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = Bare(tmp_path, monkeypatch)
    monkeypatch.setenv("TBOX_SLOT", "a")
    standing = footing(bare.config.ota)
    assert not standing.on_trial
    assert open_updates(bare.config, bare.around, standing) is None
    (draft,) = bare.told
    assert draft.level == Level.ALARM and "root.json" in draft.body["reason"]


def test_an_image_on_trial_that_cannot_update_itself_any_more_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = Bare(tmp_path, monkeypatch)
    bare.real.install(DELTA_FILE, DELTA)
    bare.real.ctl.commit(boot.count_try(boot.activate(bare.real.ctl.read(), "b"), "b"))
    monkeypatch.setenv("TBOX_SLOT", "b")
    standing = footing(bare.config.ota)
    assert standing.on_trial
    with pytest.raises(TboxError, match=r"root\.json"):
        open_updates(bare.config, bare.around, standing)
    assert bare.told == []


def test_without_boot_control_the_vehicle_drives_on_and_nothing_migrates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = Bare(tmp_path, monkeypatch)
    monkeypatch.setenv("TBOX_SLOT", "a")
    monkeypatch.setenv("TBOX_SLOTS", str(tmp_path / "none"))
    with pytest.raises(TboxError, match="no boot control here") as unknown:
        footing(bare.config.ota)
    assert open_updates(bare.config, bare.around, unknown.value) is None
    (draft,) = bare.told
    assert draft.level == Level.ALARM and "no boot control here" in draft.body["reason"]
    agent = Agent.__new__(Agent)
    agent.config = bare.config
    agent._footing = agent._find_footing()
    assert agent._may_migrate() is False
