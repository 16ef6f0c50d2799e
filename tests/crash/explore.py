"""Cuts the power at every operation of recorded lives and reopens every image that a cut may leave.

`python -m tests.crash.explore --states N [--seed S] [--jobs J]` explores more than the tests do. One state
is one distinct image of the files, written to a memory disk, booted as the daemon boots and checked.
"""

from __future__ import annotations

import argparse
import bisect
import concurrent.futures
import contextlib
import itertools
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

from tbox.clock import next_start
from tbox.ledger import Ledger
from tbox.model import Now, Record
from tbox.spool import flash, meter, schema
from tbox.spool.flash import FILE_NAME
from tbox.spool.starts import PreviousStart, highest_start_seen
from tbox.spool.store import Spool
from tests.crash.disk import Disk, Image, ImageStorage
from tests.crash.workload import Life, Minter, Snapshot, Span, Violation, settings, watched_nonces

# Checkpoints and log resets happen every few ticks, so that cuts fall into them.
WAL_PAGES = 24
STEPS_PER_LIFE = 40
# Most lives are short: starts that die young are where ends are forgotten.
LIVES_PER_CHAIN = 6
VARIANTS_PER_OP = 6
VARIANTS_PER_CUT_MAX = 20


Plant = Callable[[], AbstractContextManager[object]]


@dataclass
class Tally:
    states: int = 0
    duplicates: int = 0
    lives: int = 0
    operations: int = 0

    def add(self, other: Tally) -> None:
        self.states += other.states
        self.duplicates += other.duplicates
        self.lives += other.lives
        self.operations += other.operations


@contextmanager
def memory_directory() -> Iterator[str]:
    """Yield an empty directory on a memory disk where there is one."""
    base = "/dev/shm" if Path("/dev/shm").is_dir() else None
    path = tempfile.mkdtemp(prefix="tbox-crash-", dir=base)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def put(image: Image, directory: str) -> None:
    """Make a directory hold exactly the files of an image."""
    root = Path(directory)
    for path in root.iterdir():
        if path.name not in image:
            path.unlink()
    for name, content in image.items():
        path = root / name
        path.write_bytes(content)
        if name.startswith("device.key"):
            path.chmod(0o600)


def allowed(spans: list[Span], base: Snapshot, cut: int) -> list[Snapshot]:
    """Return what may be found after a cut before operation `cut`: the last call's end, or the next."""
    done = bisect.bisect_right([span.end for span in spans], cut)
    states = [spans[done - 1].after if done else base]
    if done < len(spans) and spans[done].begin < cut:
        states.append(spans[done].after)
    return states


def check(image: Image, expected: list[Snapshot], directory: str, *, look_first: bool) -> Snapshot:
    """Boot from an image as the daemon does; return the snapshot that was found. Raises Violation."""
    put({name: content for name, content in image.items() if name.startswith(FILE_NAME)}, directory)
    storage = ImageStorage(image, directory)
    base = expected[0]
    seen = highest_start_seen(directory, storage=storage) if look_first else 0
    start = next_start(storage, directory, seen=seen)
    if start <= base.issued:
        raise Violation(f"start {start} was given out again; {base.issued} was reached before")
    minter = Minter(start, random.Random(0))
    ledger = Ledger()
    spool = Spool.open(
        directory, settings(), start=start, mint=minter, now=Now(0), ledger=ledger, storage=storage
    )
    try:
        if spool.stat()["state"] != "flash" or minter.minted:
            raise Violation(f"did not open without help: {spool.stat()}")
        found = drain(spool)
        match = next((one for one in expected if one.rows == found), None)
        if match is None:
            raise Violation(difference(found, expected))
        if spool.depth != len(found) or ledger.snapshot()["spool"]["into"] != len(found):
            raise Violation(f"counts are off: {ledger.snapshot()} for {len(found)} records")
        check_endings(spool.previous, expected, match)
    finally:
        spool.close(Now(1), clean=False, ledger_totals={})
    return match


def blurred(found: Snapshot, expected: list[Snapshot]) -> Snapshot:
    """Return what is known after a cut in the middle of a call: it may have ended the start or not."""
    latest = expected[-1].starts
    starts = {
        start: replace(facts, ceiling=latest[start].ceiling, clean=latest[start].clean)
        for start, facts in expected[0].starts.items()
    }
    return replace(found, starts={**starts, **{s: f for s, f in found.starts.items() if s not in starts}})


def drain(spool: Spool) -> dict[int, Record]:
    """Take everything a spool offers; alarms must come first and each lane in order of id."""
    found: list[Record] = []
    while batch := spool.offer(Now(0), 500):
        found += batch
    order = [(not record.is_alarm, record.id) for record in found]
    if order != sorted(order) or len(set(order)) != len(order):
        raise Violation(f"drain order is wrong: {order}")
    return {record.id: record for record in found}


def difference(found: dict[int, Record], expected: list[Snapshot]) -> str:
    parts = []
    for one in expected:
        lost = sorted(set(one.rows) - set(found))
        back = sorted(set(found) - set(one.rows))
        changed = [i for i in found if i in one.rows and found[i] != one.rows[i]]
        parts.append(f"lost {lost[:5]} ({len(lost)}), back {back[:5]} ({len(back)}), changed {changed[:5]}")
    return "; or ".join(parts)


