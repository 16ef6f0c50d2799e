"""The power is cut at every write of a metadata refresh: no replay may get in, no device be locked out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import pytest

from tbox.durable import frame
from tbox.errors import Refused
from tbox.ota.metadata import Floors, MetadataError, TrustedSet
from tbox.ota.trust import TrustClient
from tbox.ota.truststore import FLOORS_STEM, GENERATION_STEM, Generation, Stored, TrustStore
from tests.crash.flash import Flash, Image, every_cut
from tests.tuf_repository import START, Repository

CACHE, FLOORS = "/cache", "/floors"
STEPS = ("timestamp alone", "everything", "new keys")


class Violation(AssertionError):
    """The store did what no store of trust may."""


@dataclass(frozen=True)
class Moment:
    """What a server had to show at one time."""

    served: dict[str, list[bytes]]
    timestamp: int

    def fetch(self, path: str, length_max: int) -> bytes | None:
        if path == "timestamp.json":
            return self.served["timestamp"][-1]
        version, _, role = path.removesuffix(".json").partition(".")
        versions = self.served.get(role, [])
        return versions[int(version) - 1] if int(version) <= len(versions) else None


def moments() -> dict[str, Moment]:
    """Return the states of one repository, the oldest first."""
    repository = Repository()
    found = {"first": _moment(repository)}
    for step in STEPS:
        if step == "new keys":
            repository.rotate("timestamp")
            repository.publish("root")
        if step == "timestamp alone":
            repository.publish("timestamp")
        else:
            repository.publish_all()
        found[step] = _moment(repository)
    return found


def _moment(repository: Repository) -> Moment:
    served = {role: list(versions) for role, versions in repository.served.items()}
    return Moment(served, repository.timestamp.version)


MOMENTS = moments()
ROOT = MOMENTS["first"].served["root"][0]


def client(flash: Flash, moment: Moment, store: type[TrustStore] = TrustStore) -> TrustClient:
    made = TrustClient.__new__(TrustClient)
    made._root, made._fetch, made._store = ROOT, moment.fetch, store(flash, CACHE, FLOORS)
    return made


def refreshed(image: Image, moment: Moment, store: type[TrustStore] = TrustStore) -> Flash:
    flash = Flash(image)
    client(flash, moment, store).refresh(START)
    return flash


def image_of(flash: Flash) -> Image:
    return {path: bytes(data) for path, data in flash.files.items()}


def before(step: str) -> str:
    names = list(MOMENTS)
    return names[names.index(step) - 1]


def check(image: Image, old: str | None, new: str, *, finished: bool) -> None:
    """Hold one state of the medium against what must be true in all of them."""
    newer = MOMENTS[new].timestamp
    older = MOMENTS[old].timestamp if old else 0
    stored = _load(image)
    floor = stored.floors.roles["timestamp"].version if "timestamp" in stored.floors.roles else 0
    cached = _cached(stored)
    if cached not in ({}, *(_files(name) for name in (old, new) if name)):
        raise Violation("the cache holds a mixture")
    if not stored.whole and old is not None:
        raise Violation("the cache names what is not there")
    if floor < older or (finished and floor < newer):
        raise Violation(f"the floor fell to {floor}")
    if cached == _files(new) and floor < newer:
        raise Violation("the floor is behind what is believed")
    _check_replay(image, old, new, floor)
    if _cached(_load(image_of(refreshed(image, MOMENTS[new])))) != _files(new):
        raise Violation("a refresh does not lead to the newest state")


def _load(image: Image) -> Stored:
    try:
        return TrustStore(Flash(image), CACHE, FLOORS).load()
    except Refused as error:
        raise Violation(f"locked out: {error}") from None


def _cached(stored: Stored) -> dict[str, str]:
    return {role: hashlib.sha256(raw).hexdigest() for role, raw in stored.roles.items()}


def _files(name: str) -> dict[str, str]:
    return {role: hashlib.sha256(versions[-1]).hexdigest() for role, versions in MOMENTS[name].served.items()}


def _check_replay(image: Image, old: str | None, new: str, floor: int) -> None:
    """Offer what was served before, with the cache as it is and with every file of it emptied."""
    if old is None or new == "new keys":
        return  # with new keys, the old timestamp's key is no key any more
    emptied = {path: b"" if path.startswith(CACHE) else data for path, data in image.items()}
    for state in (image, emptied):
        try:
            flash = refreshed(state, MOMENTS[old])
        except MetadataError:
            continue
        if floor > MOMENTS[old].timestamp:
            raise Violation("a replay was let in")
        if _load(image_of(flash)).floors.roles["timestamp"].version < floor:
            raise Violation("a replay lowered the floor")


def explore(step: str, store: type[TrustStore] = TrustStore, *, twice: bool = False) -> int:
    """Cut after every operation of one refresh, and of the recovery from it; return the states seen."""
    old = before(step) if step != "first" else None
    start: Image = {}
    if old is not None:
        start = image_of(refreshed({}, MOMENTS["first"], store))
        for name in list(MOMENTS)[1 : list(MOMENTS).index(step)]:
            start = image_of(refreshed(start, MOMENTS[name], store))
    seen: set[tuple[tuple[str, bytes], ...]] = set()
    once = list(_states(start, old, step, store, seen))
    for image in once if twice else ():
        for _ in _states(image, old, step, store, seen):
            pass
    return len(seen)


def _states(
    start: Image, old: str | None, new: str, store: type[TrustStore], seen: set[tuple[tuple[str, bytes], ...]]
) -> Iterator[Image]:
    log = refreshed(start, MOMENTS[new], store).log
    for done, image in every_cut(start, log):
        key = tuple(sorted(image.items()))
        if key not in seen or done == len(log):
            check(image, old, new, finished=done == len(log))
        if key not in seen:
            seen.add(key)
            yield image


@pytest.mark.parametrize("step", ["first", *STEPS])
def test_one_cut_anywhere_lets_no_replay_in_and_nobody_out(step: str) -> None:
    assert explore(step) > 10


@pytest.mark.slow
@pytest.mark.parametrize("step", ["first", *STEPS])
def test_two_cuts_anywhere_do_no_more_harm(step: str) -> None:
    print(f"{step}: {explore(step, twice=True)} states")


def test_a_refresh_that_brings_nothing_new_writes_nothing() -> None:
    start = image_of(refreshed({}, MOMENTS["first"]))
    assert refreshed(start, MOMENTS["first"]).log == []


def test_a_chain_of_refreshes_leaves_no_file_behind() -> None:
    image: Image = {}
    for moment in MOMENTS.values():
        image = image_of(refreshed(image, moment))
    assert (
        len([path for path in image if path.startswith(CACHE)]) == 4 + 1 + 2 - 1
    )  # roles, copies; root twice


@pytest.mark.parametrize("damage", [b"", b"\0" * 300])
def test_floors_and_cache_both_lost_are_refused_and_not_begun_anew(damage: bytes) -> None:
    start = image_of(refreshed({}, MOMENTS["first"]))
    for kept in ("nothing", "cache", "floors"):
        image = {
            path: data if kept != "nothing" and path.startswith(f"/{kept}") else damage
            for path, data in start.items()
        }
        store = TrustStore(Flash(image), CACHE, FLOORS)
        if kept == "nothing":
            with pytest.raises(Refused, match="floors of trust are damaged"):
                store.load()
            continue
        stored = store.load()
        assert bool(stored.roles) is (kept == "cache")
        healed = _load(image_of(refreshed(image, MOMENTS["first"])))
        assert healed.floors.roles["timestamp"].version == MOMENTS["first"].timestamp


# --- planted bugs: the exploration must catch each --------------------------------------------------------


class NoFsync(TrustStore):
    """Takes the write for the deed, as python-tuf's client does."""

    def _put(self, raw: bytes, durable: set[str]) -> str:
        digest = hashlib.sha256(raw).hexdigest()
        self._storage.write(self._path(digest), raw)
        return digest


