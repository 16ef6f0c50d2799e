"""The file format of received messages: JSON lines, for `tbox verify --save` and `--capture`. No IO here.

One object a line: {"t": Unix ns of reception, "topic": str, "payload": base64, "retained": bool}. A line
that is not whole (a torn tail, a damaged sector) is counted and skipped.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import msgspec

# base64 of 64 KiB, a topic and the rest; a longer line cannot be ours.
LINE_BYTES_MAX = 128 * 1024


class Received(NamedTuple):
    """One message as it came. t_ns: Unix ns; mono_ns: the receiver's monotonic ns, 0 from a file."""

    topic: str
    payload: bytes
    t_ns: int
    mono_ns: int = 0
    retained: bool = False


class _Line(msgspec.Struct):
    t: int
    topic: str
    payload: str
    retained: bool = False


def to_line(message: Received) -> bytes:
    """Return the line of a message, with its newline."""
    text = base64.b64encode(message.payload).decode()
    return msgspec.json.encode(_Line(message.t_ns, message.topic, text, message.retained)) + b"\n"


class CaptureReader:
    """Iterates over the messages of a capture; `torn` counts the lines that could not be read."""

    def __init__(self, lines: Iterable[bytes]) -> None:
        self._lines = lines
        self.torn = 0

    def __iter__(self) -> Iterator[Received]:
        for line in self._lines:
            if not line.strip():
                continue
            try:
                entry = msgspec.json.decode(line[:LINE_BYTES_MAX], type=_Line)
                payload = base64.b64decode(entry.payload, validate=True)
            except (msgspec.MsgspecError, binascii.Error, RecursionError, ValueError):
                self.torn += 1
                continue
            yield Received(entry.topic, payload, entry.t, retained=entry.retained)
