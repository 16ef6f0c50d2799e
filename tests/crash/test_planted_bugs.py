"""Tests of the tests: each bug planted here must turn the crash exploration red."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tbox.durable import Storage
from tbox.model import Now, Record
from tbox.spool import flash, keyring, seal, store
from tbox.spool.flash import Flash, Run
from tbox.spool.policy import LANES, Dropped, IdRanges, Lane, StoredRun
from tbox.spool.store import Spool
from tests.crash import recorder
from tests.crash.explore import Plant, explore
from tests.crash.workload import Violation

# A planted bug is found within so many states of a few seeds, or the exploration is blind to it. Which seed
# finds it depends on the SQLite at hand; the full exploration covers a hundred times as many states.
STATES_MAX = 1500
SEED = 11
SEEDS = (SEED, 3, 8, 1, 2, 4, 5)


def _pragma(old: str, new: str) -> Any:
    original = flash.pragmas
    return mock.patch.object(
        flash, "pragmas", lambda quota: [line.replace(old, new) for line in original(quota)]
    )


def synchronous_normal() -> Any:
    return _pragma("synchronous=FULL", "synchronous=NORMAL")


def synchronous_off() -> Any:
    return _pragma("synchronous=FULL", "synchronous=OFF")


@contextlib.contextmanager
def journal_delete() -> Iterator[None]:
    with (
        _pragma("journal_mode=WAL", "journal_mode=DELETE"),
        _pragma("locking_mode=EXCLUSIVE", "locking_mode=NORMAL"),
    ):
        yield


def deleted_before_puback() -> Any:
    original = Spool.offer

    def offer(self: Spool, now: Now, room: int) -> list[Record]:
        records = original(self, now, room)
        for record in records:
            self._drain.gone.add(record.id)
        return records

    return mock.patch.object(Spool, "offer", offer)


def forgotten_directory_sync() -> Any:
    return mock.patch.object(recorder._RecordingStorage, "fsync_dir", lambda _self, _path: None)


def start_number_not_synced() -> Any:
    original = recorder._RecordingStorage.fsync

    def fsync(self: Any, path: str) -> None:
        if "/start." not in path:
            original(self, path)

    return mock.patch.object(recorder._RecordingStorage, "fsync", fsync)


def key_written_in_place() -> Any:
    def write_key(storage: Storage, path: str, key: bytes) -> None:
        storage.write(path, key)

    return mock.patch.object(keyring, "write_key", write_key)


def nonce_reuse() -> Any:
    return mock.patch.object(seal, "_nonce", lambda _id, _n: bytes(seal.NONCE_BYTES))


def run_nonce_reuse() -> Any:
    """Sealed and opened alike, so every run is read back: only the watch over the nonces can tell."""
    return mock.patch.object(seal, "_nonce", lambda one, _n: (one >> 3).to_bytes(seal.NONCE_BYTES, "big"))


def eviction_outside_the_transaction() -> Any:
    original = Spool._make_room

    def make_room(self: Spool, flash: Flash) -> None:
        original(self, flash)
        if self._dropped["quota"].count:
            flash.commit()
            flash.begin()

    return mock.patch.object(Spool, "_make_room", make_room)


def drop_record_counts_one_too_few() -> Any:
    original = Dropped.body

    def body(self: Dropped) -> dict[str, object]:
        return {**original(self), "count": self.count - 1}

    return mock.patch.object(Dropped, "body", body)


def alarms_in_a_transaction_of_their_own() -> Any:
    original = Flash.insert

    def insert(self: Flash, lane: Lane, runs: Sequence[Run]) -> None:
        original(self, lane, runs)
        if lane.alarm:
            self.commit()
            self.begin()

    return mock.patch.object(Flash, "insert", insert)


def newest_row_deleted() -> Any:
    def delete(self: Flash, ids: IdRanges, _kept: Collection[int] = ()) -> None:
        for first, last in ids:
            for lane in LANES:
                self._db.execute(f"DELETE FROM {lane.name} WHERE id BETWEEN ? AND ?", (first, last))

    return mock.patch.object(Flash, "delete", delete)


def small_ticks_put_off() -> Any:
    original = Spool._commit_all

    def commit_all(self: Spool, now: Now) -> None:
        if len(self._open) != 2:
            original(self, now)

    return mock.patch.object(Spool, "_commit_all", commit_all)


def acks_forgotten() -> Any:
    original = Flash.delete

    def delete(self: Flash, ids: IdRanges, _kept: Collection[int] = ()) -> None:
        original(self, IdRanges(first for first, last in ids if first == last))

    return mock.patch.object(Flash, "delete", delete)


def partial_acks_forgotten() -> Any:
    """What is acknowledged of a run counts only when all of it is."""
    return mock.patch.object(Flash, "_note_gone", lambda _self, _run, _gone: None)


def partial_acks_outside_the_transaction() -> Any:
    original = Flash._note_gone

    def note_gone(self: Flash, run: StoredRun, gone: IdRanges) -> None:
        original(self, run, gone)
        self.commit()
        self.begin()

    return mock.patch.object(Flash, "_note_gone", note_gone)


def a_partly_gone_run_counts_whole() -> Any:
    original = Flash.sizes

    def sizes(self: Flash, lane: Lane, after: int, rows_max: int) -> list[StoredRun]:
        return [run._replace(gone=None) for run in original(self, lane, after, rows_max)]

    return mock.patch.object(Flash, "sizes", sizes)


def rotation_renames_before_it_rewraps() -> Any:
    def rotate(storage: Storage, key_file: str, flash: Flash, directory: str, random: Any) -> None:
        fresh = f"{key_file}{keyring.NEXT_SUFFIX}"
        new = seal.read_key(storage, fresh)
        old = seal.read_key(storage, key_file)
        if new is None or old is None:
            return
        storage.rename(fresh, key_file)
        storage.fsync_dir(directory)
        ring = keyring.Keyring(new, random)
        flash.begin()
        for row in flash.starts():
            flash.put_start(ring.rewrap(row, old, fresh))
        flash.commit()

    return mock.patch.object(store, "rotate", rotate)


def rows_under_new_ids() -> Any:
    original = Spool._sealed_run

    def sealed(self: Spool, run: Sequence[Record], at_s: int | None) -> Run:
        renamed = [Record(one.id + 5000, one.kind, one.level, one.payload) for one in run]
        return original(self, renamed, at_s)

    settled = Spool._settle

    def settle(self: Spool) -> None:  # the spool itself does not notice
        self._tried = [(lane, run._replace(id=run.id - 5000)) for lane, run in self._tried]
        settled(self)

    return mock.patch.multiple(Spool, _sealed_run=sealed, _settle=settle)


def clean_before_it_is() -> Any:
    original = Spool.tick

    def tick(self: Spool, now: Now) -> None:
        if self._flash is not None and self._own is not None and len(self._open) > 3:
            self._flash.begin()
            self._flash.put_start(self._own._replace(clean=1))
            self._flash.commit()
        original(self, now)

    return mock.patch.object(Spool, "tick", tick)


def endings_forgotten_early() -> Any:
    return mock.patch.object(store, "needed_starts", lambda _previous: set())


def data_key_stored_too_late() -> Any:
    original = Flash.put_start
    waiting: dict[int, Any] = {}

    def put_start(self: Flash, row: Any) -> None:
        if row.start in waiting or row.clean:
            original(self, row)
        waiting[row.start] = row

    return mock.patch.object(Flash, "put_start", put_start)


LIVING: list[Callable[[], Any]] = [
    synchronous_normal, synchronous_off, journal_delete, deleted_before_puback, forgotten_directory_sync,
    start_number_not_synced, key_written_in_place, nonce_reuse, eviction_outside_the_transaction,
    drop_record_counts_one_too_few, alarms_in_a_transaction_of_their_own, newest_row_deleted,
    small_ticks_put_off, acks_forgotten, rotation_renames_before_it_rewraps, rows_under_new_ids,
    clean_before_it_is, data_key_stored_too_late, endings_forgotten_early, partial_acks_forgotten,
    partial_acks_outside_the_transaction, a_partly_gone_run_counts_whole,
]  # fmt: skip


def log_deleted_at_open() -> Any:
    """The neighbours' advice: the log is corrupt, delete it by hand."""
    original = Spool._open_file

    def open_file(self: Spool) -> Flash:
        (Path(self._directory) / "spool.db-wal").unlink(missing_ok=True)
        return original(self)

    return mock.patch.object(Spool, "_open_file", open_file)


