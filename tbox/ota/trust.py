"""The update client's trust: refreshes and keeps TUF metadata, finds targets, answers to the boot loader.

The decisions are those of `metadata.py` and `workflow.py`; this is the shell around them, over any source of
files and any storage. `python -m tbox.ota.trust` lets a stock TUF client-conformance suite drive exactly
this.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

from tuf.api.metadata import TargetFile

from tbox.clock import WALL_CEILING_NS, WALL_FLOOR_NS
from tbox.durable import OsStorage, Storage
from tbox.errors import Refused, TboxError
from tbox.model import NS_PER_S, Now
from tbox.ota import metadata, releases, workflow
from tbox.ota.fetch import Http
from tbox.ota.metadata import HASHES, TrustedSet
from tbox.ota.model import VerifiedTarget
from tbox.ota.truststore import TrustStore
from tbox.ota.workflow import Fetch, Found, Steps, drive

R = TypeVar("R")


def moment(now: Now) -> datetime:
    """Return the wall clock's time. Raises Refused when it is not known: then no age can be judged."""
    if now.wall_ns is None or not WALL_FLOOR_NS <= now.wall_ns < WALL_CEILING_NS:
        raise Refused(
            "the time is not known, so nobody can say whether the metadata has expired",
            mend="it is tried again when GNSS or NTP has set the clock",
        )
    return datetime.fromtimestamp(now.wall_ns / NS_PER_S, UTC)


class TrustClient:
    """The metadata of one repository. Used by one thread.

    root: the first root, embedded. The storage's directories must exist.
    """

    def __init__(
        self, root: bytes, storage: Storage, directory: str, floors_directory: str, fetch: Fetch
    ) -> None:
        self._root, self._fetch = root, fetch
        self._store = TrustStore(storage, directory, floors_directory)
        self.trusted = self._load()

    def _load(self) -> TrustedSet:
        stored = self._store.load()
        return TrustedSet(self._root, cached_roots=stored.roots, cached=stored.roles, floors=stored.floors)

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        """Keep what was verified, also when a later file is refused."""
        try:
            yield
        finally:
            self._store.save(self.trusted)

    def refresh(self, now: datetime) -> None:
        """Bring the top-level metadata up to date. Raises MetadataError, TboxError, OSError."""
        self.trusted = self._load()
        self.run(workflow.refresh(self.trusted, now))

    def run(self, steps: Steps[R]) -> R:
        """Run a workflow over what `refresh` brought, and keep what it verifies. Raises as that does."""
        with self._kept():
            return drive(steps, self._fetch)

    def find(self, path: str, now: datetime) -> Found | None:
        """Look up a target after `refresh`. Raises as that does."""
        return self.run(workflow.find_target(self.trusted, path, now))


def target_url_path(path: str, digest: str, *, consistent: bool) -> str:
    """Return where a target stands below the targets URL: under its digest in a consistent repository."""
    directory, slash, name = path.rpartition("/")
    return quote(f"{directory}{slash}{digest}.{name}" if consistent else path)


def verify_slot_manifest(manifest: bytes, root: bytes) -> VerifiedTarget:
    """Return the target that a slot's stored metadata proves; thresholds kept, expiry ignored.

    root: the first root, embedded. Raises Refused. For the boot loader, which knows no network and no time.
    """
    return releases.verify_manifest(manifest, root)


# --- the shell for a stock conformance suite -----------------------------------------------------------

FIRST_ROOT = "first-root"
CACHE_DIRECTORY, FLOORS_DIRECTORY = "cache", "floors"


