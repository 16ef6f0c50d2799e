"""`tbox payload`: one payload, or each of a capture, as JSON for people."""

from __future__ import annotations

import datetime as dt
import json
import math
import sys
from pathlib import Path
from typing import Any

import click

from tbox.errors import Refused, TboxError
from tbox.model import COUNTER_BITS, COUNTER_MAX
from tbox.record.capture import CaptureReader
from tbox.record.codec import PayloadError, decode_payload

QUALITIES = ("unset", "rtc", "ntp", "gnss")


@click.command()
@click.argument("file", type=click.Path(allow_dash=True))
@click.option("--indent", is_flag=True, help="Over several lines.")
def payload(file: str, indent: bool) -> None:
    """Print a record's payload as JSON: one object a line.

    FILE holds one payload, or a capture saved by `tbox verify --save`; - is standard input. Exit 1 when a
    payload of a capture, or a line of it, cannot be read.
    """
    raw = _read(file)
    if not raw.startswith(b"{"):  # no payload begins with it: MessagePack maps do not
        try:
            record = decode_payload(raw, expand=True)
        except PayloadError as error:
            raise PayloadError(error.what, where=file) from error
        click.echo(as_text(record, indent))
        return
    reader = CaptureReader(raw.splitlines())
    bad = 0
    for message in reader:
        if message.topic.endswith("/state"):
            continue
        try:
            record = decode_payload(message.payload, expand=True)
        except PayloadError as error:
            bad += 1
            click.echo(f"tbox: {message.topic}: {error}", err=True)
            continue
        click.echo(as_text({"topic": message.topic, "received": _time(message.t_ns), **record}, indent))
    if bad or reader.torn:
        raise Refused(f"{bad} payloads and {reader.torn} lines cannot be read", where=file)


def _read(file: str) -> bytes:
    if file == "-":
        return sys.stdin.buffer.read()
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise TboxError(f"cannot read it: {error.strerror}", where=file) from error


def as_text(record: dict[str, Any], indent: bool) -> str:
    """Return a decoded payload as JSON for people, with its start, counter and time spelled out."""
    number, quality = record["id"], record["q"]
    readable = {
        **record,
        "start": number >> COUNTER_BITS,
        "counter": number & COUNTER_MAX,
        "time": _time(record["wall"]),
        "time_quality": QUALITIES[quality] if 0 <= quality < len(QUALITIES) else str(quality),
    }
    return json.dumps(plain(readable), ensure_ascii=False, indent=2 if indent else None)


def _time(wall_ns: int | None) -> str | None:
    """Return ISO 8601 in UTC; None while the clock was unset or where no calendar reaches."""
    if wall_ns is None:
        return None
    try:
        return dt.datetime.fromtimestamp(wall_ns / 1e9, dt.UTC).isoformat(timespec="milliseconds")
    except (ValueError, OverflowError, OSError):
        return None


def plain(value: Any) -> Any:
    """Return what JSON can say: bytes as hex, numbers that are none as null, every key as text."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | int | float):
        return value
    return str(value)
