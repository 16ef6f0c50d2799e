"""The `tbox` command: loads the subcommand asked for, turns expected errors into one line. No decisions."""

from __future__ import annotations

import importlib
import os
import sys

import click

from tbox import log
from tbox.errors import TboxError

# numpy's linear algebra is not used: its worker threads would only cost memory.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# name -> (module:attribute, one line of help). Modules are imported when their command runs, not before.
COMMANDS: dict[str, tuple[str, str]] = {
    "run": ("tbox.cli.run:run", "Run the daemon."),
    "status": ("tbox.cli.run:status", "Show a running daemon's state."),
    "tail": ("tbox.cli.run:tail", "Follow a running daemon's records."),
    "reset-alarms": ("tbox.cli.run:reset_alarms", "End a running daemon's alarms, latched ones too."),
    "sim": ("tbox.cli.sim:sim", "Put the simulated vehicle on a bus."),
    "replay": ("tbox.cli.replay:replay", "Play a recording on a bus."),
    "decode": ("tbox.cli.decode:decode", "Decode a recording to JSON lines."),
    "dbc": ("tbox.cli.dbc:dbc", "Check DBC files and map their signals to roles."),
    "verify": ("tbox.cli.verify:verify", "Prove from the receiver's side that nothing is missing."),
    "payload": ("tbox.cli.payload:payload", "Print a record's payload as JSON."),
    "spool": ("tbox.cli.spool:spool", "Look into a spool."),
    "capture": ("tbox.cli.capture:capture", "Export black-box captures."),
    "ota": ("tbox.cli.ota:ota", "Updates: device and publisher commands."),
    "boot": ("tbox.cli.boot:boot", "The boot loader of the simulator and supervisor on a Pi."),
    "demo": ("tbox.cli.demo:demo", "Drive a simulated vehicle through the whole T-Box and print a proof."),
}


class LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="tbox")
def cli() -> None:
    """The telematics control unit of an electric vehicle, and the bench that proves it."""


def main() -> None:
    """Run the command line. Exit 0: success; 1: the answer is no; 2: bad input. Never a traceback."""
    log.set_up("warning")  # standard output is for answers
    try:
        # Outside its standalone mode click returns the code of an Exit instead of raising it.
        sys.exit(cli.main(standalone_mode=False))
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except TboxError as error:
        click.echo(f"tbox: {error}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the reader has had enough; say nothing at exit
        sys.exit(0)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        click.echo(f"tbox: {where}{error.strerror or error}", err=True)
        sys.exit(2)
