"""scripts/vcan: the command's exit status and output are its own; what it cannot do it says in one line."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/vcan"
NO_CAN = 77


def vcan(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SCRIPT), *command], capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, **env},
    )  # fmt: skip


def test_without_a_command_it_says_how() -> None:
    done = vcan()
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1


def test_a_way_that_is_not_there_is_named_in_one_line() -> None:
    done = vcan("true", VCAN_ONLY="nowhere")
    assert (done.returncode, done.stdout) == (NO_CAN, "") and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_output_and_exit_status_are_the_commands(tmp_path: Path) -> None:
    script = 'echo "$1"; cat /sys/class/net/vcan0/mtu; exit 7'
    done = vcan("bash", "-c", script, "x", "a  'quoted' $word", VCAN_OUT=str(tmp_path))
    if done.returncode == NO_CAN:
        pytest.skip(done.stderr.strip())
    assert (done.returncode, done.stdout) == (7, "a  'quoted' $word\n72\n")


@pytest.mark.slow
def test_the_guest_keeps_only_what_it_is_told_to_and_can_load_dm_flakey(tmp_path: Path) -> None:
    script = f"modprobe dm-flakey && touch {tmp_path}/gone /mnt/out/kept"
    (tmp_path / "out").mkdir()
    done = vcan("bash", "-c", script, VCAN_ONLY="guest", VCAN_OUT=str(tmp_path / "out"))
    if done.returncode == NO_CAN:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/kept").exists() and not (tmp_path / "gone").exists()


@pytest.mark.slow
def test_a_command_that_never_ends_is_stopped() -> None:
    done = vcan("sleep", "1000", VCAN_ONLY="guest", VCAN_TIMEOUT_S="5")
    if done.returncode == NO_CAN:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 124 and "VCAN_TIMEOUT_S" in done.stderr
