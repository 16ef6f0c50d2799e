"""`tbox replay`: plays a recording on a bus, at its own pace or any other. It decodes nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import can
import click
import msgspec

from tbox.bus.local import LocalBus
from tbox.bus.python_can import open_bus
from tbox.bus.recordings import DIALECTS, LoggedFrame, Recording, message_of_logged
from tbox.bus.spec import BusError, parse_bus_url
from tbox.errors import TboxError

SPEED_MIN = 0.001
LOOPS_MAX = 1_000_000  # a replay ends, whatever it was told
SEND_WAIT_S = 5.0  # a bus that takes nothing for this long ends the replay
LISTENER_WAIT_S = 5.0  # the reader may be started at the same time
RETRY_S = 0.002
PROGRESS_S = 1.0


class Pace:
    """When a frame is due: times as logged, divided by the speed; None: at once. A core."""

    def __init__(self, speed: float | None, start_s: float) -> None:
        self._speed = speed
        self._start_s = start_s
        self._first_s: float | None = None
        self._due_s = start_s

    def due_s(self, logged_s: float | None) -> float:
        """Return the time a frame is due; one without time, or with an earlier one, follows at once."""
        if self._speed is None or logged_s is None:
            return self._due_s
        if self._first_s is None:
            self._first_s = logged_s
        self._due_s = max(self._due_s, self._start_s + (logged_s - self._first_s) / self._speed)
        return self._due_s


class Played(msgspec.Struct):
    """The line on stdout."""

    frames: int = 0
    skipped: int = 0  # error and remote frames, which nobody can send for another
    damaged: int = 0
    loops: int = 0
    seconds: float = 0.0


def parse_speed(_context: click.Context, _parameter: click.Parameter, text: str) -> float | None:
    if text == "max":
        return None
    try:
        speed = float(text)
    except ValueError:
        speed = 0.0
    if not SPEED_MIN <= speed < float("inf"):
        raise click.BadParameter(f"a number from {SPEED_MIN} on, or max")
    return speed


@click.command()
@click.argument("log", type=click.Path())
@click.option("--bus", "url", required=True, help="INTERFACE:CHANNEL, e.g. socketcan:vcan0 or tbox:/tmp/bus.")
@click.option("--speed", default="1", callback=parse_speed, help="Factor on the recorded pace, or max.")
@click.option("--channel", type=int, help="Play this channel of the recording only.")
@click.option("--loop", "loops", default=1, type=click.IntRange(1, LOOPS_MAX), help="Play it so many times.")
@click.option("--dialect", type=click.Choice(DIALECTS), help="Format of the recording, if it is not found.")
def replay(
    log: str, url: str, speed: float | None, channel: int | None, loops: int, dialect: str | None
) -> None:
    """Play the recording LOG on a bus.

    Prints one JSON line when done: frames written, frames skipped, damaged lines.
    """
    recording = Recording(log, dialect=dialect)
    spec = parse_bus_url(url)
    # A replay never reads: on the local bus nobody should wait for it to.
    bus = open_bus(spec, **({"receive": False} if spec.interface == "tbox" else {}))
    if isinstance(bus, LocalBus) and not bus.wait_for_listener(LISTENER_WAIT_S):
        click.echo(f"replay: nobody is on {spec.name}; playing to nobody", err=True)
    played = Played()
    begin_s = time.monotonic()
    try:
        for _ in range(loops):
            play(recording, bus, speed, channel, played)
            played.loops += 1
            if not played.frames:
                raise _nothing_to_play(recording, channel)
    finally:
        bus.shutdown()
        played.seconds = round(time.monotonic() - begin_s, 3)
        if played.frames:
            click.echo(msgspec.json.encode(played).decode())
    if recording.damaged:
        line, cause = recording.damaged[0]
        click.echo(f"replay: {played.damaged} damaged lines skipped, first line {line}: {cause}", err=True)


def play(
    recording: Recording, bus: can.BusABC, speed: float | None, channel: int | None, played: Played
) -> None:
    """Write each data frame of the recording when it is due."""
    pace = Pace(speed, time.monotonic())
    progress = _progress(played)
    for frame in recording:
        if channel is not None and frame.channel != channel:
            continue
        if frame.error or frame.remote:
            played.skipped += 1
            continue
        wait_s = pace.due_s(frame.t_s) - time.monotonic()
        if wait_s > 0:
            time.sleep(wait_s)
        send(bus, frame)
        played.frames += 1
        progress()
    played.damaged += sum(recording.damaged_count.values())


def send(bus: can.BusABC, frame: LoggedFrame) -> None:
    """Write one frame, waiting while the bus is full; BusError when it stays so."""
    message = message_of_logged(frame)
    until_s = time.monotonic() + SEND_WAIT_S
    while True:
        try:
            bus.send(message, timeout=SEND_WAIT_S)
            return
        except (can.CanError, OSError) as error:
            # ENOBUFS: the interface's queue is full; the kernel offers nothing to wait on.
            if "No buffer space" not in str(error) or time.monotonic() > until_s:
                raise BusError(
                    f"frame {frame.n} (line {frame.line}) was not taken: {error}",
                    where=str(bus.channel_info),
                    mend="is the bus up, and is CAN-FD enabled on it (mtu 72)?",
                ) from error
            time.sleep(RETRY_S)


def _progress(played: Played) -> Callable[[], None]:
    """Return a function that says on a terminal, once a second, how many frames were written."""
    if not sys.stderr.isatty():
        return lambda: None
    next_s = time.monotonic() + PROGRESS_S

    def tell() -> None:
        nonlocal next_s
        if time.monotonic() >= next_s:
            next_s += PROGRESS_S
            click.echo(f"replay: {played.frames} frames", err=True)

    return tell


def _nothing_to_play(recording: Recording, channel: int | None) -> TboxError:
    there = ", ".join(f"{number} ({name})" for number, name in sorted(recording.channels.items()))
    return TboxError(
        "no frame to play" if channel is None else f"no frame on channel {channel}",
        where=str(recording.path),
        mend=f"channels are {there}" if there else "check the file",
    )