class NamesNotSynced(TrustStore):
    """Syncs the files and not their names."""

    def save(self, trusted: TrustedSet) -> None:
        sync = self._storage.fsync_dir

        def skip(path: str) -> None:
            if path != CACHE or not self._storage.exists(f"{CACHE}/{GENERATION_STEM}.0"):
                return

        self._storage.fsync_dir = skip  # type: ignore[method-assign]
        super().save(trusted)
        self._storage.fsync_dir = sync  # type: ignore[method-assign]


class FloorsForgotten(TrustStore):
    """Keeps no floors."""

    def save(self, trusted: TrustedSet) -> None:
        trusted.floors = Floors()
        super().save(trusted)


class FloorsLast(TrustStore):
    """Raises the floors after the new state is believed."""

    def save(self, trusted: TrustedSet) -> None:
        found = self.load().floors
        floors, trusted.floors = trusted.floors, found
        super().save(trusted)
        trusted.floors = floors
        super().save(trusted)


class FloorsInOneCopy(TrustStore):
    """Writes the floors over themselves."""

    def _keep_floors(self, floors: Floors) -> None:
        path = f"{FLOORS}/{FLOORS_STEM}.0"
        self._storage.write(path, frame(1, msgspec.msgpack.encode(floors)))
        self._storage.fsync(path)
        self._storage.fsync_dir(FLOORS)


