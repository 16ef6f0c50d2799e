"""`tbox capture`: joins black-box parts into a recording for other tools. It asks no running agent."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np

from tbox.bus.recordings import LoggedFrame, write_recording
from tbox.edge.blackbox import CaptureDamaged, unpack_part
from tbox.errors import Refused, TboxError
from tbox.model import (
    CAN_EFF_FLAG,
    CAN_EFF_MASK,
    CAN_ERR_FLAG,
    CAN_RTR_FLAG,
    CANFD_BRS,
    CANFD_FDF,
    COUNTER_BITS,
    NS_PER_S,
    FrameBatch,
)
from tbox.record.capture import CaptureReader
from tbox.record.codec import PayloadError, decode_payload

DIALECT_BY_SUFFIX = {".log": "candump", ".asc": "asc", ".blf": "blf"}
MISSING_TOLD_MAX = 10


class Key(NamedTuple):
    """Which capture: the start it belongs to, and its number in that start."""

    start: int
    number: int

    def __str__(self) -> str:
        return f"{self.start}:{self.number}"


@dataclass
class Parts:
    """What was found of one capture. frames: part number -> its frames."""

    frames: dict[int, FrameBatch] = field(default_factory=dict)
    begin: dict[str, Any] | None = None
    end: dict[str, Any] | None = None
    damaged: list[str] = field(default_factory=list)
    wall_less_mono_ns: int | None = None  # one for the whole capture, so that distances stay exact

    def add(self, record: dict[str, Any]) -> None:
        """Take a capture record in; the same part twice (a redelivery) counts once."""
        body, wall_ns = record["body"], record["wall"]
        if self.wall_less_mono_ns is None and wall_ns is not None:
            self.wall_less_mono_ns = wall_ns - record["mono"]
        if body.get("event") == "begin":
            self.begin = body
        elif body.get("event") == "end" and isinstance(body.get("parts"), int):
            self.end = body
        elif body.get("event") == "frames":
            try:
                self.frames[int(body["part"])] = unpack_part(body)
            except (CaptureDamaged, KeyError, TypeError, ValueError) as error:
                self.damaged.append(str(error))

    def missing(self) -> list[str]:
        """Return what is not there, in words; without its end nobody knows how long the capture was."""
        found = set(self.frames) | ({0} if self.begin else set())
        lost = ["the beginning"] if self.begin is None else []
        last = max(found, default=0)
        if self.end is None:
            lost.append("the end")
        else:
            last = self.end["parts"] - 2
        return lost + [f"part {part}" for part in range(1, last + 1) if part not in found]


@click.group()
def capture() -> None:
    """Export black-box captures."""


@capture.command()
@click.argument(
    "files", nargs=-1, required=True, metavar="FILE...", type=click.Path(exists=True, path_type=Path)
)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="X.log (candump), X.asc or X.blf."
)
@click.option(
    "--capture", "wanted", multiple=True, metavar="START:NUMBER", help="Which, where there are several."
)
def export(files: tuple[Path, ...], out: Path, wanted: tuple[str, ...]) -> None:
    """Join the parts of a capture and write its frames as a recording.

    FILE is a payload, a folder of payloads, or messages saved as JSON lines (`tbox verify --save`). One line
    of JSON on stdout tells what was written. Exit 1 when parts are missing; the others are written.
    """
    dialect = _dialect(out)
    found = collect(files)
    chosen = choose(found, wanted)
    parts = [found[key] for key in chosen]
    written = write_recording(out, logged_frames(parts), dialect)
    missing = [f"{key}: {what}" for key in chosen for what in found[key].missing()]
    click.echo(json.dumps(_summary(chosen, parts, written, missing, out)))
    for part in parts:
        for damage in part.damaged:
            click.echo(f"tbox: {damage}", err=True)
    if missing:
        more = f" and {len(missing) - MISSING_TOLD_MAX} more" if len(missing) > MISSING_TOLD_MAX else ""
        raise Refused(f"incomplete, missing {', '.join(missing[:MISSING_TOLD_MAX])}{more}", where=str(out))


def _dialect(out: Path) -> str:
    suffixes = [suffix for suffix in out.suffixes if suffix != ".gz"]
    dialect = DIALECT_BY_SUFFIX.get(suffixes[-1] if suffixes else "")
    if dialect is None:
        raise TboxError(
            "unknown kind of recording", where=str(out), mend="end the name in .log, .asc or .blf"
        )
    return dialect


def collect(files: Iterable[Path]) -> dict[Key, Parts]:
    """Return all captures in the files, by start and number."""
    found: dict[Key, Parts] = {}
    for path in files:
        for inner in sorted(path.iterdir()) if path.is_dir() else [path]:
            for record in _records(inner):
                number = record["body"].get("capture") if record["kind"] == "capture" else None
                if isinstance(number, int):
                    found.setdefault(Key(record["id"] >> COUNTER_BITS, number), Parts()).add(record)
    if not found:
        raise TboxError("no capture in these files", where=", ".join(map(str, files)))
    return found


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a file: one payload, or saved messages."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise TboxError(f"cannot read: {error.strerror}", where=str(path)) from error
    if not raw.startswith(b"{"):
        try:
            yield decode_payload(raw)
        except PayloadError as error:
            raise TboxError(error.what, where=str(path), mend="leave this file out") from error
        return
    for message in CaptureReader(raw.splitlines()):
        if message.topic.endswith("/capture"):
            try:
                yield decode_payload(message.payload)
            except PayloadError as error:  # the part will be told as missing
                click.echo(f"tbox: {path}: {error}", err=True)


def choose(found: dict[Key, Parts], wanted: Sequence[str]) -> list[Key]:
    """Return the captures asked for, in order; all must share a start, as their times do."""
    names = {str(key): key for key in found}
    told = ", ".join(sorted(names))
    unknown = [name for name in wanted if name not in names]
    if unknown:
        raise TboxError(f"no capture {unknown[0]} here", mend=f"there are {told}")
    chosen = sorted(names[name] for name in set(wanted)) if wanted else sorted(found)
    if len(chosen) > 1 and not wanted:
        raise TboxError("more than one capture", mend=f"choose with --capture from {told}")
    if len({key.start for key in chosen}) > 1:
        raise TboxError("captures of different starts share no clock", mend="export them one by one")
    return chosen


def logged_frames(captures: Sequence[Parts]) -> Iterator[LoggedFrame]:
    """Yield the frames of all parts in order of time, with Unix time where the clock was set."""
    batches = [parts.frames[number] for parts in captures for number in sorted(parts.frames)]
    if not batches:
        return
    frames = np.concatenate([batch.frames for batch in batches])
    t_ns = np.concatenate([batch.t_ns for batch in batches])
    channels = np.concatenate([np.full(len(batch), batch.channel) for batch in batches])
    offset_ns = next((p.wall_less_mono_ns for p in captures if p.wall_less_mono_ns is not None), 0)
    counts: dict[int, int] = {}
    for line, i in enumerate(np.argsort(t_ns, kind="stable"), 1):
        channel, number, flags = int(channels[i]), int(frames["id"][i]), int(frames["flags"][i])
        counts[channel] = counts.get(channel, 0) + 1
        yield LoggedFrame(
            counts[channel], channel, (int(t_ns[i]) + offset_ns) / NS_PER_S,
            number & (CAN_EFF_FLAG | CAN_EFF_MASK), bool(flags & CANFD_FDF), bool(flags & CANFD_BRS),
            frames["data"][i, : int(frames["len"][i])].tobytes(),
            bool(number & CAN_RTR_FLAG), bool(number & CAN_ERR_FLAG), True, line,
        )  # fmt: skip


def _summary(
    keys: Sequence[Key], captures: Sequence[Parts], frames: int, missing: list[str], out: Path
) -> dict[str, Any]:
    return {
        "captures": [str(key) for key in keys],
        "frames": frames,
        "parts": sum(len(parts.frames) for parts in captures),
        "missing": missing,
        "triggers": [t for parts in captures if parts.end for t in parts.end.get("triggers", [])],
        "short": [reason for parts in captures if parts.end for reason in parts.end.get("short", [])],
        "out": str(out),
    }
