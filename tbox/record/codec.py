"""Turns a draft into a record, once, and a payload back into plain values. Never looks at what a body means.

A payload is one MessagePack map, zstd-compressed when that is smaller (it then begins with zstd's magic):

    v      1
    id     start << 32 | counter
    kind, level
    mono   monotonic ns of the start the record belongs to
    wall   Unix time in ns at `mono`, nil while the clock was unset
    q      quality of the wall clock: 0 unset, 1 rtc, 2 ntp, 3 gnss
    body   map; what it holds depends on the kind

`body["series"]` is a list of tables, one per set of sampling times:

    t      times in ms after `mono`: the first, then the differences
    c      columns, value = raw * s + o:
           n   name; or [prefix, first, count, suffix, width] for `count` numbered columns in one
           s, o scale and offset
           d   raw integers as differences along time. In a numbered block the columns follow each other
               and the first value of each is the difference to the first value of the one before it
           p   presence bitmap, most significant bit first, nil when every time has a value;
               `d` then holds the present values only
"""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, TypeVar, cast

import msgspec
import numpy as np
import numpy.typing as npt
import zstandard

from tbox.errors import TboxError
from tbox.model import (
    COUNTER_MAX,
    RECORD_PAYLOAD_BYTES_MAX,
    Column,
    Draft,
    Now,
    Record,
    Series,
    record_id,
)

PAYLOAD_VERSION = 1
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
ZSTD_LEVEL = 3  # DESIGN, facts: 0.57 bytes a sample; higher levels cost more than they save on 2-8 KiB
ZSTD_WINDOW_BYTES_MAX = 8 * 1024 * 1024
EXPANDED_BYTES_MAX = 4 * 1024 * 1024  # 64 x the largest payload: more is a bomb, not a record
BLOCK_COLUMNS_MAX = 4096
NESTING_MAX = 32  # maps and lists inside each other; what is deeper overruns the stack of whoever walks it
NAME_WIDTH_MAX = 9
NAME_CHARS_MAX = 256
SERIES_VALUES_MAX = 1 << 20  # all columns of one record, absent values included

_T = TypeVar("_T")
NAMES_REMEMBERED = 4096
_NUMBERED = re.compile(r"(.*?)(\d{1,9})(\D*)", re.DOTALL)


class PayloadError(TboxError):
    """These bytes are not a payload this version can read."""


class PayloadTooLargeError(TboxError):
    """The record would exceed one MQTT message of RECORD_PAYLOAD_BYTES_MAX; its id was not used up."""


class Privacy(Protocol):
    """What the minter asks of privacy.PrivacyFilter."""

    def scrub(self, draft: Draft) -> Draft:
        """Return the draft as it may leave the vehicle."""
        ...


# --- minting ------------------------------------------------------------------------------------------


class Minter:
    """Gives drafts their ids (start << 32 | 1, 2, 3 …) and encodes them once.

    An id is used up only when encoding succeeded, so a failure never leaves a gap. guard: a lock when
    several threads mint (threading.Lock()), nullcontext() when one does.
    """

    def __init__(
        self,
        start: int,
        vehicle: str,
        privacy: Privacy | None = None,
        *,
        guard: AbstractContextManager[Any],
    ) -> None:
        self.start = start
        self.vehicle = vehicle
        self._privacy = privacy
        self._guard = guard
        self._counter = 0
        self._compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL)

    @property
    def last_id(self) -> int | None:
        """The id given last, None before the first."""
        return record_id(self.start, self._counter) if self._counter else None

    def mint(self, draft: Draft, now: Now) -> Record:
        """Return the record of a draft.

        Raises PayloadTooLargeError when it does not fit one message.
        """
        with self._guard:
            if self._counter >= COUNTER_MAX:
                raise PayloadError("this start has used up its ids", mend="restart the daemon")
            if self._privacy is not None:
                draft = self._privacy.scrub(draft)
            number = record_id(self.start, self._counter + 1)
            payload = self._encode(number, draft, now)
            self._counter += 1
        return Record(number, draft.kind, int(draft.level), payload)

    def _encode(self, number: int, draft: Draft, now: Now) -> bytes:
        body = draft.body
        if "series" in body:
            body = {**body, "series": _pack_all(body["series"])}
        wall = None if now.wall_ns is None else now.wall_ns - (now.mono_ns - draft.mono_ns)
        plain = msgspec.msgpack.encode(
            {
                "v": PAYLOAD_VERSION,
                "id": number,
                "kind": draft.kind,
                "level": int(draft.level),
                "mono": draft.mono_ns,
                "wall": wall,
                "q": int(now.quality),
                "body": body,
            },
            enc_hook=_plain,
        )
        packed = self._compressor.compress(plain)
        payload = min(packed, plain, key=len)
        if len(payload) > RECORD_PAYLOAD_BYTES_MAX or len(plain) > EXPANDED_BYTES_MAX:
            raise PayloadTooLargeError(
                f"a {draft.kind} record of {len(payload)} bytes ({len(plain)} unpacked) exceeds one message",
                mend=f"split it: at most {RECORD_PAYLOAD_BYTES_MAX} bytes ({EXPANDED_BYTES_MAX} unpacked)",
            )
        return payload


