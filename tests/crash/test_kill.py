"""kill -9 of a living process on the real file system, again and again: what was safe stays safe."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tbox.ledger import Ledger
from tbox.model import Now
from tbox.spool.store import Spool
from tests.crash.filler import LIVE_QUOTA_BYTES, records_of_tick
from tests.crash.workload import Minter, settings

ROOT = Path(__file__).parents[2]
KILLS = 12


def _live_and_kill(directory: Path, lines: int) -> tuple[int, int, set[int]]:
    """Let a process run for some lines of its story, kill it; return its start, what was safe and acked."""
    command = [sys.executable, "-m", "tests.crash.filler", str(directory), "0", "run"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    start, safe, acked = 0, 0, set[int]()
    for number, line in enumerate(process.stdout):
        what, *numbers = line.split()
        if what == "start":
            start = int(numbers[0])
        elif what == "safe":
            safe = int(numbers[0])
        else:
            acked |= {int(one) for one in numbers}
        if number == lines:
            os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    return start, safe, acked


@pytest.mark.slow
def test_kill_9_at_any_moment_loses_at_most_the_open_tick(tmp_path: Path) -> None:
    rng = random.Random(9)
    safe: dict[int, int] = {}
    acked: set[int] = set()
    for _ in range(KILLS):
        start, last, done = _live_and_kill(tmp_path, rng.randint(1, 25))
        assert start not in safe
        safe[start] = last
        acked |= done
    made = {}
    for start, last in safe.items():
        minter = Minter(start, random.Random(start))
        while not minter.minted or minter.minted[-1].id < last:
            records_of_tick(minter)
        made.update({record.id: record for record in minter.minted if record.id <= last})
    spool = Spool.open(
        str(tmp_path), settings(quota_bytes=LIVE_QUOTA_BYTES), start=max(safe) + 1,
        mint=Minter(max(safe) + 1, rng), now=Now(0), ledger=Ledger(),
    )  # fmt: skip
    got = {}
    while batch := spool.offer(Now(0), 500):
        got.update({record.id: record for record in batch})
    lost = {one for one in made if one not in got and one not in acked}
    assert not lost
    assert all(got[one] == made[one] for one in got if one in made)
    assert spool.previous is not None and not spool.previous.clean
    assert (spool.previous.last_committed_id or 0) >= max(one for one in got if one >> 32 == max(safe))
    spool.close(Now(1), clean=True, ledger_totals={})
