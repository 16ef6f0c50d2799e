"""The real process is killed at every system call that touches slots, boot control or the journal."""

from __future__ import annotations

import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.crash.ota_world import DATA, FIRMWARE, Disk, drive
from tests.crash.test_ota_cuts import SCENARIOS, check_rest, fresh

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed"),
]

ROOT = Path(__file__).parents[2]
CHILD = """
import pickle, sys
from tests.crash.ota_world import Disk, drive
drive(pickle.load(open(sys.argv[1] + "/world", "rb")), Disk(sys.argv[1]))
"""
# Reading changes nothing, so a kill there is a kill before the next of these.
CALLS = ("openat", "pwrite64", "fsync", "truncate", "rename", "unlink")
ENVIRONMENT = {"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1", "PATH": "/usr/bin:/bin"}
POINTS_MAX = 200


def run_child(scenario: str, top: Path, *options: str) -> subprocess.CompletedProcess[str]:
    Disk(str(top)).put(SCENARIOS[scenario].start | SCENARIOS[scenario].world.staged)
    (top / "world").write_bytes(pickle.dumps(fresh(SCENARIOS[scenario])))
    command = [
        "strace",
        "-f",
        "-y",
        "-e",
        "signal=none",
        "-e",
        f"trace={','.join(CALLS)}",
        *options,
    ]
    return subprocess.run(
        [*command, sys.executable, "-c", CHILD, str(top)],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


def points(scenario: str, top: Path) -> list[tuple[str, int]]:
    """Return (call, its number among the calls of that name) for each that changes something of ours."""
    traced = run_child(scenario, top)
    assert traced.returncode == 0, traced.stderr[-2000:]
    count: dict[str, int] = {}
    found = []
    for line in traced.stderr.splitlines():
        match = re.match(r"(?:\[pid +\d+\] )?(\w+)\(", line)
        if match is None or match[1] not in CALLS:
            continue
        count[match[1]] = count.get(match[1], 0) + 1
        ours = f"{top}{FIRMWARE}" in line or f"{top}{DATA}" in line
        if ours and (match[1] != "openat" or "O_WRONLY" in line):
            found.append((match[1], count[match[1]]))
    return found


@pytest.mark.parametrize("scenario", ["delta", "unhealthy"])
def test_a_kill_at_any_system_call_is_recovered_from(scenario: str, tmp_path: Path) -> None:
    kills = points(scenario, tmp_path / "count")
    assert 20 < len(kills) < POINTS_MAX
    killed = 0
    for call, number in kills:
        top = tmp_path / f"{call}{number}"
        run = run_child(scenario, top, "-e", f"inject={call}:signal=KILL:when={number}")
        killed += run.returncode != 0
        world, disk = fresh(SCENARIOS[scenario]), Disk(str(top))
        _, running = drive(world, disk)
        check_rest(SCENARIOS[scenario], disk, running, world)
        shutil.rmtree(top)
    assert killed == len(kills)
