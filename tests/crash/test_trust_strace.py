"""The real process is killed at every system call that changes the metadata it keeps, or the floors."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from tbox.durable import OsStorage
from tbox.ota.metadata import MetadataError
from tbox.ota.trust import TrustClient
from tbox.ota.truststore import TrustStore
from tests.crash import strace
from tests.crash.test_trust_cuts import MOMENTS, ROOT, Moment
from tests.tuf_repository import START

pytestmark = [pytest.mark.slow, strace.needs_strace]

CHILD = """
import pickle, sys
from tbox.durable import OsStorage
from tbox.ota.trust import TrustClient
top = sys.argv[1]
root, files, now = pickle.load(open(top + "/moment", "rb"))
fetch = lambda path, length_max: files.get(path)
TrustClient(root, OsStorage(), top + "/cache", top + "/floors", fetch).refresh(now)
"""
POINTS_MAX = 60


def client(top: str, moment: Moment) -> TrustClient:
    return TrustClient(ROOT, OsStorage(), f"{top}/cache", f"{top}/floors", moment.fetch)


def prepared(top: Path) -> Path:
    """Lay out a device that has seen the state before, and the one it is to see."""
    for name in ("cache", "floors"):
        (top / name).mkdir(parents=True)
    client(str(top), MOMENTS["timestamp alone"]).refresh(START)
    served = MOMENTS["everything"].served
    files = {f"{n}.{role}.json": raw for role in served for n, raw in enumerate(served[role], 1)}
    files["timestamp.json"] = served["timestamp"][-1]
    (top / "moment").write_bytes(pickle.dumps((ROOT, files, START)))
    return top


def test_a_kill_at_any_system_call_lets_no_replay_in_and_is_recovered_from(tmp_path: Path) -> None:
    kills = strace.points(CHILD, prepared(tmp_path / "count"), ["/cache", "/floors"])
    assert 15 < len(kills) < POINTS_MAX
    for point in kills:
        top = prepared(tmp_path / f"{point[0]}{point[1]}")
        assert strace.killed(CHILD, top, point)
        stored = TrustStore(OsStorage(), f"{top}/cache", f"{top}/floors").load()
        assert stored.whole
        if stored.floors.roles["timestamp"].version == MOMENTS["everything"].timestamp:
            with pytest.raises(MetadataError, match="is older than"):
                client(str(top), MOMENTS["timestamp alone"]).refresh(START)
        device = client(str(top), MOMENTS["everything"])
        device.refresh(START)
        assert device.trusted.timestamp is not None
        assert device.trusted.timestamp.version == MOMENTS["everything"].timestamp
