"""A process that lives with a spool on the real file system and can be killed. It says what is safe.

`python -m tests.crash.filler DIR TICKS stop|die|run`: append and tick, then stop cleanly, die without
closing, or go on until killed. After each tick it prints the highest id that is safe now; what it prints as
`acked` the receiver has.
"""

from __future__ import annotations

import itertools
import os
import random
import sys

from tbox.clock import next_start
from tbox.durable import OsStorage
from tbox.ledger import Ledger
from tbox.model import NS_PER_S, Draft, Level, Now, Record
from tbox.spool.starts import highest_start_seen
from tbox.spool.store import Spool
from tests.crash.workload import Minter, settings

ROUTINE_PER_TICK = 9
LIVE_QUOTA_BYTES = 1 << 24


def records_of_tick(minter: Minter) -> list[Record]:
    routine = [minter(Draft("telemetry", Level.INFO, 0, {"fill": 300})) for _ in range(ROUTINE_PER_TICK)]
    return [*routine, minter(Draft("alarm", Level.ALARM, 0, {"fill": 90}))]


def main(directory: str, ticks: int, end: str) -> None:
    start = next_start(OsStorage(), directory, seen=highest_start_seen(directory))
    minter = Minter(start, random.Random(start))
    spool = Spool.open(
        directory,
        settings(quota_bytes=LIVE_QUOTA_BYTES),
        start=start,
        mint=minter,
        now=Now(0),
        ledger=Ledger(),
    )
    print("start", start, flush=True)
    for tick in itertools.count() if end == "run" else range(ticks):
        now = Now(tick * NS_PER_S)
        spool.append(records_of_tick(minter))
        if end == "run" and tick % 3 == 0:
            acked = [record.id for record in spool.offer(now, 12)]
            print("acked", *acked, flush=True)  # the receiver has them from here on
            spool.ack(acked)
        spool.tick(now)
        print("safe", minter.minted[-1].id, flush=True)
    if end == "stop":
        spool.close(Now(ticks * NS_PER_S), clean=True, ledger_totals={})
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