def _plain(value: object) -> object:
    """Turn numpy's scalars and arrays into what MessagePack knows."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"a record cannot hold a {type(value).__name__}")


# --- columns ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _BlockKey:
    prefix: str
    suffix: str
    width: int
    scale: float
    offset: float


def _pack_all(tables: list[Series]) -> list[dict[str, Any]]:
    values = sum(len(series.t_ms) * len(series.columns) for series in tables)
    values += sum(block.raw.size for series in tables for block in series.blocks)
    if values > SERIES_VALUES_MAX:
        raise PayloadTooLargeError(
            f"{values} values in one record", mend=f"split it: at most {SERIES_VALUES_MAX}"
        )
    return [pack_series(series) for series in tables]


def pack_series(series: Series) -> dict[str, Any]:
    """Return a Series as the map described at the top of this file."""
    numbered: dict[_BlockKey, list[tuple[int, Column]]] = {}
    single: list[Column] = []
    for column in series.columns:
        short = len(column.name) <= NAME_CHARS_MAX
        numberable = short and column.present is None and len(series.t_ms) > 0
        parts = _numbered(column.name) if numberable else None
        if parts is None:
            single.append(column)
            continue
        prefix, digits, suffix = parts
        width = len(digits) if digits[0] == "0" and len(digits) > 1 else 0
        key = _BlockKey(prefix, suffix, width, column.scale, column.offset)
        numbered.setdefault(key, []).append((int(digits), column))
    packed = [_pack_single(column) for column in single]
    for key, members in numbered.items():
        packed += _pack_numbered(key, members)
    for block in series.blocks:
        for begin in range(0, len(block.raw), BLOCK_COLUMNS_MAX):
            key = _BlockKey(block.prefix, block.suffix, 0, block.scale, block.offset)
            packed.append(_pack_block(key, block.first + begin, block.raw[begin : begin + BLOCK_COLUMNS_MAX]))
    return {"t": _deltas(series.t_ms), "c": packed}


@lru_cache(NAMES_REMEMBERED)
def _numbered(name: str) -> tuple[str, str, str] | None:
    """Return what stands before, in and behind a name's number; the same names come every second."""
    match = _NUMBERED.fullmatch(name)
    return (match[1], match[2], match[3]) if match else None


def _pack_numbered(key: _BlockKey, members: list[tuple[int, Column]]) -> list[dict[str, Any]]:
    """Cut the members into runs of consecutive numbers; a run of one is a plain column."""
    members = sorted(members, key=lambda member: member[0])
    packed: list[dict[str, Any]] = []
    begin = 0
    for end in range(1, len(members) + 1):
        full = end - begin == BLOCK_COLUMNS_MAX
        if end < len(members) and members[end][0] == members[end - 1][0] + 1 and not full:
            continue
        run = [column for _, column in members[begin:end]]
        if len(run) > 1:
            packed.append(_pack_block(key, members[begin][0], np.stack([column.raw for column in run])))
        else:
            packed.append(_pack_single(run[0]))
        begin = end
    return packed


