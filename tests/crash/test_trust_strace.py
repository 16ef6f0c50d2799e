"""The real process is killed at every system call that changes the metadata it keeps, or the floors."""

from __future__ import annotations

import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tbox.durable import OsStorage
from tbox.ota.metadata import MetadataError
from tbox.ota.trust import TrustClient
from tbox.ota.truststore import TrustStore
from tests.crash.test_trust_cuts import MOMENTS, ROOT, Moment
from tests.tuf_repository import START

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed"),
]

TOP = Path(__file__).parents[2]
CHILD = """
import pickle, sys
from tbox.durable import OsStorage
from tbox.ota.trust import TrustClient
top = sys.argv[1]
root, files, now = pickle.load(open(top + "/moment", "rb"))
fetch = lambda path, length_max: files.get(path)
TrustClient(root, OsStorage(), top + "/cache", top + "/floors", fetch).refresh(now)
"""
CALLS = ("openat", "pwrite64", "fsync", "truncate", "rename", "unlink")
ENVIRONMENT = {"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1", "PATH": "/usr/bin:/bin"}
POINTS_MAX = 60


def client(top: str, moment: Moment) -> TrustClient:
    return TrustClient(ROOT, OsStorage(), f"{top}/cache", f"{top}/floors", moment.fetch)


def prepared(top: Path) -> None:
    """Lay out a device that has seen the state before, and the one it is to see."""
    for name in ("cache", "floors"):
        (top / name).mkdir(parents=True)
    client(str(top), MOMENTS["timestamp alone"]).refresh(START)
    served = MOMENTS["everything"].served
    files = {f"{n}.{role}.json": raw for role in served for n, raw in enumerate(served[role], 1)}
    files["timestamp.json"] = served["timestamp"][-1]
    (top / "moment").write_bytes(pickle.dumps((ROOT, files, START)))


def run_child(top: Path, *options: str) -> subprocess.CompletedProcess[str]:
    prepared(top)
    trace = ["strace", "-f", "-y", "-e", "signal=none", "-e", f"trace={','.join(CALLS)}"]
    return subprocess.run(
        [*trace, *options, sys.executable, "-c", CHILD, str(top)],
        cwd=TOP, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


def points(top: Path) -> list[tuple[str, int]]:
    """Return (call, its number among the calls of that name) for each that changes something of ours."""
    traced = run_child(top)
    assert traced.returncode == 0, traced.stderr[-2000:]
    count: dict[str, int] = {}
    found = []
    for line in traced.stderr.splitlines():
        match = re.match(r"(?:\[pid +\d+\] )?(\w+)\(", line)
        if match is None or match[1] not in CALLS:
            continue
        count[match[1]] = count.get(match[1], 0) + 1
        ours = f"{top}/cache" in line or f"{top}/floors" in line
        if ours and (match[1] != "openat" or "O_WRONLY" in line):
            found.append((match[1], count[match[1]]))
    return found


def test_a_kill_at_any_system_call_lets_no_replay_in_and_is_recovered_from(tmp_path: Path) -> None:
    kills = points(tmp_path / "count")
    assert 15 < len(kills) < POINTS_MAX
    killed = 0
    for call, number in kills:
        top = tmp_path / f"{call}{number}"
        killed += run_child(top, "-e", f"inject={call}:signal=KILL:when={number}").returncode != 0
        stored = TrustStore(OsStorage(), f"{top}/cache", f"{top}/floors").load()
        assert stored.whole
        if stored.floors.roles["timestamp"].version == MOMENTS["everything"].timestamp:
            with pytest.raises(MetadataError, match="is older than"):
                client(str(top), MOMENTS["timestamp alone"]).refresh(START)
        device = client(str(top), MOMENTS["everything"])
        device.refresh(START)
        assert device.trusted.timestamp is not None
        assert device.trusted.timestamp.version == MOMENTS["everything"].timestamp
    assert killed == len(kills)
