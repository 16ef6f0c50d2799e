"""The tamper-evident log of updates: every decision as a signed entry that names the hash of the one before.

Append-only. A tail torn by a power cut is cut off and told of; a tail that was taken away shows, because the
newest entry is also noted apart. Nothing is decided here and nothing is forgotten but the oldest segment.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, NamedTuple

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from msgspec import Meta

from tbox.durable import RangedStorage, TwoCopies
from tbox.errors import TboxError
from tbox.model import Now

LINE_BYTES_MAX = 16 * 1024
SEGMENT_BYTES_MAX = 1 << 20
SEGMENTS_MAX = 16  # some tens of thousands of entries; the oldest goes, and the next entry says so
PROBLEMS_MAX = 20
HEAD_STEM = "audit-head"
KEY_NAME = "audit.key"
DOMAIN = b"tbox-audit-1\0"  # so that a signature made here is good for nothing else

Hash = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
NOTHING_BEFORE = "0" * 64


class AuditError(TboxError):
    """The log cannot be read or written."""


class Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One decision. before: hash of the entry before. wall_ns is None when the clock was not believed.

    rxswin: the software identification that ran when the entry was made (UN R156).
    """

    number: Annotated[int, Meta(ge=1)]
    before: Hash
    start: int
    mono_ns: int
    wall_ns: int | None
    rxswin: str
    event: str
    body: dict[str, Any]


class _Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    entry: msgspec.Raw
    signature: Annotated[str, Meta(pattern=r"^[0-9a-f]{128}\Z")]


class Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The newest entry, noted apart from the log."""

    number: int
    hash: Hash
    segment: int


class Parsed(NamedTuple):
    entry: Entry
    hash: str


def encode_line(entry: Entry, key: Ed25519PrivateKey) -> tuple[bytes, str]:
    """Return (the line with its end, the entry's hash)."""
    raw = msgspec.json.encode(entry, order="deterministic")
    signature = key.sign(DOMAIN + raw).hex()
    line = msgspec.json.encode(_Line(msgspec.Raw(raw), signature)) + b"\n"
    return line, hashlib.sha256(raw).hexdigest()


def parse_line(line: bytes) -> tuple[Parsed, bytes, bytes]:
    """Return the entry with its hash, its raw bytes and its signature. Raises ValueError."""
    found = msgspec.json.decode(line, type=_Line)
    raw = bytes(found.entry)
    entry = msgspec.json.decode(raw, type=Entry)
    return Parsed(entry, hashlib.sha256(raw).hexdigest()), raw, bytes.fromhex(found.signature)


# --- verifying -----------------------------------------------------------------------------------------


class Report(NamedTuple):
    """What an examination found. first, last: numbers of the entries; problems: bounded, in order."""

    entries: int
    first: int
    last: int
    last_hash: str
    problems: list[str]

    @property
    def whole(self) -> bool:
        return not self.problems and self.entries > 0


def verify(lines: Iterable[bytes], public: Ed25519PublicKey) -> Report:
    """Check every signature and link. What a log without problems cannot show is a tail taken away: compare
    `last_hash` with the newest one the device has published."""
    problems: list[str] = []
    before: Parsed | None = None
    first = count = 0
    for position, line in enumerate(lines, 1):
        problem, parsed = _examine(line, before, public)
        if problem and len(problems) < PROBLEMS_MAX:
            problems.append(f"line {position}: {problem}")
        if parsed is None:
            continue
        count += 1
        first = first or parsed.entry.number
        before = parsed
    last, last_hash = (before.entry.number, before.hash) if before else (0, NOTHING_BEFORE)
    return Report(count, first, last, last_hash, problems)


def _examine(line: bytes, before: Parsed | None, public: Ed25519PublicKey) -> tuple[str, Parsed | None]:
    try:
        parsed, raw, signature = parse_line(line)
    except (ValueError, RecursionError) as error:
        return f"is no entry: {str(error)[:100]}", None
    try:
        public.verify(signature, DOMAIN + raw)
    except InvalidSignature:
        return f"entry {parsed.entry.number} is not signed by this key", parsed
    if before is None:
        if parsed.entry.number == 1 and parsed.entry.before != NOTHING_BEFORE:
            return "entry 1 names an entry before it", parsed
        return "", parsed
    if parsed.entry.number != before.entry.number + 1:
        return f"entry {parsed.entry.number} follows {before.entry.number}", parsed
    if parsed.entry.before != before.hash:
        return f"entry {parsed.entry.number} does not continue the one before", parsed
    return "", parsed


def open_key(storage: RangedStorage, path: str) -> Ed25519PrivateKey:
    """Return the device's own key for its log, made at the first call. Raises AuditError, OSError."""
    if not storage.exists(path):
        key = Ed25519PrivateKey.generate()
        storage.write(path, key.private_bytes_raw())
        storage.fsync(path)
        storage.fsync_dir(path.rpartition("/")[0])
        return key
    try:
        return Ed25519PrivateKey.from_private_bytes(storage.read(path))
    except ValueError:
        raise AuditError("not a key", where=path, mend="restore it, or remove it for a new log") from None


# --- the log on a device -------------------------------------------------------------------------------


class AuditLog:
    """The log in `directory`, which must exist. Used by one thread.

    recovered: what was found wrong when it was opened, "" if nothing; it is also the first new entry.
    """

    def __init__(
        self, storage: RangedStorage, directory: str, key: Ed25519PrivateKey, now: Now, start: int
    ) -> None:
        self._storage, self._dir, self._key, self._start = storage, directory, key, start
        self._head = TwoCopies(storage, directory, HEAD_STEM)
        self._segment, self._size = 1, 0
        self._number, self._hash = 0, NOTHING_BEFORE
        self.recovered = self._open()
        if self.recovered:
            self.append(now, "audit-recovered", {"what": self.recovered})

    def append(self, now: Now, event: str, body: dict[str, Any], rxswin: str = "") -> Entry:
        """Sign and write an entry, durable when this returns. Raises AuditError (too long), OSError."""
        entry = Entry(
            number=self._number + 1,
            before=self._hash,
            start=self._start,
            mono_ns=now.mono_ns,
            wall_ns=now.wall_ns,
            rxswin=rxswin,
            event=event,
            body=body,
        )
        line, digest = encode_line(entry, self._key)
        if len(line) > LINE_BYTES_MAX:
            raise AuditError(f"an entry of {len(line)} bytes", where=event, mend="say less")
        if self._size and self._size + len(line) > SEGMENT_BYTES_MAX:
            self._segment, self._size = self._segment + 1, 0
        path = self._path(self._segment)
        self._storage.write(path, line, self._size)
        self._storage.fsync(path)
        if not self._size:
            self._storage.fsync_dir(self._dir)
            self._drop_oldest()
        self._size += len(line)
        self._number, self._hash = entry.number, digest
        self._head.write(msgspec.msgpack.encode(Head(entry.number, digest, self._segment)))
        return entry

    @property
    def head(self) -> tuple[int, str]:
        """Number and hash of the newest entry; worth publishing, since that cannot be taken back."""
        return self._number, self._hash

    def public_key(self) -> str:
        return self._key.public_key().public_bytes_raw().hex()

    # --- opening ---------------------------------------------------------------------------------

    def _path(self, segment: int) -> str:
        return _segment_path(self._dir, segment)

    def _segments(self) -> list[int]:
        return _segments(self._storage, self._dir)

    def _open(self) -> str:
        """Find the newest entry and cut off what a power cut left after it; return what was wrong."""
        segments = self._segments()
        self._segment = segments[-1] if segments else 1
        torn = 0
        for segment in reversed(segments):
            raw = self._storage.read(self._path(segment))
            end = self._last_entry(raw)
            if segment == self._segment:
                torn, self._size = len(raw) - end, end
            if end:
                break
        if torn:
            self._storage.truncate(self._path(self._segment), self._size)
            self._storage.fsync(self._path(self._segment))
        noted = self._noted()
        said = [f"cut off {torn} bytes after entry {self._number}"] if torn else []
        if noted is not None and noted.number > self._number:
            said.append(f"entries {self._number + 1} to {noted.number} are gone")
            # Going on from what is left would look whole: the gap stays visible in the numbers.
            self._number, self._hash = noted.number, noted.hash
        elif noted is not None and noted.number == self._number and noted.hash != self._hash:
            said.append(f"entry {self._number} is another than the one noted")
        return ", ".join(said)

    def _last_entry(self, raw: bytes) -> int:
        """Take the last whole entry of a segment; return where it ends, 0 when there is none."""
        end = raw.rfind(b"\n") + 1
        while end:
            begin = raw.rfind(b"\n", 0, end - 1) + 1
            try:
                parsed, _, _ = parse_line(raw[begin:end])
            except ValueError:
                end = begin
                continue
            self._number, self._hash = parsed.entry.number, parsed.hash
            return end
        return 0

    def _noted(self) -> Head | None:
        newest = self._head.read()
        try:
            return msgspec.msgpack.decode(newest[1], type=Head) if newest else None
        except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError):
            return None

    def _drop_oldest(self) -> None:
        for segment in self._segments()[:-SEGMENTS_MAX]:
            self._storage.unlink(self._path(segment))