class InPlace(TrustStore):
    """Writes each role over the one before, under its name."""

    def save(self, trusted: TrustedSet) -> None:
        self._keep_floors(trusted.floors)
        for role, raw in trusted.kept.items():
            path = f"{CACHE}/{role}.object"
            self._storage.write(path, raw)
            self._storage.truncate(path, len(raw))
            self._storage.fsync(path)
        self._storage.fsync_dir(CACHE)


class SweptFirst(TrustStore):
    """Removes the old files before the new ones count."""

    def save(self, trusted: TrustedSet) -> None:
        self._sweep({hashlib.sha256(raw).hexdigest() for raw in trusted.kept.values()})
        super().save(trusted)


class SwitchedFirst(TrustStore):
    """Names the new files before they are there."""

    def save(self, trusted: TrustedSet) -> None:
        self._keep_floors(trusted.floors)
        roots = tuple(hashlib.sha256(raw).hexdigest() for raw in trusted.roots[1:])
        roles = {role: hashlib.sha256(raw).hexdigest() for role, raw in trusted.kept.items()}
        self._generation.write(msgspec.msgpack.encode(Generation(roots=roots, roles=roles)))
        super().save(trusted)


class TornTakenForWhole(TrustStore):
    """Believes that a file which stands there is the file."""

    def _put(self, raw: bytes, durable: set[str]) -> str:
        digest = hashlib.sha256(raw).hexdigest()
        if not self._storage.exists(self._path(digest)):
            return super()._put(raw, durable)
        return digest


@pytest.mark.parametrize(
    "bug",
    [NoFsync, NamesNotSynced, FloorsForgotten, FloorsLast, FloorsInOneCopy, SweptFirst, SwitchedFirst],
)
def test_the_exploration_catches_a_planted_bug(bug: type[TrustStore]) -> None:
    with pytest.raises(Violation) as caught:
        explore("everything", bug)
    print(f"{bug.__name__}: {caught.value}")


def test_the_exploration_catches_a_torn_file_taken_for_whole_by_the_second_refresh() -> None:
    with pytest.raises(Violation):
        explore("everything", TornTakenForWhole, twice=True)


def test_the_exploration_catches_files_written_over_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(store: TrustStore) -> Stored:
        names = {name.removesuffix(".object") for name in store._storage.listdir(CACHE)}
        roles = {name: store._storage.read(f"{CACHE}/{name}.object") for name in names}
        newest = store._floors.read()
        floors = msgspec.msgpack.decode(newest[1], type=Floors) if newest else Floors()
        return Stored((), roles, floors, True)

    monkeypatch.setattr(TrustStore, "load", load)
    monkeypatch.setattr(TrustStore, "save", InPlace.save)
    with pytest.raises(Violation, match="mixture"):
        explore("everything", InPlace)
