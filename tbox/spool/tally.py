"""Takes what earlier starts left on flash into the account, a part at a time: opening waits for no scan."""

from __future__ import annotations

from tbox.ledger import StageLedger
from tbox.model import NS_PER_S, Now
from tbox.spool.flash import Flash, first_id
from tbox.spool.policy import LANES, IdRanges, Lane, StoredRun, unpacked

ROWS_AT_OPEN = 8192  # before the first tick
ROWS_PER_S = 1024  # and after it, since live records wait for that too


class Tally:
    """The spool's account, and how far the backlog of earlier starts is in it."""

    def __init__(self, account: StageLedger, start: int) -> None:
        self._account = account
        self._before_id = first_id(start)
        # lane -> id up to which its backlog is counted; a lane leaves when it is done
        self._counted: dict[Lane, int] = dict.fromkeys(LANES, 0)
        self._due_ns = 0

    @property
    def is_done(self) -> bool:
        return not self._counted

    def end(self) -> None:
        """There is no backlog to count any more: its file was put aside."""
        self._counted.clear()

    def leave(self, lane: Lane, first: int, last: int) -> None:
        """Records are no longer held; those that were not counted yet are taken in first."""
        early = 0
        if lane in self._counted:
            early = max(0, min(last, self._before_id - 1) - max(first, self._counted[lane] + 1) + 1)
        self._account.into += early
        self._account.held -= last - first + 1 - early

    def go_on(self, now: Now, flash: Flash, gone: IdRanges) -> None:
        """Count some more once a second, however often it ticks. gone: what is about to leave the flash."""
        if self._counted and now.mono_ns >= self._due_ns:
            self._due_ns = now.mono_ns + NS_PER_S
            self.count(flash, gone, ROWS_PER_S)

    def count(self, flash: Flash, gone: IdRanges, rows_max: int) -> None:
        """Take in what the next rows hold."""
        for lane, after in list(self._counted.items()):
            if rows_max <= 0:
                return
            found = [run for run in flash.sizes(lane, after, rows_max) if run.id < self._before_id]
            held = sum(_held(run, gone) for run in found)
            self._account.into += held
            self._account.held += held
            if len(found) < rows_max:
                del self._counted[lane]
            else:
                self._counted[lane] = found[-1].last_id
            rows_max -= len(found)


def _held(run: StoredRun, leaving: IdRanges) -> int:
    """Return how many records of a stored run are neither gone nor about to go."""
    if run.gone is None and not leaving:
        return run.n
    gone = unpacked(run.gone, run.id)
    parts = gone.without(run.id, run.last_id)
    return run.n - len(gone) - sum(b - a + 1 for part in parts for a, b in leaving.within(*part))