def _segment_path(directory: str, segment: int) -> str:
    return f"{directory}/audit.{segment:06d}.jsonl"


def _segments(storage: RangedStorage, directory: str) -> list[int]:
    names = (name.split(".") for name in storage.listdir(directory))
    return sorted(
        int(parts[1]) for parts in names if len(parts) == 3 and parts[0] == "audit" and parts[1].isdigit()
    )


# --- export --------------------------------------------------------------------------------------------


class ExportHeader(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The first line of an exported log."""

    format: Annotated[int, Meta(ge=1, le=1)] = 1
    public_key: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]


def export(storage: RangedStorage, directory: str) -> Iterator[bytes]:
    """Yield the lines of a file that `verify_export` takes, from a device's directory. Raises AuditError."""
    if not storage.exists(f"{directory}/{KEY_NAME}"):
        raise AuditError("no log here", where=directory, mend="name the directory with audit.key")
    public_key = open_key(storage, f"{directory}/{KEY_NAME}").public_key().public_bytes_raw().hex()
    yield msgspec.json.encode(ExportHeader(public_key=public_key)) + b"\n"
    for segment in _segments(storage, directory):
        yield storage.read(_segment_path(directory, segment))


def verify_export(raw: bytes, public_key: str = "") -> Report:
    """Examine an exported log. public_key: the device's, hex; without it the file's own is taken, which
    proves only that the log is of one piece. Raises AuditError when it is no such file."""
    head, _, rest = raw.partition(b"\n")
    try:
        header = msgspec.json.decode(head, type=ExportHeader)
        public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key or header.public_key))
    except ValueError as error:
        raise AuditError(f"not an exported log, or not a key: {error}") from None
    return verify(rest.splitlines(), public)
