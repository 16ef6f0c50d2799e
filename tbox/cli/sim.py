"""`tbox sim`: puts the simulated vehicle on a bus. Parses, plays, prints one JSON line."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import click
import msgspec

from tbox.bus.reader import open_bus, parse_bus_url
from tbox.sim.faults import KINDS, parse_fault
from tbox.sim.player import Player
from tbox.sim.simulator import RATE_HZ_MAX, SimSettings, SimSettingsError, Simulator
from tbox.sim.vehicle import CYCLES

_FAULTS = "\n".join(
    ["\b", "Faults (NAME@START[ms|s|min|h][:key=value,...], every one takes duration=...):"]
    + [f"  {name}: {', '.join(kind.keys) or 'no keys'}" for name, kind in KINDS.items()]
)


@click.command(epilog=_FAULTS)
@click.option("--bus", required=True, help="INTERFACE:CHANNEL, such as socketcan:vcan0 or tbox:/tmp/bus.")
@click.option("--fault", "faults", multiple=True, metavar="NAME@START", help="A fault; may be repeated.")
@click.option("--speed", type=click.FloatRange(0.01, 1000), default=1.0, show_default=True,
              help="The vehicle's seconds per second.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True)
@click.option("--seconds", type=click.FloatRange(0), help="Of the vehicle's time; without it, until stopped.")
@click.option("--cycle", default="mixed", show_default=True,
              help=f"{', '.join(CYCLES)}, or a CSV file with columns cycSecs and cycMps.")  # fmt: skip
@click.option("--once", is_flag=True, help="Drive the cycle once and stay, instead of again and again.")
@click.option("--rate", type=click.FloatRange(1, RATE_HZ_MAX), help="All frames together, per second.")
@click.option("--cells-hz", type=float, default=10.0, show_default=True, help="Scans of all cells a second.")
@click.option("--mux", is_flag=True, help="Send tbox_bms_mux.dbc instead of tbox_bms.dbc.")
@click.option("--chemistry", type=click.Choice(["NMC", "LFP"], case_sensitive=False), default="NMC")
@click.option("--soc", type=float, default=78.0, show_default=True, help="State of charge at the start, %.")
def sim(
    bus: str, faults: tuple[str, ...], speed: float, seed: int, seconds: float | None, **more: Any
) -> None:
    """Put the simulated vehicle on a bus; print the frames written as one JSON line at the end."""
    simulator = Simulator(seed, _settings(more), [parse_fault(text) for text in faults])
    opened = open_bus(parse_bus_url(bus))
    try:
        player = Player(opened, simulator, speed=speed)
        with _stopped_by_signals(player):
            player.run(seconds)
        click.echo(json.dumps(player.report()))
    finally:
        opened.shutdown()


def _settings(options: dict[str, Any]) -> SimSettings:
    values = {
        "cycle": options["cycle"],
        "loop": not options["once"],
        "rate_hz": options["rate"],
        "cells_hz": options["cells_hz"],
        "frames": "mux" if options["mux"] else "plain",
        "chemistry": options["chemistry"],
        "soc_percent": options["soc"],
    }
    try:
        # Through msgspec, so that the options obey the bounds of the settings.
        return msgspec.convert(values, SimSettings)
    except msgspec.ValidationError as error:
        raise SimSettingsError(str(error), where="tbox sim", mend="see tbox sim --help") from error


@contextmanager
def _stopped_by_signals(player: Player) -> Iterator[None]:
    def stop(_number: int, _frame: FrameType | None) -> None:
        player.stop()

    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, stop) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
