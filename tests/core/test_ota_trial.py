"""The trial judges the software alone: good ones pass in time, bad ones fail, the world's faults pause it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tbox.model import NS_PER_S
from tbox.ota.policy import OtaSettings
from tbox.ota.trial import Proof, TrialJudge, Verdict
from tests.crash.ota_world import HEALTHY

SETTINGS = OtaSettings(trial_crash_free_s=600, trial_limit_s=1800, trial_grace_s=60)


class Trial:
    """Looks every five seconds."""

    def __init__(self) -> None:
        self.judge = TrialJudge(SETTINGS)
        self.now_s = 0

    def run(self, seconds: int, **changes: Any) -> Verdict:
        proof: Proof = msgspec.structs.replace(HEALTHY, **changes)
        for _ in range(0, seconds, 5):
            self.judge.step(self.now_s * NS_PER_S, proof)
            self.now_s += 5
        return self.judge.verdict


def test_ten_good_minutes_pass() -> None:
    trial = Trial()
    assert trial.run(600) is Verdict.RUNNING
    assert trial.run(10) is Verdict.PASSED


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ("decoding", "frames are not decoded"),
        ("spool_writable", "the spool is not writable"),
        ("acked", "no record was acknowledged"),
    ],
)
def test_a_part_that_stays_down_fails_after_its_grace(part: str, reason: str) -> None:
    trial = Trial()
    assert trial.run(60, **{part: False}) is Verdict.RUNNING
    assert trial.run(10, **{part: False}) is Verdict.FAILED
    assert trial.judge.reason == reason


def test_a_part_that_comes_back_within_its_grace_is_forgiven() -> None:
    trial = Trial()
    for _ in range(10):
        assert trial.run(50, acked=False) is Verdict.RUNNING
        trial.run(5)
    assert trial.run(200) is Verdict.PASSED


def test_parts_that_take_turns_being_down_fail_at_the_limit() -> None:
    trial = Trial()
    for _ in range(30):
        trial.run(30, acked=False)
        trial.run(30, decoding=False)
    trial.run(10, acked=False)
    assert trial.judge.verdict is Verdict.FAILED


def test_a_ledger_that_does_not_balance_fails_at_once() -> None:
    trial = Trial()
    trial.run(100)
    assert trial.run(5, ledger_clean=False) is Verdict.FAILED


@pytest.mark.parametrize(
    "silence", [{"covered": False, "acked": False}, {"bus_alive": False, "decoding": False}]
)
def test_no_coverage_and_a_silent_bus_pause_the_clock(silence: dict[str, bool]) -> None:
    trial = Trial()
    trial.run(300)
    counted = trial.judge.counted_s
    assert trial.run(86_400, **silence) is Verdict.PAUSED
    assert trial.judge.counted_s == counted
    assert trial.run(290) is Verdict.RUNNING
    assert trial.run(30) is Verdict.PASSED


def test_a_battery_alarm_suspends_the_verdict_either_way() -> None:
    trial = Trial()
    trial.run(595)
    assert trial.run(3600, alarm_level=4, spool_writable=False, ledger_clean=False) is Verdict.SUSPENDED
    assert trial.run(20, alarm_level=2) is Verdict.PASSED


def test_a_verdict_is_final() -> None:
    trial = Trial()
    trial.run(5, ledger_clean=False)
    assert trial.run(5000) is Verdict.FAILED
