"""`tbox decode`: a recording to JSON lines, frame by frame as cantools decodes it. It judges no value."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from typing import IO, Any

import click

from tbox.bus.recordings import DIALECTS, LoggedFrame, Recording
from tbox.decode.database import DbcFile, load_database
from tbox.decode.objects import ANY_CHANNEL, FrameObject, Objects
from tbox.errors import TboxError
from tbox.model import CAN_EFF_FLAG

FRAMES_AT_ONCE = 1024
DAMAGED_TOLD_MAX = 5


@click.command()
@click.argument("log", type=click.Path())
@click.option(
    "--dbc", "files", multiple=True, required=True, type=click.Path(), help="DBC file; may be repeated."
)
@click.option("--channel", type=int, help="Decode this channel of the recording only.")
@click.option("--out", required=True, type=click.Path(), help="File for one JSON object a line.")
@click.option("--choices", is_flag=True, help="Give enum values by name where the DBC names them.")
@click.option("--dialect", type=click.Choice(DIALECTS), help="Format of the recording, if it is not found.")
def decode(
    log: str, files: tuple[str, ...], channel: int | None, out: str, choices: bool, dialect: str | None
) -> None:
    """Decode the recording LOG with DBC files.

    Writes an object for each frame whose id is known; prints one JSON line of counts.
    """
    database = load_database([DbcFile(path, ANY_CHANNEL) for path in files], strict=False)
    for path, line, what in database.mends:
        click.echo(f"tbox: {path}:{line}: mended: {what}", err=True)
    if database.errors:
        raise database.errors[0]
    recording = Recording(log, dialect=dialect)
    objects = Objects(database, choices=choices)
    try:
        with open(out, "w", encoding="utf-8") as file:  # noqa: PTH123
            counts = _decode_all(recording, objects, channel, file)
    except OSError as error:
        raise TboxError(
            f"cannot be written: {error.strerror}", where=out, mend="name another file"
        ) from error
    _tell_damaged(recording)
    click.echo(json.dumps(counts))


def _decode_all(recording: Recording, objects: Objects, channel: int | None, file: IO[str]) -> dict[str, Any]:
    frames = 0
    others = {"remote": 0, "error_frame": 0}
    for part in _parts(recording, channel, others):
        frames += len(part)
        found = objects.decode([(frame.can_id, frame.data) for frame in part])
        for frame, one in zip(part, found, strict=True):
            if one is not None:
                file.write(json.dumps(_line(frame, one, channel), default=str) + "\n")
    causes = dict(objects.causes) | {name: n for name, n in others.items() if n}
    causes |= {f"damaged: {cause}": n for cause, n in recording.damaged_count.items()}
    counts = {name: objects.counts[name] for name in ("decoded", "unknown", "short", "malformed")}
    return {"frames": frames, **counts, "causes": causes}


def _parts(recording: Recording, channel: int | None, others: dict[str, int]) -> Iterator[list[LoggedFrame]]:
    """Yield the data frames in parts; remote and error frames carry no signals and are counted apart."""

    def wanted() -> Iterator[LoggedFrame]:
        for frame in recording:
            if channel is not None and frame.channel != channel:
                continue
            if frame.remote or frame.error:
                others["remote" if frame.remote else "error_frame"] += 1
            else:
                yield frame

    frames = wanted()
    while part := list(islice(frames, FRAMES_AT_ONCE)):
        yield part


def _line(frame: LoggedFrame, one: FrameObject, channel: int | None) -> dict[str, Any]:
    line: dict[str, Any] = {
        "n": frame.n,
        "t": frame.t_s,
        "id": frame.can_id & ~CAN_EFF_FLAG,
        "name": one.name,
    }
    if channel is None:
        line["channel"] = frame.channel
    if one.signals is None:
        line["error"] = one.error
    else:
        line["signals"] = one.signals
        if one.short:
            line["short"] = True
    return line


def _tell_damaged(recording: Recording) -> None:
    for number, cause in recording.damaged[:DAMAGED_TOLD_MAX]:
        click.echo(f"tbox: {recording.path}:{number}: skipped: {cause}", err=True)
    if (left := sum(recording.damaged_count.values()) - DAMAGED_TOLD_MAX) > 0:
        click.echo(f"tbox: {recording.path}: {left} more damaged lines skipped", err=True)