def main(arguments: list[str] | None = None) -> int:
    """Carry out one command; 0 when it succeeded, 1 when not, and then one line on stderr says why."""
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
    except (TboxError, OSError, ValueError) as error:
        print(f"tbox.ota.trust: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tbox.ota.trust", description=__doc__)
    parser.add_argument("--metadata-dir", type=Path, required=True)
    parser.add_argument("--metadata-url", default="")
    parser.add_argument("--target-name", default="")
    parser.add_argument("--target-dir", type=Path)
    parser.add_argument("--target-base-url", default="")
    commands = parser.add_subparsers(required=True)
    init = commands.add_parser("init", help="trust this root and start without metadata")
    init.add_argument("root", type=Path)
    init.set_defaults(command=_init)
    commands.add_parser("refresh", help="update the metadata").set_defaults(command=_refresh)
    commands.add_parser("download", help="update, then fetch a target").set_defaults(command=_download)
    return parser


def _init(options: argparse.Namespace) -> None:
    root = options.root.read_bytes()
    trusted = TrustedSet(root)
    for name in (CACHE_DIRECTORY, FLOORS_DIRECTORY):
        (options.metadata_dir / name).mkdir(parents=True, exist_ok=True)
    OsStorage().fsync_dir(str(options.metadata_dir))
    (options.metadata_dir / FIRST_ROOT).write_bytes(root)
    if not (options.metadata_dir / "root.json").exists():
        _show(trusted, options.metadata_dir)


def _client(options: argparse.Namespace) -> TrustClient:
    if not options.metadata_url:
        raise Refused("which repository?", mend="say --metadata-url")
    directory = options.metadata_dir
    http, base = Http(), options.metadata_url.rstrip("/")
    return TrustClient(
        (directory / FIRST_ROOT).read_bytes(),
        OsStorage(),
        str(directory / CACHE_DIRECTORY),
        str(directory / FLOORS_DIRECTORY),
        lambda path, length_max: http.small(f"{base}/{path}", length_max),
    )


def _now() -> datetime:
    return moment(Now(0, int(time.time() * NS_PER_S)))


def _replace(path: Path, data: bytes) -> None:
    fresh = path.with_name(path.name + ".new")
    fresh.write_bytes(data)
    fresh.replace(path)


def _show(trusted: TrustedSet, directory: Path) -> None:
    """Lay what is trusted out as <role>.json for others to see; it is never read back."""
    for role, raw in trusted.kept.items():
        path = directory / f"{quote(role, safe='')}.json"
        if not path.exists() or path.read_bytes() != raw:
            _replace(path, raw)


def _refresh(options: argparse.Namespace) -> None:
    client = _client(options)
    try:
        client.refresh(_now())
    finally:
        _show(client.trusted, options.metadata_dir)


def _download(options: argparse.Namespace) -> None:
    if not options.target_name or options.target_dir is None or not options.target_base_url:
        raise Refused("which target?", mend="say --target-name, --target-dir and --target-base-url")
    name = quote(options.target_name, safe="")
    if name in (".", ".."):
        raise Refused("is no name for a file", where=options.target_name)
    client, now = _client(options), _now()
    try:
        client.refresh(now)
        found = client.find(options.target_name, now)
    finally:
        _show(client.trusted, options.metadata_dir)
    if found is None:
        raise Refused("no role has this target", where=options.target_name)
    path = options.target_dir / name
    if path.exists() and _is(found.file, path.read_bytes()):
        return
    consistent = client.trusted.root.signed.consistent_snapshot
    place = target_url_path(found.file.path, _digest(found.file), consistent=bool(consistent))
    url = f"{options.target_base_url.rstrip('/')}/{place}"
    data = Http().small(url, found.file.length)
    if data is None or not _is(found.file, data):
        raise Refused("what the server has is not the signed target", where=url)
    _replace(path, data)


def _is(file: TargetFile, data: bytes) -> bool:
    return metadata.matches(data, file.length, file.hashes)


def _digest(file: TargetFile) -> str:
    """Return the hash a target is served under. Raises Refused when it has none of a kind that counts."""
    found = next((file.hashes[name] for name in HASHES if name in file.hashes), None)
    if found is None:
        raise Refused("signed with no hash of a kind that counts", where=file.path)
    return found


if __name__ == "__main__":
    sys.exit(main())
