"""`tbox run`, `status`, `tail`, `reset-alarms`: start the daemon, ask it, follow it. Decides nothing."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import os
import select
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import click

from tbox import config as configuration
from tbox import log as logging_setup
from tbox.control import request, stream
from tbox.ledger import Ledger
from tbox.toml import TomlError

if TYPE_CHECKING:
    from tbox.agent import Agent

SUPERVISE_S = 0.5
# The pipeline must wake within milliseconds of a frame though another thread computes (PITFALLS: GIL).
SWITCH_INTERVAL_S = 0.001
# glibc's malloc.h: what it keeps of freed memory, and from which size on an array is mapped by itself.
M_TRIM_THRESHOLD, HEAP_KEPT_BYTES = -1, 8 * 1024 * 1024
M_MMAP_THRESHOLD, MAPPED_BYTES_MIN = -3, 4 * 1024 * 1024
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
    _keep_heap()
    signals = _Signals()
    agent = Agent(config)
    agent.start()
    healthy = _supervise(agent, signals)
    agent.stop(config.device.drain_s if healthy else 0)
    if not healthy:
        raise SystemExit(1)
    if agent.restart_command is not None:
        _restart(agent.restart_command)


def _keep_heap() -> None:
    """Keep the memory of one step for the next: given back, it is faulted in anew, 3,500 times a second."""
    with contextlib.suppress(AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, HEAP_KEPT_BYTES)
        libc.mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES_MIN)


def _restart(command: list[str]) -> None:
    """Have the boot loader start us anew: by a command of its own, or by the exit code it waits for."""
    from tbox.ota.supervisor import RESTART_EXIT  # the boot loader's side; of no use before

    if command:
        subprocess.run(command, check=False)
    raise SystemExit(RESTART_EXIT)


class _Signals:
    """Signals as bytes in a pipe: nothing is done inside a handler, whichever thread the kernel picks."""

    def __init__(self) -> None:
        self._read_fd, write_fd = os.pipe()
        os.set_blocking(self._read_fd, False)
        os.set_blocking(write_fd, False)
        signal.set_wakeup_fd(write_fd)
        for number in HANDLED:
            signal.signal(number, lambda *_: None)

    def wait(self, timeout_s: float) -> bytes:
        """Return the numbers of the signals that came, b"" when none did in time."""
        ready, _, _ = select.select([self._read_fd], [], [], timeout_s)
        return os.read(self._read_fd, 64) if ready else b""


def _supervise(agent: Agent, signals: _Signals) -> bool:
    """Return True when asked to stop, False when a part of the daemon died."""
    while agent.supervise():
        if agent.restart_command is not None:
            return True
        came = signals.wait(SUPERVISE_S)
        if signal.SIGTERM in came or signal.SIGINT in came:
            return True
        if signal.SIGHUP in came:
            agent.reload()
    return False


def find_socket(socket: str, config_path: str) -> str:
    """Return where the agent's control socket is: as given, as configured, or the default."""
    if socket:
        return socket
    with contextlib.suppress(TomlError):
        return configuration.load(config_path).control_socket
    return DEFAULT_SOCKET


@click.command()
@config_option
@socket_option
def status(config_path: str, socket: str) -> None:
    """Print a running daemon's state as JSON."""
    click.echo(json.dumps(request(find_socket(socket, config_path), {"cmd": "status"}), indent=2))


@click.command()
@config_option
@socket_option
@click.option("--kind", help="Only records of this kind.")
def tail(config_path: str, socket: str, kind: str | None) -> None:
    """Follow a running daemon's records, one JSON object a line."""
    for record in stream(find_socket(socket, config_path), {"cmd": "tail"}):
        if record and (kind is None or record.get("kind") == kind):
            click.echo(json.dumps(record))


@click.command("reset-alarms")
@config_option
@socket_option
@click.argument("rule", required=False)
def reset_alarms(config_path: str, socket: str, rule: str | None) -> None:
    """End the standing alarms of a running daemon, of RULE or of all; latched ones end in no other way.

    What still holds is raised again. Exit 1 if none stands.
    """
    message = {"cmd": "reset-alarms", "rule": rule}
    click.echo(json.dumps(request(find_socket(socket, config_path), message)))
