"""The spool: the one queue between sensing and sending. It forgets nothing before its PUBACK.

`Spool` puts records on flash in one transaction a tick, offers them in drain order, and says what it had to
drop. It is used by one thread, never looks into a payload and never sends. What it decides is in `policy`,
how rows are stored in `flash`, how they are sealed in `seal` and `keyring`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Any, TypeVar

import msgspec
import structlog

from tbox.durable import OsStorage, Storage
from tbox.ledger import Ledger
from tbox.model import COUNTER_BITS, Draft, Level, Now, Record
from tbox.spool.ballast import Ballast
from tbox.spool.drain import Drain, TokenBucket
from tbox.spool.flash import (
    FILE_NAME,
    Connect,
    Flash,
    Run,
    StartRow,
    first_id,
    is_busy,
    is_damage,
    is_full,
)
from tbox.spool.keyring import (
    KEY_FILE_NAME,
    Keyring,
    copied_keys,
    copied_only,
    copy_keys,
    open_keyring,
    rotate,
)
from tbox.spool.lock import DirectoryLock, SpoolError, SpoolLocked
from tbox.spool.meter import WriteMeter
from tbox.spool.outage import Outage
from tbox.spool.policy import (
    ALARM,
    LANES,
    ROUTINE,
    Dropped,
    IdRanges,
    Lane,
    SettledClock,
    StoredRun,
    evict_target_bytes,
    lane_of,
    pick_expired,
    pick_oldest,
    ranges_of,
    trusted_wall_s,
    unpacked,
)
from tbox.spool.ram import RamQueue, RamRun, runs_of
from tbox.spool.recover import Found
from tbox.spool.rescue import Rescue
from tbox.spool.schema import KIND_CODES, KIND_NAMES
from tbox.spool.seal import Random, sealed_overhead_bytes
from tbox.spool.starts import PreviousStart, needed_starts, previous_start
from tbox.spool.tally import ROWS_AT_OPEN, Tally

log = structlog.get_logger()

T = TypeVar("T")

READ_BYTES_MAX = 64 * 1024  # payload read from flash in one offer: a record that comes meanwhile waits for it
READ_RECORDS_MAX = 256
# What is read is soon acknowledged and deleted. SQLite visits every page of it, and live records wait: nearly
# twice as long where it has left SQLite's page cache of 2,000 KiB meanwhile.
READ_RUNS_PER_COMMIT = 128
READ_BYTES_PER_COMMIT = 1536 * 1024
EVICT_ROWS_READ = 256
# Pages the drop record and the tables' inner nodes may still need after an eviction.
EVICTION_HEADROOM_BYTES = 8 * 1024
SWEEP_ROWS_PER_TICK = 256  # rows looked at for their age
COMMIT_BYTES_MAX = 1024 * 1024  # one transaction; less than what the hard cap leaves above the quota
CAUSES = ("damage", "age", "quota")


class SpoolSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[spool] of tbox.toml."""

    quota_bytes: Annotated[int, msgspec.Meta(ge=256 * 1024, le=16 * 1024**3)] = 1024**3
    tick_ms: Annotated[int, msgspec.Meta(ge=10, le=60_000)] = 1000
    commit_bytes: Annotated[int, msgspec.Meta(ge=1024, le=16 * 1024**2)] = 256 * 1024
    key_file: str = ""  # "" = device.key in the spool directory
    age_max_h: dict[str, Annotated[int, msgspec.Meta(ge=1, le=10 * 366 * 24)]] = {}  # kind -> hours
    backlog_records_s: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 500
    backlog_bytes_s: Annotated[int, msgspec.Meta(ge=1024, le=1024**3)] = 1024**2
    live_records_max: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 100
    live_bytes_max: Annotated[int, msgspec.Meta(ge=1024, le=64 * 1024**2)] = 1024**2
    ram_bytes_max: Annotated[int, msgspec.Meta(ge=64 * 1024, le=1024**3)] = 16 * 1024**2
    ballast: bool = True