def _pack_block(key: _BlockKey, first: int, raw: npt.NDArray[np.int64]) -> dict[str, Any]:
    delta = raw.astype(np.int64)
    delta[:, 1:] -= raw[:, :-1]
    if raw.shape[1]:
        delta[1:, 0] -= raw[:-1, 0]
    name = [key.prefix, first, len(raw), key.suffix, key.width]
    return {"n": name, "s": key.scale, "o": key.offset, "d": delta.ravel().tolist()}


def _pack_single(column: Column) -> dict[str, Any]:
    packed: dict[str, Any] = {"n": column.name, "s": column.scale, "o": column.offset}
    if column.present is None:
        packed["d"] = _deltas(column.raw)
    else:
        packed["d"] = _deltas(column.raw[column.present])
        packed["p"] = np.packbits(column.present).tobytes()
    return packed


def _deltas(raw: npt.NDArray[np.int64]) -> list[int]:
    delta = raw.astype(np.int64)  # np.diff takes ten times as long for a few values
    delta[1:] -= raw[:-1]
    return cast(list[int], delta.tolist())


class _PackedColumn(msgspec.Struct):
    n: str | tuple[str, int, int, str, int]
    s: float
    o: float
    d: list[int]
    p: bytes | None = None


class _PackedSeries(msgspec.Struct):
    t: list[int]
    c: list[_PackedColumn]


def unpack_series(packed: object) -> Series:
    """The inverse of `pack_series`; raw is 0 where a value is absent. Numbered columns come after the others.

    Raises PayloadError.
    """
    return _unpack(_convert(packed, _PackedSeries))


def _convert(packed: object, shape: type[_T]) -> _T:
    try:
        return msgspec.convert(packed, shape)
    except (msgspec.ValidationError, RecursionError) as error:
        raise PayloadError(f"damaged series: {error}") from error


def _unpack(table: _PackedSeries) -> Series:
    try:
        t_ms = _cumulate(table.t)
        columns = [column for entry in table.c for column in _unpack_column(entry, len(t_ms))]
    except OverflowError as error:  # an integer beyond 64 bit
        raise PayloadError(f"damaged series: {error}") from error
    return Series(t_ms, tuple(columns))


def _unpack_column(entry: _PackedColumn, length: int) -> list[Column]:
    raw = _cumulate(entry.d)
    if isinstance(entry.n, tuple):
        return _unpack_block(entry.n, entry, length)
    if entry.p is None:
        if len(raw) != length:
            raise PayloadError(f"damaged series: column {entry.n!r} has {len(raw)} of {length} values")
        return [Column(entry.n, entry.s, entry.o, raw)]
    if len(entry.p) != (length + 7) // 8:
        raise PayloadError(f"damaged series: the bitmap of column {entry.n!r} does not fit {length} values")
    present = np.unpackbits(np.frombuffer(entry.p, np.uint8), count=length).astype(np.bool_)
    if int(present.sum()) != len(raw):
        raise PayloadError(f"damaged series: column {entry.n!r} has {len(raw)} of {present.sum()} values")
    full = np.zeros(length, np.int64)
    full[present] = raw
    return [Column(entry.n, entry.s, entry.o, full, present)]


def _unpack_block(name: tuple[str, int, int, str, int], entry: _PackedColumn, length: int) -> list[Column]:
    prefix, first, count, suffix, width = name
    named = len(prefix) + len(suffix) <= NAME_CHARS_MAX and 0 <= width <= NAME_WIDTH_MAX and first >= 0
    fits = 0 < count <= BLOCK_COLUMNS_MAX and count * length == len(entry.d) > 0
    if not (named and fits and entry.p is None):
        raise PayloadError(f"damaged series: block {prefix[:80]!r} does not fit {length} values")
    delta = np.array(entry.d, np.int64).reshape(count, length)
    delta[:, 0] = np.cumsum(delta[:, 0])
    raw = np.cumsum(delta, axis=1)
    return [Column(f"{prefix}{first + i:0{width}d}{suffix}", entry.s, entry.o, raw[i]) for i in range(count)]


