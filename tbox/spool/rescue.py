"""Damaged files that were put aside, and what is under way from the oldest of them back into the spool.

Knows where each file stands; counts nothing and commits nothing: `store` does, in its own transactions.
"""

from __future__ import annotations

from collections.abc import Iterator

import structlog

from tbox.durable import Storage
from tbox.spool.flash import Connect, Flash, Run
from tbox.spool.policy import LANES, IdRanges, Lane
from tbox.spool.recover import Found, Whole, finish_setting_aside, remove_aside, salvage, set_aside

log = structlog.get_logger()

RUNS_PER_TICK = 512


class Rescue:
    """Brings the runs of damaged files home, a portion a tick, and remembers what left in the meantime."""

    def __init__(self, storage: Storage, directory: str, connect: Connect) -> None:
        self._storage = storage
        self._directory = directory
        self._connect = connect
        self.files: list[str] = []  # oldest first
        self.returned: list[tuple[Lane, Run]] = []  # for the next commit
        self.returned_bytes = 0
        self.ended = False  # all of the oldest file is home with the next commit
        self._moved = False
        self._founds: Iterator[Found] | None = None
        self._found: Found | None = None  # given out last and not taken yet
        self._upto: dict[Lane, int] = dict.fromkeys(LANES, 0)
        self._left = IdRanges()  # acknowledged or dropped while their run may still be in a file put aside
        self._missing_next = 0  # held records that went with a file which was damaged while we ran
        self._missing = 0  # the same of the file that is being fetched

    @property
    def is_due(self) -> bool:
        """Whether the next commit has something of this to write."""
        return self._moved or self.ended

    # --- files ----------------------------------------------------------------------------------------

    def look(self) -> None:
        """Learn which files were put aside, now or by an earlier start. Raises OSError."""
        self.files = finish_setting_aside(self._storage, self._directory)

    def recall(self, left: IdRanges) -> None:
        """Take in what an earlier start noted as having left."""
        for first, last in left:
            self._left.add(first, last)

    def put_aside(self, tag: int, held: int, gone: IdRanges) -> str:
        """Put the spool's file aside; held: records that it still held, gone: those that had left it."""
        name = set_aside(self._storage, self._directory, tag)
        self._founds, self._found, self.ended, self._moved = None, None, False, False
        self._missing_next = held
        self.recall(gone)
        return name

    # --- records --------------------------------------------------------------------------------------

    def leave(self, first: int, last: int, stored: int) -> None:
        """Records are no longer held; `stored` of them were on flash."""
        if self.files:
            self._left.add(first, last)
            early = min(stored, self._missing_next)
            self._missing_next -= early
            self._missing -= min(stored - early, self._missing)

    def recognise(self, count: int) -> int:
        """Return how many of these records were held all along: the damage came after they were counted."""
        known = min(count, self._missing)
        self._missing -= known
        return known

    def fetch(self, flash: Flash, whole: Whole, bytes_max: int) -> Iterator[Found]:
        """Yield a portion of what the oldest file holds, and the gaps in it. Raises sqlite3.Error.

        What the caller could not take, because it raised, comes again.
        """
        if self._founds is None:
            after = flash.salvaged(self.files[0])
            self._upto = after or dict.fromkeys(LANES, 0)
            path = f"{self._directory}/{self.files[0]}"
            upto = self._upto.__getitem__
            self._founds = salvage(path, self._connect, upto, whole, mend=True) if after else iter(())
            self._missing, self._missing_next = self._missing_next, 0
        for _ in range(RUNS_PER_TICK):
            if self.returned_bytes >= bytes_max:
                return
            found = self._found = self._found or next(self._founds, None)
            if found is None:
                self.ended = True
                return
            yield found
            self._found = None  # it was taken
            self._moved = True
            if found.run is not None:
                self._upto[found.lane] = found.last

    def gone(self, run: Run, known: IdRanges) -> IdRanges:
        """Return what of a run is gone: `known`, and what left since its file was put aside."""
        for first, last in self._left.within(run.id, run.last_id):
            known.add(first, last)
        return known

    def bring(self, lane: Lane, run: Run) -> None:
        """This run comes home with the next commit."""
        self.returned.append((lane, run))
        self.returned_bytes += len(run.sealed or b"")

    # --- the commit -----------------------------------------------------------------------------------

    def write(self, flash: Flash) -> int:
        """Note in the open transaction how far it is; return how many held records did not come back."""
        flash.note_salvaged(self.files[0], self._upto, done=self.ended)
        if not self.ended:
            return 0
        if len(self.files) == 1:
            flash.forget_away()
        lost, self._missing = self._missing, 0
        return lost

    def settle(self) -> None:
        """The commit is on flash. A file all of which is home is deleted. Raises OSError."""
        self.returned, self.returned_bytes, self._moved = [], 0, False
        if self.ended:
            name = self.files.pop(0)
            log.info("spool_salvaged", file=name)
            self._founds, self.ended, self._missing = None, False, 0
            if not self.files:
                self._left = IdRanges()
            remove_aside(self._storage, self._directory, name)
