"""`tbox dbc`: checks DBC files and proposes what their signals mean. It changes no file."""

from __future__ import annotations

import sys

import click

from tbox.decode.database import DbcError, DbcFile, lint, load_database, parse_file
from tbox.decode.propose import propose
from tbox.decode.roles import RoleMap


@click.group()
def dbc() -> None:
    """Check DBC files and map their signals to roles."""


@dbc.command(name="lint")
@click.argument("files", nargs=-1, required=True, type=click.Path())
@click.option("--strict", is_flag=True, help="Mend nothing.")
def lint_command(files: tuple[str, ...], strict: bool) -> None:
    """Say whether FILES load, what is wrong in them, where, and what was mended.

    Exit 1 when a file does not load.
    """
    failed = 0
    for path in files:
        try:
            parsed = parse_file(path, strict=strict)
        except DbcError as error:
            failed += 1
            click.echo(f"{error}")
            continue
        for line, what in lint(parsed):
            click.echo(f"{path}:{line}: {what}")
        messages = parsed.database.messages
        signals = sum(len(message.signals) for message in messages)
        mended = f", {len(parsed.mends)} places mended" if parsed.mends else ""
        click.echo(f"{path}: loads: {len(messages)} messages, {signals} signals{mended}")
    sys.exit(1 if failed else 0)


@dbc.command(name="map")
@click.argument("file", type=click.Path())
@click.option(
    "--mapping", "mappings", multiple=True, type=click.Path(), help="Mapping file that is in force."
)
def map_command(file: str, mappings: tuple[str, ...]) -> None:
    """Show what is mapped in FILE and propose a mapping for the rest, as a mapping file."""
    database = load_database([DbcFile(file)])
    click.echo(propose(database, RoleMap.load(mappings)), nl=False)
