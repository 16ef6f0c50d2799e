"""An image on trial leaves every file so that the release before opens it; and this one opens that one's.

`tests/releases/0.1.0.tar.xz` is a device as the first release left it, made by that release and never made
anew; `tests/releases/device.py` says how. Where the repository's history is at hand, the first release itself
is taken out of it and run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tbox.durable import OsStorage, TwoCopies
from tests import releases
from tests.releases import device

RELEASES = Path(releases.__file__).parent
FIRST, FIRST_COMMIT = "0.1.0", "21ab279"
ROLES = ["rollout", "root", "snapshot", "targets", "timestamp"]
UNTOUCHED = {
    "boots": ["b", "2.0"], "state": "pending-reboot", "failed": [["1.5", "crashed"]], "floor": 1,
    "attempts": [[1, True]], "approved": 1, "trusted": ROLES, "floors": {"timestamp": 2, "snapshot": 2},
    "timestamp": 2, "audit": [True, "", 4], "cohort_key": 32, "download": 1000, "soc_percent_min": 30,
    "start": {"start": 2, "before": [1, True], "gap": [1], "records": 8, "read": [*range(8)]},
}  # fmt: skip
GIVEN_UP = UNTOUCHED | {
    "boots": ["a", "1.0"], "state": "rolled-back", "audit": [True, "", 7],
    "failed": [["1.5", "crashed"], ["2.0", "rolled back by hand"]],
    "start": {"start": 3, "before": [2, True], "gap": [2], "records": 13, "read": [*range(8), *range(5)]},
}  # fmt: skip
# What is read strictly: a field that the release before does not know would make it lose the whole file.
STRICT = {
    "fw": ["bootctl"], "state/ota": ["audit-head"], "state/ota/floors": ["floors"],
    "state/ota/metadata": ["generation"], "state/ota/download": ["reached"],
}  # fmt: skip


@pytest.fixture
def left(tmp_path: Path) -> Path:
    """The device as the first release left it, a new image in slot b on trial."""
    with tarfile.open(RELEASES / f"{FIRST}.tar.xz") as tar:
        tar.extraction_filter = getattr(tarfile, "data_filter", None)  # Debian 12's Python has none
        tar.extractall(tmp_path / "device")
    return tmp_path / "device"


def plain(opened: dict[str, Any]) -> Any:
    return json.loads(json.dumps(opened))


def test_this_release_opens_every_file_of_the_first(left: Path) -> None:
    assert plain(device.open_all(left)) == UNTOUCHED


def test_after_a_trial_that_failed_every_file_opens(left: Path) -> None:
    device.trial(left)
    assert plain(device.open_all(left)) == GIVEN_UP


def test_an_image_on_trial_writes_no_field_that_the_first_release_would_refuse(left: Path) -> None:
    before = fields(left)
    device.trial(left)
    assert all(before.values())
    assert fields(left) == before


def fields(top: Path) -> dict[str, set[str]]:
    """Return the names of all fields in the strictly read files, and in the newest audit entry."""
    found = {}
    for directory, stems in STRICT.items():
        for stem in stems:
            newest = TwoCopies(OsStorage(), str(top / directory), stem).read()
            assert newest is not None, stem
            found[stem] = set(names(msgspec.msgpack.decode(newest[1])))
    *_, line = (top / "state/ota/audit.000001.jsonl").read_bytes().splitlines()
    entry = json.loads(line)
    del entry["entry"]["body"]  # free by its nature
    return found | {"audit": set(names(entry))}


def names(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [name for key, inner in value.items() for name in (str(key), *names(inner))]
    return [name for inner in value for name in names(inner)] if isinstance(value, list) else []


@pytest.fixture(scope="module")
def first_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first release's own code."""
    top, archive = tmp_path_factory.mktemp("first"), ["git", "archive", FIRST_COMMIT, "tbox"]
    try:
        done = subprocess.run(archive, cwd=RELEASES.parents[1], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip(f"the history of {FIRST} is not at hand (a shallow or exported copy)")
    subprocess.run(["tar", "-x", "-C", str(top)], input=done.stdout, check=True)
    return top


def test_the_first_release_itself_opens_every_file_after_a_trial_of_this_one(
    left: Path, first_release: Path
) -> None:
    device.trial(left)
    done = subprocess.run(
        [sys.executable, "-P", str(RELEASES / "device.py"), "open", str(left)],
        env=os.environ | {"PYTHONPATH": str(first_release)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == GIVEN_UP
