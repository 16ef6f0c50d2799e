"""The real process is killed at every system call that touches slots, boot control or the journal."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest

from tests.crash import strace
from tests.crash.ota_world import DATA, FIRMWARE, Disk, drive
from tests.crash.test_ota_cuts import SCENARIOS, check_rest, fresh

pytestmark = [pytest.mark.slow, strace.needs_strace]

CHILD = """
import pickle, sys
from tests.crash import strace
from tests.crash.ota_world import Disk, drive
drive(pickle.load(open(sys.argv[1] + "/world", "rb")), Disk(sys.argv[1]))
"""
POINTS_MAX = 200


def prepared(scenario: str, top: Path) -> Path:
    """Lay out a device and the update it is to take."""
    Disk(str(top)).put(SCENARIOS[scenario].start | SCENARIOS[scenario].world.staged)
    (top / "world").write_bytes(pickle.dumps(fresh(SCENARIOS[scenario])))
    return top


@pytest.mark.parametrize("scenario", ["delta", "unhealthy"])
def test_a_kill_at_any_system_call_is_recovered_from(scenario: str, tmp_path: Path) -> None:
    kills = strace.points(CHILD, prepared(scenario, tmp_path / "count"), [FIRMWARE, DATA])
    assert 20 < len(kills) < POINTS_MAX
    for point in kills:
        top = prepared(scenario, tmp_path / f"{point[0]}{point[1]}")
        assert strace.killed(CHILD, top, point)
        world, disk = fresh(SCENARIOS[scenario]), Disk(str(top))
        _, running = drive(world, disk)
        check_rest(SCENARIOS[scenario], disk, running, world)
        shutil.rmtree(top)
