"""`tbox run`, `tbox status`, `tbox tail`: start the daemon, ask it, follow it. Decides nothing."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import signal
import sys
from typing import Any

import click
import structlog

from tbox import config as configuration
from tbox import log as logging_setup
from tbox.control import request, stream
from tbox.ledger import Ledger

log = structlog.get_logger()

SUPERVISE_S = 0.25
# The pipeline must wake within milliseconds of a frame though another thread computes (PITFALLS: GIL).
SWITCH_INTERVAL_S = 0.001
DEFAULT_SOCKET = "/var/lib/tbox/control.sock"
HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

config_option = click.option(
    "--config", "config_path", default="tbox.toml", show_default=True, help="The daemon's configuration."
)
socket_option = click.option("--socket", default="", help="Control socket of the running daemon.")


@click.command()
@config_option
@click.option("--check", is_flag=True, help="Only say whether the configuration would do.")
def run(config_path: str, check: bool) -> None:
    """Run the daemon. SIGTERM drains and stops; SIGHUP takes the thresholds anew."""
    config = configuration.load(config_path)
    logging_setup.set_up(config.device.log_level, json=config.device.log_json)
    # All of the daemon is slow to load; a bad file is said before.
    from tbox.agent import Agent, build_stages

    if check:
        build_stages(config, Ledger())
        click.echo(json.dumps({"ok": True}))
        return
    faulthandler.enable()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    # Blocked in every thread and waited for in this one: no handler ever interrupts a line of code.
    signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
    agent = Agent(config)
    agent.start()
    healthy = _supervise(agent)
    agent.stop(config.device.drain_s if healthy else 0)
    if not healthy:
        raise SystemExit(1)


def _supervise(agent: Any) -> bool:
    """Return True when asked to stop, False when a part of the daemon died."""
    while agent.supervise():
        received = signal.sigtimedwait(HANDLED, SUPERVISE_S)
        if received is None:
            continue
        if received.si_signo == signal.SIGHUP:
            agent.reload()
        else:
            return True
    return False


def _socket(socket: str, config_path: str) -> str:
    if socket:
        return socket
    with contextlib.suppress(configuration.toml.TomlError):
        return configuration.load(config_path).control_socket
    return DEFAULT_SOCKET


@click.command()
@config_option
@socket_option
def status(config_path: str, socket: str) -> None:
    """Print a running daemon's state as JSON."""
    click.echo(json.dumps(request(_socket(socket, config_path), {"cmd": "status"}), indent=2))


@click.command()
@config_option
@socket_option
@click.option("--kind", help="Only records of this kind.")
def tail(config_path: str, socket: str, kind: str | None) -> None:
    """Follow a running daemon's records, one JSON object a line."""
    for record in stream(_socket(socket, config_path), {"cmd": "tail"}):
        if record and (kind is None or record.get("kind") == kind):
            click.echo(json.dumps(record))
