"""What the repository says of itself is of today."""

from __future__ import annotations

import importlib
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from tbox.cli.main import COMMANDS, cli

ROOT = Path(__file__).parents[2]


def test_the_readme_draws_the_tables_of_today() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "diagrams"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["tbox.edge.alarms", "tbox.uplink.session", "tbox.ota.boot"])
def test_a_diagram_shows_every_event_of_its_table(module: str) -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "diagrams"))
    table = dict(script["TABLES"])[module]
    drawn = script["diagram"](module, table)
    flat = script["arrows"](getattr(importlib.import_module(module), table))
    assert len(flat) > 5
    assert all(f"{source} --> {target}: " in drawn and event in drawn for source, event, target in flat)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_a_place_in_the_readme(name: str) -> None:
    done = CliRunner().invoke(cli, [name, "--help"])
    assert done.exit_code == 0 and "Usage" in done.output
    assert f"`tbox {name}" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "code"), [(["status", "--socket", "none"], 1), (["nonsense"], 2), (["sim"], 2)]
)
def test_the_exit_status_reaches_the_shell(arguments: list[str], code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tbox", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == code
    assert done.stderr.strip() and "Traceback" not in done.stderr
