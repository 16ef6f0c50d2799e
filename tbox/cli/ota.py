"""`tbox ota`: updates, as seen and steered by people. It parses, asks the running agent and prints."""

from __future__ import annotations

import functools
import importlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from tbox import control
from tbox.cli.boot import control_status
from tbox.cli.run import config_option, find_socket, socket_option
from tbox.durable import OsStorage
from tbox.errors import Refused
from tbox.ota.bootctl import BootCtl

POLL_S = 0.5
BUSY = ("checking", "downloading", "installing")
PUBLISHER_COMMANDS = ("audit", "keys", "publish", "rollout", "rotate", "serve", "sign")
Command = Callable[..., Any]


class OtaGroup(click.Group):
    """The device's commands, and the publisher's, which are imported when one of them runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *PUBLISHER_COMMANDS])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in PUBLISHER_COMMANDS:
            return super().get_command(ctx, cmd_name)
        found = getattr(importlib.import_module("tbox.cli.ota_publish"), cmd_name)
        assert isinstance(found, click.Command)
        return found


@click.group(cls=OtaGroup)
def ota() -> None:
    """Updates: device and publisher commands."""


def agent_option(command: Command) -> Command:
    """Give a command the options that lead to the running agent, as one argument `agent`."""

    @config_option
    @socket_option
    @functools.wraps(command)
    def found(*args: Any, config_path: str, socket: str, **options: Any) -> Any:
        return command(*args, agent=find_socket(socket, config_path), **options)

    return found


def ask(agent: str, what: str) -> dict[str, Any]:
    """Ask the running agent's update engine. Raises ControlError, Refused."""
    return control.request(agent, {"cmd": "ota", "do": what})


def say(status: dict[str, Any]) -> None:
    """Print the state in one line; below it why it is so, what is offered, and what else the device knows."""
    running = status.get("running", {})
    where = f" · slot {running.get('slot')} runs {running.get('version')}" if running else ""
    click.echo(f"{status['state']}{where}")
    if status.get("rxswin"):
        click.echo(f"software identification (RXSWIN): {status['rxswin']}")
    if status.get("reason"):
        click.echo(f"why: {status['reason']}")
    if status.get("offered"):
        click.echo(f"offered: {status['offered']['version']} {status['offered']['notes']}".rstrip())
    if status.get("trial_s") is not None:
        click.echo(f"on trial for {status['trial_s']:.0f} s, pauses left out")
    for name, slot in status.get("slots", {}).items():
        if name != running.get("slot") and slot["version"]:
            click.echo(f"slot {name} holds {slot['version']}, {slot['state']}")
    for image in status.get("failed", [])[-1:]:
        click.echo(f"given up: {image['version']}, {image['reason']}")


@ota.command()
@agent_option
@click.option(
    "--dir", "directory", type=click.Path(path_type=Path), help="Read boot control here, without an agent."
)
@click.option("--json", "as_json", is_flag=True, help="Print all of it as JSON.")
def status(agent: str, directory: Path | None, as_json: bool) -> None:
    """Show what runs, what is under way and what holds it."""
    if directory is not None:
        click.echo(json.dumps(control_status(BootCtl(OsStorage(), str(directory)).read()), indent=2))
        return
    found = ask(agent, "status")
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    say(found)


@ota.command()
@agent_option
def check(agent: str) -> None:
    """Look for an update now. Exit 1 when there is none."""
    say(look(agent))


@ota.command()
@agent_option
def install(agent: str) -> None:
    """Approve the offered update, looked for if need be, and follow it until it waits for the switch or
    restarts the agent."""
    found = ask(agent, "status")
    offered = (found if found.get("offered") else look(agent))["offered"]
    click.echo(f"approved: {offered['version']} {offered['notes']}".rstrip())
    ask(agent, "install")
    say(follow(agent))


@ota.command()
@agent_option
def confirm(agent: str) -> None:
    """End the trial of a new image in its favour."""
    say(ask(agent, "confirm"))


@ota.command()
@agent_option
def rollback(agent: str) -> None:
    """End the trial of a new image against it; the previous one starts at once."""
    say(ask(agent, "rollback"))


def look(agent: str) -> dict[str, Any]:
    """Have the agent look for an update; return the status with the offer. Raises Refused without one."""
    ask(agent, "check")
    found = follow(agent, until_offered=True)
    if not found.get("offered"):
        why = found.get("reason") or f"the engine is {found['state']}"
        raise Refused(f"no update is offered: {why}")
    return found


def follow(agent: str, *, until_offered: bool = False) -> dict[str, Any]:
    """Show the progress of the work under way until none is; return the status then.

    An agent that answers no more has gone to start the new image.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task("", total=None)
        while True:
            time.sleep(POLL_S)
            try:
                found = ask(agent, "status")
            except control.ControlError:
                return {"state": "restarting", "reason": "the new image runs next: see `tbox ota status`"}
            progress = found.get("progress", {})
            bars.update(
                bar,
                description=found["state"],
                completed=progress.get("done_bytes", 0),
                total=progress.get("total_bytes") or None,
            )
            if found["state"] not in BUSY or (until_offered and found.get("offered")):
                return found