def _cumulate(deltas: list[int]) -> npt.NDArray[np.int64]:
    return np.cumsum(np.array(deltas, np.int64))


# --- reading ------------------------------------------------------------------------------------------


class _Envelope(msgspec.Struct):
    v: int
    id: int
    kind: str
    level: int
    mono: int
    wall: int | None
    q: int
    body: dict[str, Any]


def _no_extension(code: int, _: memoryview) -> object:
    raise PayloadError(f"unknown MessagePack extension {code}")


_DECODER = msgspec.msgpack.Decoder(_Envelope, ext_hook=_no_extension)


def decode_payload(payload: bytes, *, expand: bool = False) -> dict[str, Any]:
    """Return {"v", "id", "kind", "level", "mono", "wall", "q", "body"}; nothing in `payload` is believed.

    expand: body["series"] becomes [{"t_ms": [...], "signals": {name: [value or None, ...]}}, ...], values
    rounded to a thousandth of their scale. Raises PayloadError; never allocates more than a small multiple
    of EXPANDED_BYTES_MAX.
    """
    if len(payload) > RECORD_PAYLOAD_BYTES_MAX:
        raise PayloadError(f"{len(payload)} bytes are more than a payload's {RECORD_PAYLOAD_BYTES_MAX}")
    plain = _decompress(payload) if payload.startswith(ZSTD_MAGIC) else payload
    try:
        envelope = _DECODER.decode(plain)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, ValueError) as error:
        raise PayloadError(f"not a record's payload: {error}") from error
    if envelope.v != PAYLOAD_VERSION:
        raise PayloadError(f"payload version {envelope.v} is unknown", mend="use a newer tbox")
    _check_nesting(envelope.body)
    record = msgspec.structs.asdict(envelope)
    if expand and "series" in envelope.body:
        record["body"] = {**envelope.body, "series": _expand_all(envelope.body["series"])}
    return record


def _check_nesting(body: dict[str, Any]) -> None:
    layer: list[Any] = [body]
    for _ in range(NESTING_MAX):
        inner = [item for one in layer for item in (one.values() if isinstance(one, dict) else one)]
        layer = [item for item in inner if isinstance(item, dict | list | tuple)]
        if not layer:
            return
    raise PayloadError(f"the body is nested deeper than {NESTING_MAX}")


def _decompress(payload: bytes) -> bytes:
    try:
        size = zstandard.get_frame_parameters(payload).content_size
        if size == zstandard.CONTENTSIZE_UNKNOWN:
            raise PayloadError("the compressed payload does not tell its size")
        if size > EXPANDED_BYTES_MAX:
            raise PayloadError(f"the payload would expand to {size} bytes, above {EXPANDED_BYTES_MAX}")
        decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES_MAX)
        return decompressor.decompress(payload, max_output_size=EXPANDED_BYTES_MAX, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise PayloadError(f"the compressed payload is damaged: {error}") from error


def _expand_all(packed: object) -> list[dict[str, Any]]:
    tables = _convert(packed, list[_PackedSeries])
    columns = [1 if isinstance(c.n, str) else max(c.n[2], 1) for table in tables for c in table.c]
    lengths = [len(table.t) for table in tables for _ in table.c]
    if sum(k * n for k, n in zip(columns, lengths, strict=True)) > SERIES_VALUES_MAX:
        raise PayloadError(f"the payload would expand to more than {SERIES_VALUES_MAX} values")
    return [_expand(_unpack(table)) for table in tables]


def _expand(series: Series) -> dict[str, Any]:
    signals: dict[str, list[float | None]] = {}
    for column in series.columns:
        with np.errstate(all="ignore"):  # a scale that overflows is the sender's; inf says so
            value = column.raw * column.scale + column.offset
        if column.scale and np.isfinite(column.scale):
            digits = int(np.clip(3 - np.floor(np.log10(abs(column.scale))), 0, 15))
            value = np.round(value, digits)
        values: list[float | None] = value.tolist()
        if column.present is not None:
            values = [v if here else None for v, here in zip(values, column.present.tolist(), strict=True)]
        signals[column.name] = values
    return {"t_ms": series.t_ms.tolist(), "signals": signals}