def check_endings(previous: PreviousStart | None, expected: list[Snapshot], match: Snapshot) -> None:
    """Every start whose end no kept or acknowledged start record tells must be told now, and truly."""
    ends = {one.start: one for one in (previous, *previous.earlier)} if previous else {}
    told = set(match.told)
    for one, starts in match.previous_of.items():
        if one in match.rows:
            told |= set(starts)
    base, latest = expected[0], expected[-1]
    silent = set(base.starts) - told - set(ends)
    if silent:
        raise Violation(f"nobody tells how start {sorted(silent)} ended; told now: {sorted(ends)}")
    for start, end in ends.items():
        facts, ceiling = base.starts.get(start), latest.starts.get(start)
        floor = facts.floor if facts else None
        if (end.last_committed_id or 0) < (floor or 0):
            raise Violation(f"start {start} had committed {floor}, said is {end.last_committed_id}")
        if ceiling and (end.last_committed_id or 0) > (ceiling.ceiling or 0):
            raise Violation(f"start {start} never minted {end.last_committed_id}")
        if end.clean and not (ceiling and ceiling.clean):
            raise Violation(f"start {start} did not end cleanly")


def explore_life(
    life: Life, base: Snapshot, budget: int, directory: str, tally: Tally
) -> tuple[Image, Snapshot]:
    """Check images at every cut of a recorded life; return one of them to live on from."""
    rng = life.rng
    disk = Disk(life.image)
    seen: dict[int, list[Snapshot]] = {}  # image -> what was allowed when it was checked
    onward: tuple[Image, Snapshot] = (life.image, base)
    ops = life.recorder.ops
    per_cut = max(3, min(VARIANTS_PER_CUT_MAX, budget // len(ops)))
    keep_at = rng.choice((len(ops), rng.randrange(len(ops) // 2, len(ops))))
    for cut in range(len(ops) + 1):
        expected = allowed(life.spans, base, cut)
        for image in itertools.islice(disk.images(rng, VARIANTS_PER_OP), per_cut):
            key = hash(tuple(sorted(image.items())))
            if seen.get(key) == expected:  # the same image may be right before a call returns and wrong after
                tally.duplicates += 1
                continue
            tally.states += key not in seen
            seen[key] = expected
            try:
                found = check(image, expected, directory, look_first=not tally.states % 16)
            except Violation:
                raise
            except Exception as error:
                raise Violation(f"cut before operation {cut} of {len(ops)}: {error!r}") from error
            if cut <= keep_at:
                onward = (image, blurred(found, expected))
        if cut < len(ops):
            disk.apply(ops[cut])
    tally.lives += 1
    tally.operations += len(ops)
    return onward


def explore(
    states: int, seed: int, *, living: Plant = contextlib.nullcontext, booting: Plant = contextlib.nullcontext
) -> Tally:
    """Explore at least `states` distinct images; raises Violation at the first broken promise.

    living, booting: what to wrap the recorded life and the reopening in; the planted bugs go there.
    """
    tally = Tally()
    chain = 0
    with memory_directory() as work, memory_directory() as room:
        while tally.states < states:
            image: Image = {}
            base = Snapshot()
            for number in range(LIVES_PER_CHAIN):
                put(image, work)
                seed_now = seed * 1_000_003 + chain * 101 + number
                with small_log(), no_meter(), mock.patch.object(schema, "MIGRATIONS", migrations(number)):
                    life = Life(work, image, base, seed_now)
                    with living(), watched_nonces():
                        life.run(STEPS_PER_LIFE if number % 3 == 0 else number)
                    with booting():
                        image, base = explore_life(life, base, states - tally.states, room, tally)
                    abandon(life)
                if tally.states >= states:
                    break
            chain += 1
    return tally


def abandon(life: Life) -> None:
    """Let go of a life's open files; what this writes comes after the cut and is not looked at."""
    life.spool.close(life.now, clean=False, ledger_totals={})


def small_log() -> mock._patch[int]:
    return mock.patch.object(flash, "WAL_CHECKPOINT_PAGES", WAL_PAGES)


def no_meter() -> AbstractContextManager[object]:
    """Reading the kernel's account takes as long as a commit on a memory disk, and counts nothing there."""
    return mock.patch.object(meter, "_ACCOUNT", "/nonexistent")


def _add_column(db: object) -> None:
    db["routine"].add_column("later", int)  # type: ignore[index]


def migrations(life: int) -> tuple[schema.Migration, ...]:
    """From the third life on a chain runs a release whose schema has one step more."""
    return (*schema.MIGRATIONS, _add_column) if life >= 2 else schema.MIGRATIONS


def _job(states: int, seed: int) -> Tally:
    return explore(states, seed)


def main(args: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--states", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args(args)
    begin = time.monotonic()
    total = Tally()
    share = -(-options.states // options.jobs)
    with concurrent.futures.ProcessPoolExecutor(options.jobs) as pool:
        jobs = [pool.submit(_job, share, options.seed * 1000 + n) for n in range(options.jobs)]
        for job in concurrent.futures.as_completed(jobs):
            total.add(job.result())
    seconds = time.monotonic() - begin
    print(
        f"{total.states} distinct states of {total.lives} lives ({total.operations} operations, "
        f"{total.duplicates} duplicates skipped) in {seconds:.0f} s: every promise kept"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
