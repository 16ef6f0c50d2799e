"""`tbox spool` reads a stopped spool, asks the agent about a live one, says no when something is wrong."""

from __future__ import annotations

import base64
import json
import random
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import sqlite_utils
from click.testing import CliRunner

from tbox.cli.spool import spool as command
from tbox.control import ControlServer
from tbox.errors import Refused
from tbox.ledger import Ledger
from tbox.model import Draft, Level, Now, Record
from tbox.spool.flash import PAGE_BYTES
from tbox.spool.lock import SpoolError
from tbox.spool.seal import SpoolKeyError
from tbox.spool.store import Spool
from tests.crash.workload import Minter, settings


@pytest.fixture
def stopped(tmp_path: Path) -> tuple[Path, list[Record]]:
    minter = Minter(1, random.Random(1))
    spool = Spool.open(str(tmp_path), settings(), start=1, mint=minter, now=Now(0), ledger=Ledger())
    for tick in range(3):  # three runs of ten
        spool.append([minter(Draft("telemetry", Level.INFO, 0, {"fill": 50})) for _ in range(10)])
        spool.tick(Now(tick))
    spool.append([minter(Draft("alarm", Level.ALARM, 0, {}))])
    spool.tick(Now(1))
    spool.close(Now(2), clean=True, ledger_totals={})
    return tmp_path, minter.minted


def _run(*args: str) -> str:
    result = CliRunner().invoke(command, args, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_stat_counts_what_a_stopped_spool_holds(stopped: tuple[Path, list[Record]]) -> None:
    said = json.loads(_run("stat", str(stopped[0])))
    assert (said["records"], said["alarm"]["records"], said["routine"]["records"]) == (31, 1, 30)
    assert said["starts"] == [{"start": 1, "clean": True, "last_id": stopped[1][-1].id}]


def test_export_gives_back_every_payload_in_order_and_tail_the_newest(
    stopped: tuple[Path, list[Record]],
) -> None:
    directory, made = stopped
    lines = [json.loads(line) for line in _run("export", str(directory)).splitlines()]
    assert [(line["id"], base64.b64decode(line["payload"])) for line in lines] == [
        (r.id, r.payload) for r in made
    ]
    assert [json.loads(line) for line in _run("tail", str(directory), "-n", "3").splitlines()] == lines[-3:]


def test_verify_is_content_with_a_whole_spool_and_says_no_to_a_changed_run(
    stopped: tuple[Path, list[Record]],
) -> None:
    directory, _ = stopped
    assert json.loads(_run("verify", str(directory)))["unreadable"] == 0
    with sqlite3.connect(directory / "spool.db") as db:
        db.execute("UPDATE routine SET level = 2 WHERE id = (SELECT min(id) FROM routine)")
    db.close()
    with pytest.raises(Refused, match="10 records do not unseal"):
        _run("verify", str(directory))


@pytest.mark.parametrize("table", ["alarm", "partly"])
def test_verify_says_no_to_a_damaged_page(stopped: tuple[Path, list[Record]], table: str) -> None:
    path = stopped[0] / "spool.db"
    with closing(sqlite3.connect(path)) as db:
        (root,) = db.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (table,)).fetchone()
    content = bytearray(path.read_bytes())
    content[(root - 1) * PAGE_BYTES : root * PAGE_BYTES] = bytes(PAGE_BYTES)
    path.write_bytes(content)
    with pytest.raises(Refused, match=r"faults in the file|cannot read the spool"):
        _run("verify", str(stopped[0]))


def test_salvage_reads_around_a_damaged_page(stopped: tuple[Path, list[Record]], tmp_path: Path) -> None:
    directory, made = stopped
    path = directory / "spool.db"
    content = bytearray(path.read_bytes())
    content[-1024:] = bytes(1024)
    path.write_bytes(content)
    lines = _run("salvage", str(directory)).splitlines()
    found = {json.loads(line)["id"] for line in lines if "id" in json.loads(line)}
    assert found <= {record.id for record in made} and len(found) >= 20


@pytest.mark.parametrize("name", ["stat", "tail", "verify", "salvage", "export"])
def test_where_there_is_no_spool_and_with_another_key_every_command_says_so(
    stopped: tuple[Path, list[Record]], tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    with pytest.raises(SpoolError, match="there is no spool here"):
        _run(name, str(tmp_path_factory.mktemp("empty")))
    (stopped[0] / "device.key").write_bytes(bytes(32))
    with pytest.raises(SpoolKeyError, match="not the one of this spool"):
        _run(name, str(stopped[0]))


def test_salvage_counts_what_it_cannot_unseal(stopped: tuple[Path, list[Record]]) -> None:
    with closing(sqlite3.connect(stopped[0] / "spool.db")) as db:
        db.execute("UPDATE routine SET level = 2 WHERE id = (SELECT min(id) FROM routine)")
        db.commit()
    result = CliRunner().invoke(command, ["salvage", str(stopped[0])], catch_exceptions=False)
    assert json.loads(result.stderr) == {"records": 21, "spoiled": 10, "gaps": 0}
    assert len(result.stdout.splitlines()) == 21


def test_a_missing_key_is_one_line_with_the_mend(stopped: tuple[Path, list[Record]]) -> None:
    (stopped[0] / "device.key").unlink()
    with pytest.raises(SpoolKeyError, match="put the device key back"):
        _run("stat", str(stopped[0]))


def test_a_live_spool_is_asked_for_through_the_control_socket(tmp_path: Path) -> None:
    minter = Minter(1, random.Random(1))
    directory = tmp_path / "spool"
    spool = Spool.open(str(directory), settings(), start=1, mint=minter, now=Now(0), ledger=Ledger())
    server = ControlServer(str(tmp_path / "control.sock"), {"spool-stat": lambda _message: spool.stat()})
    server.start()
    try:
        assert json.loads(_run("stat", str(directory)))["state"] == "flash"
    finally:
        server.close()
        spool.close(Now(1), clean=True, ledger_totals={})


def test_sqlite_utils_shows_a_stopped_spool_to_a_person(stopped: tuple[Path, list[Record]]) -> None:
    db = sqlite_utils.Database(stopped[0] / "spool.db")
    rows = list(db["runs"].rows)
    assert (
        [row["records"] for row in rows] == [10, 10, 10, 1]
        and rows[-1]["kind"] == "alarm"
        and rows[0]["kind"] == "telemetry"
    )
    db.close()


@pytest.mark.slow
def test_the_command_is_reached_through_tbox(stopped: tuple[Path, list[Record]]) -> None:
    main = "from tbox.cli.main import main; main()"
    run = subprocess.run(
        [sys.executable, "-c", main, "spool", "stat", str(stopped[0])],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0 and json.loads(run.stdout)["records"] == 31, run.stderr