class Spool:
    """The flash FIFO. Open it with `Spool.open`; one thread only."""

    @classmethod
    def open(
        cls,
        directory: str,
        settings: SpoolSettings,
        *,
        start: int,
        mint: Callable[[Draft], Record],
        now: Now,
        ledger: Ledger,
        connect: Connect = sqlite3.connect,
        storage: Storage | None = None,
        random: Random = os.urandom,
        migrate: bool = True,
    ) -> Spool:
        """Open or create the spool in `directory`; with `migrate` off an older schema stays as it is.

        Raises SpoolLocked, SpoolKeyError, SpoolSchemaError, SpoolError: the data is then as it was. A
        medium that fails is no error: the spool runs from RAM, says so in an alarm and keeps trying.
        """
        spool = cls(
            directory, settings, start, mint, ledger, connect, storage or OsStorage(), random, migrate
        )
        try:
            spool._attach(now)
        except (sqlite3.Error, OSError) as error:
            spool._fall_to_ram(now, error)
        except BaseException:
            spool._meter.close()
            spool._lock.release()
            raise
        spool._meter.count()  # before another thread takes over
        return spool

    def __init__(
        self,
        directory: str,
        settings: SpoolSettings,
        start: int,
        mint: Callable[[Draft], Record],
        ledger: Ledger,
        connect: Connect,
        storage: Storage,
        random: Random,
        migrate: bool,
    ) -> None:
        storage.mkdir(directory)
        self._lock = DirectoryLock(directory)
        self._directory = directory
        self._settings = settings
        self._start = start
        self._mint = mint
        self._connect = connect
        self._storage = storage
        self._random = random
        self._migrate = migrate
        self._account = ledger.stage("spool", "records")
        self._tally = Tally(self._account, start)
        self._drain = Drain(
            TokenBucket(settings.backlog_records_s, max(1, settings.backlog_records_s // 5)),
            TokenBucket(settings.backlog_bytes_s, max(64 * 1024, settings.backlog_bytes_s // 5)),
        )
        self._age_max_s = {KIND_CODES[kind]: hours * 3600 for kind, hours in settings.age_max_h.items()}
        self._flash: Flash | None = None
        self._keys: Keyring | None = None
        self._own: StartRow | None = None
        self._start_rows: list[StartRow] = []  # what this start writes about starts, should it be in doubt
        self._open = RamQueue()  # appended and not known to be committed
        self._urgent_waits = False
        self._dropped = {cause: Dropped(cause) for cause in CAUSES}  # and not told yet
        # What the last commit tried to write: should that fail, it is tried again run by run as it was, for
        # it may be on flash all the same.
        self._tried: list[tuple[Lane, Run]] = []
        self._unsealed: tuple[int, list[Record]] = (0, [])  # the run read last: id, what is held of it
        self._runs_read = self._bytes_read = 0  # since the last commit
        self._settled_clock = SettledClock()
        self._meter = WriteMeter()
        self._ballast: Ballast | None = None
        self._rescue = Rescue(storage, directory, connect)
        self._suspects: dict[int, Lane] = {}  # runs, by their first ids, that did not unseal when read
        self._spoiled: set[int] = set()  # runs, by their first ids, whose rows the next commit keeps
        self._swept: dict[Lane, int] = dict.fromkeys(LANES, 0)
        self._outage = Outage()
        self._highest_id = 0
        self._now = Now(0)
        self.previous: PreviousStart | None = None

    # --- what goes in ---------------------------------------------------------------------------------

    def append(self, records: Sequence[Record]) -> None:
        """Take records into the open tick. They are safe when a `tick` has committed them."""
        for run in runs_of(records):
            self._open.append(run)
            self._urgent_waits |= self._drain.append(run)
            self._highest_id = max(self._highest_id, run.last)
        self._account.into += len(records)
        self._account.held += len(records)
        if self._open.size_bytes > self._settings.ram_bytes_max:
            self._shrink_ram()

    @property
    def wants_commit(self) -> bool:
        """Whether `tick` should be called at once: what is urgent waits, or much to write or delete."""
        if self._outage.reason:
            return False  # the flash is tried again at its own pace
        much_read = self._runs_read >= READ_RUNS_PER_COMMIT or self._bytes_read >= READ_BYTES_PER_COMMIT
        if self._drain.gone and much_read:
            return True
        return self._urgent_waits or self._open.size_bytes >= self._settings.commit_bytes

    # --- what goes out --------------------------------------------------------------------------------

    def offer(self, now: Now, room: int) -> list[Record]:
        """Return up to `room` records to send, in drain order, and mark them in flight."""
        return self._drain.offer(now.mono_ns, room, self._read, READ_BYTES_MAX)

    @property
    def more(self) -> bool:
        """Whether the next offer may find records, by themselves or when the bucket has filled again."""
        return self._drain.more

    def ack(self, ids: Iterable[int]) -> None:
        """Take PUBACKs. What was never on flash is forgotten at once, the rest at the next tick."""
        for lane, ones in self._drain.ack(ids).items():
            self._account.out += len(ones)
            for first, last in ranges_of(ones):
                self._leave(lane, first, last)
                self._forget(first, last)

    def _forget(self, first: int, last: int) -> None:
        """Take these out of the open tick; what may be on flash all the same leaves with the next commit."""
        never_stored = IdRanges()
        for run in self._open.remove(first, last):
            if not self._tried:
                never_stored.add(run.first, run.last)
        for begin, end in never_stored.without(first, last):
            self._drain.gone.add(begin, end)

    def requeue(self) -> None:
        """The link died: everything in flight will be offered again under its old id."""
        self._drain.requeue(self._open.get)

    def _read(
        self, lane: Lane, after: int, records_max: int, bytes_max: int
    ) -> tuple[list[Record], int | None]:
        """Read stored records for the drain. A run that does not unseal is left to the next tick."""
        if self._flash is None:
            return [], None
        first, ahead = self._unsealed
        if ahead and first <= after < ahead[-1].id and lane_of(ahead[0]) is lane:
            return [record for record in ahead if record.id > after], ahead[-1].id
        try:
            runs = self._flash.read(lane, after, min(records_max, READ_RECORDS_MAX), bytes_max)
            records: list[Record] = []
            for run in runs:
                self._runs_read += 1
                self._bytes_read += len(run.sealed or b"")
                held = self._records_of(run)
                if held is None:
                    self._suspects[run.id] = lane
                else:
                    records += held
        except sqlite3.Error as error:
            self._flash_failed(error)
            return [], None
        if runs and runs[0].id <= after:
            records = [record for record in records if record.id > after]
        return records, runs[-1].last_id if runs else None

    def _records_of(self, run: Run) -> list[Record] | None:
        """Return what is still held of a run; None when it is not what was sealed."""
        gone = unpacked(run.gone, run.id)
        if run.sealed is None or len(gone) == run.n:
            return []
        assert self._keys is not None
        payloads = self._keys.unseal(run)
        if payloads is None:
            return None
        kind = KIND_NAMES[run.kind]
        records = [Record(run.id + at, kind, run.level, payload) for at, payload in enumerate(payloads)]
        if gone:
            records = [record for record in records if record.id not in gone]
        self._unsealed = run.id, records
        return records

    def _give_up_spoiled(self, flash: Flash) -> None:
        """Tell of the records in runs that are not what was sealed: nobody will be sent them.

        The row stays where it is, all of it noted as gone, for a person with the key and patience: one
        flipped bit of AES-GCM costs the proof of the whole run, but only one bit of its text. It goes when
        the cap needs its room. While RAM still holds some of the records, those are sent from there first.
        """
        for one, lane in list(self._suspects.items()):
            run = next((run for run in flash.read(lane, one - 1, 1, 1) if run.id == one), None)
            if run is not None and self._drain.is_in_ram(lane, run.id, run.last_id):
                continue
            del self._suspects[one]
            if run is not None and self._records_of(run) is None:
                stored = StoredRun(run.id, run.n, run.kind, run.at_s, len(run.sealed or b""), run.gone)
                self._spoiled.add(run.id)
                self._doom(flash, lane, [stored], self._dropped["damage"])
                log.error("spool_run_spoiled", id=run.id, records=run.n)

    # --- the tick -------------------------------------------------------------------------------------

    def tick(self, now: Now) -> None:
        """Commit the open tick, acknowledgements and evictions in one transaction.

        Does nothing when there is nothing to write. A medium that fails raises nothing here: the records
        stay in RAM, an alarm says so, and later ticks try again.
        """
        self._now = now
        self._meter.follow(now)
        if self._outage.waits(now):
            self._report_ram(now)
            return
        try:
            if self._flash is None:
                self._attach(now)
            self._expire(now)
            if self._suspects and self._flash is not None:
                self._give_up_spoiled(self._flash)
            if self._outage.reason:
                self._report_ram(now, force=True)
            self._fetch_salvaged()
            self._commit_all(now)
            if self._flash is not None:
                self._tally.go_on(now, self._flash, self._drain.gone)
        except (sqlite3.Error, OSError) as error:
            self._flash_failed(error)
            return
        if self._outage.reason:
            log.info("spool_flash_back")
            self.append([self._mint(self._outage.end(now))])

    def _commit_all(self, now: Now) -> None:
        """Commit in portions: one portion but after an outage, when the RAM ring comes back to flash."""
        if self._ballast is not None and self._flash is not None:
            growth = self._open.size_bytes + self._rescue.returned_bytes
            self._ballast.fit(self._flash.file_bytes() + growth, grow=False)
        while self._has_work():
            try:
                self._commit(now)
            except sqlite3.Error as error:
                room = self._ballast is not None and is_full(error) and self._ballast.give_way()
                if not room or self._flash is None:
                    raise
                self._flash.rollback()
        self._urgent_waits = False  # nothing is open any more: committed, or acknowledged before it was
        self._drain.trim(self._settings.live_records_max, self._settings.live_bytes_max)

    def _has_work(self) -> bool:
        return bool(self._open or self._tried or self._drain.gone or self._rescue.is_due or self._told_of())

    def _commit(self, now: Now) -> None:
        """One transaction: inserts, acknowledged ranges, evictions and the records that tell of them."""
        assert self._flash is not None
        flash = self._flash
        flash.begin()
        if not self._tried:
            self._tried = self._sealed(self._portion(), now)
        self._insert(flash, self._tried)
        self._bring_home(flash)
        if self._rescue.files:
            flash.note_away(self._drain.gone)
        flash.delete(self._drain.gone, self._spoiled)
        self._make_room(flash)
        self._tell(flash, now)
        flash.commit()
        self._settle()

    def _settle(self) -> None:
        """The transaction is on flash."""
        for _, run in self._tried:
            self._open.remove(run.id, run.last_id)
        self._tried = []
        self._unsealed = 0, []
        self._drain.committed()
        self._spoiled.clear()
        self._runs_read = self._bytes_read = 0
        for lane, run in self._rescue.returned:
            self._drain.rewind(lane, run.id)
        self._rescue.settle()

    def _told_of(self) -> list[Dropped]:
        return [one for one in self._dropped.values() if one.told]

    def _tell(self, flash: Flash, now: Now) -> None:
        """Put what this transaction loses into it as drop records."""
        lost = self._told_of()
        if not lost:
            return
        told = [self._mint_drop(one, now) for one in lost]
        self._dropped = {cause: Dropped(cause) for cause in CAUSES}
        sealed = self._sealed(runs_of(told), now)
        self._tried += sealed
        self._insert(flash, sealed)

    def _portion(self) -> Iterator[RamRun]:
        """Yield the oldest open runs, as many as one transaction may add beyond the cap."""
        left_bytes = COMMIT_BYTES_MAX
        for run in self._open:
            if left_bytes <= 0:
                break
            yield run
            left_bytes -= run.size_bytes

    def _sealed(self, runs: Iterable[RamRun], now: Now) -> list[tuple[Lane, Run]]:
        at_s = trusted_wall_s(now)
        return [(lane_of(run.records[0]), self._sealed_run(run.records, at_s)) for run in runs]

    def _sealed_run(self, records: Sequence[Record], at_s: int | None) -> Run:
        assert self._keys is not None
        first = records[0]
        sealer = self._keys.sealer(first.start)
        assert sealer is not None, first.start
        sealed = sealer.seal(first.id, first.kind, first.level, [record.payload for record in records])
        # A plain int: sqlite3 looks long for a way to store an enum.
        return Run(first.id, len(records), KIND_CODES[first.kind], int(first.level), at_s, sealed)

    @staticmethod
    def _insert(flash: Flash, runs: Sequence[tuple[Lane, Run]]) -> None:
        for lane in LANES:
            its_runs = [run for its, run in runs if its is lane]
            if its_runs:
                flash.insert(lane, its_runs)

    def _mint_drop(self, dropped: Dropped, now: Now) -> Record:
        """Make the record that tells a loss. It has alarm priority, so that it outlives what it tells of."""
        record = self._mint(Draft("event", Level.ALARM, now.mono_ns, dropped.body()))
        self.append([record])
        log.warning("spool_dropped", cause=dropped.cause, count=dropped.count, bytes=dropped.bytes)
        return record

    # --- eviction -------------------------------------------------------------------------------------

    def _make_room(self, flash: Flash) -> None:
        """Evict inside the open transaction until the pages in use fit the cap again."""
        quota_bytes = self._settings.quota_bytes - EVICTION_HEADROOM_BYTES
        if flash.fits(quota_bytes):
            return
        target = evict_target_bytes(quota_bytes)
        for lane, events_too in ((ROUTINE, False), (ROUTINE, True), (ALARM, False)):
            self._evict_lane(flash, lane, events_too, target)

    def _evict_lane(self, flash: Flash, lane: Lane, events_too: bool, target: int) -> None:
        """Evict the oldest of one lane; events last: drop and start records are the frame of the proof."""
        after = 0
        while (excess := flash.used_bytes() - target) > 0:
            runs = flash.sizes(lane, after, EVICT_ROWS_READ)
            if not runs:
                return
            picked = pick_oldest(
                [run for run in runs if events_too or run.kind != KIND_CODES["event"]],
                excess,
                self._drain.is_flying,
            )
            after = (picked or runs)[-1].last_id
            flash.delete(self._doom(flash, lane, picked, self._dropped["quota"]))

    def _doom(self, flash: Flash, lane: Lane, runs: Sequence[StoredRun], dropped: Dropped) -> IdRanges:
        """These stored runs are given up; the next commit takes them off the flash. Returns their ids."""
        doomed = IdRanges()
        for run in runs:
            gone = unpacked(run.gone, run.id)
            for first, last in self._drain.gone.within(run.id, run.last_id):
                gone.add(first, last)
            size_bytes = self._held_bytes(flash, lane, run, gone)  # first: it may raise
            count = run.n - len(gone)
            dropped_before = dropped.count
            for first, last in gone.without(run.id, run.last_id):
                dropped.add(first, last, last - first + 1)
                self._leave(lane, first, last)
            assert dropped.count == dropped_before + count
            dropped.bytes += size_bytes
            doomed.add(run.id, run.last_id)
            self._drain.gone.add(run.id, run.last_id)
            self._drain.drop(run.id, run.last_id)
            self._account.drop(dropped.cause, count)
        return doomed

    def _held_bytes(self, flash: Flash, lane: Lane, run: StoredRun, gone: IdRanges) -> int:
        """Return the payload bytes still held of a run; what is partly gone must be unsealed for that.

        0 where that is not possible any more.
        """
        if not gone:
            return run.sealed_bytes - sealed_overhead_bytes(run.n)
        (whole,) = flash.read(lane, run.id - 1, 1, 1)
        return sum(len(record.payload) for record in self._records_of(whole) or () if record.id not in gone)

    def _expire(self, now: Now) -> None:
        """Look at a few stored runs and give up those past their kind's age, if the clock is settled."""
        wall_s = self._settled_clock.wall_s(now)
        if not self._age_max_s or wall_s is None or self._flash is None:
            return
        for lane in LANES:
            runs = self._flash.sizes(lane, self._swept[lane], SWEEP_ROWS_PER_TICK)
            self._swept[lane] = runs[-1].last_id if len(runs) == SWEEP_ROWS_PER_TICK else 0
            runs = [run for run in runs if any(self._drain.gone.without(run.id, run.last_id))]
            expired = pick_expired(runs, wall_s, self._age_max_s, self._drain.is_flying)
            self._doom(self._flash, lane, expired, self._dropped["age"])

    # --- salvage --------------------------------------------------------------------------------------

    def _fetch_salvaged(self) -> None:
        """Read a portion of a file put aside; the next commit brings it home."""
        if not self._rescue.files or not self._tally.is_done or self._flash is None:
            return
        for found in self._rescue.fetch(self._flash, self._is_whole, COMMIT_BYTES_MAX):
            self._take_found(self._flash, found)

    def _is_whole(self, run: Run) -> bool:
        assert self._keys is not None
        return self._keys.unseal(run) is not None

    def _take_found(self, flash: Flash, found: Found) -> None:
        run = found.run
        if run is None:
            newest = max(self._highest_id, first_id(self._start))
            if found.first <= newest:
                self._dropped["damage"].add(found.first, min(found.last, newest), 0)
            return
        if flash.holds(found.lane, run.id) or any(run.id == tried.id for _, tried in self._tried):
            return  # its commit was in doubt, and has been repeated here
        gone = self._rescue.gone(run, unpacked(run.gone, run.id))
        held = run.n - len(gone)
        if not held:
            return
        known = self._rescue.recognise(held)
        self._account.into += held - known
        if found.whole:
            self._account.held += held - known
            self._rescue.bring(found.lane, run)
            for first, last in gone:
                self._drain.gone.add(first, last)
        else:
            self._account.held -= known
            self._account.drop("damage", held)
            self._dropped["damage"].add(run.id, run.last_id, held)

    def _bring_home(self, flash: Flash) -> None:
        if not self._rescue.is_due:
            return
        self._insert(flash, self._rescue.returned)
        lost = self._rescue.write(flash)
        if lost:
            oldest, newest = 1, max(self._highest_id, first_id(self._start))
            damaged = self._dropped["damage"]
            if damaged.told:
                oldest, newest = damaged.first_id, damaged.last_id
            damaged.add(oldest, newest, lost)
            self._account.held -= lost
            self._account.drop("damage", lost)

    def _leave(self, lane: Lane, first: int, last: int) -> None:
        """Records are no longer held."""
        self._tally.leave(lane, first, last)
        if self._rescue.files:
            self._rescue.leave(first, last, last - first + 1 - self._open.count(first, last))

    # --- opening --------------------------------------------------------------------------------------

    def _attach(self, now: Now) -> None:
        """Open the file and the keys, note this start. Raises as `open` does, and sqlite3.Error, OSError."""
        try:
            self._attach_file()
        except sqlite3.Error as error:
            if not is_damage(error):
                raise
            self._put_aside(error)
            self._attach_file()
        assert self._flash is not None
        if self._settings.ballast:
            self._ballast = Ballast(self._directory, self._settings.quota_bytes)
            self._ballast.fit(self._flash.file_bytes(), grow=True)
            if self._ballast.shortfall:
                log.warning("spool_ballast_short", why=self._ballast.shortfall)

    def _attach_file(self) -> None:
        self._rescue.look()
        flash = self._open_file()
        try:
            rotate(self._storage, self._key_file, flash, self._directory, self._random)
            known, aside = flash.starts(), bool(self._rescue.files)
            copied = copied_only(known, copied_keys(self._storage, self._directory)) if aside else []
            has_data = flash.newest_id is not None or aside
            self._keys = open_keyring(
                self._storage, self._key_file, known or copied, self._random, has_data=has_data
            )
            self._keys.learn(copied_keys(self._storage, self._directory))
            self._note_start(flash, self._keys, known, copied)
            self._rescue.recall(flash.away())
            self._tally.count(flash, self._drain.gone, ROWS_AT_OPEN)
        except BaseException:
            flash.close()
            raise
        self._flash = flash

    def _put_aside(self, error: sqlite3.Error) -> None:
        """The file is damaged: keep it under another name and go on with a new one."""
        held = self._account.held - len(self._open)
        name = self._rescue.put_aside(self._start, held, self._drain.gone)
        log.error("spool_damaged", reason=str(error), put_aside=name)
        self._unsealed = 0, []
        self._suspects.clear()
        self._tally.end()

    def _open_file(self) -> Flash:
        path = f"{self._directory}/{FILE_NAME}"
        try:
            return Flash(path, self._connect, self._settings.quota_bytes, migrate=self._migrate)
        except sqlite3.Error as error:
            if is_busy(error):
                raise SpoolLocked(
                    "another program has the spool's database open", where=path, mend="close it first"
                ) from error
            raise

    def _note_start(self, flash: Flash, keys: Keyring, known: list[StartRow], copied: list[StartRow]) -> None:
        """Store this start's row and how far the one before had committed, before any record of this one.

        copied: starts whose rows went with a damaged file; their keys are needed for what is salvaged.
        """
        if self._own is not None:
            keys.learn([self._own])
            flash.begin()
            for row in [*copied, *self._start_rows]:
                flash.put_start(row)
            flash.commit()
            return
        highest = max(known[-1].start if known else 0, (flash.newest_id or 0) >> COUNTER_BITS)
        if highest >= self._start:
            raise SpoolError(
                f"start {self._start} is not above start {highest} that the spool holds",
                where=self._directory,
                mend="keep the start number files with the spool, or raise the start number",
            )
        ended = list(known)
        if ended:  # what the starts before it had reached was noted when it opened
            last = ended[-1]
            ended[-1] = last._replace(last_id=_highest(last.last_id, flash.newest_of(last.start)))
        self.previous = previous_start(ended or copied)
        needed = needed_starts(self.previous)
        oldest = flash.oldest_start() or self._start
        kept = [row for row in ended if self._rescue.files or row.start in needed or row.start >= oldest]
        own = keys.new_start(self._start)
        copy_keys(self._storage, self._directory, [*copied, *kept, own])
        self._own = own  # from here on: should the commit fail, it may have succeeded all the same
        self._start_rows = [*copied, *(row for row in kept if row not in known), own]
        flash.begin()
        flash.forget_starts([row.start for row in ended if row not in kept])
        for row in self._start_rows:
            flash.put_start(row)
        flash.commit()

    @property
    def _key_file(self) -> str:
        return self._settings.key_file or f"{self._directory}/{KEY_FILE_NAME}"

    # --- when the flash fails -------------------------------------------------------------------------

    def _flash_failed(self, error: Exception) -> None:
        """A read or write failed: undo what was half done, and go on from RAM until the flash is back."""
        damaged = isinstance(error, sqlite3.Error) and is_damage(error)
        if self._flash is not None:
            try:
                self._flash.rollback()
                lost = not (isinstance(error, sqlite3.Error) and is_full(error))
            except sqlite3.Error:
                lost = True
            if lost:
                with contextlib.suppress(sqlite3.Error):
                    self._flash.close()
                self._flash = None
        if damaged:
            assert isinstance(error, sqlite3.Error)
            try:
                self._put_aside(error)
                self._attach(self._now)
                return
            except (sqlite3.Error, OSError) as again:
                error = again
        self._fall_to_ram(self._now, error)

    def _fall_to_ram(self, now: Now, error: Exception) -> None:
        alarm = self._outage.fail(now, error)
        if alarm is not None:
            log.error("spool_flash_failed", reason=self._outage.reason)
            self.append([self._mint(alarm)])

    def _shrink_ram(self) -> None:
        """The RAM ring is full: the oldest routine records go first, alarms last, and all are counted."""
        for alarms in (False, True):
            runs = (run for run in self._open if run.records[0].is_alarm == alarms)
            for record in itertools.chain.from_iterable(run.records for run in runs):
                if self._open.size_bytes <= self._settings.ram_bytes_max:
                    return
                if record.id in self._drain.in_flight:
                    continue
                self._open.remove(record.id, record.id)
                self._drain.drop(record.id, record.id)
                if self._tried:
                    self._drain.gone.add(record.id)
                self._outage.dropped.add(record.id, record.id, 1, len(record.payload))
                self._account.held -= 1
                self._account.drop("ram")

    def _report_ram(self, now: Now, *, force: bool = False) -> None:
        dropped = self._outage.report(now, force=force)
        if dropped is not None:
            self._mint_drop(dropped, now)

    # --- state and end --------------------------------------------------------------------------------

    @property
    def last_committed_id(self) -> int | None:
        """The highest id of this start that is known to be on flash or acknowledged after it was."""
        newest = self._flash.newest_id if self._flash is not None else None
        return newest if newest is not None and newest > first_id(self._start) else None

    @property
    def depth(self) -> int:
        """Records taken in and not yet acknowledged, as far as the backlog is counted."""
        return self._account.held

    def stat(self) -> dict[str, Any]:
        """Return plain values for `tbox status` and health records."""
        flash = self._flash
        self._meter.count()
        return {
            "state": "ram" if self._outage.reason else "flash",
            "reason": self._outage.reason,
            "start": self._start,
            "records": self._account.held,
            "counted": self._tally.is_done,
            "in_flight": len(self._drain.in_flight),
            "open_records": len(self._open),
            "open_bytes": self._open.size_bytes,
            "newest_id": flash.newest_id if flash else None,
            "used_bytes": flash.used_bytes() if flash else None,
            "quota_bytes": self._settings.quota_bytes,
            "dropped": dict(self._account.dropped),
            "salvaging": list(self._rescue.files),
            "ballast_bytes": self._ballast.size_bytes if self._ballast else 0,
            "flash_bytes_written": self._meter.total_bytes,
            "flash_bytes_today": self._meter.today_bytes,
        }

    def look(self, work: Callable[[Flash, Keyring], T]) -> T:
        """Let `work` read the file for a person. Raises SpoolError while the spool runs from RAM."""
        if self._flash is None or self._keys is None:
            raise SpoolError(
                f"runs from RAM: {self._outage.reason}", where=self._directory, mend="mend the medium"
            )
        return work(self._flash, self._keys)

    def close(self, now: Now, *, clean: bool, ledger_totals: dict[str, Any]) -> None:
        """Commit what is open and close. clean: the start row then says so, with the ledger's totals."""
        self._now = now
        self._outage.hurry()
        self.tick(now)
        try:
            if clean and self._flash is not None and self._own is not None and not self._open:
                ledger = msgspec.json.encode(ledger_totals).decode()
                last_id = self._highest_id or None
                self._flash.begin()
                self._flash.put_start(self._own._replace(clean=1, last_id=last_id, ledger=ledger))
                self._flash.commit()
        except sqlite3.Error as error:
            log.error("spool_close_failed", reason=str(error))
        finally:
            if self._flash is not None:
                with contextlib.suppress(sqlite3.Error):
                    self._flash.close()
                self._flash = None
            self._meter.close()
            self._lock.release()


def _highest(*ids: int | None) -> int | None:
    return max((one for one in ids if one is not None), default=None)