def damaged_start_copy_believed() -> Any:
    """A start number is handed out again when the newest copy is torn."""
    return mock.patch("tests.crash.explore.next_start", lambda *_args, **_kw: 1)


def backlog_erased_at_boot() -> Any:
    """A changed configuration clears the spool."""
    original = Spool._attach

    def attach(self: Spool, now: Now) -> None:
        original(self, now)
        assert self._flash is not None
        self._flash.execute("DELETE FROM routine WHERE kind = 1")

    return mock.patch.object(Spool, "_attach", attach)


BOOTING: list[Callable[[], Any]] = [log_deleted_at_open, damaged_start_copy_believed, backlog_erased_at_boot]


@pytest.mark.slow
def test_without_a_bug_the_same_states_are_green() -> None:
    assert explore(600, SEED).states >= 600


def finds(bug: Plant, **planted: Plant) -> bool:
    """Whether the exploration turns red with the bug in place."""
    for seed in SEEDS:
        try:
            explore(STATES_MAX, seed, **planted)
        except Violation:
            return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("bug", LIVING, ids=lambda bug: bug.__name__)
def test_a_bug_in_the_living_spool_turns_the_exploration_red(bug: Plant) -> None:
    assert finds(bug, living=bug)


@pytest.mark.slow
def test_a_nonce_that_is_used_twice_turns_the_exploration_red() -> None:
    assert finds(run_nonce_reuse, living=run_nonce_reuse, booting=run_nonce_reuse)


@pytest.mark.parametrize("bug", BOOTING, ids=lambda bug: bug.__name__)
def test_a_bug_at_boot_turns_the_exploration_red(bug: Plant) -> None:
    assert finds(bug, booting=bug)
