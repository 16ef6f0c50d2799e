"""`tbox demo`: drive the first ride, show it live, print the proof. Decides nothing; the judge does."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.live import Live

from tbox.bench.judge import holds, judge, judge_updates
from tbox.bench.ride import SECONDS_DEFAULT, SECONDS_MIN, Ride
from tbox.bench.update_ride import Chapter
from tbox.bench.view import Panels, proof_table
from tbox.errors import TboxError

DBC_DIRECTORY = Path(__file__).parents[2] / "dbc"
STORY_ONLY_WIDTH = 110


@click.command()
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True, help="Repeats a ride.")
@click.option(
    "--seconds", type=click.FloatRange(SECONDS_MIN, 3600), default=SECONDS_DEFAULT, show_default=True
)
@click.option("--embedded-broker", is_flag=True, help="Do not use mosquitto though it is there.")
@click.option("--keep", type=click.Path(path_type=Path), help="Leave logs, spool and configuration here.")
def demo(seed: int, seconds: float, embedded_broker: bool, keep: Path | None) -> None:
    """Drive a simulated vehicle through the whole T-Box; exit 0 only if the proof holds."""
    if not DBC_DIRECTORY.is_dir():
        raise TboxError("the demo runs from a checkout", where=str(DBC_DIRECTORY), mend="run scripts/demo")
    directory = keep or Path(tempfile.mkdtemp(prefix="tbox-demo-"))
    directory.mkdir(parents=True, exist_ok=True)
    console = Console()
    ride = Ride(directory.resolve(), DBC_DIRECTORY, seconds, seed, embedded_broker)
    updates = Chapter(directory.resolve() / "updates", DBC_DIRECTORY, embedded_broker=embedded_broker)
    panels = Panels(seconds)
    told = 0
    with closing(updates), Live(console=console, refresh_per_second=4, transient=True) as live:

        def watch(
            elapsed_s: float, status: dict[str, Any], link_up: bool, story: list[tuple[float, str]]
        ) -> None:
            nonlocal told
            story += [(elapsed_s, f"beside it, updates: {sentence}") for sentence in updates.news()]
            if console.is_terminal:
                live.update(panels.render(elapsed_s, status, link_up, story))
            else:
                for at_s, text in story[told:]:
                    console.print(f"{at_s:5.0f} s  {text}")
            told = len(story)

        evidence = ride.run(watch)
        chapter = updates.finish()
    claims = judge(evidence) + judge_updates(chapter)
    console.print(proof_table(claims))
    if not holds(claims):
        console.print(f"[bold red]The proof does not hold.[/] Everything is left in {directory}")
        raise click.exceptions.Exit(1)
    if keep is None:
        shutil.rmtree(directory)
